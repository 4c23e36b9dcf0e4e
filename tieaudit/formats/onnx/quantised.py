"""Matrices that are stored as codes: which scales and zero points belong to them, and how both are laid out.

Sources: DequantizeLinear (onnx.ai/onnx/operators, opset 10–25); MatMulNBits and GatherBlockQuantized in ONNX Runtime's
docs/ContribOperators.md (1.32) and contrib_ops/cpu/quantization/gather_block_quantized.cc, matmul_nbits.cc. Without
zero points, uint8 codes of both are offsets from 2^(bits-1), typed int4 and uint4 codes are offsets from 0. What is
laid out otherwise (blocks that do not fill a row, a lookup along another axis) is left out: then nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from tieaudit.dtypes import dtype
from tieaudit.formats.onnx.scopes import Scope
from tieaudit.formats.onnx.values import Consumer, Value, Values, int_attribute, op_name
from tieaudit.model import Quantised, Weight

if TYPE_CHECKING:
    from onnx import NodeProto

_INTEGERS = frozenset("int8 uint8 int4 uint4 int2 uint2".split())
_SCALES = frozenset("float32 float16 bfloat16 float64".split())
_N_MOST_PASSED = 20


def find_quantised(values: Values) -> tuple[Quantised, ...]:
    """What the graph says about each matrix of codes, the first reader's word for it.

    A table that is looked up as codes and dequantised afterwards is one, if one scale serves all of it.
    Cost: linear in the nodes.
    """
    found: dict[str, Quantised] = {}
    for scope in values.scopes:
        for node in scope.nodes:
            make = _READERS.get(op_name(node))
            one = make(scope, node, values) if make is not None and len(node.input) > 1 else None
            if one is not None:
                found.setdefault(one.codes, one)
    return tuple(found.values())


def _held(scope: Scope, node: NodeProto, slot: int, values: Values, through: Mapping[str, int]) -> Weight | None:
    """The stored weight behind an input slot, through operations that keep the order of its elements."""
    value = values.resolve(scope, node.input[slot]) if slot < len(node.input) else None
    for _ in range(_N_MOST_PASSED):
        if value is None:
            return None
        weight = values.weights.get(value)
        if weight is not None:
            return weight if weight.held_as != "sparse_initializer" and not weight.overridable else None
        producer = values.producers.get(value)
        if producer is None or op_name(producer.node) not in through or not producer.node.input:
            return None
        value = values.resolve(producer.scope, producer.node.input[0])
    return None


_SAME_ORDER = dict.fromkeys("Identity Reshape Squeeze Unsqueeze Flatten".split(), 0)
_LOOKED_UP = {"Gather": 0}


def _dequantised(scope: Scope, node: NodeProto, values: Values) -> Quantised | None:
    """DequantizeLinear of a matrix, or of rows that were looked up in one."""
    codes = _held(scope, node, 0, values, {})
    scales = _held(scope, node, 1, values, {})
    if scales is None or int_attribute(node, "block_size", 0) != 0 or scales.dtype not in _SCALES:
        return None
    looked_up = codes is None
    if looked_up:
        codes = _held(scope, node, 0, values, _LOOKED_UP)
    if codes is None or len(codes.shape) != 2 or codes.dtype not in _INTEGERS:
        return None
    axis = int_attribute(node, "axis", 1)
    along: Literal["one", "rows", "columns"] = "one"
    if scales.shape:
        if looked_up or axis is None or scales.n_elements != codes.shape[axis % 2]:
            return None
        along = "columns" if axis % 2 else "rows"
    return _made(codes, scales, _zeros(scope, node, 2, values), codes.shape, along)


def _made(
    codes: Weight, scales: Weight, zeros: Weight | Literal["unknown"] | None, shape: tuple[int, ...],
    along: Literal["one", "rows", "columns"],
) -> Quantised | None:  # fmt: skip
    if zeros == "unknown":
        return None
    if zeros is not None and (zeros.n_elements != scales.n_elements or zeros.dtype != codes.dtype):
        return None
    kind = dtype(codes.dtype)
    signed = not kind.name.startswith("u")
    zero_id = zeros.id if zeros is not None else None
    return Quantised(codes.id, scales.id, zero_id, (shape[0], shape[1]), kind.n_bits, signed, along)


def _zeros(scope: Scope, node: NodeProto, slot: int, values: Values) -> Weight | Literal["unknown"] | None:
    """The zero points; None if there are none, "unknown" if they are computed."""
    if slot >= len(node.input) or not node.input[slot]:
        return None
    return _held(scope, node, slot, values, _SAME_ORDER) or "unknown"


def _looked_up_in_blocks(scope: Scope, node: NodeProto, values: Values) -> Quantised | None:
    """GatherBlockQuantized of rows, quantised along them."""
    codes = _held(scope, node, 0, values, _SAME_ORDER)
    rank = _rank(scope, node, values)
    if codes is None or rank is None or codes.dtype not in ("uint8", "int4", "uint4"):
        return None
    axes = int_attribute(node, "gather_axis", 0), int_attribute(node, "quantize_axis", 1)
    if axes[0] != 0 or axes[1] not in (rank - 1, -1):
        return None
    bits = int_attribute(node, "bits", 4) if codes.dtype == "uint8" else 4
    return _in_blocks(scope, node, values, codes, bits, (2, 3), codes.shape[0])


def _rank(scope: Scope, node: NodeProto, values: Values) -> int | None:
    """The rank that the node sees, which is that of the scales too."""
    direct = values.resolve(scope, node.input[2]) if len(node.input) > 2 else None
    held = values.weights.get(direct) if direct is not None else None
    if held is not None:
        return len(held.shape)
    producer = values.producers.get(direct) if direct is not None else None
    if producer is None or producer.node.op_type != "Reshape" or len(producer.node.input) < 2:
        return None
    target = values.ints(producer.scope, producer.node.input[1])
    return len(target) if target is not None else None


def _multiplied_in_blocks(scope: Scope, node: NodeProto, values: Values) -> Quantised | None:
    """MatMulNBits: codes [N, blocks, bytes of a block]."""
    codes = _held(scope, node, 1, values, _SAME_ORDER)
    if codes is None or codes.dtype != "uint8" or len(node.input) > 4 and node.input[4]:
        return None  # g_idx takes the columns in another order
    return _in_blocks(scope, node, values, codes, int_attribute(node, "bits", 4), (2, 3), int_attribute(node, "N", 0))


def _in_blocks(
    scope: Scope, node: NodeProto, values: Values, codes: Weight, bits: int | None, slots: tuple[int, int],
    n_rows: int | None,
) -> Quantised | None:  # fmt: skip
    scales = _held(scope, node, slots[0], values, _SAME_ORDER)
    zeros = _zeros(scope, node, slots[1], values)
    block = int_attribute(node, "block_size", 128)
    if bits not in (2, 4, 8) or not block or block < 1 or block * bits % 8 or scales is None or zeros == "unknown":
        return None
    if not n_rows or n_rows < 1 or not codes.n_elements:
        return None
    if scales.dtype not in _SCALES or codes.n_bytes * 8 // bits % n_rows:
        return None
    n_columns = codes.n_bytes * 8 // bits // n_rows
    given = int_attribute(node, "K", n_columns)
    if n_columns % block or given != n_columns or scales.n_elements != n_rows * (n_columns // block):
        return None
    n_blocks = n_columns // block
    packed = zeros is not None and zeros.dtype == "uint8" and bits < 8
    if zeros is not None:
        n_wanted = n_rows * (-(-n_blocks * bits // 8) if packed else n_blocks)
        if zeros.n_elements != n_wanted or zeros.dtype not in (*_INTEGERS, *_SCALES):
            return None
    typed = codes.dtype != "uint8"
    return Quantised(
        codes.id, scales.id, zeros.id if zeros is not None else None, (n_rows, n_columns), bits,
        codes.dtype == "int4", "blocks", block, 0 if typed else 1 << bits - 1, packed,
    )  # fmt: skip


def _multiplied(scope: Scope, node: NodeProto, values: Values) -> Quantised | None:
    """MatMulInteger as ONNX Runtime's dynamic quantisation writes it: MatMulInteger → Cast → Mul(scale · scale)."""
    codes = _held(scope, node, 1, values, {})
    zeros = _zeros(scope, node, 3, values)
    product = Value(scope.name, node.output[0]) if node.output else None
    for _ in range(2):  # the Cast, then the Mul
        readers = values.consumers.get(product, ()) if product is not None else ()
        if len(readers) != 1 or not readers[0].node.output:
            return None
        reader = readers[0]
        if reader.node.op_type != "Cast":
            return _with_scales(codes, _factor(reader, values), zeros)
        product = Value(reader.scope.name, reader.node.output[0])
    return None


def _factor(reader: Consumer, values: Values) -> Weight | None:
    """The stored scale among the factors that a product of integers is multiplied by."""
    node = reader.node
    other = values.resolve(reader.scope, node.input[1 - reader.slot]) if len(node.input) == 2 else None
    producer = values.producers.get(other) if other is not None else None
    if node.op_type != "Mul" or producer is None or producer.node.op_type != "Mul":
        return None
    held = [_held(producer.scope, producer.node, slot, values, {}) for slot in range(len(producer.node.input))]
    stored = [weight for weight in held if weight is not None]
    return stored[0] if len(stored) == 1 else None  # two stored ones: which of them is whose cannot be told


def _multiplied_with_scales(scope: Scope, node: NodeProto, values: Values) -> Quantised | None:
    """DynamicQuantizeMatMul, which has the scales as inputs."""
    codes, scales = (_held(scope, node, slot, values, {}) for slot in (1, 2))
    return _with_scales(codes, scales, _zeros(scope, node, 3, values))


def _with_scales(
    codes: Weight | None, scales: Weight | None, zeros: Weight | Literal["unknown"] | None
) -> Quantised | None:
    """A right factor [K, N] with one scale, or one for each of its columns."""
    if codes is None or scales is None or len(codes.shape) != 2 or codes.dtype not in _INTEGERS:
        return None
    if scales.dtype not in _SCALES or scales.n_elements not in (1, codes.shape[1]):
        return None
    return _made(codes, scales, zeros, codes.shape, "one" if scales.n_elements == 1 else "columns")


_READERS = {
    "MatMulInteger": _multiplied,
    "com.microsoft.DynamicQuantizeMatMul": _multiplied_with_scales,
    "DequantizeLinear": _dequantised,
    "com.microsoft.DequantizeLinear": _dequantised,
    "com.microsoft.GatherBlockQuantized": _looked_up_in_blocks,
    "com.microsoft.MatMulNBits": _multiplied_in_blocks,
}
