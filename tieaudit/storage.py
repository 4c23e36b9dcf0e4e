"""Locators of bytes. A storage says where bytes are and reads ranges of them; it never loads a tensor.

Every storage is picklable and has a `region`: (container, begin, end). Two weights whose regions overlap in one
container share memory; deriving aliases from regions is the business of one algorithm in `find.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from tieaudit.errors import CorruptFile

Region = tuple[str, int, int]
BLOCK_BYTES = 4 * 1024 * 1024
FIRST_BYTES = 4096


@runtime_checkable
class Storage(Protocol):
    """Where the canonical little-endian bytes of a tensor are."""

    @property
    def n_bytes(self) -> int: ...

    @property
    def region(self) -> Region: ...

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length), relative to this storage. CorruptFile if the file is shorter."""
        ...


@dataclass(frozen=True)
class FileStorage:
    """`n_bytes` bytes of a file from `offset` on."""

    path: str
    """Resolved path of the file."""
    offset: int
    n_bytes: int

    @property
    def region(self) -> Region:
        return (self.path, self.offset, self.offset + self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        with Path(self.path).open("rb", buffering=0) as file:
            return [self._read(file.fileno(), begin, length) for begin, length in ranges]

    def _read(self, handle: int, begin: int, length: int) -> bytes:
        block = os.pread(handle, length, self.offset + begin)
        while (
            0 < len(block) < length
        ):  # the system may return less than was asked for, but never nothing before the end
            piece = os.pread(handle, length - len(block), self.offset + begin + len(block))
            if not piece:
                break
            block += piece
        if len(block) != length:
            raise CorruptFile(
                f"{self.path}: expected {length} bytes at byte {self.offset + begin}, "
                f"found {len(block)}: the file is truncated or changed while it was read"
            )
        return block


@dataclass(frozen=True)
class MemoryStorage:
    """Bytes that had to be decoded while loading (typed protobuf fields, strings, small constants)."""

    data: bytes = field(repr=False)
    container: str
    """Unique name of the place, so that two tensors never look like one region."""

    @property
    def n_bytes(self) -> int:
        return len(self.data)

    @property
    def region(self) -> Region:
        return (self.container, 0, len(self.data))

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self.data[begin : begin + length] for begin, length in ranges]


def blocks(storage: Storage, n_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The whole storage in order, `n_bytes` at a time: bounded memory whatever the tensor's size."""
    for begin in range(0, storage.n_bytes, n_bytes):
        yield storage.read_ranges([(begin, min(n_bytes, storage.n_bytes - begin))])[0]


def same_bytes(one: Storage, other: Storage, progress: Callable[[int], None] | None = None) -> bool:
    """Whether two storages hold the same bytes; a small block first, since most that differ differ early.

    Cost: both once, two blocks of memory, an end at the first block that differs.
    """
    if one.n_bytes != other.n_bytes:
        return False
    begin, step = 0, FIRST_BYTES
    while begin < one.n_bytes:
        step = min(step, one.n_bytes - begin)
        if one.read_ranges([(begin, step)]) != other.read_ranges([(begin, step)]):
            return False
        if progress is not None:
            progress(step)
        begin, step = begin + step, BLOCK_BYTES
    return True
