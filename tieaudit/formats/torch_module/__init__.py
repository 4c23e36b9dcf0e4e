"""Live PyTorch modules: `package.module:factory` on the command line, any `nn.Module` in Python.

Naming a factory means running it: the user's own code is imported, in a child process, and nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.change import Edit, Plan, Share, Unshare, Written
from tieaudit.errors import RewriteRefused
from tieaudit.formats import Format
from tieaudit.view import AS_STORED

if TYPE_CHECKING:
    from tieaudit.model import Model

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def _named(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    return [(path, ()) for path in paths]


def _load(path: Path, files: tuple[Path, ...]) -> Model:
    from tieaudit.formats.torch_module.factory import load

    return load(str(path))


def _load_inputs(path: Path, files: tuple[Path, ...], inputs: Path) -> Model:
    from tieaudit.formats.torch_module.factory import load

    return load(str(path), inputs)


def _can_realise(model: Model, edit: Edit, target: str) -> str | None:
    """Two names can be one `Parameter`, as they are or, behind a parametrization, transposed."""
    if isinstance(edit, Unshare):
        return None
    if not isinstance(edit, Share):
        return "a live module has no file to set this in"
    kinds = {model.by_id[member.id].parameter for member in edit.members}
    if len(kinds) > 1:
        return "some of these are parameters and some are buffers, which no optimizer moves: they cannot be one tensor"
    views = {member.view for member in edit.members}
    if not all(view == AS_STORED or view.transposes for view in views):
        return "one of these is seen reshaped, and a module has no way to hold one parameter in two shapes"
    if edit.adjustments and (kinds == {False} or any(len(model.by_id[one.id].shape) != 2 for one in edit.members)):
        return "only matrices that are parameters can be corrected"
    if len(views) > 1 and kinds == {False}:
        return "buffers cannot be held transposed"
    return None


def _edit(model: Model, plan: Plan, folder: Path) -> Written:
    raise RewriteRefused(
        f"{model.path}: a live module is no file, it is changed where it lives",
        hint="in Python: tieaudit.tie(module) or tieaudit.untie(module), then save the module",
    )


torch_module = Format(
    name="torch_module",
    summary="live PyTorch modules: `package.module:factory`, or any nn.Module in Python",
    targets=("torch",),
    owns=lambda path: False,
    named=_named,
    group=_group,
    load=_load,
    load_inputs=_load_inputs,
    can_realise=_can_realise,
    edit=_edit,
    pool=lambda model, id, n_groups: (
        "the code of a live module cuts keys and values into the heads that it was built for, and only its tensors can "
        "be changed: save it and pool the Hugging Face folder or the ONNX model"
    ),
    holds_adjustments=True,
    has_program=False,
)
