"""safetensors without a config.json beside it: a lone file, or shards with their index. Not rewritten as it is.

Such a file has no class that would restore a dropped tensor, so no tie can be made in it; one that a checkpoint or a
module already has is carried over as `safetensors.torch.save_model` does (`create.py`).
Source of the format: https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.formats import Format

if TYPE_CHECKING:
    from tieaudit.change import Edit, Kind, Plan, Written
    from tieaudit.model import Model


def _owns(path: Path) -> bool:
    from tieaudit.formats.safetensors.discover import owns

    return owns(path)


def _group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    from tieaudit.formats.safetensors.discover import group

    return group(paths)


def _load(path: Path, files: tuple[Path, ...]) -> Model:
    from tieaudit.formats.safetensors.weights import load

    return load(path, files)


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    return (
        "a safetensors file without a config.json has no class that would restore a dropped tensor; "
        "give the folder with its config.json instead"
    )


def _can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    from tieaudit.formats.safetensors.create import can_create

    return can_create(model, edit)


def _create(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.safetensors.create import create

    return create(model, plan, dest)


safetensors = Format(
    name="safetensors",
    summary="safetensors files, alone or sharded with an index (ties are carried over, never made: no class restores)",
    targets=("safetensors",),
    owns=_owns,
    group=_group,
    load=_load,
    can_realise=_can_realise,
    can_create=_can_create,
    create=_create,
    has_program=False,
)
