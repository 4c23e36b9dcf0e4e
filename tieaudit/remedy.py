"""What a rule may recommend: a command that can be pasted, or a sentence where no command helps."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from tieaudit.formats import Format
from tieaudit.model import Model
from tieaudit.printable import listed
from tieaudit.registry import discover
from tieaudit.verdict import Fix

LIVE = "torch_module"
"""The format that is changed in Python, where it lives."""


def command(model: Model, *words: str) -> str:
    """`tieaudit apply PATH --scheme … --to OUT`, quoted for a POSIX shell."""
    path = model.path if not model.path.startswith("-") else f"./{model.path}"
    return shlex.join(["tieaudit", "apply", path, *words, "--to", "OUT"])


def rewrite(model: Model, scheme: str, ids: Iterable[str]) -> Fix:
    """The scheme that mends it without changing a value; by hand where tieaudit would refuse."""
    ids = tuple(ids)
    given = [id for id in ids if model.by_id[id].overridable]
    if given:
        return Fix("manual", f"{listed(tuple(given))} is a graph input, which a caller may override: remove the input")
    inside = [id for id in ids if model.by_id[id].scope.startswith("function:")]
    if inside:
        reason = "is inside a model-local function, which sees no outer names"
        return Fix("manual", f"{listed(tuple(inside))} {reason}: inline the functions (onnx.inliner) first")
    if model.format == LIVE:
        return Fix("manual", f'in Python: tieaudit.tie(module, scheme="{scheme}")')
    if can_edit(model):
        return Fix("safe", command(model, "--scheme", scheme))
    return Fix("manual", f"tieaudit cannot write {model.format} models; export the model again with the weights tied")


def can_edit(model: Model) -> bool:
    """Whether tieaudit can write models of this format."""
    known = discover("formats", Format).get(model.format)
    return known is not None and known.edit is not None
