"""A checkpoint as a `Model`: every tensor by name, with the bytes that it steps through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tieaudit.dtypes import TABLE, dtype
from tieaudit.errors import CorruptFile
from tieaudit.formats import KEY_GIVEN
from tieaudit.formats.safetensors.sharded import read_index
from tieaudit.formats.safetensors.weights import by_convention
from tieaudit.formats.torch_checkpoint.contents import Chosen, Contents, Named
from tieaudit.formats.torch_checkpoint.discover import INDEX_SUFFIX
from tieaudit.formats.torch_checkpoint.opened import Opened, open_file
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Embedded, Parts, Tensor
from tieaudit.formats.torch_checkpoint.stream import Blob
from tieaudit.model import Model, Part, Weight, make_id
from tieaudit.storage import FileStorage, MemoryStorage, Storage
from tieaudit.strided import Strided, is_row_major, row_major, span

_MAX_REPEATED_BYTES = 64 * 1024 * 1024
"""How much larger than what it steps through a tensor may be (expanded ones are) and still be compared."""
_MAX_ARRAY_BYTES = 64 * 1024 * 1024
_PRESENT = 8
"""Names of placeholders that the report lists."""


@dataclass
class Collected:
    """The weights of one file as they are collected."""

    opened: Opened
    chosen: Chosen = field(default_factory=lambda: Chosen("", [], ()))
    weights: dict[str, Weight] = field(default_factory=dict)
    sources: dict[str, tuple[Tensor, Named]] = field(default_factory=dict)
    """Name of a weight → the tensor in the pickle, and what was found there under which name (several parts: one)."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name → why it is no weight."""


@dataclass(frozen=True)
class Pickled:
    """All weights of a checkpoint in one or several files."""

    main: Path
    by_file: Mapping[Path, tuple[Weight, ...]]
    metadata: dict[str, str]
    notes: tuple[str, ...]

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(weight for weights in self.by_file.values() for weight in weights)

    @property
    def files(self) -> tuple[Path, ...]:
        """The index, if any, first."""
        return tuple(dict.fromkeys((self.main, *self.by_file)))


def load(path: Path, files: tuple[Path, ...], key: str = "") -> Model:
    """One checkpoint, or an index with its shards. CorruptFile, UnreadableModel, UsageError for an unknown `key`.

    Cost: reads the directory and the pickles; no tensor.
    """
    pickled = read(path, key)
    return Model(
        path=str(path),
        format="torch_checkpoint",
        parts=(Part("", tuple(map(str, pickled.files))),),
        weights=pickled.weights,
        metadata=pickled.metadata,
        notes=pickled.notes,
    )


def read(main: Path, key: str = "") -> Pickled:
    """The weights of a file, or of an index and its shards."""
    if not main.name.endswith(INDEX_SUFFIX):
        weights, metadata, notes = _read_one(main, key)
        return Pickled(main, {main: weights}, metadata, notes)
    weight_map = read_index(main)
    names: set[str] = set()
    by_file: dict[Path, tuple[Weight, ...]] = {}
    all_notes: list[str] = []
    shards = tuple(main.parent / name for name in dict.fromkeys(weight_map.values()))
    metadata = {}
    for shard in shards:
        if not shard.is_file():
            raise CorruptFile(
                f"{main}: expected the shard {shard.name} beside the index, found no such file",
                hint="the download is incomplete",
            )
        weights, metadata, notes = _read_one(shard, key)
        all_notes += notes
        for weight in weights:
            if weight_map.get(weight.name) != shard.name:
                where = weight_map.get(weight.name, "no shard")
                raise CorruptFile(f"{main}: expected tensor {weight.name!r} in {where}, found it in {shard.name}")
            names.add(weight.name)
        by_file[shard] = weights
    missing = [name for name in weight_map if name not in names]
    if missing:
        raise CorruptFile(f"{main}: expected tensor {missing[0]!r} in {weight_map[missing[0]]}, found no such tensor")
    return Pickled(main, by_file, metadata, tuple(all_notes))


def collect(opened: Opened, key: str = "") -> Collected:
    """The weights under a key of a file that is open, each with where it comes from."""
    chosen = Contents(opened.value, opened.where).choose(key)
    found = Collected(opened, chosen)
    for named in chosen.tensors:
        _add(found, named.name.lstrip(".") if opened.layout == "torchscript" else named.name, named)
    return found


def _read_one(path: Path, key: str) -> tuple[tuple[Weight, ...], dict[str, str], tuple[str, ...]]:
    opened = open_file(path)
    found = collect(opened, key)
    chosen = found.chosen
    metadata = {"layout": opened.layout}
    if chosen.key:
        metadata["key"] = chosen.key
    if key:
        metadata[KEY_GIVEN] = key
    if chosen.beside:
        metadata["beside"] = ", ".join(chosen.beside)
    if opened.placeholders:
        most = opened.placeholders.most_common(_PRESENT)
        more = len(opened.placeholders) - len(most)
        metadata["placeholders"] = ", ".join(f"{name} ×{count}" for name, count in most) + f" and {more} more" * (
            more > 0
        )
    notes = [f"{name}: {because}" for name, because in found.left_out.items()]
    if not found.weights and not notes:
        notes.append("the file holds no tensor")
    return tuple(found.weights.values()), metadata, tuple(notes)


def _add(found: Collected, name: str, named: Named) -> None:
    for full, tensor, kind in _single(name, named.leaf):
        while full in found.weights:  # a name with a dot in it, beside the nesting that it spells
            full += "'"
        if isinstance(tensor, Embedded):
            weight = _embedded(found, full, tensor)
        else:
            weight = weight_of(found, full, tensor, kind)
            found.sources[full] = (tensor, named)
        if weight is not None:
            found.weights[full] = weight


def _single(name: str, leaf: object, kind: str = "") -> Iterator[tuple[str, Tensor | Embedded, str]]:
    if isinstance(leaf, Parts):
        for part, tensor in leaf.tensors.items():
            yield from _single(f"{name}.{part}", tensor, leaf.kind)
    elif isinstance(leaf, (Tensor, Embedded)):
        yield name, leaf, kind


def weight_of(found: Collected, name: str, tensor: Tensor, kind: str = "") -> Weight | None:
    """One tensor as a weight; None, and a line in `found.left_out`, where its bytes are not its values.

    CorruptFile if it steps beyond what is stored.
    """
    if tensor.dtype not in TABLE or TABLE[tensor.dtype].item_bytes is None:
        found.left_out[name] = f"elements of type {tensor.dtype[:40]}, which is not known here; not compared"
        return None
    if tensor.odd:
        found.left_out[name] = f"{tensor.odd}; not compared"
        return None
    storage: Storage | None = None
    if tensor.stored is not None:
        storage = _storage(found, name, tensor, tensor.stored)
        if storage is None:
            return None
    parameter, because = tensor.parameter, tensor.because
    if parameter is None and kind:
        because = f"one part of a {kind.split()[0]} tensor"
    elif parameter is None:
        said, why = by_convention(name, tensor.dtype, tensor.shape)
        parameter, because = said, because or why
    weight = Weight(make_id(name), name, tensor.shape, tensor.dtype, storage, parameter=parameter, because=because)
    return replace(weight, held_as="sparse_initializer") if kind == "sparse" else weight


def _storage(found: Collected, name: str, tensor: Tensor, stored: Bytes) -> Storage | None:
    """Where a tensor's bytes are. CorruptFile if it steps beyond what it says is stored."""
    opened, item = found.opened, dtype(tensor.dtype).item_bytes or 1
    whole = opened.located.storage(stored.key)
    n_said = dtype(stored.dtype).n_bytes(stored.n_elements)
    where = f"{opened.where}: tensor {name[:200]!r}"
    if n_said > whole.n_bytes:
        raise CorruptFile(
            f"{where}: expected {n_said} bytes in storage {stored.key!r}, found {whole.n_bytes}: truncated or changed"
        )
    first = tensor.offset + stored.begin
    reach = span(tensor.shape, tensor.strides)
    if reach and (first + reach) * item > n_said:
        raise CorruptFile(
            f"{where}: expected sizes and strides inside the {n_said} bytes of storage {stored.key!r}, found an end at "
            f"byte {(first + reach) * item}"
        )
    if not reach:
        return MemoryStorage(b"", f"{opened.where}!empty {name}")
    n_bytes = item
    for size in tensor.shape:
        n_bytes *= size
    if n_bytes - reach * item > _MAX_REPEATED_BYTES:
        found.left_out[name] = f"repeats {reach * item} stored bytes up to {n_bytes}; not compared"
        return None
    swap = _swap(tensor.dtype, item) if opened.swapped else 0
    if is_row_major(tensor.shape, tensor.strides) and not swap and isinstance(whole, FileStorage):
        return FileStorage(whole.path, whole.offset + first * item, n_bytes)
    return Strided(whole, first, tensor.shape, tensor.strides, item, swap)


def _swap(name: str, item: int) -> int:
    """Bytes to be reversed together: of a complex number each half. A single byte has no order."""
    width = item // 2 if dtype(name).family == "complex" else item
    return width if width > 1 else 0


def _embedded(found: Collected, name: str, array: Embedded) -> Weight | None:
    """A numpy array in the pickle itself."""
    item = dtype(array.dtype).item_bytes or 1
    n_bytes = item
    for size in array.shape:
        n_bytes *= size
    held = array.data
    n_held = held.n_bytes if isinstance(held, Blob) else len(held)
    if n_held != n_bytes:
        found.left_out[name] = f"a numpy array of {n_bytes} bytes in {n_held}; not compared"
        return None
    pickle = found.opened.pickle
    source: Storage
    if isinstance(held, bytes):
        source = MemoryStorage(held, f"{found.opened.where}!array {name}")
    elif isinstance(pickle, FileStorage):
        source = FileStorage(pickle.path, pickle.offset + held.offset, n_bytes)
    elif n_bytes <= _MAX_ARRAY_BYTES:
        data = pickle.read_ranges([(held.offset, n_bytes)])[0]
        source = MemoryStorage(data, f"{found.opened.where}!array {name}")
    else:
        found.left_out[name] = "a large numpy array in a deflated pickle; not compared"
        return None
    if array.fortran and len(array.shape) > 1:
        strides = tuple(reversed(row_major(tuple(reversed(array.shape)))))
        source = Strided(source, 0, array.shape, strides, item)
    parameter, because = by_convention(name, array.dtype, array.shape)
    return Weight(make_id(name), name, array.shape, array.dtype, source, parameter=parameter, because=because)
