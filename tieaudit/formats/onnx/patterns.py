"""The allow-list of graph edits: how an operation reads a matrix that is stored the other way round.

Each pattern lets one consumer, which until now read `W`, read the stored tensor `S` = Wᵀ instead, without a Transpose
node that a runtime would fold back into a second copy. The name of the consumer's output stays, so that nothing
downstream changes. Each has a law test of its own.

Which one, where a matrix serves a lookup and a head (`transposed_as`):

* `auto` and `gemm`: the head becomes a Gemm and the lookup stays, so [V,d] is stored. A lookup along axis 1 is strided:
  measured 0.15 → 23 ms for 512 ids in 32000 × 1024 on one thread, 3.9 → 391 ms for 4096 ids in 128000 × 2048; the
  Gemm costs nothing (4.3–4.7 ms either way), and differs from MatMul by 1e-7 … 2e-6.
* `gather`: the lookup goes along axis 1 and the head stays: its arithmetic is bit for bit the same.
* `fused`: `com.microsoft.FusedMatMul`, one node, for ONNX Runtime only.

Where a consumer cannot be rewritten the other layout is stored, whatever was asked for. Element types: ONNX Runtime's
CPU provider has Gemm for float32, float64 and float16, none for bfloat16 or integers (nor MatMul for bfloat16, so a
bfloat16 model never ran there); integers are therefore never given to a Gemm. All patterns need operator set 7.

The lookup is flattened (ids → Reshape(−1) → Gather(axis 1) → Transpose → Reshape): the direct form, Gather(axis 1) →
Transpose into a MatMul, crashes ONNX Runtime 1.32 in float16 at optimisation level ALL. Shapes are computed at run
time, because people change a model's declared dimensions without renewing its intermediate ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from tieaudit.formats.onnx.values import attribute, int_attribute
from tieaudit.formats.onnx.workbench import Op, Piece, Site

if TYPE_CHECKING:
    from onnx import NodeProto

    from tieaudit.model import Quantised

Style = Literal["auto", "gemm", "gather", "fused"]
PROVENANCE = "tieaudit.pattern"
FLOATS = frozenset({1, 10, 11, 16})  # float32, float16, float64, bfloat16
_MOVABLE = FLOATS | frozenset({2, 3, 4, 5, 6, 7, 9, 12, 13})  # Gather, Transpose and Reshape take them in every opset
MICROSOFT = "com.microsoft"
PACKED_LOOKUP = "packed_lookup"
"""Name of the one edit that is not for a transpose: a lookup reads codes as a product has them."""
_UINT8, _INT64 = 2, 7  # TensorProto.DataType


class Reading(NamedTuple):
    """One slot that reads a matrix which will be stored transposed."""

    piece: Piece
    site: Site
    shape: tuple[int, int]
    """What the consumer sees now, and must go on to see."""
    elem: int
    """TensorProto.DataType of what it sees."""

    @property
    def op(self) -> Op:
        return self.site.op

    @property
    def slot(self) -> int:
        return self.site.slot


@dataclass
class Built:
    """The nodes that replace a consumer."""

    nodes: list[NodeProto] = field(default_factory=list)
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Old input slot → (index of the node in `nodes`, its slot)."""


@dataclass(frozen=True)
class Pattern:
    """One allowed edit."""

    name: str
    ops: frozenset[str]
    """Operations that it can rewrite."""
    why_not: Callable[[Reading], str | None]
    """A reason why this reading cannot be rewritten so, or None."""
    build: Callable[[Reading, str], Built]
    """The replacement, which reads the tensor of the given name. Called only where `why_not` gave None."""


def choose(reading: Reading, style: Style) -> Pattern | str:
    """The pattern for one reading, or the reason why there is none."""
    reason = ""
    if reading.piece.opset < 7:
        return f"operator set {reading.piece.opset} is older than 7, the first whose Gemm broadcasts"
    if 0 in reading.shape:
        return "a matrix without elements is not worth a rewrite"
    if len(getattr(reading.op.proto, "device_configurations", ())):
        return "the node is sharded over devices"
    n_inputs = 1 if reading.op.type == "Einsum" else 2
    whole = len(reading.op.proto.input) >= n_inputs and len(reading.op.proto.output) > 0
    for pattern in _in_order(style):
        if reading.op.type in pattern.ops:
            found = pattern.why_not(reading) if whole else "the node lacks an input or a result"
            if found is None:
                return pattern
            reason = reason or found
    return reason or "no runtime-proof form exists"


def cost(pattern: str, style: Style, dequantised: bool = False) -> int:
    """What a pattern costs at run time, for choosing the stored layout; only the order of magnitude counts.

    `dequantised`: the consumer reads codes through a DequantizeLinear. ONNX Runtime 1.32 runs that with a MatMul as one
    kernel on the codes (MatMulNBits, QLinearMatMul), but computes all numbers at every run for a Gemm of its own.
    """
    table = {"gemm_flip": 0, "fusedmatmul_flip": 0, "transpose_bypass": 0, "einsum_flip": 1, "matmul_to_gemm": 10,
             "matmul_to_fused": 10, "gather_axis1": 1_000}  # fmt: skip
    if style == "gemm":
        table["gather_axis1"] = 10_000_000  # dearer than new bytes
    if style == "gather":
        table |= {"gather_axis1": 10, "matmul_to_gemm": 1_000, "matmul_to_fused": 1_000}
    product = pattern in ("matmul_to_gemm", "matmul_to_fused")
    return table[pattern] + (5_000 if dequantised and product and style == "auto" else 0)


def _in_order(style: Style) -> Sequence[Pattern]:
    return (FUSED, *PATTERNS) if style == "fused" else PATTERNS


class Emit:
    """Collects the nodes of one replacement under fresh names, each saying which pattern made it."""

    def __init__(self, reading: Reading, pattern: str) -> None:
        self.piece = reading.piece
        self.old = reading.op.proto
        self.pattern = pattern
        self.base = reading.op.handle
        self.built = Built()

    def node(self, op: str, inputs: Sequence[str], out: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node and give its output's name; an empty `out` gets a fresh one."""
        from onnx import helper

        label = f"{self.base}_{op.lower()}"
        output = out or self.piece.fresh(label)
        name = self.piece.fresh(f"{self.old.name or self.base}/{op}")
        made = helper.make_node(op, list(inputs), [output], name=name, domain=domain, **attributes)
        stamp(made, self.pattern, self.piece)
        self.built.nodes.append(made)
        return output

    def ints(self, *values: int) -> str:
        """A Constant node with a vector of int64; before operator set 9 Constant holds floating point only."""
        from onnx import numpy_helper

        if self.piece.opset < 9:
            exact = numpy_helper.from_array(np.array(values, np.float64))  # up to 2**53, beyond any axis
            return self.node("Cast", (self.node("Constant", (), value=exact),), to=_INT64)
        return self.node("Constant", (), value=numpy_helper.from_array(np.array(values, np.int64)))

    def moved(self, slot: int, to: int) -> None:
        """Input `slot` of the old node is now read by the latest node at slot `to`."""
        self.built.slots[slot] = (len(self.built.nodes) - 1, to)

    def reshape(self, value: str, shape: str, out: str = "") -> str:
        """Reshape that takes zeros in the shape literally where the operator set can (an empty batch)."""
        if self.piece.opset >= 14:
            return self.node("Reshape", (value, shape), out, allowzero=1)
        return self.node("Reshape", (value, shape), out)

    def leading(self, value: str) -> str:
        """The shape of a value without its last axis, computed at run time."""
        if self.piece.opset >= 15:
            return self.node("Shape", (value,), start=0, end=-1)
        shape = self.node("Shape", (value,))
        if self.piece.opset >= 10:
            return self.node("Slice", (shape, self.ints(0), self.ints(-1)))
        return self.node("Slice", (shape,), starts=[0], ends=[-1])


def stamp(node: NodeProto, pattern: str, piece: Piece) -> None:
    """Write the pattern's name into a node: metadata from IR version 10 on, else the doc string if it is free."""
    if piece.proto.ir_version >= 10:
        for entry in node.metadata_props:
            if entry.key == PROVENANCE:
                entry.value = pattern
                return
        node.metadata_props.add(key=PROVENANCE, value=pattern)
    elif not node.doc_string:
        node.doc_string = f"{PROVENANCE}={pattern}"


def _flip_attribute(name: str, names: tuple[str, str]) -> Callable[[Reading, str], Built]:
    """A pattern that toggles transA or transB and leaves the rest of the node as it is."""

    def build(reading: Reading, stored: str) -> Built:
        node = _copy(reading.op.proto)
        node.input[reading.slot] = stored
        flag = names[reading.slot]
        found = attribute(node, flag)
        if found is None:
            found = node.attribute.add(name=flag, type=2)  # AttributeProto.INT
            found.i = 0
        found.i = 0 if found.i else 1
        stamp(node, name, reading.piece)
        return Built([node], {slot: (0, slot) for slot in range(len(node.input))})

    return build


def _copy(node: NodeProto) -> NodeProto:
    from onnx import NodeProto as Message

    copy = Message()
    copy.CopyFrom(node)
    return copy


def _in_factor_slot(reading: Reading) -> str | None:
    if reading.slot > 1:
        return f"slot {reading.slot} has no transposition flag"
    return None


def _fused_flip_why_not(reading: Reading) -> str | None:
    for flag in ("transBatchA", "transBatchB"):
        if int_attribute(reading.op.proto, flag, 0) != 0:
            return f"it moves batch axes ({flag})"
    return _in_factor_slot(reading)


def _to_gemm_why_not(reading: Reading) -> str | None:
    if reading.elem not in FLOATS:
        return "no runtime has a Gemm for its element type"
    other = reading.piece.rank(reading.op.body, reading.op.proto.input[1 - reading.slot])
    if reading.slot == 0 and other != 2:
        return "it is the left factor, and the right one is not known to be a matrix"
    return None


def _to_gemm(reading: Reading, stored: str) -> Built:
    """MatMul → Gemm, between two Reshapes unless the other factor is known to be a matrix."""
    emit = Emit(reading, "matmul_to_gemm")
    node, piece = reading.op.proto, reading.piece
    flag: dict[str, Any] = {"transB": 1} if reading.slot else {"transA": 1}
    factors = [node.input[0], node.input[1]]
    factors[reading.slot] = stored
    if piece.rank(reading.op.body, node.input[1 - reading.slot]) == 2:
        emit.node("Gemm", (*factors, *_zero(emit, reading)), node.output[0], **flag)
        emit.moved(0, 0)
        emit.moved(1, 1)
        return emit.built
    inner, outer = reading.shape
    rows = emit.reshape(factors[0], emit.ints(-1, inner))
    product = emit.node("Gemm", (rows, stored, *_zero(emit, reading)), **flag)
    emit.moved(0, 0)
    emit.moved(1, 1)
    shape = emit.node("Concat", (emit.leading(factors[0]), emit.ints(outer)), axis=0)
    emit.reshape(product, shape, node.output[0])
    return emit.built


def _zero(emit: Emit, reading: Reading) -> tuple[str, ...]:
    """Gemm's third input, which is optional only from operator set 11 on."""
    if reading.piece.opset >= 11:
        return ()
    from onnx import TensorProto

    zero = TensorProto(dims=[1], data_type=reading.elem, raw_data=bytes({1: 4, 10: 2, 11: 8, 16: 2}[reading.elem]))
    return (emit.node("Constant", (), value=zero),)


def _to_fused_why_not(reading: Reading) -> str | None:
    return None if reading.elem in FLOATS else "FusedMatMul has no integers"


def _to_fused(reading: Reading, stored: str) -> Built:
    emit = Emit(reading, "matmul_to_fused")
    factors = [reading.op.proto.input[0], reading.op.proto.input[1]]
    factors[reading.slot] = stored
    flag: dict[str, Any] = {"transB": 1} if reading.slot else {"transA": 1}
    emit.node("FusedMatMul", factors, reading.op.proto.output[0], domain=MICROSOFT, **flag)
    emit.moved(0, 0)
    emit.moved(1, 1)
    return emit.built


def _to_fused_if_imported(reading: Reading) -> str | None:
    if all(item.domain != MICROSOFT for item in reading.piece.proto.opset_import):
        return "the file is not bound to ONNX Runtime's own operations"
    return _to_fused_why_not(reading)


def _gather_why_not(reading: Reading) -> str | None:
    if reading.slot != 0:
        return "it is read as indices"
    if int_attribute(reading.op.proto, "axis", 0) not in (0, 1, -1, -2):
        return "its axis is not known"
    if reading.elem not in _MOVABLE:
        return "its element type cannot be moved in every operator set"
    return None


def _gather(reading: Reading, stored: str) -> Built:
    """A lookup along the other axis, flattened, and its result turned back."""
    emit = Emit(reading, "gather_axis1")
    node = reading.op.proto
    axis = (int_attribute(node, "axis", 0) or 0) % 2
    ids = node.input[1]
    flat = emit.reshape(ids, emit.ints(-1))
    taken = emit.node("Gather", (stored, flat), axis=1 - axis)
    emit.moved(0, 0)
    emit.moved(1, 1)
    turned = emit.node("Transpose", (taken,), perm=[1, 0])
    size = emit.ints(reading.shape[1 - axis])
    shape = emit.node("Shape", (ids,))
    parts = (shape, size) if axis == 0 else (size, shape)
    emit.reshape(turned, emit.node("Concat", parts, axis=0), node.output[0])
    return emit.built


def emit_packed_lookup(reading: Reading, stored: str, how: Quantised, widen: bool) -> Built:
    """GatherBlockQuantized of rows cut into blocks, whose codes are stored as a product reads them (see `repack`).

    `widen`: its zero points are typed 4-bit ones, which become a byte each.
    """
    emit = Emit(reading, PACKED_LOOKUP)
    node = reading.op.proto
    ids, scales = node.input[1], node.input[2]
    n_rows, n_columns = how.shape
    in_blocks = emit.ints(n_rows, n_columns // how.block, 1)
    inputs = [stored, ids, emit.reshape(scales, in_blocks)]
    if len(node.input) > 3 and node.input[3]:
        zeros = emit.node("Cast", (node.input[3],), to=_UINT8) if widen else node.input[3]
        inputs.append(emit.reshape(zeros, in_blocks))
    settings: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 2, "block_size": how.block, "bits": how.bits}
    taken = emit.node("GatherBlockQuantized", inputs, domain=MICROSOFT, **settings)
    for slot in range(len(inputs)):
        emit.moved(slot, slot)
    shape = emit.node("Concat", (emit.node("Shape", (ids,)), emit.ints(n_columns)), axis=0)
    emit.reshape(taken, shape, node.output[0])
    return emit.built


def _einsum_terms(reading: Reading) -> list[str] | None:
    found = attribute(reading.op.proto, "equation")
    if found is None or found.ref_attr_name:
        return None
    equation = str(found.s.decode("ascii", "replace")).replace(" ", "")
    return equation.partition("->")[0].split(",")


def _einsum_why_not(reading: Reading) -> str | None:
    terms = _einsum_terms(reading)
    if terms is None or reading.slot >= len(terms) or len(terms[reading.slot]) != 2 or "." in terms[reading.slot]:
        return "its equation does not name both axes"
    found = attribute(reading.op.proto, "equation")
    if found is not None and b"->" not in found.s:
        return "its equation leaves the result's axes to the order of the letters"
    return None


def _einsum(reading: Reading, stored: str) -> Built:
    node = _copy(reading.op.proto)
    node.input[reading.slot] = stored
    terms = _einsum_terms(reading) or []
    terms[reading.slot] = terms[reading.slot][::-1]
    equation = next(item for item in node.attribute if item.name == "equation")
    result = equation.s.decode().replace(" ", "").partition("->")[2]
    equation.s = f"{','.join(terms)}->{result}".encode()
    stamp(node, "einsum_flip", reading.piece)
    return Built([node], {slot: (0, slot) for slot in range(len(node.input))})


FUSED = Pattern("matmul_to_fused", frozenset({"MatMul"}), _to_fused_why_not, _to_fused)
PATTERNS = (
    Pattern(
        "gemm_flip",
        frozenset({"Gemm", f"{MICROSOFT}.FusedGemm"}),
        _in_factor_slot,
        _flip_attribute("gemm_flip", ("transA", "transB")),
    ),
    Pattern(
        "fusedmatmul_flip",
        frozenset({f"{MICROSOFT}.FusedMatMul", f"{MICROSOFT}.TransposeMatMul"}),
        _fused_flip_why_not,
        _flip_attribute("fusedmatmul_flip", ("transA", "transB")),
    ),
    Pattern("matmul_to_gemm", frozenset({"MatMul"}), _to_gemm_why_not, _to_gemm),
    Pattern("matmul_to_fused", frozenset({"MatMul"}), _to_fused_if_imported, _to_fused),
    Pattern("gather_axis1", frozenset({"Gather"}), _gather_why_not, _gather),
    Pattern("einsum_flip", frozenset({"Einsum"}), _einsum_why_not, _einsum),
)
ALLOWED = (*(pattern.name for pattern in PATTERNS), "transpose_bypass", PACKED_LOOKUP)
"""Names of all edits that may appear in `Written.rewritten`."""
