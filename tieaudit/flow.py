"""What flows through a graph: which values are fixed, counted, ids or data, and who makes and reads each.

Built once for a model with operations; recognisers ask it. Nothing is read but structure.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from heapq import heappop, heappush

from tieaudit.dialects import OTHER, Dialect, Meaning
from tieaudit.model import Model, Operation, Use, Weight
from tieaudit.registry import discover

_N_MOST_LEARNED = 6
"""Weights that one fixed value is computed from; of more, the first ones are known."""
_N_MOST_STEPS = 1500
"""Values that one walk visits."""
_N_MOST_ADDED = 20
"""Views and sums behind a product in which its biases are looked for."""
_N_MOST_STEPS_OF_ALL = 1_000_000
"""Of all walks in one graph: a made-up graph may ask for billions."""
_COUNTED_NAMES = re.compile(r"position|past|length|seq_?len|cache", re.IGNORECASE)
_WORK = frozenset("product convolve recur".split())
_MIXING = frozenset("product convolve recur attend experts normalise softmax".split())


class Nature(IntEnum):
    """What a value is made of; the later one wins where two meet."""

    FIXED = 0
    """Weights and constants only."""
    COUNTED = 1
    """Sizes, positions, masks."""
    IDS = 2
    """Integers that a caller gives."""
    DATA = 3


@dataclass(frozen=True)
class Projection:
    """A learned matrix that something is multiplied by, with the vector that is added afterwards."""

    index: int
    """Of the operation."""
    weights: tuple[str, ...]
    x: str
    """Value that is projected."""
    out: str
    """Value after the bias."""
    biases: tuple[str, ...]
    n_in: int
    n_out: int
    """0 where the shape is not known."""


class Flow:
    """The graph of one model, read through its dialect."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.operations: Sequence[Operation] = _made_before_read(tuple(model.operations))
        self.n_left = _N_MOST_STEPS_OF_ALL
        known = {
            name: meaning for one in discover("dialects", Dialect).values() for name, meaning in one.meanings.items()
        }
        self.meanings: list[Meaning] = [known.get(operation.op, OTHER) for operation in self.operations]
        self.maker: dict[str, int] = {}
        self.readers: dict[str, list[tuple[int, int]]] = {}
        for index, operation in enumerate(self.operations):
            for value in operation.outputs:
                if value:
                    self.maker.setdefault(value, index)
            for slot, value in enumerate(operation.inputs):
                if value:
                    self.readers.setdefault(value, []).append((index, slot))
        self.natures: dict[str, Nature] = {}
        self._learned: dict[str, tuple[str, ...]] = {}
        self._chosen: set[str] = set()
        """Fixed values of which data chose a part: the weights of some experts."""
        self._short: set[str] = set()
        """Integers that a caller gives, one or a row of them."""
        self._ranges: set[str] = set()
        """Positions counted up, those of a fixed length included."""
        for weight in model.weights:
            self.natures[weight.id] = Nature.FIXED
            self._learned[weight.id] = (weight.id,) if _may_be_learned(weight) else ()
        self._learned.update((id, (id,)) for id in self._quantised_biases())
        for index in range(len(self.operations)):
            self._conclude(index)

    def _quantised_biases(self) -> Iterator[str]:
        """Vectors of int32 that are dequantised or stand in the slot of a bias: products of two scales in codes."""
        codes = {one.id for one in self.model.weights if one.dtype == "int32" and len(one.shape) == 1}
        for operation, meaning in zip(self.operations, self.meanings, strict=True):
            for slot, value in enumerate(operation.inputs if codes else ()):
                is_bias = (meaning.roles or {}).get(slot) == "bias" or slot == 0 and "Dequantize" in operation.op
                if value in codes and is_bias:
                    yield value

    def does(self, index: int) -> str:
        """What the operation does, in the common vocabulary."""
        return self.meanings[index].does

    def nature(self, value: str) -> Nature:
        """What a value is made of; what nobody makes counts as fixed."""
        return self.natures.get(value, Nature.FIXED)

    def is_data(self, value: str) -> bool:
        """Whether it carries data (and not sizes, masks, ids or weights only)."""
        return self.natures.get(value, Nature.FIXED) is Nature.DATA

    def learned(self, value: str) -> tuple[str, ...]:
        """Ids of the learned weights that a fixed value is computed from, largest first; none for other values."""
        return self._learned.get(value, ())

    def data_inputs(self, index: int) -> list[str]:
        """The inputs through which data flows on."""
        slots, inputs = self.meanings[index].data, self.operations[index].inputs
        chosen = inputs if not slots else [inputs[slot] for slot in slots if slot < len(inputs)]
        return [value for value in chosen if value]

    def size(self, value: str) -> int:
        """How many elements the largest weight behind a fixed value has; 0 if there is none."""
        return max((self.model.by_id[id].n_elements for id in self.learned(value)), default=0)

    def is_vector(self, value: str) -> bool:
        """A learned value with at most one axis longer than one: a scale or a bias, or one of each expert's."""
        shapes = [self.model.by_id[id].shape for id in self.learned(value)]
        if value in self._chosen:
            shapes = [shape[1:] for shape in shapes]
        return bool(shapes) and all(sum(size > 1 for size in shape) <= 1 for shape in shapes)

    def _conclude(self, index: int) -> None:
        operation, meaning = self.operations[index], self.meanings[index]
        nature, learned = self._result(operation, meaning)
        by_data = meaning.does == "lookup" and any(map(self.is_data, operation.inputs))
        if learned and (by_data or not self._chosen.isdisjoint(operation.inputs)):
            self._chosen.update(operation.outputs)
        for value in operation.outputs:
            if value and value not in self.natures:
                self.natures[value] = nature
                if learned:
                    self._learned[value] = learned

    def _result(self, operation: Operation, meaning: Meaning) -> tuple[Nature, tuple[str, ...]]:
        does = meaning.does
        if does == "input":
            if not operation.attributes.get("integer"):
                return Nature.DATA, ()
            counted = _COUNTED_NAMES.search(str(operation.attributes.get("name", "")))
            if (rank := operation.attributes.get("rank")) in (0, 1) and rank is not None:
                self._short.update(operation.outputs)
            return (Nature.COUNTED if counted else Nature.IDS), ()
        if does == "positions":
            self._ranges.update(operation.outputs)
        if does in ("shape", "positions", "compare"):
            fixed = all(self.nature(value) is Nature.FIXED for value in operation.inputs)
            return (Nature.FIXED if fixed and does != "shape" else Nature.COUNTED), ()
        if does == "embed":
            return Nature.DATA, ()
        if does == "lookup":
            return self._looked_up(operation, meaning)
        if does == "view":
            first = operation.inputs[0] if operation.inputs else ""
            return self.nature(first), self.learned(first)
        natures = [self.nature(value) for value in operation.inputs if value]
        nature = max(natures, default=Nature.FIXED)
        if (
            does in ("add", "subtract")
            and nature is Nature.IDS
            and (Nature.COUNTED in natures or not self._ranges.isdisjoint(operation.inputs))
        ):
            given = [value for value in operation.inputs if self.nature(value) is Nature.IDS]
            if self._short.issuperset(given):  # positions that begin where a caller says
                return Nature.COUNTED, ()
        if nature is Nature.IDS and (does in _MIXING or does == "other"):
            nature = Nature.DATA
        if nature is Nature.COUNTED and does in _WORK and any(map(self.learned, operation.inputs)):
            nature = Nature.DATA  # ids as ones among zeros, times a table
        if nature is not Nature.FIXED:
            return nature, ()
        found = dict.fromkeys(id for value in operation.inputs for id in self.learned(value))
        largest = sorted(found, key=lambda id: -self.model.by_id[id].n_elements)
        return nature, tuple(largest[:_N_MOST_LEARNED])

    def _looked_up(self, operation: Operation, meaning: Meaning) -> tuple[Nature, tuple[str, ...]]:
        inputs = operation.inputs
        table = inputs[meaning.table] if meaning.table < len(inputs) else ""
        indices = inputs[meaning.indices] if meaning.indices < len(inputs) else ""
        if self.nature(table) is not Nature.FIXED:
            return self.nature(table), ()
        learned, by = self.learned(table), self.nature(indices)
        if by is Nature.FIXED or by is Nature.DATA and learned:  # chosen experts: still a weight
            return Nature.FIXED, learned
        return (Nature.DATA if learned else Nature.COUNTED), ()

    @cached_property
    def uses(self) -> dict[tuple[str, str, str], list[Use]]:
        """Uses of weights by (part, scope, node)."""
        found: dict[tuple[str, str, str], list[Use]] = {}
        for use in self.model.uses:
            found.setdefault((use.part, use.scope, use.node), []).append(use)
        return found

    def shape_at(self, index: int, id: str) -> tuple[int, ...]:
        """The shape in which an operation sees a weight, its own transposition of it included; else as stored."""
        weight, use = self.model.by_id[id], self._use(index, id)
        return weight.shape if use is None else use.view.shape(weight.shape)

    def _use(self, index: int, id: str) -> Use | None:
        operation = self.operations[index]
        uses = self.uses.get((operation.part, operation.scope, operation.node), ())
        return next((use for use in uses if use.weight == id), None)

    @cached_property
    def projections(self) -> dict[int, Projection]:
        """Every product with a learned matrix, by the operation's index."""
        found = {}
        for index, meaning in enumerate(self.meanings):
            if meaning.does == "product" and (one := self._projection(index, meaning)) is not None:
                found[index] = one
        return found

    def _projection(self, index: int, meaning: Meaning) -> Projection | None:
        operation = self.operations[index]
        data = self.data_inputs(index)
        matrices = [value for value in data if self.learned(value)]
        others = [value for value in data if self.nature(value) in (Nature.DATA, Nature.IDS)]
        if not matrices or len(others) != 1 or not operation.outputs:
            return None
        matrix = max(matrices, key=self.size)
        weights = tuple(id for id in self.learned(matrix) if len(self.model.by_id[id].shape) > 1)
        if not weights:
            return None
        n_in, n_out = self._sizes(index, weights[0], operation.inputs.index(matrix))
        biases: list[str] = []
        if meaning.bias is not None and meaning.bias < len(operation.inputs):
            biases.extend(self.learned(operation.inputs[meaning.bias]))
        out, added = self.added_after(operation.outputs[0])
        return Projection(index, weights, others[0], out, (*biases, *added), n_in, n_out)

    def _sizes(self, index: int, id: str, slot: int) -> tuple[int, int]:
        attributes, shape = self.operations[index].attributes, tuple(self.shape_at(index, id))
        if isinstance(n := attributes.get("N"), int) and isinstance(k := attributes.get("K"), int):
            return k, n
        if len(shape) < 2:
            return 0, 0
        columns, rows = shape[::-1][0], shape[::-1][1]
        linear = self.operations[index].op == "linear"  # y = x·Wᵀ: a use tells W as it is multiplied, a name as stored
        turned = slot == 0 or linear and self._use(index, id) is None
        return (columns, rows) if turned else (rows, columns)

    def added_after(self, value: str) -> tuple[str, tuple[str, ...]]:
        """Behind the learned vectors that are added to a value: the last sum, and the vectors."""
        found: list[str] = []
        maker = self.maker.get(value)
        whole = maker is not None and self.operations[maker].op.endswith("MatMulInteger")
        at = value  # views are passed to see whether a vector is added behind them
        for _ in range(_N_MOST_ADDED):
            readers = self.readers.get(at, [])
            if len(readers) != 1:
                break
            (index, slot), other = readers[0], ""
            operation, meaning = self.operations[index], self.meanings[index]
            if meaning.does == "add" and meaning.bias is None and len(operation.inputs) == 2:
                other = operation.inputs[1 - slot]
                if not (self.nature(other) is Nature.FIXED and self.is_vector(other)):
                    break
            elif meaning.bias is not None and meaning.does != "product" and meaning.bias < len(operation.inputs):
                if slot != meaning.bias:  # fused with what follows: the sum itself is nowhere
                    found += [id for id in self.learned(operation.inputs[meaning.bias]) if id not in found]
                break
            elif meaning.does == "multiply" and whole and len(operation.outputs) == 1:
                pass  # the scales of codes: the sum of their products is a number again
            elif meaning.does != "view" or slot != 0 or len(operation.outputs) != 1:
                break
            at = operation.outputs[0]
            if other:
                found += self.learned(other)
                value = at
        return value, tuple(found)

    def back(self, value: str, through: frozenset[str], stops: Container[str] = ()) -> Iterator[int]:
        """Operations behind a data value, nearest first; what `through` does not name is given and not passed.

        A value in `stops` is not looked behind. Cost: at most 1,500 values.
        """
        pending, seen = deque([value]), {value}
        while pending:
            current = pending.popleft()
            self.n_left -= 1
            index = self.maker.get(current)
            if index is None or current in stops or self.n_left < 0:
                continue
            yield index
            if self.does(index) not in through or index in self.projections or len(seen) > _N_MOST_STEPS:
                continue
            for one in self.data_inputs(index):
                if one not in seen and self.nature(one) in (Nature.DATA, Nature.IDS):
                    seen.add(one)
                    pending.append(one)


def _may_be_learned(weight: Weight) -> bool:
    codes = ("int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16")
    packed = weight.dtype in codes and len(weight.shape) > 1
    return weight.parameter is not False and (weight.is_float or packed)


def _made_before_read(operations: Sequence[Operation]) -> Sequence[Operation]:
    """The operations, each behind those that make its inputs; as they were where they are so, or go in a circle.

    ONNX asks for that order, but optimisers of graphs append nodes (the Split in ONNX Runtime's own GPT-2 models).
    """
    maker: dict[str, int] = {}
    for index, operation in enumerate(operations):
        for value in operation.outputs:
            maker.setdefault(value, index)
    waits = [{maker[value] for value in one.inputs if value in maker} - {at} for at, one in enumerate(operations)]
    if all(before < index for index, needed in enumerate(waits) for before in needed):
        return operations
    order: list[int] = []
    readers: dict[int, list[int]] = {}
    for index, needed in enumerate(waits):
        for before in needed:
            readers.setdefault(before, []).append(index)
    ready = [index for index, needed in enumerate(waits) if not needed]
    while ready:  # the earliest that can be done, so that what was in order stays so
        index = heappop(ready)
        order.append(index)
        for reader in readers.get(index, ()):
            waits[reader].discard(index)
            if not waits[reader]:
                heappush(ready, reader)
    return [operations[index] for index in order] if len(order) == len(operations) else operations
