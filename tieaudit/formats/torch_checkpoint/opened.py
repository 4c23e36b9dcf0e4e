"""One file, opened: its value, and where the bytes of its storages are, whatever the layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tieaudit.errors import CorruptFile, UnreadableModel
from tieaudit.formats.torch_checkpoint.archive import Archive
from tieaudit.formats.torch_checkpoint.discover import what_is
from tieaudit.formats.torch_checkpoint.legacy import LegacyFile
from tieaudit.formats.torch_checkpoint.pickles import Machine
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Rebuilder
from tieaudit.formats.torch_checkpoint.script import constant, mark
from tieaudit.formats.torch_checkpoint.stream import Stream
from tieaudit.formats.torch_checkpoint.tracing import Tracer
from tieaudit.storage import FileStorage, Storage

_PICKLE, _CONSTANTS = "data.pkl", "constants.pkl"
_IN_CONSTANTS = "constants:"


class Located(Protocol):
    """Where storages are."""

    def storage(self, key: str) -> Storage: ...


@dataclass(frozen=True)
class Opened:
    """What a file says, before anything is chosen from it."""

    where: str
    layout: str
    """`zip`, `legacy` or `torchscript`, for the report."""
    value: object
    located: Located
    swapped: bool
    """Whether numbers are big-endian."""
    placeholders: Counter[str]
    pickle: Storage
    """The pickle itself, in which arrays of numpy lie."""
    container: Archive | LegacyFile
    trace: Tracer | None = None
    """Which bytes of the pickle say what, where that was asked for."""


class _InArchive:
    """Storages of a zip archive: `data/<key>`, constants of a TorchScript archive `constants/<key>`."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._found: dict[str, Storage] = {}

    def storage(self, key: str) -> Storage:
        if key not in self._found:
            folder, name = ("constants", key[len(_IN_CONSTANTS) :]) if key.startswith(_IN_CONSTANTS) else ("data", key)
            self._found[key] = self._archive.storage(f"{folder}/{name}")
        return self._found[key]


def open_file(path: Path, *, traced: bool = False) -> Opened:
    """Read the pickles of one file; `traced`: for a rewrite. CorruptFile, UnreadableModel.

    Cost: the pickles; no tensor is read.
    """
    kind, said = what_is(path)
    machine = Tracer if traced else Machine
    if kind == "zip":
        return _zip(path, machine)
    if kind == "legacy":
        file = LegacyFile(path, machine)
        trace = file.machine if isinstance(file.machine, Tracer) else None
        return Opened(
            str(path), "legacy", file.value, file, False, file.placeholders, file.storage_of_file, file, trace
        )
    raise UnreadableModel(f"{path}: expected a PyTorch checkpoint, found {said}")


def open_within(path: Path, storage: FileStorage) -> Opened:
    """What `torch.save` wrote into a stored member of another archive."""
    return _zip(path, Machine, storage)


def _zip(path: Path, kind: type[Machine], within: FileStorage | None = None) -> Opened:
    archive = Archive(path, within)
    if _PICKLE not in archive:
        raise UnreadableModel(f"{path}: expected data.pkl in the archive, found {_without_pickle(archive)}")
    order = archive.read("byteorder", 16).strip() if "byteorder" in archive else b"little"
    if order not in (b"little", b"big"):
        raise CorruptFile(f"{path}, byteorder: expected little or big, found {order!r}")
    placeholders: Counter[str] = Counter()
    pickle = archive.storage(_PICKLE)
    value, machine = _value(path, _PICKLE, pickle, "", placeholders, kind)
    layout = "zip"
    if _CONSTANTS in archive:
        layout = "torchscript"
        learned = mark(value, archive)
        constants, _ = _value(path, _CONSTANTS, archive.storage(_CONSTANTS), _IN_CONSTANTS, placeholders, Machine)
        if isinstance(constants, (tuple, list)):
            known = [constant(one) if learned else one for one in constants]
            value = {"": value, "CONSTANTS": {f"c{n}": one for n, one in enumerate(known)}}
    trace = machine if isinstance(machine, Tracer) else None
    located = _InArchive(archive)
    return Opened(str(path), layout, value, located, order == b"big", placeholders, pickle, archive, trace)


def _value(
    path: Path, name: str, pickle: Storage, prefix: str, placeholders: Counter[str], kind: type[Machine]
) -> tuple[object, Machine]:
    rebuilder = Rebuilder(f"{path}, {name}")

    def persistent(saved: object) -> object:
        found = rebuilder.persistent(saved)
        if prefix and isinstance(found, Bytes):
            return Bytes(prefix + found.key, found.dtype, found.n_elements, found.begin)
        return found

    machine = kind(Stream(pickle, f"{path}, {name}"), persistent, rebuilder.call)
    value = machine.load()
    placeholders.update(machine.placeholders)
    return value, machine


def _without_pickle(archive: Archive) -> str:
    names = set(archive.members)
    if "archive_format" in names or any(name.startswith(("models/", "serialized_exported_program")) for name in names):
        return "an exported program (.pt2), which is no checkpoint"
    if "model.json" in names:
        return "a TorchScript archive of PyTorch 1.0: load it once with a newer PyTorch and save it again"
    return f"{', '.join(sorted(names)[:3])}: no PyTorch checkpoint"
