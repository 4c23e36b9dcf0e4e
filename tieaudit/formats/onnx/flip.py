"""Let everything that reads one matrix read another one, which holds its transpose.

Follows the readings of a value through Identity, Reshape to the same shape, Cast, DequantizeLinear and Transpose to the
operations that consume it, asks `patterns` for a form of each, and says why where there is none. A Cast or a
DequantizeLinear on the way is repeated on the stored matrix, the latter along the other axis with the scales it has; a
Transpose on the way disappears. ONNX Runtime folds no DequantizeLinear, so the codes stay one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tieaudit.formats.onnx.patterns import MICROSOFT, Pattern, Reading, Style, choose, stamp
from tieaudit.formats.onnx.uses import VIEW_OPS
from tieaudit.formats.onnx.values import attribute, int_attribute
from tieaudit.formats.onnx.workbench import Body, Op, Piece, Site

if TYPE_CHECKING:
    from onnx import NodeProto

    from tieaudit.formats.onnx.records import Records

Shape = tuple[int, int]
_DEQUANTISE = ("DequantizeLinear", f"{MICROSOFT}.DequantizeLinear")
_IN_BLOCKS = "its scales are in blocks, or their type is not known"
_N_MOST_PASSED = 100
"""Nodes that pass a matrix on in a row; exporters write a handful, only a damaged file has a cycle of them."""


class Leaf(NamedTuple):
    """One consumer that will read the stored matrix in another form."""

    reading: Reading
    pattern: Pattern | None
    """None: a Transpose, whose consumers will read the stored matrix itself."""
    casts: tuple[Op, ...]
    """Casts and dequantisations between the weight and the consumer, in order."""

    @property
    def name(self) -> str:
        return self.pattern.name if self.pattern is not None else "transpose_bypass"

    @property
    def dequantised(self) -> bool:
        """Whether the consumer reads codes through a DequantizeLinear."""
        return any(op.type in _DEQUANTISE for op in self.casts)


class Stuck(NamedTuple):
    """A consumer for which there is no form, and why."""

    because: str


def leaves(
    piece: Piece, body: Body, name: str, shape: Shape, elem: int, style: Style, casts: tuple[Op, ...] = (),
    depth: int = 0, met: set[tuple[Body, str]] | None = None,
) -> Iterator[Leaf | Stuck]:  # fmt: skip
    """Every consumer of a value of `shape`, with the pattern that lets it read the transpose.

    Cost: linear; where several nodes make one name, following each of them would double the work at every step.
    """
    met = set() if met is None else met
    if (body, name) in met:
        yield Stuck(f"several nodes make {name!r}")
        return
    met.add((body, name))
    if depth > _N_MOST_PASSED:
        yield Stuck(f"more than {_N_MOST_PASSED} nodes pass it on one after the other, or they form a cycle")
        return
    if body.returned(name):
        yield Stuck(f"{name!r} is an output of its graph, in this layout")
        return
    for site in body.readers(name):
        op = site.op
        reading = Reading(piece, site, shape, elem)
        if not op.proto.output:
            yield Stuck(f"its consumer {op.handle!r} ({op.type}) has no result")
        elif is_same(piece, site, shape):
            yield from leaves(piece, op.body, op.proto.output[0], shape, elem, style, casts, depth + 1, met)
        elif op.type == "Transpose" and turns(op):
            yield Leaf(reading, None, casts)
        elif to := converted(piece, site):
            yield from leaves(piece, op.body, op.proto.output[0], shape, to, style, (*casts, op), depth + 1, met)
        else:
            found = _IN_BLOCKS if op.type in _DEQUANTISE else choose(reading, style)
            if isinstance(found, str):
                yield Stuck(f"its consumer {op.handle!r} ({op.type}) reads it in this layout: {found}")
            else:
                yield Leaf(reading, found, casts)


def transposed_reads(
    piece: Piece, body: Body, name: str, shape: Shape, elem: int, depth: int = 0,
    met: set[tuple[Body, str]] | None = None,
) -> Iterator[tuple[Site, str, int]]:  # fmt: skip
    """(the Transpose's input slot, the value it reads, its element type) of every Transpose of a stored matrix."""
    met = set() if met is None else met
    if (body, name) in met or depth > _N_MOST_PASSED:
        return
    met.add((body, name))
    for site in body.readers(name):
        op = site.op
        if not op.proto.output:
            continue
        if is_same(piece, site, shape):
            yield from transposed_reads(piece, op.body, op.proto.output[0], shape, elem, depth + 1, met)
        elif op.type == "Transpose" and turns(op):
            yield site, op.proto.input[0], elem
        elif to := converted(piece, site):
            yield from transposed_reads(piece, op.body, op.proto.output[0], shape, to, depth + 1, met)


def converted(piece: Piece, site: Site) -> int:
    """The element type that a Cast, or a DequantizeLinear without blocks, makes of the matrix; 0 for anything else."""
    op = site.op
    if op.type == "Cast":
        return int_attribute(op.proto, "to", 0) or 0
    if op.type not in _DEQUANTISE or site.slot != 0 or len(op.proto.input) < 2:
        return 0
    if int_attribute(op.proto, "block_size", 0) != 0 or int_attribute(op.proto, "axis", 1) is None:
        return 0  # scales of blocks lie along both axes
    return int_attribute(op.proto, "output_dtype", 0) or _scale_type(piece, op)


def _scale_type(piece: Piece, op: Op) -> int:
    """The element type of the scales, which is that of the result; 0 if it cannot be told."""
    name = op.proto.input[1]
    owner = op.body.owner_of(name)
    tensor = owner.tensors.get(name) if owner is not None else None
    if tensor is not None:
        return int(tensor.data_type)
    known = piece.type_of(op.body, op.proto.output[0]) or piece.type_of(op.body, name)
    return int(known.type.tensor_type.elem_type) if known is not None else 0


def turns(op: Op) -> bool:
    """Whether a Transpose of a matrix swaps its axes."""
    perm = attribute(op.proto, "perm")
    return perm is None or (not perm.ref_attr_name and list(perm.ints) == [1, 0])


def is_same(piece: Piece, site: Site, shape: Shape) -> bool:
    """Whether the node passes the matrix on as it is: Identity, or Reshape to the shape that it has."""
    op = site.op
    if op.type == "Identity":
        return True
    if op.type != "Reshape" or site.slot != 0 or len(op.proto.input) < 2:
        return False
    target = constant_ints(piece, op.body, op.proto.input[1])
    if target is None or len(target) != 2:
        return False
    return all(want in (have, -1, 0) for want, have in zip(target, shape, strict=True))


def constant_ints(piece: Piece, body: Body, name: str) -> list[int] | None:
    """The value of a small int64 vector that is in the file, or None."""
    from onnx import numpy_helper

    owner = body.owner_of(name)
    if owner is None or name in owner.inputs:
        return None
    tensor = owner.tensors.get(name)
    if tensor is None and name in owner.makers and owner.makers[name].type == "Constant":
        found = attribute(owner.makers[name].proto, "value")
        tensor = found.t if found is not None else None
    if tensor is None or tensor.data_type != 7 or tensor.data_location == 1 or int(np.prod(tensor.dims)) > 64:
        return None
    return [int(value) for value in numpy_helper.to_array(tensor).ravel()]


def flip(
    piece: Piece, body: Body, name: str, stored: str, shape: Shape, elem: int, style: Style, records: Records
) -> None:
    """Rewrite every consumer of a value, so that it reads `stored`, its transpose, instead.

    Only called where `leaves` gave no `Stuck`. Cost: linear in the consumers, squared where they are many.
    """
    while (leaf := next(leaves(piece, body, name, shape, elem, style), None)) is not None:
        if isinstance(leaf, Stuck):
            raise AssertionError(f"flip was called on a value that cannot be flipped: {leaf.because}")
        source = _through_casts(piece, leaf, stored, records)
        before = leaf.reading.op.proto.input[leaf.reading.slot]
        if leaf.pattern is None:
            _bypass(piece, leaf.reading.site, source, records)
        else:
            _apply(leaf.pattern, leaf.reading, source, records)
        owner = body.owner_of(before) or leaf.reading.op.body.owner_of(before)
        if before != name and owner is not None:
            owner.sweep(before)
    for site in body.readers(name):
        _remove_dead(site.op)


def _remove_dead(op: Op) -> None:
    """Remove a view node from which no consumer can be reached."""
    for reader in op.body.readers(op.proto.output[0]):
        _remove_dead(reader.op)
    op.body.replace(op, ())


def _apply(pattern: Pattern, reading: Reading, source: str, records: Records) -> None:
    op, piece = reading.op, reading.piece
    known = piece.type_of(op.body, op.proto.output[0])
    built = pattern.build(reading, source)
    old = op.proto
    new = op.body.replace(op, built.nodes)
    if any(node.domain == MICROSOFT for node in built.nodes):
        piece.import_domain(MICROSOFT)
    for slot, (index, to) in built.slots.items():
        if slot < len(old.input) and old.input[slot]:
            handle = new[index].handle
            records.add(piece.part, (op.body.name, op.handle, slot), (op.body.name, handle, to), pattern.name)
    _remember_type(op.body, known)


def _remember_type(body: Body, known: object) -> None:
    """Keep the type of the result in the file: onnx's inference does not compute the shapes we compute at run time."""
    from onnx import ValueInfoProto

    if not isinstance(known, ValueInfoProto) or known.name in body.outputs:
        return
    if any(value.name == known.name for value in (*body.graph.value_info, *body.new_types)):
        return
    copy = ValueInfoProto()
    copy.CopyFrom(known)
    body.new_types.append(copy)
    body.changed = True


def _bypass(piece: Piece, site: Site, source: str, records: Records) -> None:
    """The consumers of a Transpose read the stored matrix itself; the Transpose goes."""
    op = site.op
    out = op.proto.output[0]
    for reader in op.body.readers(out):
        for key in final_uses(reader):
            records.add(piece.part, key, key, "transpose_bypass")
        reader.op.body.set_input(reader, source)
    if op.body.returned(out):
        from onnx import helper

        node = helper.make_node("Identity", [source], [out], name=op.proto.name)
        stamp(node, "transpose_bypass", piece)
        op.body.replace(op, [node])
    else:
        op.body.replace(op, ())


def final_uses(site: Site) -> Iterator[tuple[str, str, int]]:
    """The uses that a slot leads to, behind view nodes."""
    op = site.op
    if op.type in VIEW_OPS and site.slot == 0:
        for reader in op.body.readers(op.proto.output[0]):
            yield from final_uses(reader)
    else:
        yield site.key


def _through_casts(piece: Piece, leaf: Leaf, stored: str, records: Records) -> str:
    """The stored matrix behind copies of the conversions on the way; each copy is made once."""
    for cast in leaf.casts:
        key = (cast, stored)
        if key not in piece.casts:
            from onnx import NodeProto

            node = NodeProto()
            node.CopyFrom(cast.proto)
            node.input[0] = stored
            node.output[0] = piece.fresh(f"{cast.handle}_stored")
            node.name = piece.fresh(f"{cast.proto.name or cast.handle}/stored")
            stamp(node, leaf.name, piece)
            if cast.type in _DEQUANTISE:
                _turn_axis(node, piece.opset)
            new = cast.body.insert_after(cast, node)
            for slot in range(1, len(node.input)):  # scales and zero points are read by the copy from now on
                if node.input[slot]:
                    records.add(piece.part, Site(cast, slot).key, Site(new, slot).key, leaf.name)
            piece.casts[key] = node.output[0]
        stored = piece.casts[key]
    return stored


def _turn_axis(node: NodeProto, opset: int) -> None:
    """Let a DequantizeLinear of a matrix take its scales along the other axis (ignored where there is one scale)."""
    if node.domain != MICROSOFT and opset < 13:
        return  # one scale for all: the axis came with operator set 13
    axis = attribute(node, "axis")
    now = int(axis.i) if axis is not None else 1
    if axis is None:
        axis = node.attribute.add(name="axis", type=2)  # AttributeProto.INT
    axis.i = 1 - now % 2
