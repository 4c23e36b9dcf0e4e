"""Reading and comparing tensors in blocks: probes, exact equality through a view, constancy. Memory stays bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tieaudit.dtypes import dtype
from tieaudit.model import Weight
from tieaudit.storage import BLOCK_BYTES, Storage, blocks, same_bytes
from tieaudit.view import AS_STORED, View

Bytes = NDArray[np.uint8]
STRIPE_BYTES = 4 * BLOCK_BYTES
"""Block for reading columns: each strided read of a block is as long as the block is wide."""
SMALL_BYTES = 4096
"""Tensors up to this size are read whole at the first look: one read is as cheap as one probe."""


def storage_of(weight: Weight) -> Storage:
    """The storage of a weight that is known not to be absent."""
    if weight.storage is None:
        raise ValueError(f"{weight.id} is absent: nothing to read")
    return weight.storage


def probe(weight: Weight, n_positions: int, seed: int) -> bytes:
    """Bytes at positions that equality and transposition do not move, `n_positions` of them at most.

    A rectangular matrix is read in its tall orientation; a square one on its diagonal. Two tensors whose probes
    differ are neither equal nor transposed. Cost: `n_positions` reads of one element.
    """
    storage, item = storage_of(weight), dtype(weight.dtype).item_bytes
    if item is None or storage.n_bytes != weight.n_elements * item:
        begin = min(seed * 64, max(storage.n_bytes - 64, 0))
        return b"".join(storage.read_ranges([(begin, min(64, storage.n_bytes - begin))]))
    rng = np.random.default_rng(seed)
    if len(weight.shape) == 2:
        n_rows, n_columns = max(weight.shape), min(weight.shape)
        rows = rng.integers(n_rows, size=n_positions)
        columns = rows if n_rows == n_columns else rng.integers(n_columns, size=n_positions)
        wide = weight.shape[0] < weight.shape[1]
        flat = columns * n_rows + rows if wide else rows * n_columns + columns
    else:
        flat = rng.integers(weight.n_elements, size=n_positions)
    return b"".join(storage.read_ranges([(int(index) * item, item) for index in flat]))


def constant_value(weight: Weight) -> bytes | None:
    """The one element that fills the tensor, or None. Stops at the first different element."""
    item, storage = dtype(weight.dtype).item_bytes, storage_of(weight)
    if item is None:
        return _constant_packed(weight, storage)
    first: bytes | None = None
    begin, length = 0, SMALL_BYTES
    while begin < storage.n_bytes:
        length = min(length, storage.n_bytes - begin)
        block = storage.read_ranges([(begin, length)])[0]
        first = block[:item] if first is None else first
        if block != first * (length // item):
            return None
        begin, length = begin + length, BLOCK_BYTES
    return first


def _constant_packed(weight: Weight, storage: Storage) -> bytes | None:
    if weight.dtype == "string":
        return b"" if weight.n_elements == 1 else None
    bits = dtype(weight.dtype).n_bits
    first: int | None = None
    n_seen = 0
    for block in blocks(storage, SMALL_BYTES):
        unpacked = np.unpackbits(np.frombuffer(block, np.uint8), bitorder="little")
        values = unpacked[: len(unpacked) // bits * bits].reshape(-1, bits) if 8 % bits == 0 else None
        if values is None:
            return None
        codes = (values @ (1 << np.arange(bits)))[: weight.n_elements - n_seen]
        n_seen += len(codes)
        first = int(codes[0]) if first is None and len(codes) else first
        if (codes != first).any():
            return None
    return None if first is None else bytes([first])


def digest(weight: Weight) -> str:
    """sha256 of the canonical bytes, read in blocks."""
    running = hashlib.sha256()
    for block in blocks(storage_of(weight)):
        running.update(block)
    return running.hexdigest()


def same_through(a: Weight, b: Weight, view: View, *, progress: Callable[[int], None] | None = None) -> bool:
    """Whether `view` of `a` is `b`, bit for bit. `view` is *as stored* or a two-dimensional transpose.

    Cost: reads both once, stops at the first differing block; memory two blocks.
    """
    one, other = storage_of(a), storage_of(b)
    if a.dtype != b.dtype or one.n_bytes != other.n_bytes or view.shape(a.shape) != b.shape:
        return False
    if view == AS_STORED:
        return same_bytes(one, other, progress)
    item = dtype(a.dtype).item_bytes
    if not view.transposes or item is None:
        return False
    return _same_transposed(one, other, a.shape, item, progress)


def transposed_block(storage: Storage, shape: Sequence[int], item: int, begin: int, end: int) -> Bytes:
    """Columns begin..end of a stored [rows, columns] matrix, as rows: uint8 of shape [end - begin, rows, item]."""
    n_rows, n_columns = shape
    ranges = [((row * n_columns + begin) * item, (end - begin) * item) for row in range(n_rows)]
    block = np.frombuffer(b"".join(storage.read_ranges(ranges)), np.uint8)
    return block.reshape(n_rows, end - begin, item).transpose(1, 0, 2)


def _same_transposed(
    one: Storage, other: Storage, shape: Sequence[int], item: int, progress: Callable[[int], None] | None
) -> bool:
    """Walks the rows of the taller matrix in blocks, so that each strided read is as long as it can be."""
    if shape[0] < shape[1]:
        one, other, shape = other, one, shape[::-1]
    n_rows, n_columns = shape
    step = 8
    begin = 0
    while begin < n_rows:
        end = min(begin + step, n_rows)
        rows = one.read_ranges([(begin * n_columns * item, (end - begin) * n_columns * item)])[0]
        if not _all_equal(rows, transposed_block(other, (n_columns, n_rows), item, begin, end)):
            return False
        if progress is not None:
            progress(len(rows))
        begin, step = end, max(STRIPE_BYTES // (n_columns * item), 1)
    return True


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _all_equal(rows: bytes, block: Bytes) -> bool:
    """Whether row-major bytes are those of a block of columns (uint8 [rows, columns, item]), by whole elements."""
    unsigned = _UNSIGNED.get(block.shape[2])
    if unsigned is None:  # complex128: compared byte by byte
        return bool(np.array_equal(np.frombuffer(rows, np.uint8).reshape(block.shape), block))
    stored = block.transpose(1, 0, 2)  # as it was read, so that this view copies nothing
    elements = stored.view(unsigned)[..., 0].T
    return bool((np.frombuffer(rows, unsigned).reshape(elements.shape) == elements).all())
