"""Sharing across depth: one module that is called several times, which no name and no memory shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tieaudit.model import Model, Use, classes
from tieaudit.verdict import Found


@dataclass(frozen=True)
class Repeated:
    """Weights that are used in several calls of their module."""

    module: str
    """Dotted path of the outermost module that is called that often."""
    n_calls: int
    ids: tuple[str, ...]


def n_calls(model: Model, found: Found) -> Mapping[str, int]:
    """By weight id: in how many calls of modules it is used, under whatever name. Empty where no graph tells."""
    calls = {id: {use.call[-1] for use in uses if use.call} for id, uses in model.uses_of.items()}
    for ids in classes(tie.ids for tie in found.ties if tie.origin == "aliased"):
        together = set().union(*(calls.get(id, set()) for id in ids))
        calls.update(dict.fromkeys(ids, together))
    return {id: len(called) for id, called in calls.items() if called}


def shared_across_depth(model: Model) -> tuple[Repeated, ...]:
    """Parameters of modules that run more than once in one forward pass, by module, in the order of the weights.

    Two modules that use one tensor are a tie of names, not this. Cost: linear in the uses.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for weight in model.weights:
        place = _repeated(model.uses_of.get(weight.id, ())) if weight.parameter else None
        if place is not None:
            found.setdefault(place, []).append(weight.id)
    return tuple(Repeated(path, count, tuple(ids)) for (path, count), ids in found.items())


def _repeated(uses: Sequence[Use]) -> tuple[str, int] | None:
    """The outermost module that is called as often as the one that uses the weight, and how often; None for once."""
    by_user: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for use in uses:
        if use.call:
            by_user[path_of(use.call[-1])].append(use.call)
    stacks = max(by_user.values(), key=lambda found: len({stack[-1] for stack in found}), default=[])
    most = len({stack[-1] for stack in stacks})
    if most < 2:
        return None
    numbers: dict[str, set[str]] = defaultdict(set)
    for stack in stacks:
        for call in stack:
            numbers[path_of(call)].add(call)
    return next(path_of(call) for call in stacks[0] if len(numbers[path_of(call)]) == most), most


def path_of(call: str) -> str:
    """The dotted path of the module that a call is of."""
    return call.rpartition("@")[0]
