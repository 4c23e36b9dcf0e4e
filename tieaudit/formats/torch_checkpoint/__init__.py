"""PyTorch checkpoints: `torch.save` of state dicts, trainers' checkpoints and modules, and TorchScript archives.

Read and written without PyTorch and without executing anything from the file. Source: torch/serialization.py, 2.13.
"""

from __future__ import annotations

from tieaudit.formats import Format, later

torch_checkpoint = Format(
    name="torch_checkpoint",
    summary="PyTorch checkpoints (.pt, .pth, .bin, .ckpt, TorchScript), read and written without PyTorch",
    targets=("torch",),
    owns=later("tieaudit.formats.torch_checkpoint.discover:owns"),
    group=later("tieaudit.formats.torch_checkpoint.discover:group"),
    load=later("tieaudit.formats.torch_checkpoint.read:load"),
    load_key=later("tieaudit.formats.torch_checkpoint.read:load"),
    can_realise=later("tieaudit.formats.torch_checkpoint.write:can_realise"),
    can_create=later("tieaudit.formats.torch_checkpoint.create:can_create"),
    create=later("tieaudit.formats.torch_checkpoint.create:create"),
    edit=later("tieaudit.formats.torch_checkpoint.write:edit"),
    pool=lambda model, id, n_groups: (
        "a checkpoint says nowhere how many heads there are, and whoever loads it builds a module of the old shapes: "
        "pool the Hugging Face folder, where config.json says it, or the ONNX model"
    ),
    equalises=True,
    held_by=lambda model: "whoever loads the files gets a tensor of its own for each of these names",
    notes=later("tieaudit.formats.torch_checkpoint.optimizer:notes"),
    has_program=False,
)
