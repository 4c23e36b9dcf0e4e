"""Two questions about an ATen call: does it look up ids that a caller gives, and does its result reach an output?

The same questions, and the same answers, as for ONNX (`formats/onnx/lookups.py`), asked of another set of operations.
"""

from __future__ import annotations

from collections import deque

from tieaudit.formats.onnx.lookups import NOT_IDS, Kind
from tieaudit.formats.torch_export.flow import Call, Flow, Value, flat

LOOKUPS = {"embedding": (0, 1), "embedding_bag": (0, 1), "index_select": (0, 2), "index": (0, 1), "gather": (0, 2)}
"""Operation → slot of the table, slot of the indices."""
_FIRST = frozenset(
    "to _to_copy view reshape _unsafe_view unsqueeze squeeze flatten transpose t permute slice select clone contiguous "
    "detach detach_ alias clamp clamp_min clamp_max expand expand_as index index_select gather masked_fill "
    "masked_fill_ roll flip constant_pad_nd pad abs remainder repeat repeat_interleave split chunk unbind copy "
    "slice_scatter lift_fresh_copy new_zeros zeros_like fill_ mod getitem tril triu".split()
)
"""Operations whose result is ids if their first operand is."""
_ALL = frozenset("cat stack add sub maximum minimum mul".split())
_SECOND = frozenset("where index_put index_put_ slice_scatter copy masked_scatter".split())
"""Operations that put the values of later operands into the first one, or choose between them."""
_WRITES = frozenset("copy_ index_put_ masked_scatter_".split())
"""Operations that write a later operand into the first one, and into what that one is a view of."""
_POSITIONS = frozenset("arange cumsum sym_size sym_numel nonzero range linspace".split())
_VIEWS = frozenset("slice select view unsqueeze squeeze transpose t permute expand alias detach".split())

_ELEMENTWISE = frozenset(
    "add sub mul div neg abs exp log log2 log1p sqrt rsqrt pow remainder fmod to _to_copy type_as tanh sigmoid relu "
    "leaky_relu softplus erf gelu silu hardtanh clamp clamp_min clamp_max where masked_fill masked_fill_ softmax "
    "log_softmax _softmax _log_softmax view reshape _unsafe_view transpose t permute slice select squeeze unsqueeze "
    "flatten expand clone contiguous detach alias index index_select gather cat stack split split_with_sizes chunk "
    "unbind getitem argmax topk max amax maximum minimum mean sum logsumexp dropout eq ne lt le gt ge logical_not "
    "logical_and logical_or bitwise_not bitwise_and scatter index_put copy_ index_put_ constant_pad_nd pad repeat "
    "slice_scatter lift_fresh_copy numpy_T mT movedim moveaxis unflatten narrow roll flip copy tril triu round "
    "add_ sub_ mul_ div_ tanh_ relu_ sigmoid_ float".split()
)
"""Element-wise and shape operations: nothing with a learned matrix, and no normalisation."""
_INTEGERS = frozenset("int64 int32 int16 int8 uint8".split())


class Lookups:
    """Answers for one program, each value worked out once. `ids` are the integer tensors that a caller gives."""

    def __init__(self, flow: Flow, user_inputs: frozenset[str]) -> None:
        self._flow = flow
        self._users = user_inputs
        self._kinds: dict[Value, Kind] = {}
        self._entered: dict[Value, list[Value]] = {}
        self._written: dict[Value, list[Value]] = {}
        for call in flow.calls:
            self._note(call)
        self._reaching = self._values_that_reach_an_output()

    def reads_ids(self, call: Call, slot: int) -> bool:
        """Whether this slot is a table whose indices are ids given to the program."""
        known = LOOKUPS.get(call.op)
        operands = flat(call.args)
        if known is None or known[0] != slot or known[1] >= len(operands):
            return False
        indices = operands[known[1]]
        return isinstance(indices, Value) and self.kind(indices) is Kind.IDS

    def indexed(self, call: Call) -> tuple[int, frozenset[str]]:
        """Rows of the table of a lookup, 0 if unknown, and the inputs of the program whose values index it."""
        table, slot = LOOKUPS[call.op]
        operands = flat(call.args)
        if slot >= len(operands) or not all(isinstance(operands[one], Value) for one in (table, slot)):
            return 0, frozenset()
        axis = operands[1] if call.op in ("index_select", "gather") else 0
        shape = self._flow.shapes.get(operands[table], ())
        met, pending = {operands[slot]}, [operands[slot]]
        while pending:
            for one in self._sources(pending.pop()):
                if one not in met:
                    met.add(one)
                    pending.append(one)
        named = frozenset(one.name for one in met if not one.scope and one.name in self._users)
        return (shape[axis] if isinstance(axis, int) and -len(shape) <= axis < len(shape) else 0), named

    def feeds_output(self, call: Call) -> bool:
        """Whether a result reaches an output through element-wise and shape operations only."""
        return any(Value(call.scope, name) in self._reaching for name in call.outputs)

    def kind(self, value: Value) -> Kind:
        """Ids, positions or neither. Cost: linear over all calls together; a cycle counts as neither."""
        pending = [value]
        while pending:
            current = pending[-1]
            if current not in self._kinds:
                self._kinds[current] = Kind.OTHER  # the answer while it is being worked out
                unknown = [one for one in self._sources(current) if one not in self._kinds]
                if unknown:
                    pending.extend(unknown)
                    continue
            self._kinds[current] = self._conclude(current)
            pending.pop()
        return self._kinds[value]

    def _note(self, call: Call) -> None:
        """What a call passes into graphs that it runs, and what it writes into others."""
        operands = flat(call.args)
        for slot, operand in enumerate(operands):
            if isinstance(operand, Value) and call.bodies:
                for inside in self._flow.entered(call, slot):
                    self._entered.setdefault(inside, []).append(operand)
        if call.op in _WRITES and operands and isinstance(operands[0], Value):
            target: Value | None = operands[0]
            written = [one for one in operands[1:] if isinstance(one, Value)]
            met: set[Value] = set()
            while target is not None and target not in met:
                met.add(target)
                self._written.setdefault(target, []).extend(written)
                maker = self._flow.producers.get(target)
                first = flat(maker.args)[:1] if maker is not None and maker.op in _VIEWS else []
                target = first[0] if first and isinstance(first[0], Value) else None

    def _sources(self, value: Value) -> list[Value]:
        """The values that decide about this one."""
        found = [*self._entered.get(value, ()), *self._written.get(value, ())]
        call = self._flow.producers.get(value)
        if call is None:
            return found
        operands = [one for one in flat(call.args) if isinstance(one, Value)]
        if call.bodies:
            place = call.outputs.index(value.name)
            for body in call.bodies:
                names = self._flow.outputs.get(body, ())
                found += [Value(body, names[place])] if place < len(names) else []
        elif call.op in _ALL:
            found += operands
        elif call.op in _SECOND:
            found += [*operands[:1], *operands[1:]] if call.op != "where" else operands[1:]
        elif call.op in _FIRST:
            found += operands[:1]
        return found

    def _conclude(self, value: Value) -> Kind:
        call = self._flow.producers.get(value)
        kinds = [self._kinds.get(one, Kind.OTHER) for one in self._sources(value)]
        if call is not None and call.op in _POSITIONS:
            return Kind.POSITIONS
        if call is not None and call.op in ("add", "sub", "mul") and Kind.POSITIONS in kinds:
            return Kind.POSITIONS
        if call is None and not value.scope and value.name in self._users:
            if self._flow.dtypes.get(value) not in _INTEGERS:
                return Kind.OTHER
            return Kind.POSITIONS if NOT_IDS.search(value.name) else Kind.IDS
        return Kind.IDS if Kind.IDS in kinds else max(kinds, default=Kind.OTHER)

    def _values_that_reach_an_output(self) -> set[Value]:
        found = {Value("", name) for name in self._flow.outputs.get("", ())}
        pending = deque(found)
        while pending:
            value = pending.popleft()
            call = self._flow.producers.get(value)
            before: list[Value] = []
            if call is None:  # an input, of a nested graph perhaps
                before = self._entered.get(value, [])
            elif call.bodies:
                place = call.outputs.index(value.name)
                for body in call.bodies:
                    names = self._flow.outputs.get(body, ())
                    before += [Value(body, names[place])] if place < len(names) else []
            elif call.op in _ELEMENTWISE:
                before = [one for one in flat(call.args) if isinstance(one, Value)]
            for one in before:
                if one not in found:
                    found.add(one)
                    pending.append(one)
        return found
