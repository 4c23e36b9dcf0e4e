"""Writing a zip archive as PyTorch does: members stored, each one at a multiple of 64 bytes, so that it can be mapped.

Byte for byte the layout of `torch.save`: a data descriptor behind every member that has bytes, alignment by an extra
field `FB` that is filled with `Z`, a zip64 directory end always. Source: caffe2/serialize/inline_container.cc
(`getPadding`, `PyTorchStreamWriter`) and miniz, both of PyTorch 2.13; PKWARE, APPNOTE 6.3.10.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from tieaudit.copying import NewFile
from tieaudit.storage import Storage, blocks

ALIGNMENT = 64
_UTF8, _DESCRIBED_BEHIND = 0x0800, 0x0008
"""General purpose bits 11 and 3; the second one where sizes and checksum follow the data."""
_FULL = 0xFFFFFFFF
_FULL_16 = 0xFFFF
_SERIALIZATION_ID = ".data/serialization_id"

Content = bytes | Storage


@dataclass(frozen=True)
class _Written:
    """A member that was written, for the directory."""

    name: bytes
    crc: int
    n_bytes: int
    header: int


class Target(Protocol):
    """What an archive is written to: a file, or a list of pieces."""

    n_bytes: int

    def __enter__(self) -> Target: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def write(self, data: bytes) -> None: ...

    def copy(self, storage: Storage) -> int: ...


class ZipWriter:
    """A new archive; a context manager. Members are written in the order of `add`, their content in blocks.

    Raises FileExistsError. Cost: two passes over stored bytes, one for the checksum; memory: a block.
    """

    def __init__(self, path: Path | Target, top: str) -> None:
        self._file: Target = NewFile(path) if isinstance(path, Path) else path
        self._top = top
        self._members: list[_Written] = []

    def __enter__(self) -> ZipWriter:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._directory()
        finally:
            self._file.__exit__(kind, error, at)

    def add(self, name: str, content: Content | Sequence[Content]) -> None:
        """Append one member: a name below the archive's top folder, and its bytes, possibly in several pieces."""
        self.add_full(self._top + name, content)

    def add_full(self, name: str, content: Content | Sequence[Content], known_crc: int | None = None) -> None:
        """As `add`, for a member with the name that is given, whether or not that is below the top folder.

        `known_crc`: the checksum of all of it, where another archive has it already, so that nothing is read for it.
        """
        pieces = content if isinstance(content, Sequence) and not isinstance(content, bytes) else [content]
        n_bytes = sum(len(piece) if isinstance(piece, bytes) else piece.n_bytes for piece in pieces)
        spelled, header = name.encode("utf-8"), self._file.n_bytes
        extra = _zip64(n_bytes, header)
        begin = header + 30 + len(spelled) + len(extra) + 4
        extra += struct.pack("<2sH", b"FB", -begin % ALIGNMENT) + b"Z" * (-begin % ALIGNMENT)
        self._file.write(
            struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, _flags(n_bytes), 0, 0, 0, 0, 0, 0, len(spelled), len(extra))
        )
        self._file.write(spelled + extra)
        crc = 0
        for piece in pieces:
            for block in (piece,) if isinstance(piece, bytes) else blocks(piece) if known_crc is None else ():
                crc = zlib.crc32(block, crc)
            if isinstance(piece, bytes):
                self._file.write(piece)
            else:
                self._file.copy(piece)
        crc = crc if known_crc is None else known_crc
        long = n_bytes >= _FULL or header >= _FULL
        if n_bytes:
            self._file.write(struct.pack("<4sIQQ" if long else "<4sIII", b"PK\7\10", crc, n_bytes, n_bytes))
        self._members.append(_Written(spelled, crc, n_bytes, header))

    def add_serialization_id(self) -> None:
        """The member that tells one archive from another: 40 digits that depend on every name and every checksum.

        PyTorch takes a hash that the C++ library of its platform chooses; nothing reads more than that it differs.
        """
        names = hashlib.sha256(b"\0".join(member.name for member in self._members)).digest()
        sums = hashlib.sha256(b"".join(struct.pack("<IQ", one.crc, one.n_bytes) for one in self._members)).digest()
        digits = "".join(f"{int.from_bytes(one[:8], 'little'):020d}" for one in (names, sums))
        self.add(_SERIALIZATION_ID, digits.encode("ascii"))

    def _directory(self) -> None:
        begin = self._file.n_bytes
        for member in self._members:
            extra = _zip64(member.n_bytes, member.header)
            size, header = min(member.n_bytes, _FULL), min(member.header, _FULL)
            self._file.write(
                struct.pack(
                    "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 0, 0, _flags(member.n_bytes), 0, 0, 0, member.crc, size, size,
                    len(member.name), len(extra), 0, 0, 0, 0, header,
                )
            )  # fmt: skip
            self._file.write(member.name + extra)
        n_bytes, count = self._file.n_bytes - begin, len(self._members)
        at = self._file.n_bytes
        self._file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, n_bytes, begin))
        self._file.write(struct.pack("<4sIQI", b"PK\6\7", 0, at, 1))
        few = min(count, _FULL_16)
        self._file.write(
            struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, min(n_bytes, _FULL), min(begin, _FULL), 0)
        )


def write_archive(path: Path, top: str, members: Iterable[tuple[str, Content | Sequence[Content]]]) -> None:
    """Write (name below `top`, content) in order as a new archive, with a serialization id as its last member."""
    with ZipWriter(path, top) as archive:
        for name, content in members:
            archive.add(name, content)
        archive.add_serialization_id()


def _flags(n_bytes: int) -> int:
    return _UTF8 | (_DESCRIBED_BEHIND if n_bytes else 0)


def _zip64(n_bytes: int, header: int) -> bytes:
    """The extra field with what does not fit into 32 bits, empty for nearly all."""
    held = (struct.pack("<QQ", n_bytes, n_bytes) if n_bytes >= _FULL else b"") + (
        struct.pack("<Q", header) if header >= _FULL else b""
    )
    return struct.pack("<HH", 1, len(held)) + held if held else b""
