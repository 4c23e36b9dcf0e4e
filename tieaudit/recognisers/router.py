"""Routers: a projection whose scores choose which of several branches work."""

from __future__ import annotations

from tieaudit.recognisers import Reading, Recogniser

_SCORES = frozenset("view add subtract multiply divide softmax activate adjust reduce choose".split())


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    for index, operation in enumerate(flow.operations):
        if flow.does(index) == "pick" and operation.inputs and reading.spine.block_of.get(index) is not None:
            for one in reading.behind(operation.inputs[0], _SCORES):
                if reading.spine.block_of.get(one.index) is not None:
                    reading.project(one, "router", f"its best scores are picked ({reading.at(index)})")
        elif flow.does(index) == "experts" and len(operation.inputs) > 1:
            for one in reading.behind(operation.inputs[1], _SCORES):
                reading.project(one, "router", f"chooses the experts of {reading.at(index)}")


router = Recogniser(
    name="router",
    rank=50,
    summary="projections whose best scores choose experts",
    recognise=_recognise,
)
