"""What is left: biases by what they are added to, tables that are added, and projections of no special place."""

from __future__ import annotations

from tieaudit.flow import Nature
from tieaudit.recognisers import Reading, Recogniser

_N_MOST_TYPES = 8
"""Rows of a table of types; one with a row for each position has more."""
_WITH_BIAS = ("attention_", "ffn_", "output_head")


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    for one in flow.projections.values():
        kind = reading.kinds.get(one.index, "")
        if kind.startswith(_WITH_BIAS):
            reading.tell(one.biases, f"{kind}_bias", f"added to what {one.weights[0]} gives ({reading.at(one.index)})")
        else:
            reading.tell(one.biases, "bias", f"added to what {one.weights[0]} gives ({reading.at(one.index)})")
        reading.project(one, "projection", f"multiplies what flows ({reading.at(one.index)})")
    # without an attention nothing needs to be told where it stands: what is added to an image is no table of positions
    mixes = any(meaning.does in ("attend", "softmax") for meaning in flow.meanings) and bool(reading.spine.blocks)
    for index, operation in enumerate(flow.operations):
        if flow.does(index) not in ("add", "subtract"):
            continue
        for value in operation.inputs:
            if flow.nature(value) is Nature.FIXED and flow.learned(value) and any(map(flow.is_data, operation.inputs)):
                _added(reading, index, value, mixes)
    for index, operation in enumerate(flow.operations):
        if any(map(flow.is_data, operation.outputs)):
            for value in operation.inputs:
                reading.tell(flow.learned(value), "other", f"read by {reading.at(index)}")


def _added(reading: Reading, index: int, value: str, mixes: bool) -> None:
    flow = reading.flow
    ids, place = flow.learned(value), reading.at(index)
    others = [one for one in flow.operations[index].inputs if one != value]
    for _ in range(4):
        maker = flow.maker.get(others[0]) if others else None
        if maker is None:
            break
        one = flow.projections.get(maker)
        if one is not None:
            # heads may have an axis of their own, and a fused projection a bias for a third of it
            if flow.is_vector(value) or one.n_out % max(flow.size(value), 1) == 0:
                kind = reading.kinds.get(maker, "")
                suffix = f"{kind}_bias" if kind.startswith(_WITH_BIAS) else "bias"
                reading.tell(ids[:1], suffix, f"added to what {one.weights[0]} gives ({place})")
            break
        if flow.does(maker) not in ("view", "add"):
            break
        others = [value for value in flow.data_inputs(maker) if flow.is_data(value)][:1]
    if flow.is_vector(value):
        reading.tell(ids[:1], "bias", f"a vector that is added ({place})")
    elif len(ids) == 1 and mixes and _is_one_type(reading, value, ids[0]):
        reading.tell(ids, "type_embedding", f"a row that was chosen beforehand is added ({place})")
    elif len(ids) == 1 and mixes:
        reading.tell(ids, "position_embedding", f"added, with a value for every position ({place})")


def _is_one_type(reading: Reading, value: str, id: str) -> bool:
    """Rows of a small table by fixed indices: the types of an example that has one, as exporters write it."""
    flow = reading.flow
    if not 1 < flow.model.by_id[id].shape[0] <= _N_MOST_TYPES:
        return False
    for _ in range(4):
        maker = flow.maker.get(value)
        if maker is None or flow.does(maker) not in ("view", "lookup"):
            return False
        if flow.does(maker) == "lookup":
            return flow.operations[maker].inputs[0] == id
        value = flow.operations[maker].inputs[0]
    return False


rest = Recogniser(
    name="rest",
    rank=90,
    summary="biases, added tables, and projections of no special place",
    recognise=_recognise,
)
