"""Which part of a weight a Slice with constant bounds reads: exporters cut one matrix of a recurrent cell into gates.

Slice from opset 10 on: onnx/docs/Operators.md, "Slice"; before, its bounds are attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieaudit.formats.onnx.scopes import Scope
from tieaudit.formats.onnx.values import Values, attribute, op_name
from tieaudit.model import Box
from tieaudit.view import Shape

if TYPE_CHECKING:
    from onnx import NodeProto


def box_of(scope: Scope, node: NodeProto, slot: int, shape: Shape | None, values: Values) -> Box:
    """The range of every axis that a Slice reads of its operand; empty for all of it, and where it cannot be told."""
    if op_name(node) != "Slice" or slot != 0 or shape is None:
        return ()
    starts, ends = _numbers(scope, node, 1, "starts", values), _numbers(scope, node, 2, "ends", values)
    if not starts or not ends or len(starts) != len(ends):
        return ()
    every = tuple(range(len(starts)))
    axes, steps = (
        _numbers(scope, node, 3, "axes", values, every),
        _numbers(scope, node, 4, "", values, (1,) * len(every)),
    )
    if axes is None or len(axes) != len(starts) or steps != (1,) * len(starts):
        return ()
    found = [(0, size) for size in shape]
    for axis, start, end in zip(axes, starts, ends, strict=True):
        if not -len(shape) <= axis < len(shape):
            return ()
        size = shape[axis]
        begin, stop = (min(max(bound + size if bound < 0 else bound, 0), size) for bound in (start, end))
        found[axis] = (begin, max(begin, stop))
    return tuple(found)


def _numbers(
    scope: Scope, node: NodeProto, slot: int, name: str, values: Values, default: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """Constant numbers of an input, or of the attribute of older opsets; None where they are computed."""
    if len(node.input) > slot and node.input[slot]:
        return values.ints(scope, node.input[slot])
    found = attribute(node, name) if name else None
    if found is None:
        return default
    return None if found.ref_attr_name else tuple(int(number) for number in found.ints)
