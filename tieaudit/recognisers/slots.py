"""Operations that say themselves what their slots hold: convolutions, recurrent cells, norms, fused attention."""

from __future__ import annotations

from tieaudit.recognisers import Reading, Recogniser

_KINDS = {"recurrent_bias": "recurrent_input_bias"}
"""ONNX keeps both biases of a recurrent cell in one tensor."""


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    for index, meaning in enumerate(flow.meanings):
        inputs = flow.operations[index].inputs
        for slot, kind in (meaning.roles or {}).items():
            if slot >= len(inputs) or not (ids := flow.learned(inputs[slot])):
                continue
            kind = _KINDS.get(kind, kind)
            if kind == "norm_scale":
                reading.norms.add(index)
            reading.tell(ids[:1], kind, f"slot {slot} of {reading.at(index)}")
            if kind == "convolution":  # a weight norm: the direction is the largest
                reading.tell(ids[1:], "other", f"scales the convolution {ids[0]}")


slots = Recogniser(
    name="slots",
    rank=10,
    summary="convolutions, recurrent cells, norms and fused attention, by the slots of one operation",
    recognise=_recognise,
)
