"""Reading and comparing tensors in blocks: probes, exact equality through a view, constancy. Memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from tieaudit.dtypes import dtype
from tieaudit.model import Weight, storage_of
from tieaudit.storage import BLOCK_BYTES, Storage, blocks, fill, next_stored, same_bytes
from tieaudit.strided import Strided, is_row_major
from tieaudit.view import AS_STORED, Shape, View

if TYPE_CHECKING:  # a scan of a model in which nothing collides never needs it
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

STRIPE_BYTES = 4 * BLOCK_BYTES
"""Block for reading columns: each strided read of a block is as long as the block is wide."""
SMALL_BYTES = 4096
"""Tensors up to this size are read whole at the first look: one read is as cheap as one probe."""
_FIRST_BYTES = 256
"""First look at a larger one: most tensors that are not constant show it here."""
_PADDING_BYTES = 192
"""Behind each row of a block: rows a power of two apart would share the few cache lines of one set."""
_TILE = 512
N_ROUNDS = 4
"""Rounds of probing; only what collides in one goes on to the next."""
_N_EDGE, _N_INSIDE = 8, 48


def probe(weight: Weight, round_number: int) -> bytes:
    """A few bytes that a tensor shares with all its copies and transposes; tensors whose bytes differ are neither.

    A rectangular matrix is read in its tall orientation; of a square one the diagonal, and its edges in an order that
    does not tell rows from columns. Each round looks elsewhere. Cost: 1, 2, 32 and 48 elements.
    """
    storage, item, bits = storage_of(weight), dtype(weight.dtype).item_bytes, packed_bits(weight.dtype)
    if (item is None and not bits) or storage.n_bytes != dtype(weight.dtype).n_bytes(weight.n_elements):
        begin = min(round_number * 64, max(storage.n_bytes - 64, 0))
        return b"".join(storage.read_ranges([(begin, min(64, storage.n_bytes - begin))]))
    groups: list[bytes] = []
    for flat in _probed(weight.shape, weight.n_elements, round_number):
        if item is not None:
            ranges = _runs(weight.shape, weight.n_elements, round_number)[len(groups)]
            groups.append(b"".join(storage.read_ranges([(begin * item, length * item) for begin, length in ranges])))
            continue
        held = storage.read_ranges([(index * bits // 8, 1) for index in flat])  # the first one in the lowest bits
        mask = (1 << bits) - 1
        groups.append(bytes(byte[0] >> index * bits % 8 & mask for byte, index in zip(held, flat, strict=True)))
    return b"".join(sorted(groups))


@lru_cache(maxsize=4096)
def _probed(shape: Shape, n_elements: int, round_number: int) -> tuple[tuple[int, ...], ...]:
    """Flat indices of the elements to probe, in groups; a transpose has the same groups, a square one maybe swapped.

    Corners and edges come first: most of what differs at all differs there, also where the rest is zero.
    """
    from random import Random

    if round_number == 0:
        return ((n_elements - 1,),)
    rng, n_drawn = Random(round_number), 2 if round_number == 1 else _N_INSIDE
    n_edge = min(_N_EDGE, min(shape, default=1)) if len(shape) == 2 else min(_N_EDGE, n_elements)
    if len(shape) != 2:
        edges = (*range(n_edge), *range(n_elements - n_edge, n_elements))
        return (edges if round_number == 2 else tuple(rng.randrange(n_elements) for _ in range(n_drawn)),)
    n_rows, n_columns = max(shape), min(shape)
    wide = shape[0] < shape[1]

    def at(row: int, column: int) -> int:
        return column * n_rows + row if wide else row * n_columns + column

    def drawn() -> int:
        row = rng.randrange(n_rows)
        return at(row, row if n_rows == n_columns else rng.randrange(n_columns))

    if round_number != 2:
        return (tuple(drawn() for _ in range(n_drawn)),)
    along = (*(at(0, i) for i in range(n_edge)), *(at(n_rows - 1, n_columns - n_edge + i) for i in range(n_edge)))
    across = (*(at(i, 0) for i in range(n_edge)), *(at(n_rows - n_edge + i, n_columns - 1) for i in range(n_edge)))
    return (along, across)


@lru_cache(maxsize=4096)
def _runs(shape: Shape, n_elements: int, round_number: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The groups of `_probed` as (first, how many) of neighbours: one read for each run."""
    groups = []
    for flat in _probed(shape, n_elements, round_number):
        runs: list[tuple[int, int]] = []
        for index in flat:
            if runs and sum(runs[-1]) == index:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((index, 1))
        groups.append(tuple(runs))
    return tuple(groups)


def packed_bits(name: str) -> int:
    """Bits of one element where several of them fill a byte exactly (2 and 4); 0 for every other type."""
    bits = dtype(name).n_bits
    return bits if bits in (2, 4) else 0


def head(weight: Weight) -> bytes:
    """The beginning of a weight: all of a small one. One read, by which most weights are told apart."""
    storage = storage_of(weight)
    n_bytes = storage.n_bytes if storage.n_bytes <= SMALL_BYTES else _FIRST_BYTES
    return storage.read_ranges([(0, n_bytes)])[0]


def constant_value(weight: Weight, beginning: bytes) -> bytes | None:
    """The one element that fills the tensor, or None. `beginning` is its `head`; stops at the first other element."""
    item, storage = dtype(weight.dtype).item_bytes, storage_of(weight)
    if item is None:
        return _constant_packed(weight, storage)
    first, block, begin = beginning[:item], beginning, 0
    while block:
        if block != first * (len(block) // item):
            return None
        begin += len(block)
        if not any(first):  # what a sparse file does not store is zero: there is no need to read that
            begin = storage.n_bytes if (found := next_stored(storage, begin)) is None else found // item * item
        (block,) = storage.read_ranges([(begin, min(BLOCK_BYTES, storage.n_bytes - begin))])
    return first


def _constant_packed(weight: Weight, storage: Storage) -> bytes | None:
    if weight.dtype == "string":
        return b"" if weight.n_elements == 1 else None
    import numpy as np

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


def comparable(name: str, view: View) -> bool:
    """Whether tensors of this element type can be compared through a view: as stored always, transposed mostly."""
    return view == AS_STORED or (view.transposes and bool(dtype(name).item_bytes or packed_bits(name)))


def digest(weight: Weight, view: View = AS_STORED) -> str:
    """sha256 of the canonical bytes of `view` of the weight: *as stored*, or a two-dimensional transpose.

    ValueError for another view, or where no whole number of elements fills a byte.
    Cost: reads the weight once, in blocks.
    """
    import hashlib

    if not comparable(weight.dtype, view):
        raise ValueError(f"{weight.id}: no digest of {weight.dtype} seen {view}")
    running = hashlib.sha256()
    for block in blocks(storage_of(weight)) if view == AS_STORED else transposed_blocks(weight):
        running.update(block)
    return running.hexdigest()


def transposed_blocks(weight: Weight) -> Iterator[bytes]:
    """The canonical bytes of the transpose of a stored matrix, in order. Memory: a few blocks."""
    storage, bits = storage_of(weight), packed_bits(weight.dtype)
    n_rows, n_columns = weight.shape
    item = dtype(weight.dtype).item_bytes or 1  # packed elements are unpacked to a byte each on the way
    step = -(-max(STRIPE_BYTES // (n_rows * item), 1) // 4) * 4  # so that packed blocks end with a byte
    for begin in range(0, n_columns, step):
        end = min(begin + step, n_columns)
        if not bits:
            yield transposed_block(storage, weight.shape, item, begin, end).tobytes()
            continue
        rows = codes(storage, bits, [(row * n_columns + begin, end - begin) for row in range(n_rows)])
        yield packed(rows.T.reshape(-1), bits)


def same_through(a: Weight, b: Weight, view: View, *, progress: Callable[[int], None] | None = None) -> bool:
    """Whether `view` of `a` is `b`, bit for bit. `view` is *as stored* or a two-dimensional transpose.

    Cost: reads both once, stops at the first differing block; memory two blocks.
    """
    one, other = storage_of(a), storage_of(b)
    if a.dtype != b.dtype or one.n_bytes != other.n_bytes or view.shape(a.shape) != b.shape:
        return False
    if view == AS_STORED:
        return same_bytes(one, other, progress)
    if not comparable(a.dtype, view):
        return False
    lying, standing = _unturned(one, a.shape), _unturned(other, b.shape)
    if lying is not None or standing is not None:  # a transpose of what is stored as a transpose: as it lies there
        return same_bytes(lying or one, other if lying is not None else standing or other, progress)
    bits, item = packed_bits(a.dtype), dtype(a.dtype).item_bytes
    if item is None:
        return _same_packed_transposed(one, other, a.shape, bits, progress)
    return _same_transposed(one, other, a.shape, item, progress)


def _unturned(storage: Storage, shape: Shape) -> Storage | None:
    """The transpose of a matrix that steps through its bytes column by column: they lie row by row; else None."""
    if not isinstance(storage, Strided) or len(storage.shape) != 2 or storage.shape != tuple(shape):
        return None
    turned = replace(storage, shape=storage.shape[::-1], strides=storage.strides[::-1])
    return turned if is_row_major(turned.shape, turned.strides) else None


def transposed_block(storage: Storage, shape: Sequence[int], item: int, begin: int, end: int) -> Bytes:
    """Columns begin..end of a stored [rows, columns] matrix, as rows: uint8 of shape [end - begin, rows, item]."""
    import numpy as np

    n_rows, n_columns = shape
    ranges = [((row * n_columns + begin) * item, (end - begin) * item) for row in range(n_rows)]
    block = np.frombuffer(b"".join(storage.read_ranges(ranges)), np.uint8)
    return block.reshape(n_rows, end - begin, item).transpose(1, 0, 2)


def _same_transposed(
    one: Storage, other: Storage, shape: Sequence[int], item: int, progress: Callable[[int], None] | None
) -> bool:
    """Walks the rows of the taller matrix in blocks, so that each strided read is as long as it can be.

    Both blocks are read into buffers that are used again and again, and compared in tiles that fit into the cache:
    twelve times faster than comparing a block as a whole, most of which is waiting for memory.
    """
    import numpy as np

    if shape[0] < shape[1]:
        one, other, shape = other, one, shape[::-1]
    n_rows, n_columns = shape
    word = next(n_bytes for n_bytes in (8, 4, 2, 1) if item % n_bytes == 0)
    kind, n_words = np.dtype(f"u{word}"), item // word
    row_bytes = n_columns * item
    n_block = min(max(STRIPE_BYTES // row_bytes, 1), n_rows)
    rows = np.empty((n_block, n_columns, n_words), kind)
    stride = n_block * item + _PADDING_BYTES
    columns = np.empty((n_columns, stride // word), kind)
    flat_rows, flat_columns = (block.reshape(-1).view(np.uint8).data for block in (rows, columns))
    begin, step = 0, min(8, n_block)
    while begin < n_rows:
        n_here = min(step, n_rows - begin)
        fill(one, [(begin * row_bytes, flat_rows[: n_here * row_bytes])])
        fill(
            other,
            (
                ((column * n_rows + begin) * item, flat_columns[column * stride : column * stride + n_here * item])
                for column in range(n_columns)
            ),
        )
        block = columns[:, : n_here * n_words].reshape(n_columns, n_here, n_words).transpose(1, 0, 2)
        if not _equal_in_tiles(rows[:n_here], block):
            return False
        if progress is not None:
            progress(n_here * row_bytes)
        begin, step = begin + n_here, n_block
    return True


def _equal_in_tiles(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    n_rows, n_columns = a.shape[:2]
    return all(
        bool((a[top : top + _TILE, left : left + _TILE] == b[top : top + _TILE, left : left + _TILE]).all())
        for top in range(0, n_rows, _TILE)
        for left in range(0, n_columns, _TILE)
    )


def codes(storage: Storage, bits: int, ranges: Sequence[tuple[int, int]]) -> Bytes:
    """Elements of `bits` bits, one to a byte, of ranges (first element, how many) of one length: [ranges, length]."""
    import numpy as np

    per_byte = 8 // bits
    spans = [(first // per_byte, -(-(first + count) // per_byte) - first // per_byte) for first, count in ranges]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    rows = []
    for (first, count), held in zip(ranges, storage.read_ranges(spans), strict=True):
        unpacked = (np.frombuffer(held, np.uint8)[:, None] >> shifts & ((1 << bits) - 1)).reshape(-1)
        rows.append(unpacked[first % per_byte :][:count])
    return np.stack(rows) if rows else np.zeros((0, 0), np.uint8)


def packed(elements: Bytes, bits: int) -> bytes:
    """One element to a byte → several, the first one in the lowest bits, and zeros behind the last one."""
    import numpy as np

    per_byte = 8 // bits
    padded = np.zeros(-(-len(elements) // per_byte) * per_byte, np.uint8)
    padded[: len(elements)] = elements
    shifted = padded.reshape(-1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    return bytes(np.bitwise_or.reduce(shifted, axis=1).tobytes())


def _same_packed_transposed(
    one: Storage, other: Storage, shape: Sequence[int], bits: int, progress: Callable[[int], None] | None
) -> bool:
    """As `_same_transposed`, with a byte for each element of a block."""
    import numpy as np

    if shape[0] < shape[1]:
        one, other, shape = other, one, shape[::-1]
    n_rows, n_columns = shape
    begin, step = 0, 8
    while begin < n_rows:
        count = min(step, n_rows - begin)
        rows = codes(one, bits, [(begin * n_columns, count * n_columns)]).reshape(count, n_columns)
        columns = codes(other, bits, [(column * n_rows + begin, count) for column in range(n_columns)])
        if not np.array_equal(rows, columns.T):
            return False
        if progress is not None:
            progress(rows.size * bits // 8)
        begin, step = begin + count, max(STRIPE_BYTES // n_columns, 1)
    return True
