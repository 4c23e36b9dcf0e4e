"""Who consumes each weight, and through what view: a walk from every weight through the nodes that only re-arrange it.

A view node with several consumers gives a use for each. What a graph returns is a use by `@<name>` (operation
`output`). A weight passed into a model-local function is followed into the body, and out again where the body only
re-arranges it; beyond `_N_MOST_STEPS` the call itself is the use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from tieaudit.formats.onnx.boxes import box_of
from tieaudit.formats.onnx.lookups import Lookups
from tieaudit.formats.onnx.scopes import Scope, first_output
from tieaudit.formats.onnx.tensors import DTYPES, MAX_RANK
from tieaudit.formats.onnx.values import Value, Values, attribute, int_attribute, op_name
from tieaudit.model import Use, Weight
from tieaudit.view import AS_STORED, Cast, Dequantise, Opaque, Reshape, Shape, Step, Transpose, View

if TYPE_CHECKING:
    from onnx import NodeProto

VIEW_OPS = frozenset(
    "Identity Transpose Cast Reshape Squeeze Unsqueeze Flatten DequantizeLinear com.microsoft.DequantizeLinear".split()
)
"""Operations that only re-arrange or convert their first input."""
_TRANSPOSING = {
    "Gemm": ("transA", "transB"),
    "com.microsoft.FusedMatMul": ("transA", "transB"),
    "com.microsoft.TransposeMatMul": ("transA", "transB"),
    "com.microsoft.FusedGemm": ("transA", "transB"),
    "com.microsoft.GemmFloat8": ("transA", "transB"),
}
_N_MOST_STEPS = 20_000
_N_MOST_CALLS = 50
_N_MOST_STEPS_IN_CALLS = 100_000
"""Of all weights together: what one call passes on, every call passes on."""
_N_MOST_VIEWS = 200
"""Nodes in a chain of views; behind them, the next one counts as the consumer."""


@dataclass(frozen=True)
class _Seen:
    """A weight as it appears at one value, on one path of function calls."""

    value: Value
    view: View = AS_STORED
    shape: Shape | None = None
    """None once a reshape to an unknown shape was passed."""
    dtype: str | None = None
    chain: tuple[str, ...] = ()
    calls: tuple[tuple[Scope, NodeProto], ...] = ()
    transposes: bool = False
    """Whether a Transpose node that moves something was passed."""


def find_uses(values: Values, part: str, lookups: Lookups) -> Iterator[Use]:
    """Every use of every weight, in the order of the weights.

    Cost: linear in the view nodes and consumers reached (each belongs to one weight unless functions are called).
    """
    n_left = _N_MOST_STEPS_IN_CALLS
    for value, weight in values.weights.items():
        start = _Seen(value, AS_STORED, weight.shape, weight.dtype)
        n_left -= yield from _uses_of(weight, start, values, part, lookups, n_left)


def _uses_of(
    weight: Weight, start: _Seen, values: Values, part: str, lookups: Lookups, n_left: int
) -> Generator[Use, None, int]:
    """The uses of one weight; returns how many steps inside called functions that took, of which `n_left` are left."""
    pending, met, n_steps, n_in_calls = deque([start]), set(), 0, 0
    while pending:
        seen = pending.popleft()
        key = (seen.value, tuple((scope.name, first_output(node)) for scope, node in seen.calls))
        if key in met:  # only in a malformed graph whose values form a cycle
            continue
        met.add(key)
        for scope, index in values.outputs.get(seen.value, ()):
            if scope.function is not None and seen.calls:
                pending.extend(_returned(seen, index))
            else:
                yield Use(
                    weight.id, "output", f"@{scope.outputs[index]}", 0, seen.view, part, scope.name, chain=seen.chain
                )
        for scope, node, slot in values.consumers.get(seen.value, ()):
            n_steps += 1
            n_in_calls += bool(seen.calls)
            onward = None
            if n_steps <= _N_MOST_STEPS and n_in_calls <= n_left:
                onward = _called(seen, scope, node, slot, values) or _viewed(seen, scope, node, slot, values)
            if onward is not None:
                pending.append(onward)
                continue
            yield Use(
                weight.id,
                op_name(node),
                first_output(node) or f"{node.op_type}",
                slot,
                _operand(seen, node, slot),
                part,
                scope.name,
                lookups.reads_ids(scope, node, slot),
                lookups.feeds_output(scope, node),
                seen.chain,
                seen.transposes,
                tuple(first_output(call) for _, call in seen.calls),
                box_of(scope, node, slot, seen.shape, values),
            )
    return n_in_calls


def _called(seen: _Seen, scope: Scope, node: NodeProto, slot: int, values: Values) -> _Seen | None:
    """The weight as the called function's formal input, or None if this is not a call that can be followed."""
    body = values.function(node)
    if body is None or slot >= len(body.inputs) or len(seen.calls) >= _N_MOST_CALLS:
        return None
    return replace(seen, value=Value(body.name, body.inputs[slot]), calls=(*seen.calls, (scope, node)))


def _returned(seen: _Seen, index: int) -> Iterator[_Seen]:
    scope, node = seen.calls[-1]
    if index < len(node.output) and node.output[index]:
        yield replace(seen, value=Value(scope.name, node.output[index]), calls=seen.calls[:-1])


def _viewed(seen: _Seen, scope: Scope, node: NodeProto, slot: int, values: Values) -> _Seen | None:
    """The weight behind a view node, or None if the node consumes it."""
    op = op_name(node)
    if slot != 0 or op not in VIEW_OPS or not first_output(node) or values.function(node) is not None:
        return None
    if len(seen.chain) >= _N_MOST_VIEWS:
        return None
    after = replace(seen, value=Value(scope.name, first_output(node)), chain=(*seen.chain, first_output(node)))
    if op == "Identity":
        return after
    if op.endswith("DequantizeLinear"):
        return replace(after, view=seen.view.then(_dequantised(seen.shape, scope, node, values)), dtype=None)
    if op == "Cast":
        to = DTYPES.get(int_attribute(node, "to", 0) or 0)
        if to is not None and to == seen.dtype:
            return after
        step: Step = Cast(to) if to is not None and to != "string" else Opaque("cast")
        return replace(after, view=seen.view.then(step), dtype=to)
    if op == "Transpose":
        return _transposed(after, node)
    shape = _shape_after(op, seen.shape, scope, node, values)
    if shape is None or len(shape) > MAX_RANK:
        return replace(after, view=seen.view.then(Opaque("reshaped")), shape=None)
    view = seen.view if shape == seen.shape else seen.view.then(Reshape(shape))
    return replace(after, view=view, shape=shape)


def _dequantised(shape: Shape | None, scope: Scope, node: NodeProto, values: Values) -> Step:
    """What DequantizeLinear does to each element; in blocks it depends on two axes."""
    if int_attribute(node, "block_size", 0) != 0:
        return Opaque("dequantized in blocks")
    scales = values.resolve(scope, node.input[1]) if len(node.input) > 1 else None
    held = values.weights.get(scales) if scales is not None else None
    if held is not None and not held.shape:
        return Dequantise()
    axis = int_attribute(node, "axis", 1)
    if axis is None or shape is None or not -len(shape) <= axis < len(shape):
        return Opaque("dequantized")
    return Dequantise(axis % len(shape))


def _transposed(after: _Seen, node: NodeProto) -> _Seen:
    found = attribute(node, "perm")
    if after.shape is None or (found is not None and found.ref_attr_name):
        return replace(after, view=after.view.then(Opaque("permuted")), shape=None, transposes=True)
    rank = len(after.shape)
    perm = tuple(int(axis) for axis in found.ints) if found is not None and found.ints else tuple(range(rank))[::-1]
    if sorted(perm) != list(range(rank)):
        return replace(after, view=after.view.then(Opaque("permuted by a malformed perm")), shape=None)
    step = Transpose(perm)
    moves = perm != tuple(range(rank)) or after.transposes
    return replace(after, view=after.view.then(step), shape=step.shape(after.shape), transposes=moves)


def _operand(seen: _Seen, node: NodeProto, slot: int) -> View:
    """The view with the consumer's own transposition of its operand added."""
    names = _TRANSPOSING.get(op_name(node), ())
    if slot >= len(names):
        return seen.view
    batch = int_attribute(node, names[slot].replace("trans", "transBatch"), 0)
    flag = int_attribute(node, names[slot], 0)
    if batch != 0 or flag is None:
        return seen.view.then(Opaque("permuted by its consumer"))
    if not flag:
        return seen.view
    if seen.shape is None or len(seen.shape) < 2:
        return seen.view.then(Opaque("transposed by its consumer")) if seen.shape is None else seen.view
    axes = list(range(len(seen.shape)))
    return seen.view.then(Transpose((*axes[:-2], axes[-1], axes[-2])))


def _shape_after(op: str, shape: Shape | None, scope: Scope, node: NodeProto, values: Values) -> Shape | None:
    """The shape behind Reshape, Flatten, Squeeze or Unsqueeze, or None where it is not known or makes no sense."""
    if shape is None:
        return None
    if op == "Flatten":
        axis = int_attribute(node, "axis", 1)
        if axis is None or not -len(shape) <= axis <= len(shape):
            return None
        axis += len(shape) if axis < 0 else 0
        return (prod(shape[:axis]), prod(shape[axis:]))
    numbers = _numbers(op, scope, node, values)
    if op == "Reshape":
        return None if numbers is None else _reshaped(shape, numbers, int_attribute(node, "allowzero", 0))
    if op == "Squeeze":
        given = (len(node.input) > 1 and node.input[1]) or attribute(node, "axes") is not None
        if not given:
            return tuple(size for size in shape if size != 1)
        axes = _axes(numbers, len(shape))
        if axes is None or any(shape[axis] != 1 for axis in axes):
            return None
        return tuple(size for axis, size in enumerate(shape) if axis not in axes)
    axes = _axes(numbers, len(shape) + len(numbers)) if numbers is not None else None
    if axes is None or numbers is None:
        return None
    rest = iter(shape)
    return tuple(1 if axis in axes else next(rest) for axis in range(len(shape) + len(numbers)))


def _numbers(op: str, scope: Scope, node: NodeProto, values: Values) -> tuple[int, ...] | None:
    """The target shape or the axes: the second input (opset 5 and 13 on), or the attribute of older opsets."""
    if len(node.input) > 1 and node.input[1]:
        return values.ints(scope, node.input[1])
    found = attribute(node, "shape" if op == "Reshape" else "axes")
    return None if found is None or found.ref_attr_name else tuple(int(number) for number in found.ints)


def _axes(numbers: tuple[int, ...] | None, rank: int) -> set[int] | None:
    if numbers is None or any(not -rank <= axis < rank for axis in numbers):
        return None
    axes = {axis % rank for axis in numbers}
    return axes if len(axes) == len(numbers) else None


def _reshaped(shape: Shape, numbers: tuple[int, ...], allow_zero: int | None) -> Shape | None:
    """Reshape's target with 0 (copy, unless `allowzero`) and -1 (the rest) filled in."""
    if allow_zero is None:
        return None
    sizes = list(numbers)
    for axis, size in enumerate(sizes):
        if size == 0 and not allow_zero:
            if axis >= len(shape):
                return None
            sizes[axis] = shape[axis]
    n_elements = prod(shape)
    if sizes.count(-1) == 1:
        others = prod(size for size in sizes if size != -1)
        if others == 0 or n_elements % others:
            return None
        sizes[sizes.index(-1)] = n_elements // others
    if any(size < 0 for size in sizes) or prod(sizes) != n_elements:
        return None
    return tuple(sizes)
