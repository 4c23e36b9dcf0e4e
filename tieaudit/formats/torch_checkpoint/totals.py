"""Sums of tensors, computed once more from the original for the proof: block by block, apart from what wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tieaudit.dtypes import dtype
from tieaudit.model import Weight
from tieaudit.storage import BLOCK_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.generic]


@dataclass(frozen=True)
class Term:
    """A tensor that is added, None if it cannot be read; or the sum itself."""

    weight: Weight | None
    turned: bool
    """Added as its transpose."""


def same_sum(first: Term, others: Sequence[Term], total: Term) -> bool:
    """Whether `total` is the sum of the others, each element rounded once. Cost: reads all of them once, in blocks."""
    import numpy as np

    wanted, found = first.weight, total.weight
    terms = [first, *others]
    if wanted is None or found is None or (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
        return False
    for begin, end in _rows(wanted):
        blocks = [_block(term, wanted, begin, end) for term in terms]
        block = _block(total, found, begin, end)
        if block is None or any(one is None for one in blocks):
            return False
        with np.errstate(all="ignore"):
            expected = sum(one.astype(np.float64) for one in blocks if one is not None)
            rounded = np.asarray(expected).astype(block.dtype)
        if rounded.tobytes() != block.tobytes() and not _equal(rounded, block):
            return False
    return True


def _equal(a: Numbers, b: Numbers) -> bool:
    """Bit for bit, but for the payload of what is no number."""
    import numpy as np

    one, other = (np.isnan(block.astype(np.float64)) for block in (a, b))
    width = f"u{a.dtype.itemsize}"
    return bool((one == other).all() and (a.view(width)[~one] == b.view(width)[~one]).all())


def _rows(weight: Weight) -> Iterator[tuple[int, int]]:
    """Rows of a matrix that are compared together; a tensor of other rank is one column."""
    n_rows, n_columns = _matrix(weight.shape)
    step = max(BLOCK_BYTES // (8 * max(n_columns, 1)), 1)
    for begin in range(0, n_rows, step):
        yield begin, min(begin + step, n_rows)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) == 2:
        return shape[0], shape[1]
    count = 1
    for size in shape:
        count *= size
    return count, 1


def _block(term: Term, like: Weight, begin: int, end: int) -> Numbers | None:
    """Rows begin … end as they are added; of a transposed matrix its columns."""
    import numpy as np

    weight = term.weight
    shape = like.shape[::-1] if term.turned else like.shape
    if weight is None or weight.storage is None or weight.dtype != like.dtype or weight.shape != shape:
        return None
    kind = dtype(weight.dtype).numpy()
    n_rows, n_columns = _matrix(shape)
    if not term.turned:
        ranges = [(begin * n_columns * kind.itemsize, (end - begin) * n_columns * kind.itemsize)]
    else:
        ranges = [((row * n_columns + begin) * kind.itemsize, (end - begin) * kind.itemsize) for row in range(n_rows)]
    block: Numbers = np.frombuffer(b"".join(weight.storage.read_ranges(ranges)), kind)
    return np.ascontiguousarray(block.reshape(n_rows, end - begin).T).reshape(-1) if term.turned else block
