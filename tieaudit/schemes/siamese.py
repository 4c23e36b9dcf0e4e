"""Two towers of the same shape become one."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Member, Weight
from tieaudit.onevalue import one_value
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject

_LEAST_SHARE = 0.5
"""Two towers that hold less than this of the parameters are two layers of something else."""


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    learned = [one for one in subject.model.weights if one.is_float and one.parameter is not False and not one.absent]
    total = sum(one.n_elements for one in learned)
    best: dict[str, dict[str, Weight]] = {}
    for towers in (_by_part(learned), *_by_prefix(learned), _by_input(subject, learned)):
        alike = _alike(towers)
        if len(alike) > 1 and _size(alike) > max(_size(best), _LEAST_SHARE * total):
            best = alike
    if not best:
        yield Refusal("siamese", (), "no two towers with the same weights of the same shapes were recognised")
        return
    first, *others = best
    for rest, weight in best[first].items():
        members = [weight, *(best[other][rest] for other in others)]
        regions = {one.storage.region: one.n_bytes for one in members if one.storage is not None}
        if len(regions) < 2:
            continue
        ids = tuple(Member(one.id) for one in members)
        because = f"{rest} of {' and '.join(best)}"
        saved = sum(regions.values()) - max(regions.values())
        yield Candidate("siamese", ids, saved, one_value(subject).holds(ids), because)


def _by_part(weights: list[Weight]) -> dict[str, dict[str, Weight]]:
    found: dict[str, dict[str, Weight]] = {}
    for weight in weights:
        found.setdefault(weight.part, {})[weight.name] = weight
    return found


def _by_prefix(weights: list[Weight]) -> Iterator[dict[str, dict[str, Weight]]]:
    """For every module, its children with what they hold. Numbered children are layers in a row, and no towers."""
    tree: dict[str, dict[str, dict[str, Weight]]] = {}
    for weight in weights:
        path = weight.name.split(".")
        for depth in range(len(path) - 2):
            child, rest = path[depth], ".".join(path[depth + 1 :])
            if not child.isdigit():
                tree.setdefault(".".join(path[:depth]), {}).setdefault(child, {})[rest] = weight
    yield from tree.values()


def _by_input(subject: Subject, weights: list[Weight]) -> dict[str, dict[str, Weight]]:
    """In a graph: the weights that meet one set of its inputs, and no other, in the order of their use.

    So towers are found whatever their weights are called; what comes behind the towers meets the inputs of all.
    """
    behind: dict[str, frozenset[str]] = {}
    met: dict[tuple[str, str, str], frozenset[str]] = {}
    for operation in subject.model.operations:
        given = frozenset().union(*(behind.get(value, frozenset()) for value in operation.inputs))
        if operation.op == "input":
            given = frozenset(operation.outputs)
        behind.update(dict.fromkeys(operation.outputs, given))
        met[operation.part, operation.scope, operation.node] = given
    learned, reached = {one.id: one for one in weights}, dict[str, frozenset[str]]()
    for use in subject.model.uses:
        reached[use.weight] = reached.get(use.weight, frozenset()) | met.get(
            (use.part, use.scope, use.node), frozenset()
        )
    found: dict[str, dict[str, Weight]] = {}
    for use in subject.model.uses:
        weight, inputs = learned.pop(use.weight, None), reached[use.weight]
        if weight is not None and inputs:
            tower = found.setdefault(f"what {' and '.join(sorted(inputs))} alone leads to", {})
            tower[f"weight {len(tower)} ({use.op})"] = weight
    return found


def _alike(towers: dict[str, dict[str, Weight]]) -> dict[str, dict[str, Weight]]:
    """The largest set of towers whose weights have the same names, shapes and types."""
    groups: dict[frozenset[tuple[str, tuple[int, ...], str]], dict[str, dict[str, Weight]]] = {}
    for name, tower in towers.items():
        if sum(len(weight.shape) > 1 for weight in tower.values()) > 1:
            shape = frozenset((rest, weight.shape, weight.dtype) for rest, weight in tower.items())
            groups.setdefault(shape, {})[name] = tower
    return max(groups.values(), key=_size, default={})


def _size(towers: dict[str, dict[str, Weight]]) -> int:
    return sum(weight.n_elements for tower in towers.values() for weight in tower.values()) if len(towers) > 1 else 0


siamese = Scheme(
    name="siamese",
    merge="mean",
    summary="towers of the same shape become one",
    source="Bromley et al. 1993, Signature verification using a Siamese time delay neural network (NeurIPS)",
    propose=_propose,
    page="""siamese: two towers, one set of weights.

Towers are modules beside each other, or parts of one export, that hold the same weights by name, shape and type and,
together, most of the model; or, in a graph whatever its names, what different inputs lead to before they meet. Towers
for different inputs, a query's and a document's, have the same shape too.""",
)
