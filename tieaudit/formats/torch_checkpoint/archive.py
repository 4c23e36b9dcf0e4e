"""The directory of a zip archive as PyTorch writes it, with every size checked before it is believed.

Only what such archives have: one disk, no encryption, members stored or deflated. Nothing is ever extracted.
Source: PKWARE, APPNOTE 6.3.10 (4.3.7, 4.3.12, 4.3.14–4.3.16); caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tieaudit.errors import CorruptFile
from tieaudit.storage import FileStorage, MemoryStorage, Storage

_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x06"
_LOCATOR_64 = b"PK\x06\x07"
_CENTRAL = b"PK\x01\x02"
_LOCAL = b"PK\x03\x04"
_MAX_COMMENT = 65535
MAX_DIRECTORY_BYTES = 256 * 1024 * 1024
MAX_INFLATED_BYTES = 64 * 1024 * 1024
"""Of all deflated members of one archive together: PyTorch stores weights, so that they can be mapped."""
_STORED, _DEFLATED = 0, 8
_ALL_32, _ALL_16 = 0xFFFFFFFF, 0xFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive."""

    name: str
    method: int
    n_packed: int
    n_bytes: int
    header: int
    """Where its local header begins."""
    crc: int = 0
    """CRC-32 of its content, as the directory says."""


class Archive:
    """The members of one archive by their names below its top folder."""

    def __init__(self, path: Path, within: FileStorage | None = None) -> None:
        """The archive that a file is, or that lies `within` one, stored in another archive."""
        self.where = str(path)
        self.path = str(path.resolve())
        self._file = FileStorage(self.path, 0, os.stat(self.path).st_size) if within is None else within
        n_file = self._file.n_bytes
        begin, n_bytes = self._directory(n_file)
        members = self._members(begin, n_bytes)
        self._check_apart(members, begin)
        self.top = _top(members)
        self.members: Mapping[str, Member] = {
            member.name.removeprefix(self.top): member for member in members if member.name.startswith(self.top)
        }
        self.all = tuple(sorted(members, key=lambda one: one.header))
        """Every member, those beside the top folder too, in the order of the file."""
        self._n_inflated = 0
        self._inflated: dict[int, Storage] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str, most: int) -> bytes:
        """A small member, whole."""
        storage = self.storage(name)
        if storage.n_bytes > most:
            raise CorruptFile(f"{self.where}, {name}: expected at most {most} bytes, found {storage.n_bytes}")
        return storage.read_ranges([(0, storage.n_bytes)])[0]

    def storage(self, name: str) -> Storage:
        """Where the bytes of a member are: in the file, or inflated in memory where it is deflated and small."""
        member = self.members.get(name)
        if member is None:
            raise CorruptFile(f"{self.where}: expected {self.top}{name} in the archive, found no such member")
        return self.content(member)

    def content(self, member: Member) -> Storage:
        """As `storage`, for one of `all`."""
        data = self._data_of(member)
        if member.method == _STORED:
            return data
        if member.header in self._inflated:
            return self._inflated[member.header]
        self._n_inflated += member.n_bytes
        if self._n_inflated > MAX_INFLATED_BYTES:
            raise CorruptFile(
                f"{self.where}, {member.name}: expected weights that are stored, found deflated ones of more than "
                f"{MAX_INFLATED_BYTES} bytes",
                hint="PyTorch never deflates them: unpack the archive and pack it again with `zip -0 -r`",
            )
        found = MemoryStorage(self._inflate(member, data), f"{self.path}!{member.name}")
        self._inflated[member.header] = found
        return found

    def _inflate(self, member: Member, data: FileStorage) -> bytes:
        machine = zlib.decompressobj(-15)
        try:
            found = machine.decompress(data.read_ranges([(0, data.n_bytes)])[0], member.n_bytes + 1)
        except zlib.error as error:
            raise CorruptFile(f"{self.where}, {member.name}: expected deflated bytes: {error}") from None
        if len(found) != member.n_bytes:
            raise CorruptFile(
                f"{self.where}, {member.name}: expected {member.n_bytes} bytes as the directory says, found "
                f"{'more' if len(found) > member.n_bytes else len(found)}"
            )
        return found

    def _data_of(self, member: Member) -> FileStorage:
        (header,) = self._file.read_ranges([(member.header, 30)])
        signature, method, n_name, n_extra = struct.unpack("<4s4xH16xHH", header)
        if signature != _LOCAL or method != member.method:
            raise CorruptFile(
                f"{self.where}, {member.name}: expected its local header at byte {member.header}, found {header[:4]!r}"
            )
        begin = member.header + 30 + n_name + n_extra
        if begin + member.n_packed > self._file.n_bytes:
            raise CorruptFile(
                f"{self.where}, {member.name}: expected {member.n_packed} bytes at byte {begin}, found the end of the "
                f"file at byte {self._file.n_bytes}: truncated"
            )
        return FileStorage(self.path, self._file.offset + begin, member.n_packed)

    def _directory(self, n_file: int) -> tuple[int, int]:
        """Begin and length of the central directory."""
        n_tail = min(n_file, 22 + _MAX_COMMENT)
        (tail,) = self._file.read_ranges([(n_file - n_tail, n_tail)])
        at = tail.rfind(_END)
        if at < 0 or len(tail) - at < 22:
            raise CorruptFile(
                f"{self.where}: expected the directory of a zip archive at the end of its {n_file} bytes, found none: "
                "truncated, or the download is incomplete"
            )
        _, n_members, n_bytes, begin = struct.unpack("<4s6xHII2x", tail[at : at + 22])
        if begin == _ALL_32 or n_bytes == _ALL_32 or n_members == _ALL_16:
            begin, n_bytes = self._directory_64(n_file - n_tail + at, begin, n_bytes)
        if begin + n_bytes > n_file or n_bytes > MAX_DIRECTORY_BYTES:
            raise CorruptFile(
                f"{self.where}: expected a directory inside the file, of at most {MAX_DIRECTORY_BYTES} bytes, found "
                f"{n_bytes} bytes at byte {begin}"
            )
        return begin, n_bytes

    def _directory_64(self, end: int, begin: int, n_bytes: int) -> tuple[int, int]:
        if end < 20:
            return begin, n_bytes
        (locator,) = self._file.read_ranges([(end - 20, 20)])
        signature, at = struct.unpack("<4s4xQ4x", locator)
        if signature != _LOCATOR_64:
            return begin, n_bytes
        if at + 56 > end:
            raise CorruptFile(f"{self.where}: expected the end of a zip64 directory at byte {at}, beyond its locator")
        (record,) = self._file.read_ranges([(at, 56)])
        if record[:4] != _END_64:
            raise CorruptFile(f"{self.where}: expected the end of a zip64 directory at byte {at}, found {record[:4]!r}")
        length, offset = struct.unpack("<40xQQ", record)
        return int(offset), int(length)

    def _members(self, begin: int, n_bytes: int) -> list[Member]:
        (text,) = self._file.read_ranges([(begin, n_bytes)])
        found: dict[str, Member] = {}
        at = 0
        while at + 46 <= len(text) and text[at : at + 4] == _CENTRAL:
            flags, method, crc, packed, plain, n_name, n_extra, n_comment, header = struct.unpack(
                "<8xHH4xIIIHHH8xI", text[at : at + 46]
            )
            name = text[at + 46 : at + 46 + n_name].decode("utf-8", "replace")
            extra = text[at + 46 + n_name : at + 46 + n_name + n_extra]
            packed, plain, header = _sizes_64(extra, plain, packed, header)
            self._check(name, flags, method, packed, plain)
            if name in found:
                raise CorruptFile(
                    f"{self.where}: expected every name once, found {name[:200]!r} twice: readers disagree"
                )
            found[name] = Member(name, method, packed, plain, header, crc)
            at += 46 + n_name + n_extra + n_comment
        if at != len(text) or not found:
            raise CorruptFile(
                f"{self.where}: expected entries up to the end of the directory, found none at byte {begin + at}"
            )
        return list(found.values())

    def _check(self, name: str, flags: int, method: int, n_packed: int, n_bytes: int) -> None:
        where = f"{self.where}: member {name[:200]!r}"
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise CorruptFile(f"{where}: expected a name below the archive's folder, found one that leads out of it")
        if flags & 1:
            raise CorruptFile(f"{where}: expected no encryption, found an encrypted member")
        if method not in (_STORED, _DEFLATED):
            raise CorruptFile(f"{where}: expected a stored or deflated member, found method {method}")
        if method == _STORED and n_packed != n_bytes:
            raise CorruptFile(f"{where}: expected one size, found {n_packed} bytes packed and {n_bytes} unpacked")

    def _check_apart(self, members: list[Member], end: int) -> None:
        """No byte belongs to two members: else one name could be read as two things, and a small file as a huge one."""
        order = sorted(members, key=lambda one: one.header)
        begins = [one.header for one in order[1:]] + [end]
        for member, following in zip(order, begins, strict=True):
            if member.header + 30 + member.n_packed > following:
                raise CorruptFile(
                    f"{self.where}: member {member.name[:200]!r}: expected its {member.n_packed} bytes to end before "
                    f"byte {following}, where the next one begins: members overlap or the file is truncated"
                )


def _sizes_64(extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and offset, from the zip64 field where the plain ones are full."""
    at, field = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            break
        at += 4 + length
    numbers = [int.from_bytes(field[n : n + 8], "little") for n in range(0, len(field) - len(field) % 8, 8)]
    plain = numbers.pop(0) if plain == _ALL_32 and numbers else plain
    packed = numbers.pop(0) if packed == _ALL_32 and numbers else packed
    header = numbers.pop(0) if header == _ALL_32 and numbers else header
    return packed, plain, header


def _top(members: list[Member]) -> str:
    """The folder that all of a PyTorch archive lies in: that of the shallowest data.pkl, else of the first member."""
    pickles = [member.name for member in members if member.name.endswith("/data.pkl")]
    first = min(pickles, key=lambda name: name.count("/")) if pickles else members[0].name
    top = first.rpartition("/")[0] if pickles else first.partition("/")[0] if "/" in first else ""
    return f"{top}/" if top else ""
