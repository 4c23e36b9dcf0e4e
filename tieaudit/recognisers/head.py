"""The output head: the last projection before an output of the graph, onto the vocabulary of a token table."""

from __future__ import annotations

from tieaudit.flow import Projection
from tieaudit.recognisers import ELEMENTWISE, Reading, Recogniser

_TO_OUTPUT = ELEMENTWISE | frozenset("softmax pick reduce join scatter compare".split())
_NEAR = 0.1
"""Rows by which a vocabulary is padded on one side: at most a tenth."""
_WIDE = 8
"""Outputs for each input from which a single last projection scores a vocabulary of its own."""
_FEWEST = 3
"""A projection onto two outputs is a decision, whatever tables have two rows."""


def _recognise(reading: Reading) -> None:
    flow = reading.flow
    tables = {
        flow.shape_at(i, id)[0]: id
        for i, operation in enumerate(flow.operations)
        if flow.does(i) in ("lookup", "embed") or flow.does(i) == "product" and i not in flow.projections
        for value in operation.inputs
        for id in flow.learned(value)
        if reading.roles.get(id, None) is not None and reading.roles[id].kind == "token_embedding"
    }
    last: dict[int, Projection] = {}
    for index, operation in enumerate(flow.operations):
        if flow.does(index) == "output":
            for value in operation.inputs:
                last.update((one.index, one) for one in reading.behind(value, _TO_OUTPUT))
    last = {index: one for index, one in last.items() if index not in reading.kinds and one.n_out >= _FEWEST}
    exact = [one for one in last.values() if one.n_out in tables]
    near = [one for one in last.values() if any(abs(one.n_out - rows) <= _NEAR * rows for rows in tables)]
    if not exact and not near and tables and len(last) == 1:
        near = [one for one in last.values() if one.n_out >= _WIDE * one.n_in > 0]
    for one in exact or near:
        rows = min(tables, key=lambda rows: abs(rows - one.n_out))
        of = f"the vocabulary of {tables[rows]}" + ("" if rows == one.n_out else f", which has {rows} rows")
        reading.project(one, "output_head", f"last projection onto {one.n_out} outputs, {of} ({reading.at(one.index)})")


head = Recogniser(
    name="head",
    rank=40,
    summary="the last projection onto the vocabulary of a token embedding",
    recognise=_recognise,
)
