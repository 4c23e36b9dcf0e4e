"""PyTorch checkpoints: `torch.save` of state dicts, trainers' checkpoints and modules, and TorchScript archives.

Read without PyTorch and without executing anything from the file. Source: torch/serialization.py, version 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieaudit.formats import Format, later

if TYPE_CHECKING:
    from tieaudit.change import Edit
    from tieaudit.model import Model


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    return (
        "tieaudit reads PyTorch checkpoints and does not write them yet: tie the modules and save again with "
        "torch.save, which stores tensors that share memory once"
    )


torch_checkpoint = Format(
    name="torch_checkpoint",
    summary="PyTorch checkpoints (.pt, .pth, .bin, .ckpt, TorchScript), read without PyTorch (read only)",
    targets=("torch",),
    owns=later("tieaudit.formats.torch_checkpoint.discover:owns"),
    group=later("tieaudit.formats.torch_checkpoint.discover:group"),
    load=later("tieaudit.formats.torch_checkpoint.read:load"),
    load_key=later("tieaudit.formats.torch_checkpoint.read:load"),
    can_realise=_can_realise,
)
