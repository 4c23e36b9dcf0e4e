"""safetensors without a config.json beside it: a lone file, or shards with their index.

Such a file has no class that would restore a dropped tensor, so a scheme can only give names one value (`equal.py`); a
tie that a checkpoint or a module already has is carried over as `safetensors.torch.save_model` does (`create.py`).
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
    from tieaudit.formats.safetensors.equal import can_realise

    return can_realise(model, edit)


def _edit(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.safetensors.equal import edit

    return edit(model, plan, dest)


def _held_by(model: Model) -> str:
    from tieaudit.formats.safetensors.equal import HELD_BY

    return HELD_BY


def _can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    from tieaudit.formats.safetensors.create import can_create

    return can_create(model, edit)


def _create(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.safetensors.create import create

    return create(model, plan, dest)


safetensors = Format(
    name="safetensors",
    summary="safetensors files, alone or sharded with an index (a tie becomes equal values: no class restores it)",
    targets=("safetensors",),
    owns=_owns,
    group=_group,
    load=_load,
    can_realise=_can_realise,
    edit=_edit,
    equalises=True,
    held_by=_held_by,
    can_create=_can_create,
    create=_create,
    has_program=False,
)
