"""Bytes of a pickle, a window at a time: whatever a pickle says about lengths, no more is held than was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from tieaudit.errors import CorruptFile
from tieaudit.storage import Storage

_WINDOW_BYTES = 65536
_MAX_LINE_BYTES = 4096
"""Longest line of a text opcode: a module, a name, a number."""


@dataclass(frozen=True)
class Blob:
    """A long text or byte string that was passed over: where it is."""

    offset: int
    """From the beginning of the pickle's storage."""
    n_bytes: int


class Stream:
    """A storage that is read once, from `at` on. CorruptFile where it ends too early."""

    def __init__(self, storage: Storage, where: str, at: int = 0) -> None:
        self.where = where
        """What is read, for messages."""
        self._storage = storage
        self._end = storage.n_bytes
        self._window = b""
        self._begin = at
        self._next = 0

    @property
    def at(self) -> int:
        """Offset of the next byte."""
        return self._begin + self._next

    def byte(self) -> int:
        if self._next >= len(self._window):
            self._fill(1)
        value = self._window[self._next]
        self._next += 1
        return value

    def take(self, n_bytes: int) -> bytes:
        """The next `n_bytes`; callers bound it."""
        end = self._next + n_bytes
        if end > len(self._window):
            self._fill(n_bytes)
            end = n_bytes
        data = self._window[self._next : end]
        self._next = end
        return data

    def number(self, n_bytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(n_bytes), "little", signed=signed)

    def skip(self, n_bytes: int) -> Blob:
        """Pass over bytes without reading them."""
        blob = Blob(self.at, n_bytes)
        if n_bytes > self._end - blob.offset:
            raise self._cut_off(n_bytes)
        self._begin, self._window, self._next = blob.offset + n_bytes, b"", 0
        return blob

    def line(self) -> str:
        """Up to the next newline, which is left out."""
        found = bytearray()
        while (value := self.byte()) != 10:
            found.append(value)
            if len(found) > _MAX_LINE_BYTES:
                raise CorruptFile(f"{self.where}: expected a line of at most {_MAX_LINE_BYTES} bytes at byte {self.at}")
        return found.decode("utf-8", "replace")

    def _fill(self, n_bytes: int) -> None:
        begin = self.at
        if n_bytes > self._end - begin:
            raise self._cut_off(n_bytes)
        length = min(max(n_bytes, _WINDOW_BYTES), self._end - begin)
        (self._window,) = self._storage.read_ranges([(begin, length)])
        self._begin, self._next = begin, 0

    def _cut_off(self, n_bytes: int) -> CorruptFile:
        return CorruptFile(
            f"{self.where}: expected {n_bytes} more bytes at byte {self.at} of the pickle, found its end at byte "
            f"{self._end}: truncated, or no pickle"
        )
