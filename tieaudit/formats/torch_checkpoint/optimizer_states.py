"""The optimizer states in a file: where they are, and which of their numbers stands for which parameter.

`optimizer.state_dict()` numbers the parameters of all groups, one behind the other, from 0. The file does not say which
is which unless the groups have `param_names`; a numbering is believed if the shapes of all moments agree with it.
Source: torch/optim/optimizer.py, version 2.13, `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tieaudit.change import Edit, Share, Unshare
from tieaudit.formats.torch_checkpoint.pickles import Made
from tieaudit.formats.torch_checkpoint.rebuild import Tensor
from tieaudit.model import Model, Weight

GROUPS, STATE, PARAMS, NAMES = "param_groups", "state", "params", "param_names"
_N_MOST = 1_000_000


@dataclass(frozen=True)
class State:
    """One optimizer's state, as the pickle describes it."""

    where: str
    """Dotted keys down to it; empty for the whole file."""
    held: Mapping[object, object]
    """The dictionary that has `state` and `param_groups`."""
    entries: dict[object, object]
    """Number → what the optimizer keeps for this parameter; none for one that was never stepped."""
    groups: list[dict[str, object]]
    around: tuple[object, ...]
    """Keys beside it."""

    @property
    def numbers(self) -> list[object]:
        """Of all groups, in their order."""
        return [number for group in self.groups for number in _list(group[PARAMS])]

    @property
    def counts(self) -> list[int]:
        """Parameters in each group."""
        return [len(_list(group[PARAMS])) for group in self.groups]

    @property
    def names(self) -> list[object] | None:
        """Of the parameters in that order, where every group says them."""
        found: list[object] = []
        for group in self.groups:
            names = group.get(NAMES)
            if not isinstance(names, list) or len(names) != len(_list(group[PARAMS])):
                return None
            found += names
        return found


def _list(value: object) -> list[object]:
    assert isinstance(value, list)  # `_read` looked
    return value


def states_in(value: object) -> Iterator[State]:
    """Every value of a file that has the keys of an optimizer's state dict, wherever it lies."""
    waiting: list[tuple[str, object, tuple[object, ...]]] = [("", value, ())]
    seen: set[int] = set()
    while waiting and len(seen) < _N_MOST:
        where, one, around = waiting.pop()
        if id(one) in seen or not isinstance(one, (dict, list, tuple, Made)):
            continue
        seen.add(id(one))
        held = one.items if isinstance(one, Made) and one.items else one
        if isinstance(held, dict) and {STATE, GROUPS} <= held.keys():
            state = _read(where, held, around)
            if state is not None:
                yield state
            continue
        inside = list(_inside(one))
        names = tuple(name for name, _ in inside)
        waiting += [(f"{where}.{name}".lstrip("."), child, names) for name, child in inside]


def _inside(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, Made):
        for held in (value.state, value.items, value.entries):
            yield from _inside(held)
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _read(where: str, held: Mapping[object, object], around: tuple[object, ...]) -> State | None:
    entries, groups = held[STATE], held[GROUPS]
    if not isinstance(entries, dict) or not isinstance(groups, list):
        return None
    if not all(isinstance(group, dict) and isinstance(group.get(PARAMS), list) for group in groups):
        return None
    return State(where, held, entries, groups, around)


def live(model: Model, edits: Sequence[Edit]) -> list[Weight]:
    """The parameters of the live module, edits made, in the order of its state dict: of several names the first."""
    anchor: dict[str, str] = {}
    own = set()
    for edit in edits:
        if isinstance(edit, Share):
            anchor.update((member.id, edit.members[0].id) for member in edit.members)
        elif isinstance(edit, Unshare):
            own.add(edit.name)
    found: dict[object, Weight] = {}
    for weight in model.weights:
        if weight.parameter is False or weight.storage is None:
            continue
        one: object = anchor.get(weight.id, weight.id)
        storage = model.by_id[str(one)].storage
        if weight.name not in own and storage is not None:
            one = storage.region
        found.setdefault(one, weight)
    return list(found.values())


def numberings(state: State, parameters: Sequence[Weight]) -> list[list[Weight]]:
    """The orders in which these parameters may be the state's own; none if it is that of others.

    By name, where the groups say names; else in the order of `model.parameters()`, or, as training scripts sort them
    for weight decay, matrices in one of two groups and vectors in the other, each in that order.
    """
    if len(state.numbers) != len(parameters):
        return []
    by_name = {weight.name: weight for weight in parameters}
    names = state.names
    if names is not None and all(isinstance(name, str) for name in names) and set(names) == by_name.keys():
        orders = [[by_name[str(name)] for name in names]]
    else:
        orders = [list(parameters)]
        matrices = [weight for weight in parameters if len(weight.shape) >= 2]
        vectors = [weight for weight in parameters if len(weight.shape) < 2]
        sorted_ways = ((matrices, vectors), (vectors, matrices))
        orders += [[*a, *b] for a, b in sorted_ways if state.counts == [len(a), len(b)] and [*a, *b] != orders[0]]
    shapes = [_largest(state.entries.get(number)) if _is_key(number) else None for number in state.numbers]
    return [
        order
        for order in orders
        if all(shape is None or shape == weight.shape for shape, weight in zip(shapes, order, strict=True))
    ]


def _is_key(number: object) -> bool:
    return isinstance(number, (int, str))


def _largest(held: object) -> tuple[int, ...] | None:
    """The shape of a parameter's moments: those of its largest state tensor that is no count of steps."""
    tensors = held.values() if isinstance(held, dict) else ()
    shapes = [one.shape for one in tensors if isinstance(one, Tensor) and one.shape]
    return max(shapes, key=_product, default=None)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
