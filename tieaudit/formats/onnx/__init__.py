"""The ONNX format: one file, or several that are parts of one export.

Importing this package loads neither onnx nor numpy; everything happens inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.formats import Format

if TYPE_CHECKING:
    from tieaudit.change import Edit, Plan, Pool, Written
    from tieaudit.model import Model


# The wrappers carry an underscore because a submodule `edit` becomes an attribute of this package when it is imported.
def _owns(path: Path) -> bool:
    from tieaudit.formats.onnx.discover import owns

    return owns(path)


def _group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    from tieaudit.formats.onnx.discover import group

    return group(paths)


def _load(path: Path, files: tuple[Path, ...]) -> Model:
    from tieaudit.formats.onnx.read import load

    return load(path, files)


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    from tieaudit.formats.onnx.edit import can_realise

    return can_realise(model, edit, target)


def _edit(model: Model, plan: Plan, dest: Path) -> Written:
    from tieaudit.formats.onnx.edit import edit

    return edit(model, plan, dest)


def _pool(model: Model, id: str, n_groups: int) -> Pool | str:
    from tieaudit.formats.onnx.pool import plan_of

    return plan_of(model, id, n_groups)


FORMAT = Format(
    name="onnx",
    summary="ONNX files: inline and external data, subgraphs, Constant nodes, several parts of one export.",
    targets=("ort-cpu", "ort-cuda"),
    owns=_owns,
    group=_group,
    load=_load,
    can_realise=_can_realise,
    edit=_edit,
    pool=_pool,
    holds_adjustments=True,
)
