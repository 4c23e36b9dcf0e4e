"""Gate, up and down: x · W₁, an activation, maybe a product of two such branches, then W₂ back onto the stream."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tieaudit.flow import Flow, Projection
from tieaudit.recognisers import Reading, Recogniser

_INNER = frozenset(
    "view add subtract multiply divide choose activate adjust root reduce join normalise convolve scatter "
    "lookup".split()
)
_TO_STREAM = _INNER - {"convolve"} | {"product"}


@dataclass
class _Branch:
    """A projection behind the inner side of a feed-forward, and whether an activation lies between on every way."""

    one: Projection
    activated: bool
    bare: bool
    """Also reached without an activation."""


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    for index in sorted(flow.projections):
        down = flow.projections[index]
        if index in reading.kinds or reading.spine.block_of.get(index) is None:
            continue
        branches = _branches(reading, down)
        if not branches or not any(branch.activated for branch in branches) and len(branches) < 2:
            continue
        if any(branch.one.index in reading.kinds for branch in branches) or len(branches) > 2:
            continue
        if _rejoins(reading, down):
            _tell(reading, down, branches)


def _rejoins(reading: Reading, down: Projection) -> bool:
    """Whether what is projected reaches the stream with no other learned matrix on the way."""
    flow, stream = reading.flow, reading.spine.on_stream
    ends = set(flow.operations[down.index].outputs)
    for index, _ in reading.ahead(flow.operations[down.index].outputs[0], _TO_STREAM):
        if index not in flow.projections:
            ends.update(flow.operations[index].outputs)
    return not ends.isdisjoint(stream)


def _tell(reading: Reading, down: Projection, branches: list[_Branch]) -> None:
    place = reading.at(down.index)
    if len(branches) == 2:
        branches.sort(key=lambda branch: (branch.bare or not branch.activated, branch.one.index))
        reading.project(branches[0].one, "ffn_gate", f"activated, it gates what is projected at {place}")
        reading.project(branches[1].one, "ffn_up", f"multiplied by a gate and projected at {place}")
    else:
        branch = branches[0].one
        if down.n_in and branch.n_out == 2 * down.n_in:
            reading.project(branch, "ffn_gate_up", f"twice the width of what is projected at {place}")
        else:
            reading.project(branch, "ffn_up", f"activated and projected at {place}")
    reading.project(down, "ffn_down", "projects an activated projection back onto the stream")


def _branches(reading: Reading, down: Projection) -> list[_Branch]:
    flow, stream = reading.flow, reading.spine.on_stream
    found: dict[int, _Branch] = {}
    pending, seen = deque([(down.x, False)]), {(down.x, False)}
    while pending and len(seen) < 400:
        value, activated = pending.popleft()
        index = flow.maker.get(value)
        if index is None or value in stream:
            continue
        if index in flow.projections:
            branch = found.setdefault(index, _Branch(flow.projections[index], False, False))
            fused = activated or bool(flow.operations[index].attributes.get("activation"))  # FusedGemm of ONNX Runtime
            branch.activated |= fused
            branch.bare |= not fused
            continue
        does = flow.does(index)
        if does not in _INNER:
            if does in ("attend", "recur", "embed", "input", "experts", "softmax", "product"):
                return []
            continue
        activated |= does == "activate" and not _is_limit(flow, index)
        for one in flow.data_inputs(index):
            if flow.is_data(one) and (one, activated) not in seen:
                seen.add((one, activated))
                pending.append((one, activated))
    return list(found.values())


def _is_limit(flow: Flow, index: int) -> bool:
    """Clip with given limits keeps what lies between; it is an activation only where the lower limit is 0 (ReLU6)."""
    return flow.operations[index].op in ("Clip", "clamp")


feed_forward = Recogniser(
    name="feed_forward",
    rank=60,
    summary="gate, up and down of a feed-forward block",
    recognise=_recognise,
)
