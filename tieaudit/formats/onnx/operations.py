"""The graph of an ONNX file as neutral operations: what flows from node to node, through bodies and functions.

Made when somebody looks; until then the parsed graph is kept, without its large tensors. A copy in another process
(pickled) keeps the path only and reads the file again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tieaudit.formats.onnx.scopes import Scope, first_output, walk_scopes
from tieaudit.formats.onnx.values import op_name
from tieaudit.model import Attribute, Operation, make_id

if TYPE_CHECKING:
    from onnx import AttributeProto, NodeProto

_N_MOST_INLINED = 50_000
"""Operations of one file beyond those it spells: bodies of functions, once for every call but the first."""
_N_MOST_CALLS = 50
"""Functions inside functions."""
_N_MOST_INTS = 16
_INTEGER_TYPES = frozenset({2, 3, 4, 5, 6, 7, 12, 13})  # TensorProto.DataType
_STRING = 8
"""Texts become integers by a table of words before anything is looked up."""


class Operations(Sequence[Operation]):
    """The operations of one file, in the order of its nodes."""

    def __init__(self, file: Path, part: str, scopes: list[Scope] | None = None) -> None:
        self.file = file
        self.part = part
        self._scopes = scopes
        self._made: tuple[Operation, ...] | None = None

    def _all(self) -> tuple[Operation, ...]:
        """Raises CorruptFile where the file has changed since. Cost: linear in the nodes and in calls of functions."""
        if self._made is None:
            if self._scopes is None:
                from tieaudit.formats.onnx.read import parse

                self._scopes = walk_scopes(parse(self.file)[0], str(self.file))
            self._made = tuple(_Walk(self._scopes, self.part).main())
            self._scopes = None
        return self._made

    @overload
    def __getitem__(self, index: int) -> Operation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Operation]: ...
    def __getitem__(self, index: int | slice) -> Operation | Sequence[Operation]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._all())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Operations, (self.file, self.part))


class OfParts(Sequence[Operation]):
    """The operations of several files, one after the other."""

    def __init__(self, parts: Sequence[Operations]) -> None:
        self.parts = tuple(parts)

    @overload
    def __getitem__(self, index: int) -> Operation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Operation]: ...
    def __getitem__(self, index: int | slice) -> Operation | Sequence[Operation]:
        return tuple(self)[index]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[Operation]:
        for part in self.parts:
            yield from part


class _Walk:
    """One pass over the nodes of a file; `names` says what a name means where it is not the scope's own value."""

    def __init__(self, scopes: list[Scope], part: str) -> None:
        self.part = part
        self.scopes = scopes
        self.functions = {
            (scope.function.domain, scope.function.name): scope for scope in scopes if scope.function is not None
        }
        self.bodies: dict[int, list[Scope]] = {}
        for scope in scopes:
            if scope.owner is not None:
                self.bodies.setdefault(id(scope.owner), []).append(scope)
        self.n_left = sum(len(scope.nodes) for scope in scopes) + _N_MOST_INLINED
        self.n_calls = 0

    def main(self) -> Iterator[Operation]:
        for scope in self.scopes:
            if scope.parent is None and scope.function is None:
                yield from self._inputs(scope)
                yield from self._nodes(scope, {}, "", 0)
                for name in scope.outputs:
                    value = self._value(scope, name, {}, "")
                    yield Operation("output", f"@{name}", (value,), (), {}, self.part, scope.name)

    def _inputs(self, scope: Scope) -> Iterator[Operation]:
        held = set() if scope.graph is None else {tensor.name for tensor in scope.graph.initializer}
        for info in scope.graph.input if scope.graph is not None else ():
            if info.name in held:
                continue
            kind = info.type.tensor_type
            by_ids = kind.elem_type in _INTEGER_TYPES or kind.elem_type == _STRING
            facts: dict[str, Attribute] = {"name": info.name, "integer": int(by_ids)}
            if kind.HasField("shape"):
                facts["rank"] = len(kind.shape.dim)
            value = make_id(info.name, self.part, scope.name)
            yield Operation("input", info.name, (), (value,), facts, self.part, scope.name)

    def _nodes(self, scope: Scope, names: dict[str, str], call: str, depth: int) -> Iterator[Operation]:
        for node in scope.nodes:
            self.n_left -= 1
            if self.n_left < 0:
                return
            inputs = tuple(self._value(scope, name, names, call) for name in node.input)
            outputs = tuple(self._value(scope, name, names, call) for name in node.output)
            body = self.functions.get((node.domain, node.op_type)) if self.functions else None
            if body is not None and depth < _N_MOST_CALLS:
                yield from self._call(body, inputs, outputs, depth, scope)
                continue
            bodies = self.bodies.get(id(node), ()) if self.bodies else ()
            if not bodies:
                handle = first_output(node) or node.op_type
                yield Operation(op_name(node), handle, inputs, outputs, _attributes(node), self.part, scope.name)
                continue
            for one in bodies:
                yield from self._body(node, one, inputs, outputs, names, call, depth)

    def _call(
        self, body: Scope, inputs: tuple[str, ...], outputs: tuple[str, ...], depth: int, scope: Scope
    ) -> Iterator[Operation]:
        """The body of a function, its values named for this call alone."""
        self.n_calls += 1
        call = f"call {self.n_calls}:"
        names = dict(zip(body.inputs, inputs, strict=False))
        yield from self._nodes(body, names, call, depth + 1)
        for name, output in zip(body.outputs, outputs, strict=False):
            yield self._pass(self._value(body, name, names, call), output, scope)

    def _body(
        self,
        node: NodeProto,
        body: Scope,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        names: dict[str, str],
        call: str,
        depth: int,
    ) -> Iterator[Operation]:
        """If takes no inputs; Loop's body gets (iteration, condition, states) for (trip count, condition, states)."""
        if node.op_type in ("Loop", "Scan"):
            for given, name in zip(inputs, body.inputs, strict=False):
                if given:
                    yield self._pass(given, self._value(body, name, names, call), body)
        yield from self._nodes(body, names, call, depth)
        returned = body.outputs[1:] if node.op_type == "Loop" else body.outputs
        for name, output in zip(returned, outputs, strict=False):
            yield self._pass(self._value(body, name, names, call), output, body)

    def _pass(self, value: str, to: str, scope: Scope) -> Operation:
        return Operation("pass", to, (value,), (to,), {}, self.part, scope.name)

    def _value(self, scope: Scope, name: str, names: dict[str, str], call: str) -> str:
        if not name:
            return ""
        owner = scope.owner_of(name) if scope.parent is not None else scope
        if call and owner is not None and (owner.function is not None or owner is scope):
            return names.get(name) or make_id(call + name, self.part, owner.name)
        return make_id(name, self.part, owner.name if owner is not None else scope.name)


def _attributes(node: NodeProto) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    for item in node.attribute:
        value = _attribute(item)
        if value is not None:
            found[item.name] = value
    return found


def _attribute(item: AttributeProto) -> Attribute | None:
    """INT = 2, FLOAT = 1, STRING = 3, INTS = 7 (AttributeProto.AttributeType)."""
    if item.ref_attr_name:
        return None
    if item.type == 2 or not item.type and item.HasField("i"):
        return int(item.i)
    if item.type == 1:
        return float(item.f)
    if item.type == 3 and len(item.s) < 100:
        return bytes(item.s).decode("utf-8", "replace")
    if item.type == 7 and len(item.ints) <= _N_MOST_INTS:
        return tuple(int(number) for number in item.ints)
    return None
