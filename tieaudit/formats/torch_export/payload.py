"""The weights of one exported program by their names: a step through a blob for each, as for a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tieaudit.dtypes import dtype
from tieaudit.errors import CorruptFile, UnreadableModel
from tieaudit.formats.torch_checkpoint.contents import ALL, Contents
from tieaudit.formats.torch_checkpoint.opened import Opened, open_within
from tieaudit.formats.torch_checkpoint.read import Collected, weight_of
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Tensor
from tieaudit.formats.torch_export.fields import Fields, read_json
from tieaudit.formats.torch_export.layout import CONSTANTS, WEIGHTS, Layout, checked_name
from tieaudit.formats.torch_export.program import scalar, shape_and_strides
from tieaudit.model import Weight, make_id
from tieaudit.storage import FileStorage, MemoryStorage, Region, Storage

FAKE = "it was exported without values"
PICKLED = "pickled, as only tensor subclasses and objects are"


@dataclass(frozen=True)
class Entry:
    """One row of a table of weights."""

    name: str
    folder: str
    blob: str
    """Name of its bytes in `folder`."""
    is_parameter: bool
    pickled: bool
    meta: Fields | None
    row: Fields


@dataclass(frozen=True)
class Valueless:
    """A tensor whose bytes were not saved."""

    region: Region
    n_bytes: int
    no_values: str = FAKE

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        raise UnreadableModel(f"{self.region[0]}: there is nothing to read: {self.no_values}")


@dataclass
class Payload:
    """All weights of a program."""

    weights: dict[str, Weight] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    """Empty in the old layout."""
    left_out: dict[str, str] = field(default_factory=dict)
    pickled: bool = False
    """Whether the weights are a pickled state dict."""


def read_payload(path: Path, layout: Layout) -> Payload:
    """Weights, buffers and constants. CorruptFile; reads tables and pickles, no tensor."""
    found = Payload()
    for folder in (WEIGHTS, CONSTANTS):
        if layout.pickle(folder) in layout.archive:
            _read_pickle(path, layout, folder, found)
        elif layout.name:
            _read_table(path, layout, folder, found)
        elif folder == WEIGHTS:
            raise CorruptFile(f"{path}: expected {layout.pickle(folder)} in the archive, found no such member")
    return found


def entries_of(layout: Layout, folder: str) -> Iterator[Entry]:
    """The rows of one table."""
    table = read_json(layout.archive, layout.table(folder))
    for name, row in table.mapping("config"):
        blob = checked_name(row.text("path_name"), row.where)
        pickled = row.flag("use_pickle")
        meta = None if pickled and row.value.get("tensor_meta") is None else row.object("tensor_meta")
        yield Entry(name, folder, blob, row.flag("is_param"), pickled, meta, row)


def _read_table(path: Path, layout: Layout, folder: str, payload: Payload) -> None:
    found = Collected(_opened(path, layout))
    for entry in entries_of(layout, folder):
        if entry.name in payload.entries:
            raise CorruptFile(f"{path}: expected {entry.name[:200]!r} among weights or constants, found it in both")
        payload.entries[entry.name] = entry
        if entry.pickled or entry.meta is None:
            payload.left_out[entry.name] = f"{PICKLED}; not compared"
            continue
        tensor, blob = _tensor(layout, entry, entry.meta)
        weight = weight_of(found, entry.name, tensor)
        if weight is not None and not blob.n_bytes and weight.n_elements:
            item = dtype(weight.dtype).item_bytes or 1
            where: Region = (f"{layout.archive.path}!{entry.folder}{entry.blob}", 0, weight.n_elements * item)
            weight = replace(weight, storage=Valueless(where, weight.n_elements * item))
        if weight is not None:
            payload.weights[entry.name] = weight
    payload.left_out.update(found.left_out)


def _tensor(layout: Layout, entry: Entry, meta: Fields) -> tuple[Tensor, Storage]:
    """A tensor of a table, and its blob; one without values has no storage."""
    kind = scalar(meta)
    shape, strides, offset = shape_and_strides(meta)
    key = entry.folder + entry.blob
    blob = layout.archive.storage(key)
    because = "a parameter of the program" if entry.is_parameter else "a buffer or a constant of the program"
    item = dtype(kind).item_bytes or 1
    stored = Bytes(key, kind, blob.n_bytes // item) if blob.n_bytes else None
    return Tensor(stored, kind, offset, shape, strides, entry.is_parameter, because), blob


def _opened(path: Path, layout: Layout) -> Opened:
    """The archive as `weight_of` wants it."""
    archive = layout.archive
    order = archive.read("byteorder", 16).strip() if "byteorder" in archive else b"little"
    if order not in (b"little", b"big"):
        raise CorruptFile(f"{path}, byteorder: expected little or big, found {order!r}")
    return Opened(str(path), "pt2", None, archive, order == b"big", Counter(), MemoryStorage(b"", str(path)), archive)


def _read_pickle(path: Path, layout: Layout, folder: str, payload: Payload) -> None:
    """A state dict that `torch.save` wrote, read through the allow-list as any checkpoint."""
    name = layout.pickle(folder)
    stored = layout.archive.storage(name)
    payload.pickled = payload.pickled or folder == WEIGHTS
    if not stored.n_bytes:
        return
    if not isinstance(stored, FileStorage):
        raise CorruptFile(f"{path}, {name}: expected a stored member, found a deflated one")
    found = Collected(open_within(path, stored))
    chosen = Contents(found.opened.value, f"{path}, {name}").choose(ALL)
    for named in chosen.tensors:
        full, leaf = named.name, named.leaf
        if not isinstance(leaf, Tensor):
            found.left_out[full] = "no plain tensor; not compared"
        elif (weight := weight_of(found, full, leaf)) is not None:
            payload.weights[full] = replace(weight, id=make_id(full))
    payload.left_out.update(found.left_out)
