"""The layout before PyTorch 1.6: five pickles, then the storages one after the other.

magic number, protocol 1001, system, the value itself, keys of the storages in the order in which they follow; each
storage is its number of elements (8 bytes, little-endian) and its bytes. Source: torch/serialization.py,
`_legacy_load` and `_legacy_save`; storages are little-endian whatever wrote them (torch/csrc/serialization.cpp).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from tieaudit.dtypes import dtype
from tieaudit.errors import CorruptFile
from tieaudit.formats.torch_checkpoint.pickles import Machine
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Rebuilder
from tieaudit.formats.torch_checkpoint.stream import Stream
from tieaudit.storage import FileStorage

MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The end of the first pickle: what comes before it depends on the protocol."""
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class LegacyFile:
    """A file of this layout: its value, and where its storages are."""

    def __init__(self, path: Path, machine: type[Machine] = Machine) -> None:
        self.path = str(path.resolve())
        file = FileStorage(self.path, 0, os.stat(self.path).st_size)
        self.where = str(path)
        self.placeholders: Counter[str] = Counter()
        self._named: dict[str, Bytes] = {}
        stream = Stream(file, self.where)
        rebuilder = Rebuilder(self.where)
        magic = Machine(stream, rebuilder.persistent, rebuilder.call).load()
        if magic != _MAGIC_NUMBER:
            raise CorruptFile(f"{path}: expected PyTorch's magic number, found {str(magic)[:40]}")
        protocol = Machine(stream, rebuilder.persistent, rebuilder.call).load()
        if protocol != _PROTOCOL:
            raise CorruptFile(f"{path}: expected protocol {_PROTOCOL}, found {str(protocol)[:40]}")
        Machine(stream, rebuilder.persistent, rebuilder.call).load()
        self.machine = machine(stream, self._persistent(rebuilder), rebuilder.call)
        self.value = self.machine.load()
        self.placeholders = self.machine.placeholders
        keys = Machine(stream, rebuilder.persistent, rebuilder.call).load()
        self.storage_of_file = file
        self._storages = self._located(keys, stream.at, file.n_bytes)

    def _persistent(self, rebuilder: Rebuilder) -> Callable[[object], object]:
        def named(saved: object) -> object:
            found = rebuilder.persistent(saved)
            if isinstance(found, Bytes):
                self._named.setdefault(found.key, found)
            return found

        return named

    def _located(self, keys: object, at: int, n_file: int) -> Mapping[str, FileStorage]:
        found: dict[str, FileStorage] = {}
        if not isinstance(keys, list):
            raise CorruptFile(f"{self.where}: expected the keys of the storages before byte {at}, found another value")
        for key in map(str, keys):
            known = self._named.get(key)
            if known is None or key in found:
                raise CorruptFile(f"{self.where}: expected the key of a storage that is used, once, found {key[:80]!r}")
            n_bytes = dtype(known.dtype).n_bytes(known.n_elements)
            if at + 8 + n_bytes > n_file:
                raise CorruptFile(
                    f"{self.where}: storage {key!r}: expected {n_bytes} bytes at byte {at + 8}, found the end of the "
                    f"file at byte {n_file}: truncated"
                )
            head = FileStorage(self.path, at, 8).read_ranges([(0, 8)])[0]
            count = int.from_bytes(head, "little", signed=True)
            if count != known.n_elements:
                raise CorruptFile(
                    f"{self.where}: storage {key!r}: expected {known.n_elements} elements at byte {at}, found {count}"
                )
            found[key] = FileStorage(self.path, at + 8, n_bytes)
            at += 8 + n_bytes
        return found

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the storages in the order of the file."""
        return tuple(self._storages)

    def storage(self, key: str) -> FileStorage:
        """Where a storage's bytes are. CorruptFile if the file names it but does not hold it."""
        found = self._storages.get(key)
        if found is None:
            raise CorruptFile(f"{self.where}: expected storage {key[:80]!r} in the file, found no such key")
        return found
