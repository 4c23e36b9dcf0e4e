"""Writing new files from stored bytes: ranges of files are copied by the kernel where it can, all else in blocks.

Linux: `copy_file_range` (which shares the blocks where the file system can), then `sendfile`; a range that neither
takes, and every other system, goes through one block of memory. Holes of a sparse file stay holes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tieaudit.storage import BLOCK_BYTES, FileStorage, Storage, blocks, reading

_KERNEL_BYTES = 256 * 1024 * 1024
"""Bytes of one request to the kernel, so that an interrupt is heard between two."""
_BUFFER_BYTES = 1024 * 1024
_CANNOT = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
"""What the kernel says where this way of copying is not for these two files: across file systems, or sandboxed."""


class NewFile:
    """A regular file that is written from its beginning; it must not exist yet.

    A context manager. Nothing is synchronised with the disk: `rewrite` does that for all files at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = 0
        """Bytes written so far: where the next ones will be."""
        self._handle = -1
        self._buffer = bytearray()

    def __enter__(self) -> NewFile:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._flush()
                os.ftruncate(self._handle, self.n_bytes)  # a hole at the end is no byte yet
        finally:
            os.close(self._handle)

    def write(self, data: bytes) -> None:
        """Append bytes; short ones are gathered."""
        self._buffer += data
        self.n_bytes += len(data)
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def align(self, n_bytes: int) -> int:
        """Append zeros up to a multiple of `n_bytes`; the offset that was reached."""
        self.write(bytes(-self.n_bytes % n_bytes))
        return self.n_bytes

    def copy(self, storage: Storage, block_bytes: int = BLOCK_BYTES) -> int:
        """Append all bytes of a storage; their offset. CorruptFile if its file is shorter than it should be.

        Cost: one pass over the bytes; memory: a block, or nothing where the kernel copies.
        """
        begin = self.n_bytes
        if isinstance(storage, FileStorage):
            with reading() as files:
                self._copy_range(files.handle(storage.path), storage)
        else:
            for block in blocks(storage, block_bytes):
                self.write(block)
        return begin

    def _copy_range(self, source: int, storage: FileStorage) -> None:
        if storage.n_bytes <= _BUFFER_BYTES:
            self.write(storage.read_ranges([(0, storage.n_bytes)])[0])
            return
        self._flush()
        if os.fstat(source).st_size < storage.offset + storage.n_bytes:
            storage.read_ranges([(storage.n_bytes - 1, 1)])  # says what is missing
        for begin, end in _data(source, storage.offset, storage.offset + storage.n_bytes):
            os.lseek(self._handle, self.n_bytes + begin - storage.offset, os.SEEK_SET)
            done = _by_kernel(source, self._handle, begin, end - begin)
            for at in range(begin + done, end, BLOCK_BYTES):
                _write(self._handle, storage.read_ranges([(at - storage.offset, min(BLOCK_BYTES, end - at))])[0])
        self.n_bytes += storage.n_bytes
        os.lseek(self._handle, self.n_bytes, os.SEEK_SET)

    def _flush(self) -> None:
        if self._buffer:
            _write(self._handle, bytes(self._buffer))
            self._buffer.clear()


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file into a new one. Links are followed: what is written is never a link.

    Raises OSError; CorruptFile if the source becomes shorter meanwhile.
    """
    with NewFile(target) as new:
        new.copy(FileStorage(str(source), 0, source.stat().st_size))


def _write(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def _data(source: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file's range that are stored, in order: all of it where the system knows no holes."""
    if sys.platform not in ("linux", "darwin"):
        yield begin, end
        return
    while begin < end:
        try:
            first = os.lseek(source, begin, os.SEEK_DATA)
            last = min(os.lseek(source, first, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return
            first, last = begin, end
        if first >= end:
            return
        yield first, last
        begin = last


def _by_kernel(source: int, target: int, begin: int, n_bytes: int) -> int:
    """Bytes that the kernel copied from `begin` of `source` to the place of `target`, which moves on."""
    if sys.platform != "linux":
        return 0
    done = 0
    for copy in (_copy_file_range, _sendfile):
        try:
            while done < n_bytes:
                count = copy(source, target, begin + done, min(n_bytes - done, _KERNEL_BYTES))
                if count == 0:  # some file systems say this where another way works; at a real end the reader complains
                    break
                done += count
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        if done == n_bytes:
            break
    return done


def _copy_file_range(source: int, target: int, begin: int, n_bytes: int) -> int:
    if sys.platform != "linux":
        return 0
    return os.copy_file_range(source, target, n_bytes, offset_src=begin)


def _sendfile(source: int, target: int, begin: int, n_bytes: int) -> int:
    return os.sendfile(target, source, begin, n_bytes)
