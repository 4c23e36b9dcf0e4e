"""A graph of ATen calls in neutral terms, and who reads a value of it behind transposes, copies and casts.

One walk for exported programs in files and in memory: who makes a `Flow` says what the calls and their operands are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

from tieaudit.model import Box, Use
from tieaudit.view import AS_STORED, Cast, Reshape, Shape, Transpose, View

PASSES = frozenset("detach detach_ alias contiguous clone lift_fresh_copy to _to_copy type_as".split())
"""Operations behind which a tensor is still itself, in another type perhaps."""
_RESHAPES = frozenset("view reshape _unsafe_view unsqueeze squeeze flatten unflatten view_copy".split())
READS_TRANSPOSED = frozenset({("linear", 1)})
"""Operation and slot whose consumer transposes what it is given: y = x · Wᵀ + b."""
_N_MOST_STEPS = 200_000
_N_MOST_VIEWS = 200


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a graph: its scope (empty for the main graph) and its name there."""

    scope: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One operation: what it takes, in the order of its schema, and what it makes."""

    op: str
    """Name without namespace for ATen (`embedding`), with it otherwise (`torchvision.nms`)."""
    name: str
    """Name of the node, or of its first output."""
    args: tuple[Any, ...]
    """`Value`, a number, a text, a list of those; positional ones first."""
    outputs: tuple[str, ...]
    scope: str = ""
    call: tuple[str, ...] = ()
    """Calls of modules in which this runs, as `Use.call`."""
    bodies: tuple[str, ...] = ()
    """Scopes of the graphs that it calls."""


@dataclass
class Flow:
    """All calls of a program, those of nested graphs included."""

    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Scope → names of its inputs."""
    outputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Scope → names of the values that it returns."""
    shapes: dict[Value, Shape] = field(default_factory=dict)
    """Of values whose shape is known in full."""
    dtypes: dict[Value, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.producers: dict[Value, Call] = {}
        self.consumers: dict[Value, list[tuple[Call, int]]] = {}

    def index(self) -> None:
        """Work out producers and consumers, once all calls are there."""
        for call in self.calls:
            for name in call.outputs:
                self.producers.setdefault(Value(call.scope, name), call)
            for slot, operand in enumerate(flat(call.args)):
                if isinstance(operand, Value):
                    self.consumers.setdefault(operand, []).append((call, slot))

    def entered(self, call: Call, slot: int) -> list[Value]:
        """The inputs of the graphs that a call runs which this operand becomes; none if it is no such call.

        The operands of `cond`, `wrap_with_set_grad_enabled` and their like are the last ones, in order.
        """
        operands = [at for at, one in enumerate(flat(call.args)) if isinstance(one, Value)]
        found = []
        for body in call.bodies:
            names = self.inputs.get(body, ())
            taken = operands[len(operands) - len(names) :] if len(names) <= len(operands) else []
            if slot in taken:
                found.append(Value(body, names[taken.index(slot)]))
        return found


def flat(args: Any) -> list[Any]:
    """Operands one behind the other, nested lists opened: what slots count."""
    found: list[Any] = []
    pending = [args]
    while pending:
        one = pending.pop()
        if isinstance(one, (list, tuple)):
            pending.extend(reversed(one))
        else:
            found.append(one)
    return found


@dataclass(frozen=True)
class _Seen:
    value: Value
    view: View
    shape: Shape
    dtype: str
    chain: tuple[str, ...] = ()


class Queries(Protocol):
    """What a walk asks about a consumer."""

    def reads_ids(self, call: Call, slot: int) -> bool: ...

    def feeds_output(self, call: Call) -> bool: ...


def uses_of(
    flow: Flow, weight: str, value: Value, shape: Shape, dtype: str, queries: Queries | None = None
) -> Iterator[Use]:
    """Every consumption of a value, behind the operations that only re-arrange or convert it.

    Cost: linear in the operations reached.
    """
    pending = deque([_Seen(value, AS_STORED, shape, dtype)])
    met: set[Value] = set()
    while pending and len(met) < _N_MOST_STEPS:
        seen = pending.popleft()
        if seen.value in met:
            continue
        met.add(seen.value)
        if not seen.value.scope and seen.value.name in flow.outputs.get("", ()):
            yield Use(weight, "output", f"@{seen.value.name}", 0, seen.view, chain=seen.chain)
        for call, slot in flow.consumers.get(seen.value, ()):
            inside = flow.entered(call, slot)
            onward = None if inside else _through(flow, call, slot, seen)
            if inside or onward is not None:
                pending.extend(replace(seen, value=one) for one in inside)
                pending.extend([onward] if onward is not None else ())
                continue
            turned = (call.op, slot) in READS_TRANSPOSED and len(seen.shape) == 2
            yield Use(
                weight, call.op, call.name, slot, seen.view.then(Transpose((1, 0))) if turned else seen.view,
                scope=call.scope, chain=seen.chain, box=_box(call, slot, seen.shape), call=call.call,
                reads_ids=queries is not None and queries.reads_ids(call, slot),
                feeds_output=queries is not None and queries.feeds_output(call),
            )  # fmt: skip


def _through(flow: Flow, call: Call, slot: int, seen: _Seen) -> _Seen | None:
    """The weight behind an operation that only re-arranges its first operand; None if it is consumed there."""
    if slot != 0 or len(call.outputs) != 1 or len(seen.chain) >= _N_MOST_VIEWS:
        return None
    made = Value(call.scope, call.outputs[0])
    after = replace(seen, value=made, chain=(*seen.chain, call.name))
    if call.op in PASSES:
        kind = flow.dtypes.get(made, seen.dtype)
        return after if kind == seen.dtype else replace(after, view=seen.view.then(Cast(kind)), dtype=kind)
    perm = _permutation(call, len(seen.shape))
    if perm is not None:
        step = Transpose(perm)
        return replace(after, view=seen.view.then(step), shape=step.shape(seen.shape))
    if call.op in _RESHAPES:
        shape = flow.shapes.get(made)
        if shape is None or prod(shape) != prod(seen.shape):
            return None
        return after if shape == seen.shape else replace(after, view=seen.view.then(Reshape(shape)), shape=shape)
    if call.op == "slice" and all(begin == 0 and end == size for (begin, end), size in _pairs(call, seen.shape)):
        return after if _box(call, slot, seen.shape) else None
    return None


def _pairs(call: Call, shape: Shape) -> Iterator[tuple[tuple[int, int], int]]:
    return zip(_box(call, 0, shape), shape, strict=False)


def _permutation(call: Call, rank: int) -> tuple[int, ...] | None:
    """The axes of a transposing call, or None if it is none or its axes are not numbers."""
    if call.op in ("t", "numpy_T", "mT", "adjoint", "matrix_H") and rank == 2:
        return (1, 0)
    axes = call.args[1:3]
    if call.op == "transpose" and len(axes) == 2:
        one, other = axes
        if not all(isinstance(axis, int) and -rank <= axis < rank for axis in axes):
            return None
        order = list(range(rank))
        order[one], order[other] = order[other], order[one]
        return tuple(order)
    if call.op == "permute" and axes and isinstance(axes[0], (list, tuple)):
        if not all(isinstance(axis, int) and -rank <= axis < rank for axis in axes[0]):
            return None
        order = [axis % rank for axis in axes[0]]
        return tuple(order) if sorted(order) == list(range(rank)) else None
    return None


def _box(call: Call, slot: int, shape: Shape) -> Box:
    """The range of every axis that a cutting consumer reads, by constant bounds; empty where that is not known."""
    if slot != 0 or call.op not in ("slice", "select", "narrow"):
        return ()
    axis, begin, end, step = (*call.args[1:5], *(None,) * 4)[:4]
    axis, begin, step = axis or 0, begin or 0, 1 if step is None else step
    if not isinstance(axis, int) or not isinstance(begin, int) or not -len(shape) <= axis < len(shape) or step != 1:
        return ()
    axis %= len(shape)
    size = shape[axis]
    begin = max(begin + size, 0) if begin < 0 else min(begin, size)
    if call.op == "select":
        end = begin + 1
    elif call.op == "narrow":
        end = begin + end if isinstance(end, int) else ""
    elif end is None:
        end = size
    if not isinstance(end, int):
        return ()
    end = max(end + size, 0) if end < 0 else min(end, size)
    return tuple((begin, end) if at == axis else (0, one) for at, one in enumerate(shape))
