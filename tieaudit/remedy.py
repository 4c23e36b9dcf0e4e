"""What a rule may recommend: a command that can be pasted, or a sentence where no command helps."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from tieaudit.change import Edit, Respell, Share
from tieaudit.errors import TieAuditError
from tieaudit.formats import Format
from tieaudit.model import Member, Model, Part
from tieaudit.printable import listed
from tieaudit.registry import discover
from tieaudit.verdict import Fix
from tieaudit.view import AS_STORED, View

LIVE = "torch_module"
"""The format that is changed in Python, where it lives."""


def command(model: Model, *words: str) -> str:
    """`tieaudit apply PATH --scheme … --to OUT`, quoted for a POSIX shell."""
    path = model.path if not model.path.startswith("-") else f"./{model.path}"
    return shlex.join(["tieaudit", "apply", path, *words, "--to", "OUT"])


def share(ids: Sequence[str], views: Sequence[View] = ()) -> Share:
    """The edit that makes these weights one tensor; `views`: how each is seen from the first one."""
    return Share(tuple(Member(id, view) for id, view in zip(ids, views or [AS_STORED] * len(ids), strict=True)))


def rewrite(model: Model, scheme: str, edits: Sequence[Edit]) -> Fix:
    """The scheme that makes these edits, which change no value; by hand where tieaudit would refuse all of them.

    Cost: what the format's own question costs, for each edit.
    """
    ids = tuple(dict.fromkeys(id for edit in edits for id in _ids(edit)))
    given = [id for id in ids if model.by_id[id].overridable]
    if given:
        return Fix("manual", f"{listed(tuple(given))} is a graph input, which a caller may override: remove the input")
    reasons = [why_not(model, edit) for edit in edits]
    if reasons and all(reasons):
        inside = [id for id in ids if model.by_id[id].scope.startswith("function:")]
        if inside:
            reason = "is inside a model-local function, which sees no outer names"
            return Fix("manual", f"{listed(tuple(inside))} {reason}: inline the functions (onnx.inliner) first")
        return Fix("manual", f"no automatic fix: {reasons[0]}")
    if model.format == LIVE:
        return Fix("manual", f'in Python: tieaudit.tie(module, scheme="{scheme}")')
    if can_edit(model):
        return Fix("safe", command(model, "--scheme", scheme), scheme)
    return Fix("manual", f"tieaudit cannot write {model.format} models; export the model again with the weights tied")


def declare_untied(model: Model, ids: Sequence[str]) -> Fix:
    """The setting that makes the configuration say that these are not tied; by hand where there is none."""
    known = discover("formats", Format).get(model.format)
    if known is None or known.switch is None or not can_edit(model):
        return Fix("manual", "nothing switches this tie off: decide which tensor was meant, and store that one only")
    settings = known.switch(model, tuple(ids), False, known.targets[0])
    if isinstance(settings, str):
        return Fix("manual", f"no automatic fix: {settings}")
    return Fix("unsafe", command(model, "--scheme", "declare"), "declare")


def _ids(edit: Edit) -> tuple[str, ...]:
    if isinstance(edit, Share):
        return tuple(member.id for member in edit.members)
    return (edit.weight,) if isinstance(edit, Respell) else ()


def why_not(model: Model, edit: Edit) -> str | None:
    """Why the model's format would refuse this edit, for its default target; None if it would not, or is not known."""
    known = discover("formats", Format).get(model.format)
    if known is None or known.can_realise is None or not all(_is_there(part) for part in model.parts):
        return None
    try:
        settings = known.settings(model, edit, known.targets[0])
    except (TieAuditError, OSError) as error:  # a file that went away, or that cannot be taken apart
        return str(error)
    return settings if isinstance(settings, str) else None


def _is_there(part: Part) -> bool:
    """Whether a part has files that could be asked: examples in memory have none."""
    return not part.paths or os.path.isfile(part.paths[0])


def can_edit(model: Model) -> bool:
    """Whether tieaudit can write models of this format."""
    known = discover("formats", Format).get(model.format)
    return known is not None and known.edit is not None
