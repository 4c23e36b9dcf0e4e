"""Query, key, value and output: what flows into a softmax of a product, what that weighs, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from tieaudit.flow import Projection
from tieaudit.recognisers import Reading, Recogniser

_SCORES = frozenset("view add subtract multiply divide choose activate adjust join reduce scatter".split())
_MADE_OF = frozenset(
    "view add subtract multiply divide choose activate adjust root reduce join scatter normalise convolve "
    "lookup".split()
)
_WEIGHED = frozenset("view multiply divide choose join softmax scatter add".split())
_RESULT = frozenset(
    "view multiply divide add subtract choose activate adjust root reduce join normalise scatter product".split()
)
_LOW_RANK = frozenset("view normalise multiply divide root reduce adjust add subtract join".split())


@dataclass(frozen=True)
class _Core:
    """One attention: the values that become queries, keys and values, and what comes out."""

    index: int
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    outputs: tuple[str, ...]


def _recognise(reading: Reading) -> None:
    cores = [core for index in range(len(reading.flow.operations)) if (core := _core(reading, index)) is not None]
    for core in cores:
        _tell(reading, core)
    for core in cores:
        _tell_output(reading, core)


def _core(reading: Reading, index: int) -> _Core | None:
    flow = reading.flow
    operation, meaning = flow.operations[index], flow.meanings[index]
    if meaning.does == "attend":
        given = [operation.inputs[slot] if slot < len(operation.inputs) else "" for slot in meaning.queries]
        q, k, v = [*given, "", "", ""][:3]
        k, v = k or q, v or k or q
        if not meaning.queries:  # projects its queries, keys and values itself
            return _Core(index, (), (), (), operation.outputs[:1])
        return _Core(index, (q,), (k,), (v,), operation.outputs[:1])
    if meaning.does != "softmax" or not operation.inputs:
        return None
    products = [
        i
        for i in flow.back(operation.inputs[0], _SCORES, reading.spine.on_stream)
        if flow.does(i) == "product" and i not in flow.projections
    ]
    if not products:
        return None
    values: list[str] = []
    outputs: list[str] = []
    for reader, slot in reading.ahead(operation.outputs[0], _WEIGHED):
        if flow.does(reader) != "product" or reader in flow.projections:
            continue
        data = flow.data_inputs(reader)
        others = [value for value in data if value != flow.operations[reader].inputs[slot]]
        if others and flow.is_data(others[0]):
            values.append(others[0])
            outputs.extend(flow.operations[reader].outputs[:1])
    if not values:
        return None
    sides = [flow.data_inputs(i) for i in products]
    pairs = [side for side in sides if len(side) > 1]
    return _Core(
        index,
        tuple(side[0] for side in pairs),
        tuple(side[1] for side in pairs),
        tuple(values),
        tuple(outputs),
    )


def _sources(reading: Reading, values: tuple[str, ...]) -> list[Projection]:
    found = {one.index: one for value in values if value for one in reading.behind(value, _MADE_OF)}
    return [one for one in found.values() if one.index not in reading.kinds]


def _tell(reading: Reading, core: _Core) -> None:
    q, k, v = (_sources(reading, values) for values in (core.queries, core.keys, core.values))
    in_q, in_k, in_v = ({one.index for one in found} for found in (q, k, v))
    place = reading.at(core.index)
    told: list[tuple[Projection, str]] = []
    for one in {one.index: one for one in (*q, *k, *v)}.values():
        flags = (one.index in in_q, one.index in in_k, one.index in in_v)
        kind, what = _KINDS[flags]
        told.append((one, kind))
        reading.project(one, kind, f"becomes {what} of the attention at {place}")
        reading.attentions.setdefault(one.index, core.index)
    _tell_low_rank(reading, told, place)
    _note_crossing(reading, told)


_KINDS = {
    (True, False, False): ("attention_query", "the queries"),
    (False, True, False): ("attention_key", "the keys"),
    (False, False, True): ("attention_value", "the values"),
    (True, True, True): ("attention_qkv", "queries, keys and values"),
    (True, True, False): ("attention_qkv", "queries and keys"),
    (True, False, True): ("attention_qkv", "queries and values"),
    (False, True, True): ("attention_kv", "keys and values"),
}


def _tell_low_rank(reading: Reading, told: list[tuple[Projection, str]], place: str) -> None:
    """The first of two factors, with at most a norm between: x · A, then norm, then · B."""
    leads: dict[int, set[str]] = {}
    for one, kind in told:
        for first in reading.behind(one.x, _LOW_RANK):
            leads.setdefault(first.index, set()).add(kind)
    for index, kinds in leads.items():
        first, known = reading.flow.projections[index], reading.kinds.get(index)
        if known is None and kinds == {"attention_query"}:
            reading.project(first, "attention_query", f"first factor of the queries of the attention at {place}")
        elif kinds <= {"attention_key", "attention_value", "attention_kv"}:
            if known == "attention_key":  # a part of the keys itself, and the source of the rest
                reading.roles.pop(first.weights[0], None)
                del reading.kinds[index]
            because = f"first factor of keys and values of the attention at {place}"
            reading.project(first, "attention_kv", because)


def _note_crossing(reading: Reading, told: list[tuple[Projection, str]]) -> None:
    """Keys and values that are made of another stream than the queries."""
    queries = [one for one, kind in told if kind == "attention_query"]
    others = [one for one, kind in told if kind in ("attention_key", "attention_value", "attention_kv")]
    if not queries or not others:
        return
    own = _origin(reading, queries[0].x)
    for one in others:
        theirs = _origin(reading, one.x)
        if own[0] is not None and theirs != own and (theirs[0] is not None or theirs[1]):
            reading.crossings.add(one.x)


def _origin(reading: Reading, value: str) -> tuple[int | None, str]:
    """(stream, graph input) that a value comes from."""
    here = reading.spine.latest(value)
    if here is not None:
        return (here if isinstance(here, int) else here.stream), ""
    found = list(reading.flow.back(value, _LOW_RANK))
    inputs = [index for index in found if reading.flow.does(index) == "input"]
    return None, reading.flow.operations[inputs[0]].node if inputs else ""


def _tell_output(reading: Reading, core: _Core) -> None:
    flow = reading.flow
    for value in core.outputs:
        for index, _ in reading.ahead(value, _RESULT):
            one = flow.projections.get(index)
            if one is not None and index not in reading.kinds:
                because = f"projects what the attention at {reading.at(core.index)} gives"
                reading.project(one, "attention_output", because)
                reading.attentions.setdefault(one.index, core.index)


attention = Recogniser(
    name="attention",
    rank=30,
    summary="query, key, value and output of a softmax of a product, or of one fused operation",
    recognise=_recognise,
)
