"""Who makes and who reads each value of one ONNX file: the index that every question about its graphs is asked of."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from tieaudit.formats.onnx.scopes import Scope
from tieaudit.model import Weight

if TYPE_CHECKING:
    from onnx import AttributeProto, NodeProto

DEFAULT_DOMAINS = ("", "ai.onnx")
_RANDOM = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout".split()
)
_N_MOST_INTS = 64


class Value(NamedTuple):
    """A value, by the scope that defines it and its name there."""

    scope: str
    name: str


class Consumer(NamedTuple):
    """One input slot of one node."""

    scope: Scope
    node: NodeProto
    slot: int


class Producer(NamedTuple):
    """One output of one node."""

    scope: Scope
    node: NodeProto
    slot: int


def op_name(node: NodeProto) -> str:
    """Operation type, with its domain unless it is the default one."""
    return str(node.op_type) if node.domain in DEFAULT_DOMAINS else f"{node.domain}.{node.op_type}"


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """The attribute of that name, or None."""
    return next((item for item in node.attribute if item.name == name), None)


def int_attribute(node: NodeProto, name: str, default: int) -> int | None:
    """An integer attribute; None if it refers to an attribute of the enclosing function."""
    found = attribute(node, name)
    if found is None:
        return default
    return None if found.ref_attr_name else int(found.i)


class Values:
    """Producers and consumers of every value, names resolved through the nesting of scopes.

    Cost of building: linear in nodes and inputs (times the depth of nesting for outer names).
    """

    def __init__(self, scopes: list[Scope], weights: Mapping[Value, Weight]) -> None:
        self.scopes = scopes
        self.by_name = {scope.name: scope for scope in scopes}
        self.weights = weights
        self.producers: dict[Value, Producer] = {}
        self.consumers: dict[Value, list[Consumer]] = {}
        self.outputs: dict[Value, list[tuple[Scope, int]]] = {}
        self.input_types: dict[Value, int] = {}
        self.functions: dict[tuple[str, str, str], Scope] = {}
        self.calls: dict[str, list[Consumer]] = {}
        self._bodies: dict[int, list[Scope]] = {}
        self._ints: dict[Value, tuple[int, ...] | None] = {}
        for scope in scopes:
            if scope.function is not None:
                self.functions.setdefault(_signature(scope.function, scope.function.name), scope)
        for scope in scopes:
            self._index(scope)

    def _index(self, scope: Scope) -> None:
        if scope.owner is not None:
            self._bodies.setdefault(id(scope.owner), []).append(scope)  # `scope` keeps the wrapper alive
        if scope.graph is not None:
            for info in scope.graph.input:
                is_tensor = info.type.HasField("tensor_type")
                self.input_types[Value(scope.name, info.name)] = info.type.tensor_type.elem_type if is_tensor else -1
        for node in scope.nodes:
            for index, name in enumerate(node.output):
                if name:
                    self.producers[Value(scope.name, name)] = Producer(scope, node, index)
            for slot, name in enumerate(node.input):
                value = self.resolve(scope, name)
                if value is not None:
                    self.consumers.setdefault(value, []).append(Consumer(scope, node, slot))
            if (called := self.function(node)) is not None:
                self.calls.setdefault(called.name, []).append(Consumer(scope, node, 0))
        for index, name in enumerate(scope.outputs):
            value = self.resolve(scope, name)
            if value is not None:
                self.outputs.setdefault(value, []).append((scope, index))

    def resolve(self, scope: Scope, name: str) -> Value | None:
        """The value that `name` means inside `scope`, or None for an empty or undefined name."""
        if not name:
            return None
        owner = scope.owner_of(name)
        return Value(owner.name, name) if owner is not None else None

    def function(self, node: NodeProto) -> Scope | None:
        """The body of the model-local function that a node calls, or None."""
        return self.functions.get(_signature(node, node.op_type)) if self.functions else None

    def scopes_of(self, node: NodeProto) -> list[Scope]:
        """The bodies of a control-flow or search node."""
        return self._bodies.get(id(node), [])

    def ints(self, scope: Scope, name: str) -> tuple[int, ...] | None:
        """A short integer constant by the name it has in `scope`, or None if it is not one."""
        value = self.resolve(scope, name)
        if value is None:
            return None
        if value not in self._ints:
            self._ints[value] = self._read_ints(value)
        return self._ints[value]

    def _read_ints(self, value: Value) -> tuple[int, ...] | None:
        weight = self.weights.get(value)
        if weight is not None:
            known = weight.dtype in ("int64", "int32") and weight.held_as != "sparse_initializer"
            if not known or weight.overridable or weight.storage is None or weight.n_elements > _N_MOST_INTS:
                return None
            data = weight.storage.read_ranges([(0, weight.n_bytes)])[0]
            return struct.unpack(f"<{weight.n_elements}{'q' if weight.dtype == 'int64' else 'i'}", data)
        producer = self.producers.get(value)
        if producer is None or producer.node.op_type != "Constant":
            return None
        for item in producer.node.attribute:
            if item.name == "value_ints":
                return tuple(int(number) for number in item.ints)
            if item.name == "value_int":
                return (int(item.i),)
        return None

    def constants(self) -> set[Value]:
        """Values that depend on no input: weights, and what is computed from constants alone.

        Nodes with bodies, random nodes and function calls count as not constant. Cost: linear.
        """
        found: set[Value] = set()
        pending = deque(self.weights)
        missing: dict[int, int] = {}
        for producer in self.producers.values():
            if producer.node.op_type == "Constant":
                pending.append(Value(producer.scope.name, producer.node.output[producer.slot]))
        while pending:
            value = pending.popleft()
            if value in found:
                continue
            found.add(value)
            for scope, node, _ in self.consumers.get(value, ()):
                key = id(node)  # one wrapper per node as long as `consumers` holds it
                if key not in missing:
                    missing[key] = self._n_inputs(scope, node)
                missing[key] -= 1
                if missing[key] == 0:
                    pending.extend(Value(scope.name, name) for name in node.output if name)
        return found

    def _n_inputs(self, scope: Scope, node: NodeProto) -> int:
        has_body = any(item.HasField("g") for item in node.attribute)
        if node.op_type in _RANDOM or has_body or self.function(node) is not None:
            return -1
        return sum(1 for name in node.input if name)


def _signature(item: object, name: str) -> tuple[str, str, str]:
    domain = getattr(item, "domain", "")
    return ("" if domain in DEFAULT_DOMAINS else domain, name, getattr(item, "overload", ""))
