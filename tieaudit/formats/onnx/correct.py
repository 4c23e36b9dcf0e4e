"""Let one member of a share see the common value C adjusted: C·diag(g), C·M or C + L·R, written as ordinary operations.

Only the factors are new tensors; C itself is never computed with, so that no runtime can fold a second copy of it:

* a lookup of rows: `Mul(Gather(C, ids), g)`, `MatMul(Gather(C, ids), M)`, and for a residual
  `Gather(C, ids) + MatMul(Gather(L, ids), R)`;
* a product x·C reads what `Mul` or `MatMul` make of its result; a product x·Cᵀ (an output head) what they make of x:
  x·(C·M)ᵀ = (x·Mᵀ)·Cᵀ; a residual is a narrow product beside it: x·C + (x·L)·R.

The factors are stored in the layout in which their consumer reads them, in the element type of C; where the consumer
reads C through a Cast, they are cast alike. The result keeps its name. All of this comes before the members are made
one (`share`), which then may write the product itself in another form. From operator set 7, which broadcasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tieaudit.adjusting import factor
from tieaudit.change import Adjustment, Factor, Share
from tieaudit.formats.onnx.bench import Bench, Spot
from tieaudit.formats.onnx.flip import Stuck, converted, is_same, turns
from tieaudit.formats.onnx.patterns import FLOATS, MICROSOFT, stamp
from tieaudit.formats.onnx.scopes import OVERRIDES_SINCE
from tieaudit.formats.onnx.values import attribute, int_attribute
from tieaudit.formats.onnx.wire import N_BYTES_INLINE
from tieaudit.formats.onnx.workbench import Body, Piece, Site
from tieaudit.model import Model, make_id
from tieaudit.storage import MemoryStorage

if TYPE_CHECKING:
    from onnx import NodeProto

INPUT, OUTPUT, BESIDE_LOOKUP, BESIDE_PRODUCT = (
    "adjusted_input",
    "adjusted_output",
    "residual_lookup",
    "residual_product",
)
PATTERNS = (INPUT, OUTPUT, BESIDE_LOOKUP, BESIDE_PRODUCT)
"""Names of the edits, for the allow-list."""
_PRODUCTS = frozenset({"MatMul", "Gemm", f"{MICROSOFT}.FusedMatMul"})
_N_MOST_PASSED = 100


class Reader(NamedTuple):
    """One consumer of a member, behind the views and casts on the way to it."""

    site: Site
    turned: bool
    """Whether it sees the transpose of the matrix that is stored."""
    elem: int
    """TensorProto.DataType of what it sees."""


class Seat(NamedTuple):
    """One member that sees the common value adjusted."""

    id: str
    spot: Spot
    adjustment: Adjustment
    readers: tuple[tuple[Reader, str, bool], ...]
    """Each with its pattern, and whether what it uses is the transpose of the common value in the plan's layout."""


def decide(bench: Bench, model: Model, edit: Share) -> tuple[Seat, ...] | str:
    """How each adjusted member's consumers will be written, or why one cannot be."""
    views = {member.id: member.view for member in edit.members}
    found = []
    for id, adjustment in edit.adjustments.items():
        weight = model.by_id.get(id)
        spot = bench.spot(weight) if weight is not None else None
        if weight is None or spot is None or id not in views:
            return f"{id} cannot be corrected: it is in no graph that can be edited"
        tensor = spot.tensor()
        elem = int(tensor.data_type) if tensor is not None else 0
        reason = _unfit(spot, elem, len(weight.shape))
        if reason is not None:
            return f"{id} cannot be corrected: {reason}"
        shape = (weight.shape[0], weight.shape[1])
        chosen = []
        for reader in readers(spot.piece, spot.body, spot.name, shape, elem):
            pattern = reader if isinstance(reader, Stuck) else _choose(reader, adjustment, views[id].transposes)
            if isinstance(pattern, Stuck) or isinstance(reader, Stuck):
                because = pattern.because if isinstance(pattern, Stuck) else ""
                return f"{id} cannot be corrected: {because}"
            chosen.append((reader, *pattern))
        if not chosen:
            return f"{id} cannot be corrected: nothing reads it"
        found.append(Seat(id, spot, adjustment, tuple(chosen)))
    return tuple(found)


def _unfit(spot: Spot, elem: int, n_axes: int) -> str | None:
    piece = spot.piece
    if n_axes != 2 or spot.turned:
        return "only matrices can be, in the layout that the file has"
    if elem not in FLOATS:
        return "its element type is not one that runtimes compute with"
    if piece.opset < 7:
        return f"operator set {piece.opset} is older than 7, the first that broadcasts"
    if piece.proto.ir_version < OVERRIDES_SINCE:
        return f"IR version {piece.proto.ir_version} has no initializers that are not inputs, so none can be added"
    return None


def readers(
    piece: Piece, body: Body, name: str, shape: tuple[int, int], elem: int, turned: bool = False,
    met: set[tuple[Body, str]] | None = None,
) -> Iterator[Reader | Stuck]:  # fmt: skip
    """Every consumer of a matrix of `shape`, behind Identity, Reshape to the same shape, Transpose and Cast."""
    met = set() if met is None else met
    if (body, name) in met or len(met) > _N_MOST_PASSED:
        yield Stuck(f"too many nodes pass {name!r} on, or they form a cycle")
        return
    met.add((body, name))
    if body.returned(name):
        yield Stuck(f"{name!r} is an output of its graph")
        return
    for site in body.readers(name):
        op = site.op
        if not op.proto.output:
            yield Stuck(f"its consumer {op.handle!r} ({op.type}) has no result")
        elif is_same(piece, site, shape):
            yield from readers(piece, op.body, op.proto.output[0], shape, elem, turned, met)
        elif op.type == "Transpose" and turns(op):
            yield from readers(piece, op.body, op.proto.output[0], shape[::-1], elem, not turned, met)
        elif op.type == "Cast" and (to := converted(piece, site)):
            yield from readers(piece, op.body, op.proto.output[0], shape, to, turned, met)
        elif op.type not in ("Shape", "Size"):
            yield Reader(site, turned, elem)


def _choose(reader: Reader, adjustment: Adjustment, member_turned: bool) -> tuple[str, bool] | Stuck:
    """The pattern for one consumer, and whether it uses the transpose of the common value."""
    op, node = reader.site.op, reader.site.op.proto
    turned = reader.turned ^ member_turned
    stuck = _unfit_reader(reader)
    if stuck is not None:
        return Stuck(f"its consumer {op.handle!r} ({op.type}) {stuck}")
    residual = adjustment.kind == "low-rank"
    if op.type == "Gather":
        if turned and not residual:
            return Stuck(f"its consumer {op.handle!r} looks up columns, of which the correction says nothing")
        return (BESIDE_LOOKUP if residual else OUTPUT), turned
    turned ^= bool(int_attribute(node, "transB", 0))
    if residual:
        if op.type != "MatMul" and not _is_one(node, "alpha"):
            return Stuck(f"its consumer {op.handle!r} ({op.type}) multiplies its result with another number than 1")
        return BESIDE_PRODUCT, turned
    if not turned and op.type == "Gemm" and len(node.input) > 2 and node.input[2]:
        return Stuck(f"its consumer {op.handle!r} (Gemm) adds a bias to what would have to be corrected first")
    return (INPUT if turned else OUTPUT), turned


def _unfit_reader(reader: Reader) -> str | None:
    """Why a consumer cannot be corrected, as the rest of a sentence."""
    op, slot, node = reader.site.op, reader.site.slot, reader.site.op.proto
    if op.type not in _PRODUCTS | {"Gather"}:
        return "can read only what is stored; corrections are written at Gather, MatMul and Gemm"
    if len(node.input) < 2 or len(getattr(node, "device_configurations", ())):
        return "lacks an input, or is sharded over devices"
    if op.type == "Gather":
        if slot != 0 or int_attribute(node, "axis", 0) != 0:
            return "does not look up whole rows of it"
        return None
    if slot != 1:
        return f"reads it as its input {slot}, and corrections are written for a right factor"
    if any(int_attribute(node, flag, 0) != 0 for flag in ("transA", "transBatchA", "transBatchB")):
        return "turns its left factor"
    if int_attribute(node, "transB", 0) is None or reader.elem not in FLOATS:
        return "takes its settings or types from elsewhere"
    return None


def _is_one(node: NodeProto, name: str) -> bool:
    found = attribute(node, name)
    return found is None or (not found.ref_attr_name and float(found.f) == 1.0)


def correct(bench: Bench, seats: Sequence[Seat]) -> None:
    """Write the corrections. Only called with what `decide` gave."""
    for seat in seats:
        stored: dict[tuple[str, bool], str] = {}
        for reader, pattern, turned in seat.readers:
            _Writer(bench, seat, reader, pattern, stored).write(turned)
        seat.spot.piece.touched = True


class _Writer:
    """Writes one corrected consumer."""

    def __init__(
        self, bench: Bench, seat: Seat, reader: Reader, pattern: str, stored: dict[tuple[str, bool], str]
    ) -> None:
        self.bench, self.seat, self.reader, self.pattern = bench, seat, reader, pattern
        self.stored = stored
        """(side, transposed) → name of the initializer, shared by the consumers of one member."""
        self.piece, self.op = seat.spot.piece, reader.site.op
        self.nodes: list[NodeProto] = []
        self.used: list[Factor] = []

    def write(self, turned: bool) -> None:
        """The consumer's result keeps its name, whatever makes it now."""
        from onnx import NodeProto

        old, slot = self.op.proto, self.reader.site.slot
        kept = NodeProto()
        kept.CopyFrom(old)
        result = old.output[0]
        if self.pattern == INPUT:
            kept.input[0] = self._times(old.input[0], "right", self.seat.adjustment.kind == "linear")
            self.nodes.append(kept)
        else:
            kept.output[0] = self.piece.fresh(f"{result}_uncorrected")
            if self.piece.proto.ir_version < 10:
                kept.doc_string = ""  # where the pattern's name goes
            self.nodes.append(kept)
            if self.pattern == OUTPUT:
                self._times(kept.output[0], "right", False, result)
            else:
                self._beside(kept.output[0], old, turned, result)
        stamp(kept, self.pattern, self.piece)
        self._replace(old, slot, kept)

    def _beside(self, base: str, old: NodeProto, turned: bool, result: str) -> None:
        """base + (x·first)·second, or with rows of `first` looked up."""
        first, second = ("right", "left") if turned else ("left", "right")
        if self.pattern == BESIDE_LOOKUP:
            narrow = self._node("Gather", (self._factor(first, turned), old.input[1]), axis=0)
        else:
            narrow = self._node("MatMul", (old.input[0], self._factor(first, turned)))
        self._node("Add", (base, self._node("MatMul", (narrow, self._factor(second, turned)))), result)

    def _times(self, value: str, side: str, transposed: bool, result: str = "") -> str:
        scale = self.seat.adjustment.kind == "scale"
        return self._node("Mul" if scale else "MatMul", (value, self._factor(side, transposed)), result)

    def _node(self, op: str, inputs: Sequence[str], result: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = result or self.piece.fresh(f"{self.op.handle}_{op.lower()}")
        name = self.piece.fresh(f"{self.op.proto.name or self.op.handle}/{op}")
        made = helper.make_node(op, list(inputs), [output], name=name, **attributes)
        stamp(made, self.pattern, self.piece)
        self.nodes.append(made)
        return output

    def _factor(self, side: str, transposed: bool) -> str:
        """The name under which the consumer reads a factor."""
        from onnx import TensorProto

        spot, key = self.seat.spot, (side, transposed)
        tensor = spot.tensor()
        assert tensor is not None
        if key not in self.stored:
            values = factor(self.seat.adjustment, side)
            values = np.ascontiguousarray(values.T) if transposed else values
            name = self.piece.fresh(f"{spot.name}_{self.seat.adjustment.kind.replace('-', '_')}_{side}")
            made = TensorProto(name=name, data_type=tensor.data_type, dims=values.shape)
            home = self.piece.location_of(tensor) if values.nbytes >= N_BYTES_INLINE else None
            self.piece.put(made, MemoryStorage(values.tobytes(), f"{self.piece.part}|{name}"), home)
            spot.body.add_tensor(made)
            self.stored[key] = name
        name = self.stored[key]
        id = make_id(name, self.piece.part, spot.body.name)
        self.used.append(Factor("right" if side == "right" else "left", id, transposed))
        return name if self.reader.elem == tensor.data_type else self._node("Cast", (name,), to=self.reader.elem)

    def _replace(self, old: NodeProto, slot: int, kept: NodeProto) -> None:
        body, scope = self.op.body, self.op.body.name
        before = [(scope, self.op.handle, index) for index, name in enumerate(old.input) if name]
        after = str(kept.output[0])
        body.replace(self.op, self.nodes)
        for key in before:
            if self.pattern != INPUT or key[2] == slot:
                self.bench.records.add(self.piece.part, key, (scope, after, key[2]), self.pattern)
        self.bench.records.adjust(self.seat.id, self.piece.part, (scope, after, slot), tuple(self.used))
