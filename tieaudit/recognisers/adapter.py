"""Low-rank adapters: x · A · B, added to what x gives at another, larger matrix."""

from __future__ import annotations

from tieaudit.recognisers import Reading, Recogniser

_BETWEEN = frozenset(["view"])
_SCALED = frozenset("view multiply divide".split())


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    for second in flow.projections.values():
        if second.index in reading.kinds or not 0 < second.n_in < second.n_out:
            continue
        firsts = reading.behind(second.x, _BETWEEN)
        if len(firsts) != 1 or firsts[0].n_out >= firsts[0].n_in or firsts[0].index in reading.kinds:
            continue
        beside = _beside(reading, second.out, firsts[0].x)
        if beside is not None:
            because = f"a low-rank correction of {beside} ({reading.at(second.index)})"
            reading.project(firsts[0], "adapter_a", because)
            reading.project(second, "adapter_b", because)


def _beside(reading: Reading, value: str, x: str) -> str | None:
    """The weight whose product with the same x is added to a value."""
    flow = reading.flow
    for index, slot in reading.ahead(value, _SCALED):
        if flow.does(index) == "add" and len(flow.operations[index].inputs) == 2:
            other = flow.operations[index].inputs[1 - slot]
            for one in reading.behind(other, _SCALED | {"add"}):
                if one.x == x:
                    return one.weights[0]
    return None


adapter = Recogniser(
    name="adapter",
    rank=15,
    summary="low-rank pairs whose product is added to another projection of the same input",
    recognise=_recognise,
)
