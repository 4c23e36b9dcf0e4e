"""PyTorch checkpoints: `torch.save` of state dicts, trainers' checkpoints and modules, and TorchScript archives.

Read and written without PyTorch and without executing anything from the file. Source: torch/serialization.py, 2.13.
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
    from tieaudit.formats.torch_checkpoint.discover import owns

    return owns(path)


def _group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    from tieaudit.formats.torch_checkpoint.discover import group

    return group(paths)


def _load(path: Path, files: tuple[Path, ...]) -> Model:
    from tieaudit.formats.torch_checkpoint.read import load

    return load(path, files)


def _load_key(path: Path, files: tuple[Path, ...], key: str) -> Model:
    from tieaudit.formats.torch_checkpoint.read import load

    return load(path, files, key)


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    from tieaudit.formats.torch_checkpoint.write import can_realise

    return can_realise(model, edit, target)


def _edit(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.torch_checkpoint.write import edit

    return edit(model, plan, dest)


def _can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    from tieaudit.formats.torch_checkpoint.create import can_create

    return can_create(model, edit)


def _create(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.torch_checkpoint.create import create

    return create(model, plan, dest)


def _notes(model: Model, edits: Sequence[Edit], adjust: bool) -> tuple[str, ...]:
    from tieaudit.formats.torch_checkpoint.optimizer import notes

    return notes(model, edits, adjust)


torch_checkpoint = Format(
    name="torch_checkpoint",
    summary="PyTorch checkpoints (.pt, .pth, .bin, .ckpt, TorchScript), read and written without PyTorch",
    targets=("torch",),
    owns=_owns,
    group=_group,
    load=_load,
    load_key=_load_key,
    can_realise=_can_realise,
    can_create=_can_create,
    create=_create,
    edit=_edit,
    notes=_notes,
    has_program=False,
)
