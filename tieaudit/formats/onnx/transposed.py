"""Bytes that are not stored anywhere yet: the transpose of a stored matrix, and a copy that is to stay a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tieaudit.storage import BLOCK_BYTES, Region, Storage, blocks


@dataclass(frozen=True)
class Transposed:
    """The transpose of a row-major matrix of `shape`, computed while it is read.

    Cost: every range reads the whole source once, in blocks; memory: the range and one block.
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
            n_begin, n_length = (n * n_columns * self.n_item_bytes for n in (top, n_here))
            block = np.frombuffer(self.source.read_ranges([(n_begin, n_length)])[0], np.uint8)
            cells = block.reshape(n_here, n_columns, self.n_item_bytes)[:, first:last]
            strip[:, top : top + n_here] = cells.transpose(1, 0, 2)
        return strip.reshape(-1)[begin - first * row :][:length].tobytes()


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


def in_blocks(storage: Storage) -> Iterator[bytes]:
    """A storage in order, in blocks; wide ones for a transpose, which reads its whole source for every block."""
    return blocks(storage, 16 * BLOCK_BYTES if isinstance(storage, Transposed) else BLOCK_BYTES)
