"""Express a tie that a Transpose node makes so that a runtime does not fold it into a second copy.

torch's exporter and optimum write `Transpose(W) → MatMul`, onnxruntime-genai `Transpose(W) → Gather`; ONNX Runtime,
onnxsim and graphsurgeon compute the Transpose once and keep both matrices. The consumers are given a form that reads W
itself, so the bytes stay as they are; only where a consumer has no such form (or the user prefers it) is the transpose
stored instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tieaudit.change import Respell
from tieaudit.dtypes import dtype
from tieaudit.formats.onnx.bench import Bench, Spot
from tieaudit.formats.onnx.flip import Leaf, Stuck, flip, leaves, transposed_reads
from tieaudit.formats.onnx.patterns import Style, cost
from tieaudit.formats.onnx.share import Decision, elem, lay_out, seen, take_seats
from tieaudit.formats.onnx.workbench import Site
from tieaudit.model import Model


class InPlace(NamedTuple):
    """The matrix stays as it is stored; the Transposes go."""

    spot: Spot
    shape: tuple[int, int]
    """As it is stored."""


NO_TRANSPOSE = "no Transpose node reads"


def decide(bench: Bench, model: Model, edit: Respell, style: Style) -> InPlace | Decision | str:
    """How to do it, or the reason why it cannot be done."""
    seats = take_seats(bench, model, ((edit.weight, False),))
    if isinstance(seats, str):
        return seats
    weight, spot, _ = seats[0]
    if len(weight.shape) != 2 or dtype(weight.dtype).n_bits % 8 or not dtype(weight.dtype).n_bits:
        return f"{edit.weight} is {weight.dtype} {list(weight.shape)}: only matrices can be read both ways"
    turns = tuple(transposed_reads(spot.piece, spot.body, spot.name, seen(seats[0]), elem(spot)))
    if not turns:
        return f"{NO_TRANSPOSE} {edit.weight}"
    total, reason = 0, None
    for item in _leaves_behind(spot, turns, seen(seats[0])[::-1], style):
        if isinstance(item, Stuck):
            reason = reason or item.because
        else:
            total += cost(item.name, style, item.dequantised)
    other = lay_out(seats, True, style)
    if isinstance(other, Decision) and (reason is not None or other.cost < total):
        return other
    if reason is not None:
        return f"{edit.weight} cannot be read as it is stored: {reason}; nor can its transpose be stored: {other}"
    return InPlace(spot, seen(seats[0]))


def _leaves_behind(
    spot: Spot, turns: tuple[tuple[Site, str, int], ...], shape: tuple[int, int], style: Style
) -> Iterator[Leaf | Stuck]:
    """What reads the results of the Transposes."""
    for site, source, kind in turns:
        body = site.op.body
        origin = body.owner_of(source)
        for item in leaves(spot.piece, body, site.op.proto.output[0], shape, kind, style):
            inner = item.reading.op.body if isinstance(item, Leaf) else body
            if inner.owner_of(source) is not origin:
                yield Stuck(f"the graph {inner.name!r} uses the name {source!r} for something else")
            yield item


def respell(bench: Bench, found: InPlace, style: Style) -> None:
    """Rewrite what is behind the Transposes."""
    (piece, body, name, _), shape = found
    piece.touched = True
    while (turn := next(iter(transposed_reads(piece, body, name, shape, elem(found.spot))), None)) is not None:
        site, source, kind = turn
        out = site.op.proto.output[0]
        inner = site.op.body
        flip(piece, inner, out, source, shape[::-1], kind, style, bench.records)
        if out in inner.makers:
            inner.replace(site.op, ())
        owner = inner.owner_of(source)
        if owner is not None and source != name:
            owner.sweep(source)
