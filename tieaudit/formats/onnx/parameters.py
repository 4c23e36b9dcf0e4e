"""Which weights are parameters: learned numbers, and not masks, indices, shape constants, statistics or scales.

Decided by the slots that a weight reaches. From each weight the walk goes on through what only carries it (views,
Expand, Slice …) and through whatever is computed from constants alone (a weight norm, a folded rotary table), up to
the first operation that mixes it with data; that operation and its slot give the verdict, *learned* winning over the
rest. Values are looked at only where the shape suggests a mask or a table of sines, and up to 16 MiB. Names are a
second source, for rotary tables and for scalars.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from tieaudit.dtypes import dtype
from tieaudit.formats.onnx.lookups import Kind, Lookups
from tieaudit.formats.onnx.scopes import first_output
from tieaudit.formats.onnx.slots import BUFFERS, CARRYING, LEARNED, STEERING
from tieaudit.formats.onnx.values import Consumer, Value, Values, op_name
from tieaudit.model import Weight
from tieaudit.storage import blocks

NOT_USED = "not used by any node"
_N_MOST_BYTES_READ = 16 * 1024 * 1024
_N_MOST_STEPS = 5_000
_N_LEAST_STEPS = 50
"""Values that are followed for every weight, also when those before it have used up what there was for all."""
_N_STEPS_FOR_ALL = 200_000
_N_FEW = 65
"""Elements from which on a Constant node is taken for a parameter; slopes, means and coefficients are fewer."""
_BUFFER_NAMES = re.compile(
    r"inv_freq|rotary_emb|(cos|sin)_?cached?|cached_(cos|sin)|relative_position_index|position_ids|mel_filters|"
    r"(causal|attn|attention)_?mask|running_(mean|var)$|num_batches_tracked$|final_logits_bias|_buffer$",
    re.IGNORECASE,
)
_PARAMETER_ENDINGS = re.compile(r"(^|[._/])(weight|bias|gamma|beta|logit_scale|logit_bias|gate|slope)$")
_MADE_UP_NAMES = re.compile(
    r"^onnx::|^\d+$|[Cc]onstant|^/|_fold|^const|"
    # names of nodes of torch.export graphs, which its exporter gives to what it folded
    r"^(val|where|embedding|unsqueeze|squeeze|expand|view|reshape|mul|add|sub|div|neg|exp|zeros|ones|full|transpose|"
    r"permute|index|cat|cos|sin|slice|to|_to_copy|clone|select|arange|triu|tril|masked_fill|scalar_tensor|"
    r"lift_fresh_copy|repeat|_?unsafe_view|new_\w+|zeros_like|ones_like|full_like)(_\d+)?$"
)
_PACKED_INTS = frozenset("int8 uint8 int4 uint4 int2 uint2".split())
_MATRIX_OPS = frozenset("MatMul Gemm com.microsoft.FusedMatMul Einsum Conv".split())


class Verdict(NamedTuple):
    """One slot's opinion, stronger ones first when compared."""

    strength: int
    parameter: bool | None
    because: str


def _learned(because: str) -> Verdict:
    return Verdict(3, True, because)


def _not(because: str) -> Verdict:
    return Verdict(2, False, because)


def _unsure(because: str) -> Verdict:
    return Verdict(1, None, because)


class Parameters:
    """Verdicts for the weights of one file. Cost: linear, plus the bytes of the few small tensors looked at."""

    def __init__(self, values: Values, lookups: Lookups) -> None:
        self.values = values
        self.lookups = lookups
        self.constants = values.constants()
        self._n_left = _N_STEPS_FOR_ALL + _N_LEAST_STEPS * len(values.weights)
        self._facts: dict[Value, _Facts | None] = {}

    def verdict(self, value: Value, weight: Weight) -> tuple[bool | None, str]:
        """(is it a parameter, why)."""
        if dtype(weight.dtype).family in ("string", "bool"):
            return False, f"{weight.dtype} values are not learned"
        if not weight.n_elements:
            return False, "has no elements"
        best = None
        for opinion in self._opinions(value, weight):
            if best is None or opinion.strength > best.strength:
                best = opinion
            if best.strength == 3:
                break
        if best is None:
            return None, NOT_USED
        return best.parameter, best.because

    def _opinions(self, value: Value, weight: Weight) -> Iterator[Verdict]:
        pending, met = deque([(value, False)]), {value}
        n_steps = min(_N_MOST_STEPS, max(_N_LEAST_STEPS, self._n_left))
        while pending:
            current, quantised = pending.popleft()
            if current in self.values.outputs:
                yield from self._returned(current, weight, pending, met, quantised)
            for consumer in self.values.consumers.get(current, ()):
                if n_steps <= 0:
                    yield _unsure("reaches more operations than are followed")
                    return
                onward = list(self._onward(consumer))
                n_steps -= 1 + len(onward)
                self._n_left -= 1 + len(onward)
                now = quantised or op_name(consumer.node).endswith("DequantizeLinear")
                if not onward:
                    yield self._judge(consumer, weight, now)
                pending.extend((one, now) for one in onward if one not in met)
                met.update(onward)

    def _returned(
        self, value: Value, weight: Weight, pending: deque[tuple[Value, bool]], met: set[Value], quantised: bool
    ) -> Iterator[Verdict]:
        """A value that its graph returns: follow it out of a function body or a branch."""
        for scope, index in self.values.outputs[value]:
            places = [(call.scope, call.node) for call in self.values.calls.get(scope.name, ())]
            if scope.owner is not None and scope.parent is not None and scope.owner.op_type == "If":
                places.append((scope.parent, scope.owner))
            outer = [Value(place.name, node.output[index]) for place, node in places if index < len(node.output)]
            fresh = [one for one in outer if one.name and one not in met]
            met.update(fresh)
            pending.extend((one, quantised) for one in fresh)
            if not outer:
                scalar = weight.n_elements == 1 or not _is_real(weight)
                yield _not("only returned, a constant") if scalar else _unsure("only returned by the graph")

    def _onward(self, consumer: Consumer) -> Iterator[Value]:
        """The values in which the weight lives on behind this consumer, none if the consumer decides."""
        scope, node, slot = consumer
        if (body := self.values.function(node)) is not None:
            if slot < len(body.inputs):
                yield Value(body.name, body.inputs[slot])
            return
        op = op_name(node)
        if slot in LEARNED.get(op, ()) and not self._is_constant(scope.name, node):
            return
        if slot in BUFFERS.get(op, ()) or slot in STEERING.get(op, ()):
            return
        if slot in CARRYING.get(op, ()) or self._is_constant(scope.name, node):
            for name in node.output:
                if name:
                    yield Value(scope.name, name)

    def _is_constant(self, scope: str, node: object) -> bool:
        name = first_output(node)  # type: ignore[arg-type]
        return bool(name) and Value(scope, name) in self.constants

    def _judge(self, consumer: Consumer, weight: Weight, quantised: bool) -> Verdict:
        op, slot = op_name(consumer.node), consumer.slot
        place = f"slot {slot} of {op}"
        if slot in BUFFERS.get(op, ()):
            return _not(f"{place}: statistics, a computed table, a scale or a zero point")
        if slot in STEERING.get(op, ()):
            return _not(f"{place}: a shape, axis, index, limit or condition")
        if op in ("LSTM", "GRU", "RNN") and slot in (5, 6):
            return self._initial_state(consumer, weight)
        if slot in LEARNED.get(op, ()):
            return self._learned_slot(consumer, weight, place)
        if op in ("Gather", "GatherND", "GatherElements"):
            return self._table(consumer, weight, place, quantised)
        if not (_is_real(weight) or quantised):
            return _not(f"{weight.dtype} numbers in {place}")
        if op in ("Add", "Sub", "Mul", "Div", "Where", "Sum", "Concat", "Max", "Min", "com.microsoft.QLinearAdd"):
            return self._element_wise(consumer, weight, place)
        if weight.n_elements == 1:
            return _not(f"a scalar in {place}")
        return _unsure(f"{place} is not known to hold parameters or constants")

    def _learned_slot(self, consumer: Consumer, weight: Weight, place: str) -> Verdict:
        op, node = op_name(consumer.node), consumer.node
        if dtype(weight.dtype).family == "int" and weight.n_elements == 1:
            return _not(f"a scalar in {place}")
        if op == "InstanceNormalization" and _is_made_up(weight):  # GroupNormalization is exported around it
            facts = self._look(consumer, weight)
            if facts is not None and facts.constant:
                return _not(f"{place}, one value everywhere: not the module's own")
        if op in _MATRIX_OPS and consumer.slot < 2:
            if _BUFFER_NAMES.search(weight.name):
                return _not(f"named as a computed table, {place}")
            other = self.values.resolve(consumer.scope, node.input[1 - consumer.slot]) if len(node.input) > 1 else None
            if self.lookups.kind(other) is Kind.POSITIONS:
                return _not(f"{place}, multiplied with positions: rotary frequencies")
        return _learned(place)

    def _initial_state(self, consumer: Consumer, weight: Weight) -> Verdict:
        facts = self._look(consumer, weight)
        place = f"initial state of {consumer.node.op_type}"
        return _not(f"{place}, all values equal") if facts is None or facts.constant else _learned(place)

    def _table(self, consumer: Consumer, weight: Weight, place: str, quantised: bool) -> Verdict:
        if weight.n_elements == 1:
            return _not(f"a scalar in {place}")
        if not _is_real(weight):
            packed = weight.dtype in _PACKED_INTS and len(weight.shape) > 1
            if not (packed or quantised):
                return _not(f"{weight.dtype} numbers in {place}: a table of indices")
            return _learned(f"{place}: a quantised table")
        given = consumer.node.input[1:2]
        indices = self.values.resolve(consumer.scope, given[0]) if given else None
        if self.lookups.kind(indices) is not Kind.IDS and self._computed(consumer, weight):
            return _not(f"{place}: a table of sines and cosines")
        return _learned(place)

    def _computed(self, consumer: Consumer, weight: Weight) -> bool:
        """Whether a position table is computed: called so, or its first row is all 0 and 1 (sin 0, cos 0)."""
        if _BUFFER_NAMES.search(weight.name):
            return True
        if weight.name.endswith(".weight"):  # an embedding module's weight is a parameter even where it is frozen
            return False
        facts = self._look(consumer, weight)
        return facts is not None and facts.sinusoidal

    def _element_wise(self, consumer: Consumer, weight: Weight, place: str) -> Verdict:
        scope, node, slot = consumer
        op = op_name(node)
        if prod(weight.shape) == 1:
            return self._scalar(consumer, weight, place)
        if _BUFFER_NAMES.search(weight.name):
            return _not(f"named as a mask or a computed table, {place}")
        if _was_constant_node(weight) and _is_made_up(weight) and weight.n_elements < _N_FEW:
            return _not(f"{place}, a few numbers written into the graph by the exporter")
        if _was_constant_node(weight) and _is_made_up(weight) and sum(size > 1 for size in weight.shape) > 1:
            return _not(f"{place}, a grid written into the graph by the exporter: anchors, priors or coordinates")
        others = [self.values.resolve(scope, name) for index, name in enumerate(node.input) if index != slot]
        if op in ("Mul", "Add", "Sub", "Div") and any(self.lookups.kind(one) is Kind.POSITIONS for one in others):
            return _not(f"{place}, combined with positions")
        if op in ("Sub", "Div") and slot == 1 and others[0] in self.values.input_types:
            return _not(f"{place}: normalises an input of the graph")
        if op == "Mul" and any(self._dequantises(one) for one in others):
            return _not(f"{place}: scales of a product of whole numbers")
        facts = self._look(consumer, weight)
        if facts is not None:
            if facts.mask:
                return _not(f"{place}, only 0, 1 or very negative values: a mask")
            if facts.sinusoidal and not weight.name.endswith(".weight"):
                return _not(f"{place}: a table of sines and cosines")
            if facts.constant and _is_made_up(weight) and (len(weight.shape) > 1 or op in ("Concat", "Where")):
                return _not(f"{place}, one value everywhere: a mask, padding or an empty state")
        return _learned(place)

    def _dequantises(self, value: Value | None) -> bool:
        """Whether a factor is the product of quantised tensors, or the scale of an input quantised as it comes.

        ONNX Runtime's quantize_dynamic writes Cast(MatMulInteger(…)) · (scale of the input · scales of the weight).
        Source: onnxruntime/python/tools/quantization/operators/matmul.py, MatMulInteger.quantize.
        """
        producer = self.values.producers.get(value) if value is not None else None
        if producer is not None and producer.node.op_type == "Cast":
            behind = self.values.resolve(producer.scope, producer.node.input[0])
            producer = self.values.producers.get(behind) if behind is not None else None
            return producer is not None and producer.node.op_type in ("MatMulInteger", "ConvInteger")
        return producer is not None and producer.node.op_type == "DynamicQuantizeLinear" and producer.slot == 1

    def _scalar(self, consumer: Consumer, weight: Weight, place: str) -> Verdict:
        """A single number is a constant of the formula unless it is a module's own or the bias of one output."""
        if consumer.node.op_type == "Add" and len(weight.shape) == 1 and self._follows_one_output(consumer):
            return _learned(f"{place}: the bias of a single output")
        if weight.held_as != "constant_node" and not _is_made_up(weight) and _PARAMETER_ENDINGS.search(weight.name):
            return _learned(f"{place}, named as a parameter")
        return _not(f"a scalar in {place}")

    def _follows_one_output(self, consumer: Consumer) -> bool:
        scope, node, slot = consumer
        other = self.values.resolve(scope, node.input[1 - slot]) if len(node.input) == 2 else None
        producer = self.values.producers.get(other) if other is not None else None
        if producer is None or producer.node.op_type not in ("MatMul", "Gemm") or len(producer.node.input) < 2:
            return False
        matrix = self.values.resolve(producer.scope, producer.node.input[1])
        held = self.values.weights.get(matrix) if matrix is not None else None
        return held is not None and 1 in held.shape[-2:]

    def _look(self, consumer: Consumer, weight: Weight) -> _Facts | None:
        """Facts about the values of a weight; None if it is too large or not of a kind numpy compares."""
        value = Value(weight.scope, weight.name)
        if value not in self._facts:
            self._facts[value] = _look_at(weight)
        return self._facts[value]


class _Facts(NamedTuple):
    constant: bool
    mask: bool
    sinusoidal: bool


def _look_at(weight: Weight) -> _Facts | None:
    if weight.storage is None or weight.n_bytes > _N_MOST_BYTES_READ or weight.held_as == "sparse_initializer":
        return None
    if weight.dtype not in ("float32", "float16", "float64", "bfloat16"):
        return None
    import numpy as np

    data = b"".join(blocks(weight.storage))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        array = np.frombuffer(data, dtype(weight.dtype).numpy()).astype(np.float64, copy=False)
    constant = bool((array == array[0]).all())
    mask = sinusoidal = False
    if len(weight.shape) > 1 and not constant:
        square = weight.shape[-1] == weight.shape[-2] or len(weight.shape) > 2
        mask = square and bool(((array == 0) | (array == 1) | (array <= -1e4)).all())
        width = weight.shape[-1]
        first = array[:width]
        # sin² + cos² = 1 pairs make every row's squares sum to half its width; one table may hold only one of them
        sinusoidal = bool(np.isin(first, (0.0, 1.0)).all() and (np.abs(array) <= 1.0).all())
    return _Facts(constant, mask, sinusoidal)


def _is_real(weight: Weight) -> bool:
    return dtype(weight.dtype).family in ("float", "complex")


def _is_made_up(weight: Weight) -> bool:
    """Whether an exporter invented the name."""
    return bool(_MADE_UP_NAMES.search(weight.name))


def _was_constant_node(weight: Weight) -> bool:
    """Whether it is a Constant node, or was one before an optimiser made an initializer of it."""
    return weight.held_as == "constant_node" or bool(re.search(r"Constant(_\d+)?_output_\d+$", weight.name))
