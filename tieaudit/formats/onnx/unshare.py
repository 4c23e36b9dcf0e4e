"""Give some uses of a weight a stored copy of their own, or let two names stop sharing one range of a data file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tieaudit.change import Unshare
from tieaudit.formats.onnx.bench import Bench
from tieaudit.formats.onnx.patterns import stamp
from tieaudit.formats.onnx.records import Key
from tieaudit.formats.onnx.transposed import Copy
from tieaudit.formats.onnx.uses import VIEW_OPS
from tieaudit.formats.onnx.workbench import Body, Op, Piece, Site
from tieaudit.model import Model, Weight

if TYPE_CHECKING:
    from onnx import TensorProto

PATTERN = "repeated_view"
"""Tag of a view node that was repeated, because other uses go on reading the original."""


def why_not(bench: Bench, model: Model, edit: Unshare) -> str | None:
    """Why the copy cannot be made, or None."""
    source = model.by_id.get(edit.source)
    if source is None or source.storage is None:
        return f"there is no stored weight {edit.source}"
    spot = bench.spot(source)
    if spot is None:
        return f"{edit.source} is in no graph that can be edited"
    existing = _existing(bench, model, edit, source)
    if existing is not None:
        if bench.spot(existing) is None:
            return f"{edit.name} is in no graph that can be edited"
        return None if not edit.uses else f"the name {edit.name!r} is taken"
    if source.held_as == "sparse_initializer":
        return f"{edit.source} is sparse"
    if edit.name in spot.piece.names:
        return f"the name {edit.name!r} is taken"
    if spot.piece.proto.ir_version < 4:
        return f"IR version {spot.piece.proto.ir_version} has no initializers that are not inputs, so none can be added"
    if not edit.uses:
        return "an ONNX copy needs the uses that will read it"
    reached = {site.key for site in _below(spot.body, spot.name)}
    for part, *rest in edit.uses:
        if part != source.part or tuple(rest) not in reached:
            return f"no use of {edit.source} is at slot {rest[2]} of {rest[1]!r}"
    return None


def unshare(bench: Bench, model: Model, edit: Unshare) -> None:
    """Make the copy. Only called where `why_not` gave None."""
    source = model.by_id[edit.source]
    existing = _existing(bench, model, edit, source)
    spot = bench.spot(existing or source)
    storage = (existing or source).storage
    assert spot is not None and storage is not None
    tensor = spot.tensor()
    assert tensor is not None
    piece = spot.piece
    piece.touched = True
    if existing is not None:
        bench.separated.add(existing.id)
        if (location := piece.location_of(tensor)) is not None:
            piece.put(tensor, Copy(storage, existing.id), location)
        return
    copy = _copy_of(piece, tensor, edit.name)
    spot.body.add_tensor(copy)
    piece.names.add(edit.name)
    _move(piece, spot.body, spot.name, edit.name, {(scope, node, slot) for _, scope, node, slot in edit.uses})


def _existing(bench: Bench, model: Model, edit: Unshare, source: Weight) -> Weight | None:
    """A weight that has the name already, in any file, and still shares its bytes with the source."""
    if source.storage is None:
        return None
    container, begin, end = source.storage.region
    for other in model.weights:
        if edit.name not in (other.name, other.id) or other.id in (source.id, *bench.separated):
            continue
        region = other.storage.region if other.storage is not None else ("", 0, 0)
        if region[0] == container and region[1] < end and begin < region[2]:
            return other
    return None


def _copy_of(piece: Piece, tensor: TensorProto, name: str) -> TensorProto:
    from onnx import TensorProto

    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    location = piece.location_of(tensor)
    number = piece.token_number(tensor.raw_data)
    if location is not None or number is not None:
        storage = piece.stored[number] if number is not None else piece.external(tensor)
        piece.put(copy, Copy(storage, f"{piece.part}|{name}"), location)
    return copy


def _below(body: Body, name: str) -> Iterator[Site]:
    """Every slot that reads a value, or one made of it by view nodes. A cycle of views is walked once."""
    pending, met = [(body, name)], {(body, name)}
    while pending:
        home, value = pending.pop()
        for site in home.readers(value):
            yield site
            made = (site.op.body, str(site.op.proto.output[0])) if _is_view(site) else None
            if made is not None and made not in met:
                met.add(made)
                pending.append(made)


def _is_view(site: Site) -> bool:
    return site.slot == 0 and site.op.type in VIEW_OPS and len(site.op.proto.output) == 1


def _ends(site: Site) -> Iterator[Key]:
    """The uses that a slot leads to."""
    if not _is_view(site):
        yield site.key
        return
    for reader in _below(site.op.body, site.op.proto.output[0]):
        if not _is_view(reader):
            yield reader.key


def _move(piece: Piece, body: Body, old: str, new: str, uses: set[Key]) -> None:
    """Let those uses that are behind a value read another one; a view on the way is repeated if others need it too."""
    for site in body.readers(old):
        if site.key in uses:
            site.op.body.set_input(site, new)
            continue
        ends = set(_ends(site)) if _is_view(site) else set()
        if not ends & uses:
            continue
        op = site.op
        if ends <= uses and not op.body.returned(op.proto.output[0]):
            op.body.set_input(site, new)
        else:
            _move(piece, op.body, op.proto.output[0], _repeat(piece, op, new), uses)


def _repeat(piece: Piece, op: Op, source: str) -> str:
    from onnx import NodeProto

    node = NodeProto()
    node.CopyFrom(op.proto)
    node.input[0] = source
    node.output[0] = piece.fresh(f"{op.handle}_copy")
    node.name = piece.fresh(f"{op.proto.name or op.handle}/copy")
    stamp(node, PATTERN, piece)
    op.body.insert_after(op, node)
    return str(node.output[0])
