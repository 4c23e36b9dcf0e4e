"""Locators of bytes. A storage says where bytes are and reads ranges of them; it never loads a tensor.

Every storage is picklable and has a `region`: (container, begin, end). Two weights whose regions overlap in one
container share memory; deriving aliases from regions is the business of one algorithm in `regions.py`.

Reads go through `Reading`, which keeps files open while many small reads follow one another and counts the bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tieaudit.errors import CorruptFile, WeightsNotHere

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


def no_values(storage: Storage) -> str:
    """Why there is a place but no bytes in it (a tensor of the meta device, a shard of another machine), or empty."""
    return str(getattr(storage, "no_values", ""))


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
        files = _current.get()
        if files is None:  # nobody keeps files open: for this call only
            with reading():
                return self.read_ranges(ranges)
        handle = files.handle(self.path)
        return [self._read(files, handle, begin, length) for begin, length in ranges]

    def fill(self, places: Iterable[tuple[int, memoryview]]) -> None:
        """Read from each offset on into the buffer beside it, which is filled. Nothing is allocated."""
        with reading() as files:
            handle = files.handle(self.path)
            for begin, buffer in places:
                n_here = os.preadv(handle, (buffer,), self.offset + begin)
                files.n_bytes += n_here
                if n_here != len(buffer):
                    buffer[n_here:] = self._read(files, handle, begin + n_here, len(buffer) - n_here)

    def _read(self, files: Reading, handle: int, begin: int, length: int) -> bytes:
        block = os.pread(handle, length, self.offset + begin)
        while 0 < len(block) < length:  # a system may return less than was asked for, but nothing only at the end
            piece = os.pread(handle, length - len(block), self.offset + begin + len(block))
            if not piece:
                break
            block += piece
        files.n_bytes += len(block)
        if len(block) != length:
            raise CorruptFile(
                f"{self.path}: expected {length} bytes at byte {self.offset + begin}, "
                f"found {len(block)}: the file is truncated or changed while it was read"
            )
        return block


class Reading:
    """Files that stay open between reads, and how many bytes were read from them."""

    def __init__(self, scattered: bool = False) -> None:
        self.scattered = scattered
        self.n_bytes = 0
        """Bytes read from files so far."""
        self._handles: dict[str, int] = {}

    def handle(self, path: str) -> int:
        """An open handle of a file, until `close`, or until many other files were opened since it was used."""
        found = self._handles.pop(path, None)
        if found is None:
            while len(self._handles) >= _N_MOST_OPEN:
                os.close(self._handles.pop(next(iter(self._handles))))
            found = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if self.scattered and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(found, 0, 0, os.POSIX_FADV_RANDOM)
        self._handles[path] = found
        return found

    def close(self) -> None:
        """Close all files; the count stays."""
        while self._handles:
            os.close(self._handles.popitem()[1])


_N_MOST_OPEN = 200
"""Half of what a process may have open on the strictest of usual systems (256)."""
_current: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(scattered: bool = False) -> Iterator[Reading]:
    """Keep files open for the reads inside, and count their bytes; nested ones share the outermost.

    `scattered`: a few bytes here and there, so that the system need not read 128 KiB ahead of each of them.
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    files = Reading(scattered)
    token = _current.set(files)
    try:
        yield files
    finally:
        _current.reset(token)
        files.close()


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


@dataclass(frozen=True)
class NotHere:
    """The place of a tensor whose file is elsewhere: it is stored, and nothing of it can be read or measured."""

    container: str
    """Unique name of the place, so that two tensors never look like one region."""
    no_values: str
    """Why there are no bytes."""
    n_bytes: int = 0

    @property
    def region(self) -> Region:
        return (self.container, 0, 0)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        raise WeightsNotHere(f"{self.container}: there is nothing to read: {self.no_values}")


def fill(storage: Storage, places: Iterable[tuple[int, memoryview]]) -> None:
    """Read from each offset on into the buffer beside it: without a copy where the storage is a file."""
    if type(storage) is FileStorage:  # a kind of its own may get its bytes elsewhere
        storage.fill(places)
        return
    for begin, buffer in places:
        buffer[:] = storage.read_ranges([(begin, len(buffer))])[0]


def next_stored(storage: Storage, begin: int) -> int | None:
    """The first offset from `begin` on whose byte the file holds; None if all the rest is a hole, which reads as zeros.

    Where a system or a storage knows nothing of holes, that is `begin`. Cost: one call, nothing is read.
    Source: lseek(2), SEEK_DATA; a system without holes may answer with the offset itself.
    """
    if type(storage) is not FileStorage or begin >= storage.n_bytes or not hasattr(os, "SEEK_DATA"):
        return begin if begin < storage.n_bytes else None
    with reading() as files:
        try:
            found = os.lseek(files.handle(storage.path), storage.offset + begin, os.SEEK_DATA) - storage.offset
        except OSError as error:
            if error.errno != errno.ENXIO:
                return begin
            # no data up to the end of the file, which must reach as far as it is said to
            storage.read_ranges([(storage.n_bytes - 1, 1)])
            return None
    return found if found < storage.n_bytes else None


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
        (block,) = one.read_ranges([(begin, step)])
        if [block] != other.read_ranges([(begin, step)]):
            return False
        if progress is not None:
            progress(step)
        begin, step = begin + step, BLOCK_BYTES
        if not block[-1] and begin < one.n_bytes:  # perhaps in a hole of both files, which reads as zeros
            places = [next_stored(storage, begin) for storage in (one, other)]
            begin = min(one.n_bytes if place is None else place for place in places)
    return True
