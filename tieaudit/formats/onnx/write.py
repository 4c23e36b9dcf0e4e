"""Write the files of an edited model: what was inline stays inline, external data becomes a fresh compact file.

Files that no edit touches are copied byte for byte. Of an edited part only the graph and the layout of its data files
change: a data file keeps its name, holds each range once (ranges that overlapped still do), and nothing else. Bytes go
from file to file in blocks, so that memory stays bounded whatever the tensors' sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tieaudit.copying import NewFile, copy_file
from tieaudit.errors import RewriteRefused
from tieaudit.formats import carried
from tieaudit.formats.onnx.everywhere import all_tensors
from tieaudit.formats.onnx.inline import N_MOST_BYTES, expanded, write_pieces
from tieaudit.formats.onnx.transposed import append
from tieaudit.formats.onnx.wire import N_BYTES_INLINE
from tieaudit.formats.onnx.workbench import EXTERNAL, Piece
from tieaudit.storage import FileStorage, Storage

if TYPE_CHECKING:
    from onnx import TensorProto

    from tieaudit.model import Model

PAGE_BYTES = 65536
"""Alignment of tensors of 1 MiB and more, so that they can be mapped: Windows maps at multiples of 64 KiB, others at
those of 4 KiB (onnx: docs/ExternalData.md; ONNX Runtime writes so: graph.h, OffsetAlignmentInfo)."""
_N_BYTES_ALIGNED = 1024 * 1024
EXTERNAL_SINCE = 4
"""IR version from which a tensor may lie in a file of its own (onnx.proto: IR_VERSION_2019_1_22)."""
_N_BYTES_SMALL_ALIGNMENT = 64


class Item(NamedTuple):
    """One tensor that goes into a data file."""

    tensor: TensorProto
    storage: Storage
    location: str
    """The data file as the model file will name it."""


class Files(NamedTuple):
    """Names of files relative to the destination."""

    written: tuple[str, ...]
    copied: tuple[str, ...]
    """Of these, what lay beside the model and was only carried along."""


def write(model: Model, pieces: list[Piece], dest: Path, data_names: Mapping[str, str]) -> Files:
    """Write every file of the model into the new folder `dest`; paths relative to it.

    `data_names`: new names of data files, by the old ones.

    Raises RewriteRefused where a file cannot be kept in the folder, CorruptFile where bytes are missing.
    """
    root = Path(model.path) if Path(model.path).is_dir() else _common_folder(pieces)
    dest.mkdir(parents=True, exist_ok=True)
    edited = _closure(pieces)
    sources: set[Path] = set()
    data: dict[Path, list[Item]] = {}
    for piece in edited:
        sources.update(path for path, _ in piece.data_files)
        piece.flush()
        _move_out_if_too_large(piece)
        for found in _items(piece):
            item = found._replace(location=data_names.get(found.location, found.location))
            data.setdefault(_inside(_relative(piece, root).parent / item.location, piece), []).append(item)
    written = [_write_data(dest, relative, items) for relative, items in sorted(data.items())]
    for piece in pieces:
        relative = _relative(piece, root)
        if piece in edited:
            written.append(_write_piece(dest, relative, piece))
        else:
            written.append(_copy(piece.path, dest, relative))
            for path, location in piece.data_files:
                if (target := _inside(relative.parent / location, piece)).as_posix() not in written:
                    written.append(_copy(path, dest, target))
    rest = tuple(_copy_rest(root, dest, set(written), sources)) if root == Path(model.path) else ()
    return Files((*written, *rest), rest)


def _common_folder(pieces: list[Piece]) -> Path:
    return Path(os.path.commonpath([piece.path.parent.absolute() for piece in pieces]))


def _relative(piece: Piece, root: Path) -> Path:
    path = piece.path.absolute()
    base = root.absolute()
    return path.relative_to(base) if path.is_relative_to(base) else Path(path.name)


def _inside(relative: Path, piece: Piece) -> Path:
    """A path below the destination, without dots. The reader has refused what leads out of the model's folder."""
    clean = Path(os.path.normpath(relative))
    if clean.is_absolute() or ".." in clean.parts:
        raise RewriteRefused(f"{piece.path}: its external data {str(relative)!r} is outside the model's folder")
    return clean


def _closure(pieces: list[Piece]) -> list[Piece]:
    """The edited parts and those that share a data file with one, whose offsets change too."""
    edited = [piece for piece in pieces if piece.touched]
    files = {id(piece): {path for path, _ in piece.data_files} for piece in pieces}
    while True:
        known = set().union(*(files[id(piece)] for piece in edited)) if edited else set()
        more = [piece for piece in pieces if piece not in edited and files[id(piece)] & known]
        if not more:
            return [piece for piece in pieces if piece in edited]
        edited += more


def _items(piece: Piece) -> Iterator[Item]:
    """Every tensor of an edited part that is, or will be, in a data file."""
    for tensor in all_tensors(piece.proto):
        if tensor.data_location == EXTERNAL:
            location = os.path.normpath(piece.location_of(tensor) or "")  # `sub/../data` needs a folder that may not be
            yield Item(tensor, piece.external(tensor), location)
            continue
        number = piece.token_number(tensor.raw_data)
        if number is not None and number in piece.outside:
            yield Item(tensor, piece.stored[number], piece.outside[number])


def _move_out_if_too_large(piece: Piece) -> None:
    """A file that would exceed what protobuf can hold gets its tensors into a data file beside it."""
    numbers = []
    for tensor in all_tensors(piece.proto):
        number = piece.token_number(tensor.raw_data) if tensor.data_location != EXTERNAL else None
        if number is not None and number not in piece.outside:
            numbers.append(number)
    n_others = piece.proto.ByteSize()
    n_bytes = n_others + sum(piece.stored[number].n_bytes for number in numbers)
    if n_bytes <= N_MOST_BYTES:
        return
    large = [number for number in numbers if piece.stored[number].n_bytes >= N_BYTES_INLINE]
    if piece.proto.ir_version < EXTERNAL_SINCE or n_others > N_MOST_BYTES or not large:
        raise RewriteRefused(
            f"{piece.path}: expected a result of at most {N_MOST_BYTES:,} bytes, which is what a protobuf file can hold"
            f", found one of {n_bytes:,}",
            hint=f"save it with external data first (IR version {EXTERNAL_SINCE} or newer)",
        )
    piece.outside.update(dict.fromkeys(large, f"{piece.path.name}.data"))


def _write_data(dest: Path, relative: Path, items: list[Item]) -> str:
    """One compact data file, and the places of its tensors into their messages."""
    target = dest / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    by_container: dict[str, list[Item]] = {}
    for item in items:
        by_container.setdefault(item.storage.region[0], []).append(item)
    with NewFile(target) as file:
        for container, members in by_container.items():
            for begin, end, overlapping in _runs(members):
                first = overlapping[0].storage
                whole = FileStorage(container, begin, end - begin) if isinstance(first, FileStorage) else first
                at = _append(file, whole)
                for item in overlapping:
                    _place(item, at + item.storage.region[1] - begin)
    return relative.as_posix()


def _runs(items: list[Item]) -> Iterator[tuple[int, int, list[Item]]]:
    """Maximal runs of overlapping ranges of one container, as (begin, end, items), in order."""
    run: list[Item] = []
    begin = end = 0
    for item in sorted(items, key=lambda item: item.storage.region[1:]):
        _, first, last = item.storage.region
        if run and (first < end or (first, last) == (begin, end)):
            run.append(item)
            end = max(end, last)
            continue
        if run:
            yield begin, end, run
        run, begin, end = [item], first, last
    if run:
        yield begin, end, run


def _append(file: NewFile, storage: Storage) -> int:
    """Write a storage at the next aligned place; its offset."""
    at = file.align(PAGE_BYTES if storage.n_bytes >= _N_BYTES_ALIGNED else _N_BYTES_SMALL_ALIGNMENT)
    append(file, storage)
    return at


def _place(item: Item, offset: int) -> None:
    """Point a tensor to its bytes. A checksum of the old file is dropped with the old place."""
    from onnx import TensorProto

    tensor = item.tensor
    kept = [(entry.key, entry.value) for entry in tensor.external_data
            if entry.key not in ("location", "offset", "length", "checksum")]  # fmt: skip
    place = [("location", item.location), ("offset", str(offset)), ("length", str(item.storage.n_bytes))]
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (*place, *kept):
        tensor.external_data.add(key=key, value=value)


def _write_piece(dest: Path, relative: Path, piece: Piece) -> str:
    target = dest / relative
    target.parent.mkdir(parents=True, exist_ok=True)

    def stored(raw: bytes) -> Storage | None:
        number = piece.token_number(raw)
        return piece.stored[number] if number is not None else None

    pieces, _ = expanded(piece.proto.SerializeToString(), piece.token, stored)
    with NewFile(target) as file:
        write_pieces(pieces, file)
    return relative.as_posix()


def _copy(source: Path, dest: Path, relative: Path) -> str:
    target = dest / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_file(source, target)
    return relative.as_posix()


def _copy_rest(root: Path, dest: Path, written: set[str], replaced: set[Path]) -> Iterator[str]:
    """Every other regular file of the folder, except the data files that were written anew."""
    for path in carried(root):
        relative = path.relative_to(root)
        if relative.as_posix() not in written and path.resolve() not in replaced:
            yield _copy(path, dest, relative)
