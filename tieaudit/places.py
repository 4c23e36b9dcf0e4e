"""Where in a graph a weight stands: its layer by the order of blocks, its side by who attends to whom, its expert."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from tieaudit.model import Role
from tieaudit.recognisers import Reading
from tieaudit.spine import Block

_N_MOST_NESTED = 20
"""Streams inside a block of another stream, inside a block of another one …"""
NO_LAYER = ("token_embedding", "position_embedding", "type_embedding", "output_head", "output_head_bias", "buffer")
"""Kinds that belong to no layer."""


def placed(reading: Reading) -> Mapping[str, Role]:
    """The roles with layers, sides and experts. Cost: linear in the operations."""
    readers = _readers(reading)
    numbers = _numbers(reading)  # of every block the stream and the layer
    encoder = _encoder(reading)
    sides = _sides(reading, readers, encoder)
    experts = _experts(reading, readers)
    attentions = _attentions(reading)
    found = {}
    for id, role in reading.roles.items():
        layers = {_layer(reading, index, numbers, encoder) for index in readers.get(id, ())}
        alone = len(layers) == 1 and role.kind not in NO_LAYER
        stream, layer = (next(iter(layers)) if alone else None) or (None, None)
        because = role.because
        several = [one for one in layers if one is not None]
        if len(several) > 1 and role.kind not in NO_LAYER:
            because += f"; shared by {len(several)} layers"
        role = replace(role, because=because, layer=layer, side=sides.get(id), expert=experts.get(id))  # type: ignore[arg-type]
        found[id] = replace(role, attention=attentions.get(id), stream=stream)
    return found


def _attentions(reading: Reading) -> dict[str, int]:
    """Weight and bias of a projection → the attention that it belongs to; none for what several share."""
    found: dict[str, set[int]] = {}
    for index, core in reading.attentions.items():
        one = reading.flow.projections[index]
        for id in (*one.weights[:1], *one.biases):
            found.setdefault(id, set()).add(core)
    return {id: next(iter(cores)) for id, cores in found.items() if len(cores) == 1}


def _readers(reading: Reading) -> dict[str, list[int]]:
    """Weight → the operations at which it, or what is computed from weights alone with it, meets data."""
    flow, found = reading.flow, dict[str, list[int]]()
    for index, operation in enumerate(flow.operations):
        if not any(flow.is_data(value) for value in operation.outputs if value):
            continue
        for value in operation.inputs:
            for id in flow.learned(value):
                found.setdefault(id, []).append(index)
    return found


_Place = tuple[int, int]
"""Stream, and layer in it."""


def _layer(
    reading: Reading, index: int, numbers: Mapping[int, _Place | None], encoder: frozenset[int]
) -> _Place | None:
    block = reading.spine.block_of.get(index)
    if block is None or index in encoder and block.sum not in encoder:  # behind the encoder's last block
        return None
    return numbers.get(block.sum)


def _numbers(reading: Reading) -> dict[int, _Place | None]:
    """Place of every block, by its sum."""
    streams: dict[int, list[Block]] = {}
    for block in reading.spine.blocks:
        streams.setdefault(block.stream, []).append(block)
    letters = _letters(reading)
    outer: dict[int, int | None] = {}
    for blocks in streams.values():
        marks = [letters.get(block.sum, "") for block in blocks]
        for block, number in zip(blocks, _grouped(marks), strict=True):
            outer[block.sum] = number
    found: dict[int, _Place | None] = {}
    for block in reading.spine.blocks:
        at, steps = block, 0
        while at.inside is not None and len(streams[at.inside.stream]) > 1 and steps < _N_MOST_NESTED:
            at, steps = at.inside, steps + 1
        number = outer[at.sum]
        found[block.sum] = None if number is None else (at.stream, number)
    return found


def _letters(reading: Reading) -> dict[int, str]:
    """What each block does: M mixes positions, X attends to another stream, F is a feed-forward."""
    flow, spine = reading.flow, reading.spine
    found: dict[int, set[str]] = {}

    def note(index: int, letter: str) -> None:
        block, steps = spine.block_of.get(index), 0
        while block is not None and steps < _N_MOST_NESTED:
            found.setdefault(block.sum, set()).add(letter)
            block, steps = block.inside, steps + 1

    for index, one in flow.projections.items():
        kind = reading.kinds.get(index, "")
        if kind in ("attention_query", "attention_qkv"):
            note(index, "M")
        elif kind in ("attention_key", "attention_kv"):
            note(index, "X" if one.x in reading.crossings else "M")
        elif kind.startswith("ffn_"):
            note(index, "F")
    for index, meaning in enumerate(flow.meanings):
        if meaning.does in ("recur", "attend"):
            note(index, "M")
        elif meaning.does == "convolve":
            note(index, "C")
    return {sum: "X" if "X" in marks else "".join(sorted(marks)) for sum, marks in found.items()}


def _grouped(marks: list[str]) -> list[int | None]:
    """Layer of each block: by the shortest pattern that repeats, else a new one wherever positions are mixed.

    Up to two blocks before the first that mixes positions (convolutions over the input) belong to no layer.
    """
    for n_before in range(min(3, len(marks))):
        if n_before and ("M" in marks[n_before - 1] or "M" not in marks[n_before]):
            continue
        rest = marks[n_before:]
        for period in range(1, len(rest) // 2 + 1):
            if len(rest) % period == 0 and all(a == b for a, b in zip(rest, rest[period:], strict=False)):
                return [None] * n_before + [index // period for index in range(len(rest))]
    alone = all(mark == "F" for mark in marks)
    numbers: list[int | None] = []
    number = -1
    for index, mark in enumerate(marks):
        if alone or index == 0 or mark != "F" and "X" not in mark:
            number += 1
        numbers.append(number)
    return numbers


def _encoder(reading: Reading) -> frozenset[int]:
    """Operations that work out what another stream attends to."""
    flow = reading.flow
    encoder: set[int] = set()
    pending, seen = deque(reading.crossings), set(reading.crossings)
    while pending:
        index = flow.maker.get(pending.popleft())
        if index is None:
            continue
        encoder.add(index)
        for value in flow.operations[index].inputs:
            if value and value not in seen:
                seen.add(value)
                pending.append(value)
    return frozenset(encoder)


def _sides(reading: Reading, readers: Mapping[str, list[int]], encoder: frozenset[int]) -> dict[str, str]:
    """Encoder: what the values that another stream attends to are made of. Decoder: the rest of that graph."""
    if not reading.crossings:
        return {}
    flow = reading.flow
    parts = {flow.operations[index].part for index in encoder} | {
        flow.operations[index].part for value in reading.crossings for index, _ in flow.readers.get(value, ())
    }
    found = {}
    for id, indices in readers.items():
        if flow.operations[indices[0]].part not in parts:
            continue
        inside = {index in encoder for index in indices}
        if len(inside) == 1:
            found[id] = "encoder" if inside.pop() else "decoder"
    return found


def _experts(reading: Reading, readers: Mapping[str, list[int]]) -> dict[str, int]:
    """Which of several equal feed-forwards of a block with a router, where there is one for each of its scores."""
    flow, spine = reading.flow, reading.spine
    n_scores: dict[int, int] = {}
    for index, kind in reading.kinds.items():
        block = spine.block_of.get(index)
        if kind == "router" and block is not None:
            n_scores[block.sum] = flow.projections[index].n_out
    places: dict[tuple[int, str, tuple[int, ...]], list[str]] = {}
    for id, role in reading.roles.items():
        block = spine.block_of.get(readers[id][0]) if id in readers else None
        if block is not None and block.sum in n_scores and role.kind.startswith("ffn_"):
            places.setdefault((block.sum, role.kind, reading.flow.model.by_id[id].shape), []).append(id)
    found = {}
    for (block_sum, _, _), ids in places.items():
        if len(ids) == n_scores[block_sum] > 1:
            ids.sort(key=lambda id: readers[id][0])
            found.update({id: number for number, id in enumerate(ids)})
    return found
