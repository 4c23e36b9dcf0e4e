"""Exported PyTorch programs: archives of `torch.export.save` (.pt2), read and rewritten without PyTorch.

Nothing in such an archive is unpickled, evaluated or loaded. Source: torch/export/pt2_archive, version 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.formats import Format

if TYPE_CHECKING:
    from tieaudit.change import Edit, Plan, Written
    from tieaudit.model import Model


def _owns(path: Path) -> bool:
    from tieaudit.formats.torch_export.discover import owns

    return owns(path)


def _group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    from tieaudit.formats.torch_export.discover import group

    return group(paths)


def _load(path: Path, files: tuple[Path, ...]) -> Model:
    from tieaudit.formats.torch_export.read import load

    return load(path, files)


def _load_key(path: Path, files: tuple[Path, ...], key: str) -> Model:
    from tieaudit.formats.torch_export.read import load

    return load(path, files, key)


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    from tieaudit.formats.torch_export.realise import can_realise

    return can_realise(model, edit, target)


def _edit(model: Model, plan: Plan, folder: Path) -> Written:
    from tieaudit.formats.torch_export.write import edit

    return edit(model, plan, folder)


torch_export = Format(
    name="torch_export",
    summary="exported PyTorch programs (.pt2), read and rewritten without PyTorch",
    targets=("torch",),
    owns=_owns,
    group=_group,
    load=_load,
    load_key=_load_key,
    can_realise=_can_realise,
    edit=_edit,
    precedence=5,
)
