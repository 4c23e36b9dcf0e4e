"""Norms that are written out: x divided by a root of a mean, times a learned scale, plus a learned bias."""

from __future__ import annotations

from collections import deque

from tieaudit.flow import Nature
from tieaudit.recognisers import Reading, Recogniser

_PARTS = frozenset("view multiply divide root adjust subtract add reduce choose activate".split())
_MEANS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "mean", "sum", "var")
_LENGTHS = ("ReduceL2", "norm", "linalg_vector_norm", "LpNormalization")
_N_MOST_STEPS = 40


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    for index, operation in enumerate(flow.operations):
        if flow.does(index) == "subtract":
            _less_scaled(reading, index)
        if flow.does(index) not in ("multiply", "add"):
            continue
        learned = [value for value in operation.inputs if flow.nature(value) is Nature.FIXED and flow.learned(value)]
        data = [value for value in operation.inputs if flow.is_data(value)]
        if len(learned) != 1 or len(data) != 1:
            continue
        if flow.does(index) == "multiply" and flow.is_vector(learned[0]) and _is_root(reading, data[0]):
            reading.norms.add(index)
            because = f"multiplies the root by which something is normalised ({reading.at(index)})"
            reading.tell(flow.learned(learned[0]), "norm_scale", because)
        elif flow.does(index) == "multiply" and _normalised(reading, data[0]):
            reading.norms.add(index)
            reading.tell(flow.learned(learned[0]), "norm_scale", f"scales what is normalised ({reading.at(index)})")
        elif flow.does(index) == "multiply" and flow.is_vector(learned[0]) and _affine(reading, index):
            reading.norms.add(index)
            because = f"scales what a vector of its size is then added to, as behind a norm ({reading.at(index)})"
            reading.tell(flow.learned(learned[0]), "norm_scale", because)
        elif flow.does(index) == "add" and flow.is_vector(learned[0]) and _scaled(reading, data[0]):
            reading.tell(flow.learned(learned[0]), "norm_bias", f"added behind a norm ({reading.at(index)})")


def _normalised(reading: Reading, value: str) -> bool:
    """Whether a value is something divided by a root of its own mean, or the result of a norm without a scale."""
    flow = reading.flow
    pending, seen = deque([(value, True)]), {value}
    rooted = meant = long = False
    while pending and len(seen) < _N_MOST_STEPS:
        current, viewed = pending.popleft()
        index = flow.maker.get(current)
        if index is None:
            continue
        does, op = flow.does(index), flow.operations[index].op
        if does == "normalise" and viewed and index not in reading.norms:
            return True
        rooted |= does == "root" or op in ("Pow", "pow")
        meant |= op in _MEANS
        long |= op in _LENGTHS
        data = [one for one in flow.data_inputs(index) if flow.is_data(one)]
        if does not in _PARTS or does == "add" and len(data) > 1:
            continue
        for one in data:
            if one not in seen:
                seen.add(one)
                pending.append((one, viewed and does == "view"))
    return _divides(reading, value) and (long or rooted and meant)


def _divides(reading: Reading, value: str) -> bool:
    """Whether the nearest operation that is no view multiplies or divides two data values, a root among them."""
    flow = reading.flow
    for _ in range(4):
        index = flow.maker.get(value)
        if index is None:
            return False
        if flow.does(index) == "view":
            value = flow.operations[index].inputs[0]
            continue
        data = [one for one in flow.data_inputs(index) if flow.is_data(one)]
        if flow.does(index) in ("multiply", "divide") and len(data) == 2:
            makers = [flow.maker.get(one, -1) for one in data]
            short = [flow.does(maker) for maker in makers if maker >= 0]
            short += ["root" for maker in makers if maker >= 0 and _one_over_root(reading, maker)]
            return any(one in ("root", "choose", "activate", "reduce", "view") or one == "adjust" for one in short)
        if flow.does(index) == "multiply" and len(data) == 1:  # times a number
            value = data[0]
            continue
        return False
    return False


def _one_over_root(reading: Reading, index: int) -> bool:
    """Whether an operation divides a number by a root, as the older exporter of PyTorch spells rsqrt."""
    flow = reading.flow
    data = [one for one in flow.data_inputs(index) if flow.is_data(one)]
    if flow.does(index) != "divide" or len(data) != 1 or data[0] == flow.operations[index].inputs[0]:
        return False
    return data[0] in flow.maker and flow.does(flow.maker[data[0]]) == "root"


def _is_root(reading: Reading, value: str) -> bool:
    """Whether a value is 1 / √(mean …): x · (scale · root) + (bias − mean · (scale · root)), as in TensorFlow."""
    flow, rooted = reading.flow, False
    for _ in range(_N_MOST_STEPS):
        index = flow.maker.get(value)
        if index is None:
            return False
        does, op = flow.does(index), flow.operations[index].op
        if rooted and (op in _MEANS or does == "normalise"):
            return True
        data = [one for one in flow.data_inputs(index) if flow.is_data(one)]
        if does == "root" or op in ("Pow", "pow"):
            rooted = True
        elif (
            not rooted
            and does != "view"
            or rooted
            and does not in ("view", "add", "choose", "subtract", "adjust", "multiply")
        ):
            return False
        if not data:
            return False
        value = data[0]
    return False


def _less_scaled(reading: Reading, index: int) -> None:
    """The bias in bias − mean · (scale · root)."""
    flow = reading.flow
    first, second = [*flow.operations[index].inputs, "", ""][:2]
    maker = flow.maker.get(second)
    if not (flow.learned(first) and flow.is_vector(first)) or maker is None or flow.does(maker) != "multiply":
        return
    if any(flow.maker.get(value) in reading.norms for value in flow.operations[maker].inputs):
        because = f"the scaled mean is subtracted from it, behind a norm ({reading.at(index)})"
        reading.tell(flow.learned(first), "norm_bias", because)


def _affine(reading: Reading, index: int) -> bool:
    """A norm whose statistics were folded away, or that has none: x · scale + bias, both learned."""
    flow = reading.flow
    readers = flow.readers.get(flow.operations[index].outputs[0], ())
    if len(readers) != 1 or flow.does(readers[0][0]) != "add":
        return False
    vectors = [flow.size(value) for value in flow.operations[readers[0][0]].inputs if flow.is_vector(value)]
    own = [flow.size(value) for value in flow.operations[index].inputs if flow.is_vector(value)]
    return bool(vectors) and vectors == own and own[0] > 1


def _scaled(reading: Reading, value: str) -> bool:
    flow = reading.flow
    for _ in range(3):
        index = flow.maker.get(value)
        if index is None:
            return False
        if index in reading.norms or flow.does(index) == "normalise":
            return True
        if flow.does(index) == "multiply" and any(
            flow.maker.get(one) in reading.norms for one in flow.data_inputs(index)
        ):
            return True
        if flow.does(index) != "view":
            return False
        value = flow.operations[index].inputs[0]
    return False


norm = Recogniser(
    name="norm",
    rank=25,
    summary="scale and bias of norms that are written out in small operations",
    recognise=_recognise,
)
