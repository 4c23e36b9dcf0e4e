"""A safetensors checkpoint in one file or in several with an index: which files, and which tensor is where."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tieaudit.errors import CorruptFile
from tieaudit.formats.safetensors.header import Entry, Header, parse_json, read_header

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 200_000_000
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})\.safetensors")
_N_MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, whichever file they are in."""

    main: Path
    """The file or the index."""
    headers: Mapping[str, Header]
    """File name → header, in the order of the index."""
    entries: Mapping[str, tuple[str, Entry]]
    """Tensor name → (file name, entry)."""
    in_index: Mapping[str, str] = field(default_factory=dict)
    """Texts of the index's own `metadata`: huggingface_hub writes {dropped: kept} there and not into the shards."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the checkpoint, the index (if any) first."""
        shards = tuple(self.main.parent / name for name in self.headers)
        return shards if self.main in shards else (self.main, *shards)

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of all files together; the first file wins."""
        found: dict[str, str] = {}
        for header in self.headers.values():
            for key, value in header.metadata.items():
                found.setdefault(key, value)
        return found


def read_checkpoint(main: Path) -> Checkpoint:
    """A lone file, or an index with all its shards. CorruptFile where index and shards disagree."""
    if not main.name.endswith(INDEX_SUFFIX):
        header = read_header(main)
        return Checkpoint(main, {main.name: header}, {e.name: (main.name, e) for e in header.entries})
    index = read_index_json(main)
    weight_map = weight_map_of(main, index)
    headers: dict[str, Header] = {}
    for name in dict.fromkeys(weight_map.values()):
        if not (main.parent / name).is_file():
            raise CorruptFile(
                f"{main}: expected the shard {name} beside the index, found no such file",
                hint="the download is incomplete",
            )
        headers[name] = read_header(main.parent / name)
    return Checkpoint(main, headers, by_index(main, weight_map, headers), texts_of(index))


def by_index(main: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> dict[str, tuple[str, Entry]]:
    """Tensor → (file, entry) in the order of the index. CorruptFile where index and shards disagree."""
    entries: dict[str, tuple[str, Entry]] = {}
    for name, header in headers.items():
        for entry in header.entries:
            if entry.name in entries:
                both = f"{entries[entry.name][0]} and {name}"
                raise CorruptFile(f"{main}: expected tensor {entry.name!r} in one shard, found it in {both}")
            if entry.name not in weight_map:
                raise CorruptFile(
                    f"{main}: expected every tensor of {name} in weight_map, found {entry.name!r} missing"
                )
            entries[entry.name] = (name, entry)
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor][0] != name:
            where = f"it in {entries[tensor][0]}" if tensor in entries else "no such tensor there"
            raise CorruptFile(f"{main}: expected tensor {tensor!r} in {name}, found {where}")
    return {tensor: entries[tensor] for tensor in weight_map}


def texts_of(index: Mapping[str, object]) -> dict[str, str]:
    """The texts of an index's own `metadata`."""
    said = index.get("metadata")
    return {key: text for key, text in said.items() if isinstance(text, str)} if isinstance(said, dict) else {}


def siblings_of(path: Path) -> tuple[Path, ...]:
    """All shards that a file named `…-00001-of-00002.safetensors` is counted with, itself included; or it alone.

    Source of the names: huggingface_hub, serialization/_base.py, `split_state_dict_into_shards_factory`.
    """
    named = _SHARD.fullmatch(path.name)
    if named is None or int(named["total"]) > _N_MOST_SHARDS:
        return (path,)
    numbers = (f"{number:0{len(named['number'])}}" for number in range(1, int(named["total"]) + 1))
    return tuple(path.with_name(f"{named['stem']}-{number}-of-{named['total']}.safetensors") for number in numbers)


def read_shards(files: Sequence[Path]) -> Checkpoint:
    """Shards without an index as one checkpoint. CorruptFile where one is missing, or a tensor is in two of them."""
    headers: dict[str, Header] = {}
    entries: dict[str, tuple[str, Entry]] = {}
    for file in files:
        if not file.is_file():
            raise CorruptFile(
                f"{files[0]}: expected {len(files)} shards by its name, found no file {file.name}",
                hint="fetch it: a tie with a tensor in it would go unseen",
            )
        headers[file.name] = read_header(file)
        for entry in headers[file.name].entries:
            if entry.name in entries:
                both = f"{entries[entry.name][0]} and {file.name}"
                raise CorruptFile(f"{files[0]}: expected tensor {entry.name!r} in one shard, found it in {both}")
            entries[entry.name] = (file.name, entry)
    return Checkpoint(files[0], headers, entries)


def read_index(path: Path) -> dict[str, str]:
    """weight_map of an index: tensor → plain file name. CorruptFile for anything else, path escapes included."""
    return weight_map_of(path, read_index_json(path))


def weight_map_of(path: Path, index: Mapping[str, object]) -> dict[str, str]:
    """weight_map of an index that was read: tensor → plain file name. CorruptFile for anything else."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{path}: expected an object weight_map (tensor → file), found {type(weight_map).__name__}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise CorruptFile(
                f"{path}: tensor {tensor!r}: expected the plain name of a file beside the index, found {name!r}"
            )
    return weight_map


def read_index_json(path: Path) -> dict[str, object]:
    """The whole index as JSON."""
    if not path.is_file():  # opening a pipe would wait for a writer
        raise CorruptFile(f"{path}: expected an index, found {'no file' if not path.exists() else 'no plain file'}")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_INDEX_BYTES:
        raise CorruptFile(f"{path}: expected an index of at most {MAX_INDEX_BYTES} bytes, found {n_bytes}")
    text = path.read_bytes()
    found = parse_json(text.strip(), str(path))
    if not isinstance(found, dict):
        raise CorruptFile(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def is_plain_name(name: str) -> bool:
    """Whether a name stays inside the folder it is looked up in."""
    return bool(name) and name not in (".", "..") and not any(sign in name for sign in "/\\\0") and ":" not in name


def owners_of_shards(folder: Path) -> dict[str, Path]:
    """File name → the first index of the folder that lists it. An index that cannot be read lists nothing."""
    found: dict[str, Path] = {}
    for index in sorted(folder.glob("*" + INDEX_SUFFIX)):
        try:
            for name in read_index(index).values():
                found.setdefault(name, index)
        except (CorruptFile, OSError):
            continue
    return found
