"""A TensorProto → where its canonical bytes are. Large tensors stay in their file; nothing is loaded to look.

Canonical: row-major, little-endian, sub-byte types packed low bits first with zero padding; strings as an 8-byte
little-endian length before each; a sparse tensor as its values, then its indices.

Source of the layouts: onnx.proto (TensorProto) of onnx 1.23, onnx/numpy_helper.py `to_array`, docs/ExternalData.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.dtypes import DType, dtype
from tieaudit.errors import CorruptFile, WeightsNotHere
from tieaudit.formats.onnx.wire import Malformed, Skeleton, packed_field
from tieaudit.pointers import elsewhere
from tieaudit.printable import printable
from tieaudit.storage import FileStorage, MemoryStorage, Storage

if TYPE_CHECKING:
    import numpy as np
    from onnx import SparseTensorProto, TensorProto

_NAMES = (
    "- float32 uint8 int8 uint16 int16 int32 int64 string bool float16 float64 uint32 uint64 complex64 complex128 "
    "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz uint4 int4 float4_e2m1fn float8_e8m0fnu "
    "uint2 int2 float6_e2m3fn float6_e3m2fn"
).split()
DTYPES: dict[int, str] = {number: name for number, name in enumerate(_NAMES) if number}
"""TensorProto.DataType → canonical name."""

MAX_RANK = 64
"""Most dimensions of a tensor: what numpy holds, and far more than any runtime takes."""
_N_MOST_CLAIMS = 16
"""How often the bytes of a data file may be claimed by tensors of different ranges, types or shapes."""
_FEW_BYTES = 64 * 1024 * 1024
_STRING = 8
_FLOAT_DATA, _DOUBLE_DATA = 4, 10


@dataclass
class Source:
    """The file being read: where its external data may be, and where its inline data is."""

    path: Path
    skeleton: Skeleton | None = None
    data_files: dict[str, tuple[Path, int]] = field(default_factory=dict)
    """Location as written → (resolved path, size in bytes) of the external files met so far."""

    @cached_property
    def resolved(self) -> str:
        """The file's path without links: asked of the system once, not for every tensor."""
        return str(self.path.resolve())

    claims: dict[tuple[str, int, int, str, tuple[int, ...]], None] = field(default_factory=dict)
    """(path, begin, end, type, shape) of each different external tensor met so far."""
    n_bytes_copied: int = 0
    """Bytes of data files that had to be taken into memory."""


def text(found: str | bytes) -> str:
    """A protobuf string; the library gives bytes where a file breaks the rule that strings are UTF-8."""
    return found if isinstance(found, str) else bytes(found).decode("utf-8", "backslashreplace")


def shape_of(dims: object, where: str) -> tuple[int, ...]:
    """A shape of at most MAX_RANK sizes ≥ 0. CorruptFile otherwise."""
    n_dims = len(dims)  # type: ignore[arg-type]
    if n_dims > MAX_RANK:
        raise CorruptFile(f"{where}: expected at most {MAX_RANK} dimensions, found {n_dims}")
    shape = tuple(int(size) for size in dims)  # type: ignore[attr-defined]
    if any(size < 0 for size in shape):
        raise CorruptFile(f"{where}: expected sizes of 0 or more, found the shape {list(shape)}")
    return shape


def locate(tensor: TensorProto, source: Source, place: str) -> tuple[tuple[int, ...], str, Storage]:
    """(shape, dtype, storage) of a dense tensor; `place` is its unique name in the file, used in messages.

    Raises CorruptFile for an unknown type, a byte count that does not match the shape, or bad external data.
    Cost: constant for data in files; one copy for typed fields and small tensors.
    """
    where = f"{source.path}, tensor {place!r}"
    if tensor.data_type not in DTYPES:
        raise CorruptFile(f"{where}: expected an element type from 1 to {max(DTYPES)}, found {tensor.data_type}")
    if tensor.HasField("segment"):
        raise CorruptFile(f"{where}: expected a whole tensor, found a segment of one, which no runtime reads either")
    kind, shape = dtype(DTYPES[tensor.data_type]), shape_of(tensor.dims, where)
    n_elements = prod(shape)
    container = f"{source.path}#{place}"
    storage: Storage
    if tensor.data_location == 1:  # EXTERNAL
        storage = _external(tensor, source, kind, shape, where)
    elif tensor.data_type == _STRING:
        storage = MemoryStorage(_strings(tensor, n_elements, where), container)
    elif tensor.HasField("raw_data"):
        storage = _raw(tensor, source, kind.n_bytes(n_elements), where, container)
    else:
        storage = MemoryStorage(_typed(tensor, kind, n_elements, where), container)
    return shape, kind.name, _without_padding(storage, kind, n_elements, source, where, container)


def locate_sparse(sparse: SparseTensorProto, source: Source, place: str) -> tuple[tuple[int, ...], str, Storage]:
    """(shape, dtype, storage) of a sparse tensor: its values followed by its indices, in memory."""
    where = f"{source.path}, sparse tensor {place!r}"
    values_shape, name, values = locate(sparse.values, source, place)
    indices_shape, index_type, indices = locate(sparse.indices, source, place + " (indices)")
    if index_type != "int64" or len(values_shape) != 1 or indices_shape[:1] != values_shape:
        raise CorruptFile(
            f"{where}: expected as many int64 indices as values, found {index_type} {list(indices_shape)} "
            f"for values {list(values_shape)}"
        )
    data = b"".join(_taken(part, part.n_bytes, source, where) for part in (values, indices))
    return shape_of(sparse.dims, where), name, MemoryStorage(data, f"{source.path}#{place}")


def _raw(tensor: TensorProto, source: Source, n_bytes: int, where: str, container: str) -> Storage:
    place = source.skeleton.place(tensor.raw_data) if source.skeleton is not None else None
    found = place[1] if place else len(tensor.raw_data)
    if found != n_bytes:
        at = f" at byte {place[0]}" if place else ""
        raise CorruptFile(
            f"{where}: expected {n_bytes} bytes of raw data for {DTYPES[tensor.data_type]} {list(tensor.dims)}, "
            f"found {found}{at}"
        )
    if place:
        return FileStorage(source.resolved, place[0], n_bytes)
    return MemoryStorage(tensor.raw_data, container)


def _strings(tensor: TensorProto, n_elements: int, where: str) -> bytes:
    if len(tensor.string_data) != n_elements:
        raise CorruptFile(f"{where}: expected {n_elements} strings, found {len(tensor.string_data)}")
    return b"".join(len(item).to_bytes(8, "little") + bytes(item) for item in tensor.string_data)


def _typed(tensor: TensorProto, kind: DType, n_elements: int, where: str) -> bytes:
    import numpy as np

    if kind.name in ("float32", "complex64"):
        data = _floats(tensor, _FLOAT_DATA, where)
    elif kind.name in ("float64", "complex128"):
        data = _floats(tensor, _DOUBLE_DATA, where)
    elif kind.name in ("uint32", "uint64"):
        data = np.fromiter(tensor.uint64_data, np.uint64).astype(f"<u{kind.n_bits // 8}").tobytes()
    elif kind.name == "int64":
        data = np.fromiter(tensor.int64_data, np.int64).astype("<i8").tobytes()
    else:
        data = _from_int32(np.fromiter(tensor.int32_data, np.int32), kind, n_elements)
    if len(data) != kind.n_bytes(n_elements):
        raise CorruptFile(
            f"{where}: expected {n_elements} elements for {kind.name} {list(tensor.dims)} in its typed field, "
            f"found {len(data) * 8 // kind.n_bits}"
        )
    return data


def _floats(tensor: TensorProto, number: int, where: str) -> bytes:
    try:
        return packed_field(tensor.SerializeToString(), number)
    except Malformed as error:  # the library wrote it, so this cannot happen
        raise CorruptFile(f"{where}: {error}") from error


def _from_int32(values: np.ndarray[tuple[int], np.dtype[np.int32]], kind: DType, n_elements: int) -> bytes:
    import numpy as np

    bits = values.view(np.uint32)
    if kind.name == "bool":
        return bytes((bits != 0).astype(np.uint8).tobytes())
    if kind.n_bits == 6:  # one element per number; packed as onnx.numpy_helper._pack_6bit does
        flat = np.zeros(-(-len(bits) // 4) * 4, np.uint32)
        flat[: len(bits)] = bits & 0x3F
        groups = flat.reshape(-1, 4) << np.array([0, 6, 12, 18], np.uint32)
        packed = groups.sum(axis=1, dtype=np.uint32).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        return bytes(packed.tobytes()[: kind.n_bytes(len(bits))])
    # 2- and 4-bit types hold one packed byte per number, the others one element
    return bytes(bits.astype(f"<u{max(kind.n_bits // 8, 1)}").tobytes())


def _taken(storage: Storage, n_bytes: int, source: Source, where: str) -> bytes:
    """The first bytes of a storage, in memory. CorruptFile if data files are to be taken again and again."""
    if isinstance(storage, FileStorage) and storage.path != source.resolved:
        source.n_bytes_copied += n_bytes
        if source.n_bytes_copied > _FEW_BYTES + 2 * sum(dict(source.data_files.values()).values()):
            raise CorruptFile(
                f"{where}: expected each byte of a data file in one tensor, found tensors of one range that would need "
                f"{source.n_bytes_copied} bytes of memory"
            )
    return storage.read_ranges([(0, n_bytes)])[0]


def _without_padding(
    storage: Storage, kind: DType, n_elements: int, source: Source, where: str, container: str
) -> Storage:
    """The same bytes with the unused bits of the last byte zero. Reads one byte of a file in the usual case."""
    n_used = n_elements * kind.n_bits % 8
    if not n_used:
        return storage
    last = storage.read_ranges([(storage.n_bytes - 1, 1)])[0][0]
    clean = last & ((1 << n_used) - 1)
    if clean == last:
        return storage
    return MemoryStorage(_taken(storage, storage.n_bytes - 1, source, where) + bytes([clean]), container)


def _external(tensor: TensorProto, source: Source, kind: DType, shape: tuple[int, ...], where: str) -> FileStorage:
    if kind.family == "string":
        raise CorruptFile(f"{where}: expected inline strings, found strings in external data, which ONNX forbids")
    entries = {text(entry.key): text(entry.value) for entry in tensor.external_data}
    n_bytes = kind.n_bytes(prod(shape))
    path, size = data_file(source, entries.get("location", ""), where)
    offset = _number(entries, "offset", 0, where)
    length = _number(entries, "length", n_bytes, where)
    if length != n_bytes:
        raise CorruptFile(
            f"{where}: expected {n_bytes} bytes for {kind.name} {list(tensor.dims)}, found length = {length} "
            f"at byte {offset} of {path.name}"
        )
    if offset + length > size:
        raise CorruptFile(
            f"{where}: expected {length} bytes at byte {offset} of {path.name}, which has only {size} bytes"
        )
    source.claims[str(path), offset, offset + length, kind.name, shape] = None
    return FileStorage(str(path), offset, length)


def check_claims(source: Source) -> None:
    """CorruptFile if tensors overlap so much that reading them would cost far more than reading their files."""
    n_claimed = sum(end - begin for _, begin, end, _, _ in source.claims)
    n_there = sum(dict(source.data_files.values()).values())
    if n_claimed > _FEW_BYTES + _N_MOST_CLAIMS * n_there:
        raise CorruptFile(
            f"{source.path}: expected tensors that hardly overlap in their data files, found {len(source.claims)} that "
            f"claim {n_claimed} bytes of files of {n_there} bytes"
        )


def _number(entries: dict[str, str], key: str, default: int, where: str) -> int:
    value = entries.get(key, "")
    if not value:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        raise CorruptFile(
            f"{where}: expected a number of bytes as the {key} of its external data, found {value[:40]!r}"
        )
    return int(value)


def data_file(source: Source, location: str, where: str) -> tuple[Path, int]:
    """(resolved path, size in bytes) of an external data file. CorruptFile if it is missing or outside the folder."""
    if location not in source.data_files:
        source.data_files[location] = _find_data_file(source.path.parent, location, where)
    return source.data_files[location]


def _find_data_file(folder: Path, location: str, where: str) -> tuple[Path, int]:
    rule = "expected external data in a file inside the model's folder"
    if not location or "\0" in location:
        raise CorruptFile(f"{where}: {rule}, found the location {location[:200]!r}")
    if Path(location).is_absolute():
        raise CorruptFile(f"{where}: {rule}, found the absolute path {location[:200]!r}")
    home = folder.resolve()
    try:
        path = (home / location).resolve()
        inside = path.is_relative_to(home)
        exists = inside and path.is_file()
        size = path.stat().st_size if exists else 0
    except (OSError, RuntimeError) as error:  # name too long, loop of links, no permission
        raise CorruptFile(f"{where}: {rule}, found {location[:200]!r}: {error}") from error
    shown = printable(str(path))
    if not inside:
        raise CorruptFile(
            f"{where}: {rule}, found {location[:200]!r}, which leads to {shown}; "
            "copy that file beside the model if you trust it"
        )
    try:
        away = elsewhere(home / location)
    except OSError as error:
        raise CorruptFile(f"{where}: {rule}, found {location[:200]!r}: {error}") from error
    if away is not None:
        raise WeightsNotHere(f"{where}: expected its data in {shown}, found {away.because}", hint=away.hint)
    if not exists:
        raise CorruptFile(f"{where}: expected its data in {shown}, found no such file; fetch it beside the model")
    return path, size
