"""Bytes that are not stored anywhere yet: the transpose of a stored matrix, and a copy that is to stay a copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tieaudit.copying import NewFile
from tieaudit.storage import BLOCK_BYTES, Region, Storage

_WIDE_BYTES = 4 * BLOCK_BYTES
"""Block of a transpose: each strided read is as long as the block is wide."""
_N_BYTES_STRIDED = 4096
"""Rows of the source shorter than this are read whole: a call for every row would cost more than its bytes."""


@dataclass(frozen=True)
class Transposed:
    """The transpose of a row-major matrix of `shape`, computed while it is read.

    Cost: a range reads its columns of the source, row by row, or the whole source where rows are short; memory:
    the range and one block.
    """

    source: Storage
    shape: tuple[int, int]
    """Of the source."""
    n_item_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes

    @property
    def region(self) -> Region:
        container, begin, end = self.source.region
        return (f"transposed:{container}", begin, end)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._range(begin, length) for begin, length in ranges]

    def _range(self, begin: int, length: int) -> bytes:
        n_rows, n_columns = self.shape
        row = n_rows * self.n_item_bytes
        if length <= 0 or row == 0:
            return b""
        first, last = begin // row, -(-(begin + length) // row)
        strip = np.empty((last - first, n_rows, self.n_item_bytes), np.uint8)
        n_rows_per_block = max(1, BLOCK_BYTES // max(n_columns * self.n_item_bytes, 1))
        for top in range(0, n_rows, n_rows_per_block):
            n_here = min(n_rows_per_block, n_rows - top)
            strip[:, top : top + n_here] = self._cells(top, n_here, first, last).transpose(1, 0, 2)
        return strip.reshape(-1)[begin - first * row :][:length].tobytes()

    def _cells(self, top: int, n_rows: int, first: int, last: int) -> NDArray[np.uint8]:
        """Rows top… of the source, columns first … last: [rows, columns, bytes of an item]."""
        row, item = self.shape[1] * self.n_item_bytes, self.n_item_bytes
        if row >= _N_BYTES_STRIDED:
            ranges = [(n * row + first * item, (last - first) * item) for n in range(top, top + n_rows)]
            return np.frombuffer(b"".join(self.source.read_ranges(ranges)), np.uint8).reshape(n_rows, -1, item)
        block = np.frombuffer(self.source.read_ranges([(top * row, n_rows * row)])[0], np.uint8)
        return block.reshape(n_rows, -1, item)[:, first:last]


@dataclass(frozen=True)
class Copy:
    """The same bytes under a region of their own, so that they are written once more."""

    source: Storage
    label: str
    """Tells copies of one source apart."""

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes

    @property
    def region(self) -> Region:
        container, begin, end = self.source.region
        return (f"copy {self.label}:{container}", begin, end)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return self.source.read_ranges(ranges)


def append(file: NewFile, storage: Storage) -> None:
    """Write a storage: in wide blocks for a transpose, and a copy like what it is a copy of."""
    while isinstance(storage, Copy):
        storage = storage.source
    file.copy(storage, _WIDE_BYTES if isinstance(storage, Transposed) else BLOCK_BYTES)
