"""Two questions about a consumer: does it look up ids that a caller gives, and does its result reach an output?

Ids are followed backwards from the indices of a lookup through operations that keep them ids (Reshape, Concat, Add,
Where …) to an integer input of the graph. Positions, which are made of shapes, ranges and running sums or given as an
input called so, are told apart: `position + past` is a position, not an id.
"""

from __future__ import annotations

import re
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING

from tieaudit.formats.onnx.scopes import Scope
from tieaudit.formats.onnx.values import Value, Values, op_name

if TYPE_CHECKING:
    from onnx import NodeProto

_EMBED = {2: 0, 4: 1}  # word and segment tables by their ids; slot 3 is the position table
LOOKUPS: dict[str, dict[int, int]] = {
    "Gather": {0: 1},
    "GatherElements": {0: 1},
    "GatherND": {0: 1},
    "com.microsoft.GatherBlockQuantized": {0: 1},
    "com.microsoft.EmbedLayerNormalization": _EMBED,
    "com.microsoft.QEmbedLayerNormalization": _EMBED,
}
"""Operation → slot of the table → slot of the indices."""

_FIRST = (0,)
_ALL: tuple[int, ...] = ()
_CARRIES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        "Identity Cast Reshape Unsqueeze Squeeze Flatten Transpose Slice Clip Gather GatherElements GatherND Expand "
        "Tile Pad Split Mod Abs Compress Trilu".split(),
        _FIRST,
    ),
    **dict.fromkeys("Concat Max Min Add Sub".split(), _ALL),
    "Where": (1, 2),
    "ScatterND": (0, 2),
    "ScatterElements": (0, 2),
}
_MAKES_POSITIONS = frozenset("Range Shape Size CumSum NonZero".split())
_INTEGER_TYPES = frozenset({2, 3, 4, 5, 6, 7, 12, 13})  # TensorProto.DataType
NOT_IDS = re.compile(r"position|mask|past|length|seq_?len|cache", re.IGNORECASE)

_PASSES = frozenset(
    "Add Sub Mul Div Neg Abs Exp Log Sqrt Pow Mod Cast CastLike Tanh Sigmoid Relu LeakyRelu Softplus Erf Gelu Identity "
    "Reshape Transpose Slice Squeeze Unsqueeze Flatten Where Softmax LogSoftmax Hardmax Gather GatherND GatherElements "
    "Clip ArgMax TopK Max Min Concat Split Expand Pad Dropout ReduceMax ReduceMean ReduceSum ReduceLogSumExp "
    "Equal Greater GreaterOrEqual Less LessOrEqual Not And Or ScatterND ScatterElements QuantizeLinear "
    "DequantizeLinear com.microsoft.QuickGelu com.microsoft.FastGelu com.microsoft.BiasGelu "
    "com.microsoft.BiasSoftmax com.microsoft.QuantizeLinear com.microsoft.DequantizeLinear".split()
)
"""Element-wise and shape operations: nothing with a learned matrix, and no normalisation."""


class Kind(IntEnum):
    """What an integer value is made of."""

    OTHER = 0
    IDS = 1
    POSITIONS = 2


class Lookups:
    """Answers for one file, each value worked out once."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self._kinds: dict[Value, Kind] = {}
        self._concluded: set[Value] = set()
        self._reaching = _values_that_reach_an_output(values)

    def feeds_output(self, scope: Scope, node: NodeProto) -> bool:
        """Whether a result of the node reaches a graph output through element-wise and shape operations only."""
        return any(Value(scope.name, name) in self._reaching for name in node.output if name)

    def reads_ids(self, scope: Scope, node: NodeProto, slot: int) -> bool:
        """Whether this slot is a table whose indices are ids given to the graph."""
        indices = LOOKUPS.get(op_name(node), {}).get(slot)
        if indices is None or indices >= len(node.input):
            return False
        return self.kind(self.values.resolve(scope, node.input[indices])) is Kind.IDS

    def kind(self, value: Value | None) -> Kind:
        """Ids, positions or neither. Cost: linear over all calls together; a cycle counts as neither."""
        if value is None:
            return Kind.OTHER
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self._concluded:  # asked for by several values
                pending.pop()
                continue
            if current not in self._kinds:
                self._kinds[current] = Kind.OTHER  # the answer while it is being worked out
                unknown = [one for one in self._sources(current) if one not in self._kinds]
                if unknown:
                    pending.extend(unknown)
                    continue
            self._kinds[current] = self._conclude(current)
            self._concluded.add(current)
            pending.pop()
        return self._kinds[value]

    def _sources(self, value: Value) -> list[Value]:
        """The values that decide about this one."""
        values = self.values
        producer = values.producers.get(value)
        if producer is None:
            return self._actual_inputs(value)
        scope, node, index = producer
        if (body := values.function(node)) is not None:
            names = [(body, body.outputs[index])] if index < len(body.outputs) else []
        elif node.op_type == "If":
            bodies = [one for one in values.scopes_of(node) if index < len(one.outputs)]
            names = [(body, body.outputs[index]) for body in bodies]
        else:
            slots = _CARRIES.get(op_name(node))
            if slots is None:
                return []
            names = [(scope, name) for slot, name in enumerate(node.input) if not slots or slot in slots]
        found = (values.resolve(place, name) for place, name in names)
        return [one for one in found if one is not None]

    def _actual_inputs(self, value: Value) -> list[Value]:
        """What is passed for a formal input of a function, Loop or Scan body."""
        scope = self.values.by_name[value.scope]
        index = scope.input_slots.get(value.name)
        if index is None:
            return []
        if scope.function is not None:
            places = [(call.scope, call.node) for call in self.values.calls.get(scope.name, ())]
        elif scope.owner is not None and scope.parent is not None and scope.owner.op_type in ("Loop", "Scan"):
            places = [(scope.parent, scope.owner)]
        else:
            return []
        found = (self.values.resolve(place, node.input[index]) for place, node in places if index < len(node.input))
        return [one for one in found if one is not None]

    def _conclude(self, value: Value) -> Kind:
        kinds = [self._kinds[one] for one in self._sources(value)]
        producer = self.values.producers.get(value)
        if producer is None:
            return self._formal(value, kinds)
        op = op_name(producer.node)
        if op in _MAKES_POSITIONS:
            return Kind.POSITIONS
        if op in ("Add", "Sub") and Kind.POSITIONS in kinds:
            return Kind.POSITIONS
        return Kind.IDS if Kind.IDS in kinds else max(kinds, default=Kind.OTHER)

    def _formal(self, value: Value, kinds: list[Kind]) -> Kind:
        scope = self.values.by_name[value.scope]
        if value.name not in scope.input_slots:
            return Kind.OTHER
        if scope.function is not None:
            return Kind.IDS if Kind.IDS in kinds else max(kinds, default=Kind.OTHER)
        if value in self.values.weights:
            return Kind.OTHER
        if scope.owner is not None and scope.owner.op_type == "Loop" and self._counts(scope, value.name):
            return Kind.POSITIONS
        if Kind.POSITIONS in kinds:
            return Kind.POSITIONS
        elem_type = self.values.input_types.get(value, -1)
        # inputs of a body need no type: what is used as an index and not declared otherwise is an integer
        if elem_type not in _INTEGER_TYPES and not (elem_type == 0 and scope.parent is not None):
            return Kind.OTHER
        return Kind.POSITIONS if NOT_IDS.search(value.name) else Kind.IDS

    def _counts(self, scope: Scope, name: str) -> bool:
        """Whether a Loop body's input is its iteration number, or a state that only grows by addition."""
        index = scope.input_slots[name]
        if index == 0:
            return True
        if index < 2 or index - 1 >= len(scope.outputs):
            return False
        producer = self.values.producers.get(Value(scope.name, scope.outputs[index - 1]))
        return producer is not None and producer.node.op_type == "Add" and name in producer.node.input


def _values_that_reach_an_output(values: Values) -> set[Value]:
    """One pass backwards from the outputs. Bodies of If, Loop and Scan go on through their node's outputs."""
    found: set[Value] = set()
    visited: set[int] = set()
    pending: deque[Value] = deque()

    def reach(scope: Scope, name: str) -> None:
        value = values.resolve(scope, name)
        if value is not None and value not in found:
            found.add(value)
            pending.append(value)

    for scope in values.scopes:
        owner = scope.owner
        if scope.function is None and (owner is None or owner.op_type not in ("If", "Loop", "Scan")):
            for name in scope.outputs:
                reach(scope, name)
    while pending:
        producer = values.producers.get(pending.popleft())
        if producer is None:
            continue
        scope, node, index = producer
        if (body := values.function(node)) is not None:
            bodies, shift = [body], 0
        else:
            bodies, shift = values.scopes_of(node), 1 if node.op_type == "Loop" else 0
        for body in bodies:  # a Loop body's first output is its condition
            if index + shift < len(body.outputs):
                reach(body, body.outputs[index + shift])
        if not bodies and op_name(node) in _PASSES and id(node) not in visited:
            visited.add(id(node))  # one wrapper per node as long as `producers` holds it
            for name in node.input:
                reach(scope, name)
    return found
