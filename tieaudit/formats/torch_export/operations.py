"""The graph of an exported program as neutral operations, for roles: what flows from call to call."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.formats.torch_export.flow import Call, Value, flat
from tieaudit.formats.torch_export.program import Program
from tieaudit.model import Attribute, Operation, Weight, make_id

_N_MOST_DEPTH = 50
_INTEGERS = frozenset({"int64", "int32", "int16", "int8", "uint8"})


def operations_of(program: Program, weights: tuple[Weight, ...]) -> tuple[Operation, ...]:
    """Inputs, calls in their order, outputs; bodies of control flow behind the call that runs them. Cost: linear."""
    return tuple(_Walk(program, weights).all())


class _Walk:
    def __init__(self, program: Program, weights: tuple[Weight, ...]) -> None:
        self.program = program
        self.flow = program.flow
        values = program.weights
        self.ids = {Value("", values[one.name]): one.id for one in weights if one.name in values}

        self.calls: dict[str, list[Call]] = {}
        for call in self.flow.calls:
            self.calls.setdefault(call.scope, []).append(call)

    def all(self) -> Iterator[Operation]:
        yield from self._inputs()
        yield from self._scope("", 0)
        for name in self.flow.outputs.get("", ()):
            yield Operation("output", f"@{name}", (self._name(Value("", name)),), ())

    def _scope(self, scope: str, depth: int) -> Iterator[Operation]:
        for call in self.calls.get(scope, ()):
            if call.bodies and depth < _N_MOST_DEPTH:
                yield from self._into(call, depth)
            else:
                yield self._operation(call)

    def _inputs(self) -> Iterator[Operation]:
        for name in sorted(self.program.user_inputs):
            value = Value("", name)
            facts: dict[str, Attribute] = {"name": name}
            if value in self.flow.dtypes:
                facts["integer"] = int(self.flow.dtypes[value] in _INTEGERS)
            port = next((one for one in self.program.ports if one.name == name), None)
            if port is not None:
                facts |= {"integer": int(port.dtype in _INTEGERS), "rank": len(port.dims)}
            yield Operation("input", name, (), (self._name(value),), facts)

    def _operation(self, call: Call) -> Operation:
        inputs = tuple(self._name(one) if isinstance(one, Value) else "" for one in flat(call.args))
        outputs = tuple(self._name(Value(call.scope, name)) for name in call.outputs)
        return Operation(call.op, call.name, inputs, outputs, scope=call.scope)

    def _into(self, call: Call, depth: int) -> Iterator[Operation]:
        """What a call hands to the graphs that it runs, these, and what it takes from them."""
        for slot, operand in enumerate(flat(call.args)):
            if isinstance(operand, Value):
                for inner in self.flow.entered(call, slot):
                    yield Operation("pass", call.name, (self._name(operand),), (self._name(inner),), scope=call.scope)
        for body in call.bodies:
            yield from self._scope(body, depth + 1)
            for inside, outside in zip(self.flow.outputs.get(body, ()), call.outputs, strict=False):
                made = self._name(Value(body, inside)), self._name(Value(call.scope, outside))
                yield Operation("pass", call.name, made[:1], made[1:], scope=call.scope)

    def _name(self, value: Value) -> str:
        return self.ids.get(value) or make_id(f"%{value.name}", "", value.scope)
