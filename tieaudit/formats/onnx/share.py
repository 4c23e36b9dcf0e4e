"""Make several weights one stored tensor: which layout is stored, in which graph, under which name.

The stored layout is the cheapest in which every consumer can read it (see `patterns`): the layout of a member, so that
no new bytes are needed, unless no such layout serves. The tensor lives in the innermost graph that all members' graphs
see; a member that is already there keeps its name, else a fresh name is taken, and a name that an inner graph hides is
not used. Where the members are in several files each file gets one initializer, and all of them one range of a common
data file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tieaudit.change import Share
from tieaudit.dtypes import dtype
from tieaudit.formats.onnx.annotations import clash, hand_over
from tieaudit.formats.onnx.bench import Bench, Spot
from tieaudit.formats.onnx.flip import Stuck, flip, leaves
from tieaudit.formats.onnx.patterns import Style, cost
from tieaudit.formats.onnx.scopes import OVERRIDES_SINCE
from tieaudit.formats.onnx.transposed import Transposed
from tieaudit.formats.onnx.wire import N_BYTES_INLINE
from tieaudit.formats.onnx.workbench import Body, Piece
from tieaudit.model import Model, Weight
from tieaudit.storage import Storage

if TYPE_CHECKING:
    from onnx import TensorProto

SEES_OUTER = frozenset(
    {"If", "Loop", "Scan", "SequenceMap"}
    | {f"com.microsoft.{name}" for name in ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch")}
)
"""Operations whose bodies may read names of the graph around them, as ONNX and ONNX Runtime have it."""
_NEW_BYTES = 1_000_000
"""Cost of a stored layout that no member has: only where nothing else works, or by the user's choice."""


class Seat(NamedTuple):
    """One member: what it is, where it is, and whether it is stored as the transpose of the first member."""

    weight: Weight
    spot: Spot
    turned: bool


@dataclass(frozen=True)
class Anchor:
    """What one file will store."""

    piece: Piece
    owner: Body
    keeper: Seat | None
    """The member whose initializer stays; None for a new one."""
    rename: bool
    """Whether the keeper needs a fresh name, because an inner graph hides the one it has."""
    others: tuple[Seat, ...]


@dataclass(frozen=True)
class Decision:
    """How the members become one."""

    turned: bool
    """Whether the transpose of the first member's layout is stored."""
    seats: tuple[Seat, ...]
    anchors: tuple[Anchor, ...]
    cost: int


def decide(bench: Bench, model: Model, edit: Share, style: Style) -> Decision | str:
    """The best way to make the members one tensor, or the reason why there is none."""
    if any(member.view.steps and not member.view.transposes for member in edit.members):
        return "only equal and transposed weights can be one initializer"
    if edit.members and edit.members[0].view.steps:
        return "the first member of a tie must be seen as stored"
    seats = take_seats(bench, model, tuple((member.id, member.view.transposes) for member in edit.members))
    if isinstance(seats, str):
        return seats
    reason = _unlike(seats, edit.values) or _apart(seats)
    if reason is not None:
        return reason
    layouts = _layouts(seats, edit.values)
    if isinstance(layouts, str):
        return layouts
    found = {turned: lay_out(seats, turned, style) for turned in layouts}
    possible = [item for item in found.values() if isinstance(item, Decision)]
    if possible:
        return min(possible, key=lambda item: item.cost)
    if any(seat.turned for seat in seats) and len(set(found.values())) > 1:
        return f"one way round, {found[False]}; the other way round, {found[True]}"
    return str(next(iter(found.values())))


def _layouts(seats: Sequence[Seat], values: Storage | None) -> tuple[bool, ...] | str:
    """Which layouts may be stored: those of a member, and the transpose of whole bytes; or why none may."""
    kind = dtype(seats[0].weight.dtype)
    if len(seats[0].weight.shape) != 2:
        return (False,)
    if kind.n_bits and kind.n_bits % 8 == 0:
        return (False, True)
    stored = {seat.turned for seat in seats}
    if len(stored) > 1 and (values is not None or any(seat.spot.turned for seat in seats)):
        return f"{kind.name} is not stored in whole bytes, so no new transpose of it is computed"
    return tuple(sorted(stored))


def take_seats(bench: Bench, model: Model, wanted: Sequence[tuple[str, bool]]) -> tuple[Seat, ...] | str:
    """Where the weights of these ids are (with whether each is the first one's transpose), or why one is unfit."""
    seats: dict[tuple[Piece, Body, str], Seat] = {}
    for id, transposed in dict.fromkeys(wanted):
        weight = model.by_id.get(id)
        if weight is None:
            return f"there is no weight {id}"
        reason = _unfit(weight)
        spot = bench.spot(weight)
        if reason is None and spot is None:
            reason = "it is in no graph that can be edited"
        if reason is None and spot is not None and weight.name in spot.piece.trained:
            reason = "training information in the file speaks of it"
        if reason is not None or spot is None:
            return f"{id} cannot be shared: {reason}"
        seats.setdefault(spot[:3], Seat(weight, spot, transposed ^ spot.turned))
    return tuple(seats.values()) if seats else "there is nothing to share"


def _unfit(weight: Weight) -> str | None:
    """Why this weight can never be merged with another."""
    if weight.absent:
        return "it is not stored"
    if weight.overridable:
        return "it is an input of its graph too, so a caller may replace its value"
    if weight.held_as == "sparse_initializer":
        return "it is sparse"
    if weight.scope.startswith("function:"):
        return "it belongs to a model-local function, whose body sees no outer names (onnx.inliner undoes it)"
    return None


def _unlike(seats: Sequence[Seat], values: Storage | None) -> str | None:
    first = seats[0].weight
    for seat in seats:
        shape = seat.weight.shape[::-1] if seat.turned ^ seat.spot.turned else seat.weight.shape
        if seat.weight.dtype != first.dtype or shape != first.shape:
            return (
                f"{first.id} is {first.dtype} {list(first.shape)}, {seat.weight.id} is {seat.weight.dtype} "
                f"{list(seat.weight.shape)}: they cannot be one tensor"
            )
    kind = dtype(first.dtype)
    if values is not None and (kind.family == "string" or values.n_bytes != first.n_bytes):
        return f"expected {first.n_bytes} bytes for the common value, found {values.n_bytes}"
    return None


def _apart(seats: Sequence[Seat]) -> str | None:
    """Why members in several files cannot share their bytes."""
    pieces = {seat.spot.piece.part: seat.spot.piece for seat in seats}
    if len(pieces) < 2:
        return None
    if len({piece.path.parent.resolve() for piece in pieces.values()}) > 1:
        return "its parts are in different folders, and external data must be in the folder of its file"
    kind = dtype(seats[0].weight.dtype)
    if kind.family != "float" and kind.n_bytes(seats[0].weight.n_elements) < N_BYTES_INLINE:
        return "shape inference and runtimes want small integers inside the file, and files can share only data outside"
    if kind.family == "string":
        return "strings cannot be external data"
    old = next((piece for piece in pieces.values() if piece.proto.ir_version < 4), None)
    return f"{old.path.name} has IR version {old.proto.ir_version}, which has no external data" if old else None


def lay_out(seats: tuple[Seat, ...], turned: bool, style: Style) -> Decision | str:
    """What storing one layout takes, or why it cannot be."""
    total = 0 if any(seat.turned == turned for seat in seats) else _NEW_BYTES
    for seat in seats:
        if seat.turned == turned:
            continue
        weight, spot = seat.weight, seat.spot
        for leaf in leaves(spot.piece, spot.body, spot.name, seen(seat), elem(spot), style):
            if isinstance(leaf, Stuck):
                return f"{weight.id} cannot be read transposed: {leaf.because}"
            total += cost(leaf.name, style, leaf.dequantised)
    anchors = []
    for part in dict.fromkeys(seat.spot.piece.part for seat in seats):
        anchor = _anchor([seat for seat in seats if seat.spot.piece.part == part], turned)
        if isinstance(anchor, str):
            return anchor
        anchors.append(anchor)
    return Decision(turned, seats, tuple(anchors), total)


def seen(seat: Seat) -> tuple[int, int]:
    """The shape of a matrix as it is stored now."""
    shape = seat.weight.shape[::-1] if seat.spot.turned else seat.weight.shape
    return (shape[0], shape[1])


def elem(spot: Spot) -> int:
    """TensorProto.DataType of a weight."""
    tensor = spot.tensor()
    return int(tensor.data_type) if tensor is not None else 0


def _anchor(seats: Sequence[Seat], turned: bool) -> Anchor | str:
    """Which initializer of one file stays, in which graph."""
    piece = seats[0].spot.piece
    owner = _innermost([seat.spot.body for seat in seats])
    for seat in seats:
        for body in seat.spot.body.ancestors():
            if body is owner:
                break
            if body.owner is not None and body.owner.type not in SEES_OUTER:
                return f"{seat.weight.id} is inside {body.owner.type}, whose bodies may not read outer names"
    pinned = [seat for seat in seats if seat.spot.body.returned(seat.spot.name)]
    here = [seat for seat in seats if seat.spot.body is owner and seat.turned == turned]
    if len(pinned) > 1:
        return f"{pinned[0].weight.id} and {pinned[1].weight.id} are both outputs of a graph, so both names must stay"
    if pinned and pinned[0] not in here:
        return f"{pinned[0].weight.id} is an output of its graph, so its name must stay there, in its layout"
    here.sort(key=lambda seat: (seat not in pinned, seat is not seats[0], seat.spot.constant is not None))
    keeper = here[0] if here else None
    if keeper is None and piece.proto.ir_version < OVERRIDES_SINCE:
        return f"IR version {piece.proto.ir_version} has no initializers that are not inputs, so none can be added"
    others = tuple(seat for seat in seats if seat is not keeper)
    reason = clash(keeper.spot if keeper else None, [(seat.spot, seat.turned != turned) for seat in others])
    if reason is not None:
        return reason
    rename = keeper is not None and _hidden(keeper, owner, [seat for seat in others if seat.turned == turned])
    if rename and piece.proto.ir_version < OVERRIDES_SINCE:
        return (
            f"an inner graph uses the name {seats[0].weight.name!r} too, and IR version {piece.proto.ir_version} "
            "has no initializers that are not inputs, so none can be added"
        )
    if rename and pinned:
        return f"an inner graph uses the name {pinned[0].weight.name!r} for something else"
    return Anchor(piece, owner, keeper, rename, others)


def _innermost(bodies: Sequence[Body]) -> Body:
    """The innermost graph that all of these see."""
    common = list(bodies[0].ancestors())
    for body in bodies[1:]:
        around = list(body.ancestors())
        common = [item for item in common if any(item is other for other in around)]
    return common[0]


def _hidden(keeper: Seat, owner: Body, vanishing: Sequence[Seat]) -> bool:
    """Whether an inner graph gives the keeper's name another meaning, once these members are gone."""
    name = keeper.spot.name
    gone = [seat.spot.body for seat in vanishing if seat.spot.name == name]
    return any(body.defines(name) and all(body is not other for other in gone) for body in owner.inner())


def share(bench: Bench, decision: Decision, values: Storage | None, lossless: bool, style: Style) -> None:
    """Carry out a decision. `values`: the common value in the first member's layout, if it is not a member's own."""
    several = len(decision.anchors) > 1
    given = None
    if values is not None or not lossless or several or all(seat.turned != decision.turned for seat in decision.seats):
        given = _common_bytes(decision, values, lossless)
    location = bench.shared_file([anchor.piece for anchor in decision.anchors]) if several else None
    for anchor in decision.anchors:
        _in_one_file(bench, anchor, decision.turned, given, location, style)


def _common_bytes(decision: Decision, values: Storage | None, lossless: bool) -> Storage:
    """The common value in the stored layout."""
    first = decision.seats[0].weight
    source = values if values is not None else first.storage
    if values is None and lossless:  # any member's bytes are the common ones
        source = next(
            (seat.weight.storage for seat in decision.seats if seat.turned == decision.turned and not seat.spot.turned),
            None,
        )
        if source is not None:
            return source
        source = first.storage
    if source is None:
        raise AssertionError(f"{first.id} has no bytes")
    if not decision.turned:
        return source
    return Transposed(source, (first.shape[0], first.shape[1]), dtype(first.dtype).n_bits // 8)


def _in_one_file(
    bench: Bench, anchor: Anchor, turned: bool, given: Storage | None, location: str | None, style: Style
) -> None:
    piece, owner = anchor.piece, anchor.owner
    piece.touched = True
    if anchor.keeper is not None:
        name, tensor = _keep(bench, anchor, anchor.keeper)
    else:
        tensor = _make(anchor, turned, given)
        name = tensor.name
        owner.add_tensor(tensor)
    if given is not None:
        old = tensor if anchor.keeper is not None else anchor.others[0].spot.tensor()
        home = piece.location_of(old) if old is not None and given.n_bytes >= N_BYTES_INLINE else None
        piece.put(tensor, given, location or home)
    for seat in anchor.others:
        body, before = seat.spot.body, seat.spot.name
        if seat.turned != turned:
            flip(piece, body, before, name, seen(seat), elem(seat.spot), style, bench.records)
        elif before != name:
            for site in body.readers(before):
                site.op.body.set_input(site, name)
        hand_over(body, before, owner, name)
        drop(seat.spot)
        bench.move(seat.weight, Spot(piece, owner, name, seat.spot.turned ^ (seat.turned != turned)))


def _keep(bench: Bench, anchor: Anchor, keeper: Seat) -> tuple[str, TensorProto]:
    """The keeper's name and tensor: out of its Constant node where initializers can be, in front of all where not."""
    piece, owner, name = anchor.piece, anchor.owner, keeper.spot.name
    op = keeper.spot.constant
    tensor = keeper.spot.tensor()
    assert tensor is not None
    if op is not None and piece.proto.ir_version < 4:
        owner.ops.remove(op)
        owner.ops.insert(0, op)
        owner.changed = True
    elif op is not None:
        tensor = _as_initializer(tensor, name)
        owner.replace(op, ())
        owner.add_tensor(tensor)
    if anchor.rename:
        fresh = piece.fresh(f"{name}_shared")
        for site in owner.readers(name):
            site.op.body.set_input(site, fresh)
        hand_over(owner, name, owner, fresh)
        tensor = _as_initializer(tensor, fresh)
        drop(Spot(piece, owner, name))
        owner.add_tensor(tensor)
        name = fresh
    bench.move(keeper.weight, Spot(piece, owner, name, keeper.spot.turned))
    return name, tensor


def _make(anchor: Anchor, turned: bool, given: Storage | None) -> TensorProto:
    """A new initializer under a fresh name: a member's, or one that will get the given bytes."""
    from onnx import TensorProto

    source = next((seat for seat in anchor.others if seat.turned == turned), anchor.others[0])
    old = source.spot.tensor()
    assert old is not None
    name = anchor.piece.fresh(f"{source.spot.name}_shared")
    if given is None:
        return _as_initializer(old, name)
    dims = list(old.dims) if source.turned == turned else list(old.dims)[::-1]
    return TensorProto(name=name, data_type=old.data_type, dims=dims)


def _as_initializer(tensor: TensorProto, name: str) -> TensorProto:
    from onnx import TensorProto

    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def drop(spot: Spot) -> None:
    """Take an initializer or a Constant node away."""
    op = spot.constant
    if op is not None:
        spot.body.replace(op, ())
    else:
        spot.body.drop_tensor(spot.name)
