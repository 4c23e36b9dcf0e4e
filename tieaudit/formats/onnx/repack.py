"""Let a lookup read the codes of a matrix product: one packed table for GatherBlockQuantized and MatMulNBits.

Both keep a row's codes in the same order of bits, but MatMulNBits wants them as [N, blocks, bytes of a block] and
GatherBlockQuantized takes any shape whose last axis is quantised. So the product's tensor stays, and the lookup reads
each block as a row of its own: scales [N, blocks] → [N, blocks, 1], and the result's two last axes become one. A
Reshape of the codes themselves would be folded by the runtime into a second table; a Reshape of the scales costs a
copy of those only. int4 codes become uint8 ones, whose zero is the middle of the range instead of 0: the same numbers.

Source: ONNX Runtime docs/ContribOperators.md (1.32), contrib_ops/cpu/quantization/gather_block_quantized.cc: uint8 data
needs the first axis looked up and the last one quantised, and one byte of zero points for each row of blocks: zero
points that are packed two or four to a byte stand in the way, typed uint4 ones are cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tieaudit.change import Share
from tieaudit.formats.onnx.annotations import clash, hand_over
from tieaudit.formats.onnx.bench import Bench
from tieaudit.formats.onnx.patterns import MICROSOFT, PACKED_LOOKUP, Reading, emit_packed_lookup
from tieaudit.formats.onnx.share import Seat, drop, take_seats
from tieaudit.formats.onnx.values import attribute, int_attribute
from tieaudit.formats.onnx.workbench import Site
from tieaudit.model import Model, Quantised
from tieaudit.view import Repack

_LOOKUP = f"{MICROSOFT}.GatherBlockQuantized"


class OnePacking(NamedTuple):
    """The tensor that stays, and the tables whose readers will read it."""

    keeper: Seat
    others: tuple[Seat, ...]
    how: Quantised


def is_repacking(edit: Share) -> bool:
    """Whether the members are the same codes in several packings."""
    return any(isinstance(step, Repack) for member in edit.members for step in member.view.steps)


def decide(bench: Bench, model: Model, edit: Share) -> OnePacking | str:
    """Which packing stays, or the reason why one cannot serve all."""
    if edit.values is not None:
        return "packed codes are shared as they are, never with another value"
    seats = take_seats(bench, model, tuple((member.id, False) for member in edit.members))
    if isinstance(seats, str):
        return seats
    how = {one.codes: one for one in model.quantised}
    keepers = [seat for seat in seats if len(seat.weight.shape) == 3 and seat.weight.dtype == "uint8"]
    if not keepers:
        return "no member is packed in blocks as MatMulNBits wants it"
    keeper = keepers[0]
    others = tuple(seat for seat in seats if seat is not keeper)
    for seat in others:
        reason = _why_not(seat, keeper, how[seat.weight.id], model)
        if reason is not None:
            return f"{seat.weight.id} cannot be read from {keeper.weight.id}: {reason}"
    reason = clash(keeper.spot, [(seat.spot, True) for seat in others])
    return reason or OnePacking(keeper, others, how[keeper.weight.id])


def _why_not(seat: Seat, keeper: Seat, how: Quantised, model: Model) -> str | None:
    spot = seat.spot
    if spot.piece is not keeper.spot.piece:
        return "they are in different files"
    if all(body is not keeper.spot.body for body in spot.body.ancestors()):
        return "they are in different graphs, neither of which sees the other"
    if spot.body.returned(spot.name):
        return "it is an output of its graph"
    if how.zeros is not None and model.by_id[how.zeros].dtype not in (("uint8",) if how.bits == 8 else ("uint4",)):
        return f"its zero points are {how.bits} bits each, and a lookup in blocks wants a byte for each"
    for site in spot.body.readers(spot.name):
        reason = _unfit(site, keeper)
        if reason is not None:
            return f"its consumer {site.op.handle!r} ({site.op.type}) {reason}"
    return None


def _unfit(site: Site, keeper: Seat) -> str | None:
    proto = site.op.proto
    if site.op.type != _LOOKUP or site.slot != 0 or len(proto.input) < 3 or not proto.output:
        same = (keeper.weight.dtype, len(keeper.weight.shape)) == ("uint8", 3) and site.op.type.endswith("MatMulNBits")
        return None if same and site.slot == 1 else "reads it in this packing"
    if any((found := attribute(proto, name)) is not None and found.ref_attr_name for name in ("bits", "block_size")):
        return "takes its settings from a function's attributes"
    if int_attribute(proto, "gather_axis", 0) != 0:
        return "looks up along another axis"
    if site.op.body.owner_of(keeper.spot.name) is not keeper.spot.body:
        return f"is in a graph that uses the name {keeper.spot.name!r} for something else"
    return None


def repack(bench: Bench, found: OnePacking) -> None:
    """Carry out a decision."""
    piece, owner, name, _ = found.keeper.spot
    piece.touched = True
    for seat in found.others:
        body, before = seat.spot.body, seat.spot.name
        for site in body.readers(before):
            if site.op.type == _LOOKUP and len(seat.weight.shape) == 2:
                _look_up(bench, Reading(piece, site, found.how.shape, 0), name, found.how, seat.weight.dtype == "uint4")
            else:
                site.op.body.set_input(site, name)
        hand_over(body, before, owner, name)
        drop(seat.spot)
        bench.move(seat.weight, found.keeper.spot)


def _look_up(bench: Bench, reading: Reading, stored: str, how: Quantised, widen: bool) -> None:
    op = reading.op
    built = emit_packed_lookup(reading, stored, how, widen)
    old = op.proto
    new: Sequence[object] = op.body.replace(op, built.nodes)
    for slot, (index, to) in built.slots.items():
        if slot < len(old.input) and old.input[slot]:
            handle = new[index].handle  # type: ignore[attr-defined]
            bench.records.add(
                reading.piece.part, (op.body.name, op.handle, slot), (op.body.name, handle, to), PACKED_LOOKUP
            )
