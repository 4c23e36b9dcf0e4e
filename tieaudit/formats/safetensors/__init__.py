"""safetensors without a config.json beside it: a lone file, or shards with their index. Not rewritten as it is.

Such a file has no class that would restore a dropped tensor, so no tie can be made in it; one that a checkpoint or a
module already has is carried over as `safetensors.torch.save_model` does (`create.py`).
Source of the format: https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieaudit.formats import Format, later

if TYPE_CHECKING:
    from tieaudit.change import Edit
    from tieaudit.model import Model


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    return (
        "a safetensors file without a config.json has no class that would restore a dropped tensor; "
        "give the folder with its config.json instead"
    )


safetensors = Format(
    name="safetensors",
    summary="safetensors files, alone or sharded with an index (ties are carried over, never made: no class restores)",
    targets=("safetensors",),
    owns=later("tieaudit.formats.safetensors.discover:owns"),
    group=later("tieaudit.formats.safetensors.discover:group"),
    load=later("tieaudit.formats.safetensors.weights:load"),
    can_realise=_can_realise,
    can_create=later("tieaudit.formats.safetensors.create:can_create"),
    create=later("tieaudit.formats.safetensors.create:create"),
    has_program=False,
)
