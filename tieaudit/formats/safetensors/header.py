"""The header of a safetensors file: read with the format's limits enforced, without the safetensors library.

What this refuses although the library (0.8) reads it: a header that does not begin with `{`, a name that occurs twice
in one object, and the array spelling of a tensor entry. All three are against the format's own description, and each
lets two readers see two different models in one file. What it reads although the library refuses it: numbers within one
rounding of the largest float (1.7976931348623158e308), in a field that nobody reads.

Source: https://github.com/huggingface/safetensors (README "Format", `safetensors/src/tensor.rs`), version 0.8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tieaudit.dtypes import TABLE
from tieaudit.errors import CorruptFile, WeightsNotHere
from tieaudit.pointers import LFS_MAGIC
from tieaudit.storage import FileStorage, Storage

LENGTH_BYTES = 8
"""The file begins with the header's length, unsigned, little-endian."""
MAX_HEADER_BYTES = 100_000_000
MAX_SIZE = 2**64 - 1
"""Sizes and offsets are 64-bit unsigned in the reference."""
MAX_DEPTH = 127
"""Nesting at which the reference's JSON reader gives up."""

# Spelling in the file → name in `dtypes.TABLE`.
TAGS: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
}
SPELLINGS: Mapping[str, str] = {name: tag for tag, name in TAGS.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str
    """Canonical name from `dtypes.TABLE`."""
    shape: tuple[int, ...]
    storage: Storage
    """A range of the file; in a pickled checkpoint, which has the same noun, maybe a step through one."""


@dataclass(frozen=True)
class Header:
    """All that a safetensors file says before its data."""

    path: str
    """Resolved path."""
    entries: tuple[Entry, ...]
    """Tensors in the order of the header's text."""
    metadata: Mapping[str, str]

    def named(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}


def read_header(path: Path) -> Header:
    """The header of one file, every rule of the format checked.

    Raises: CorruptFile with the file, the tensor and the byte; WeightsNotHere for a git-LFS pointer.
    Cost: reads the header only; memory in proportion to it.
    """
    resolved = path.resolve()
    n_file = resolved.stat().st_size
    with resolved.open("rb") as file:
        head = file.read(len(LFS_MAGIC))
        if head == LFS_MAGIC:
            raise WeightsNotHere(
                f"{path}: a git-LFS pointer of {n_file} bytes, the weights are not here", hint="run `git lfs pull`"
            )
        if n_file < LENGTH_BYTES:
            raise CorruptFile(f"{path}: expected at least {LENGTH_BYTES} bytes of header length, found {n_file}")
        n_header = int.from_bytes(head[:LENGTH_BYTES], "little")
        if n_header > MAX_HEADER_BYTES:
            raise CorruptFile(
                f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, found {n_header} at byte 0",
                hint="probably not a safetensors file",
            )
        if LENGTH_BYTES + n_header > n_file:
            raise CorruptFile(
                f"{path}: expected a header of {n_header} bytes at byte {LENGTH_BYTES}, found the end of the file at "
                f"byte {n_file}: the file is truncated"
            )
        file.seek(LENGTH_BYTES)
        text = file.read(n_header)
    if len(text) != n_header:
        raise CorruptFile(f"{path}: the file changed while its header was read")
    found = parse_json(text, str(path), LENGTH_BYTES)
    if not isinstance(found, dict):  # cannot happen: the text begins with '{'; here for the reader and the type checker
        raise CorruptFile(f"{path}: expected a JSON object at byte {LENGTH_BYTES}, found another value")
    metadata = _metadata(found.pop("__metadata__", None), path)
    data = LENGTH_BYTES + n_header
    entries = tuple(_entry(path, resolved, name, info, data) for name, info in found.items())
    _check_layout(path, entries, data, n_file)
    return Header(str(resolved), entries, metadata)


def parse_json(text: bytes, where: str, at_byte: int = 0) -> object:
    """A JSON object as strictly as the reference reads it. CorruptFile names the byte where reading failed."""
    if text[:1] != b"{":
        raise CorruptFile(f"{where}: expected '{{' at byte {at_byte}, found {text[:1]!r}: no JSON object")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(
            f"{where}: expected UTF-8, found {text[error.start : error.start + 1]!r} at byte {at_byte + error.start}"
        ) from None
    try:
        found = json.loads(
            decoded, object_pairs_hook=_unique, parse_int=_integer, parse_float=_number, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        byte = at_byte + len(decoded[: error.pos].encode())
        raise CorruptFile(f"{where}: expected JSON, found an error at byte {byte}: {error.msg}") from None
    except RecursionError:
        raise CorruptFile(f"{where}: JSON nested too deeply to be read safely") from None
    except ValueError as error:
        raise CorruptFile(f"{where}: {error}") from None
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        _check_text(name)
        if isinstance(value, str):
            _check_text(value)
        if name in found:
            raise ValueError(f"expected unique names in a JSON object, found {name!r} twice: readers would disagree")
        found[name] = value
    return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected text, found a lone surrogate in {text!r}") from None


class _Negative(float):
    """A number that is no size: the reference reads `-0` and `-1` as no unsigned integer."""


def _integer(text: str) -> int | float:
    if len(text) <= 20 and not text.startswith("-"):
        return int(text)
    _number(text)  # int() of a text of any length is quadratic, and the reference reads what is longer as a float
    return _Negative(-1)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"expected a number that fits into 64 bits, found {text[:40]}")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"expected JSON, found {text}, which JSON does not have")


def _metadata(found: object, path: Path) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise CorruptFile(f"{path}: expected __metadata__ to be an object of texts, found {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(value, str):
            raise CorruptFile(f"{path}: expected text in __metadata__ under {key!r}, found {type(value).__name__}")
    return found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _entry(path: Path, resolved: Path, name: str, info: object, data: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(info, dict):
        raise CorruptFile(f"{where}: expected an object with dtype, shape and data_offsets, found {_shown(info)}")
    tag, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(tag, str) or tag not in TAGS:
        raise CorruptFile(f"{where}: expected an element type ({', '.join(TAGS)}), found {_shown(tag)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CorruptFile(f"{where}: expected a shape of non-negative integers, found {_shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CorruptFile(f"{where}: expected data_offsets [begin, end], found {_shown(offsets)}")
    if len(info) > 3 and _depth(info) > MAX_DEPTH - 1:
        raise CorruptFile(f"{where}: JSON nested too deeply to be read safely")
    begin, end = offsets
    if begin > end:
        raise CorruptFile(f"{where}: expected begin ≤ end, found data_offsets {offsets} at byte {data + begin}")
    kind = TABLE[TAGS[tag]]
    n_bits = _n_bits(where, shape, kind.n_bits)
    if n_bits % 8:
        raise CorruptFile(f"{where}: expected whole bytes, found {tag} {shape}, which is {n_bits} bits")
    if n_bits // 8 != end - begin:
        raise CorruptFile(
            f"{where}: expected {n_bits // 8} bytes for {tag} {shape}, found {end - begin} at byte {data + begin}"
        )
    return Entry(name, kind.name, tuple(shape), FileStorage(str(resolved), data + begin, end - begin))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _n_bits(where: str, shape: list[int], n_bits: int) -> int:
    """Size with the reference's order of multiplication, in which an overflow counts even if a later factor is 0."""
    n_elements = 1
    for size in shape:
        n_elements *= size
        if n_elements > MAX_SIZE:
            raise CorruptFile(f"{where}: the shape {_shown(shape)} overflows 64 bits")
    if n_elements * n_bits > MAX_SIZE:
        raise CorruptFile(f"{where}: the size of shape {_shown(shape)} overflows 64 bits")
    return n_elements * n_bits


def _depth(value: object) -> int:
    """Nesting depth, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return depth


def _check_layout(path: Path, entries: tuple[Entry, ...], data: int, n_file: int) -> None:
    """No overlap, no hole, nothing after the last tensor: every byte of the data has exactly one owner."""
    reached, last = data, "the header"
    for entry in sorted(entries, key=lambda one: one.storage.region[1:]):
        _, begin, end = entry.storage.region
        if end > n_file:
            raise CorruptFile(
                f"{path}: tensor {entry.name!r}: expected its data to end within the {n_file} bytes of the file, "
                f"found an end at byte {end}: the file is truncated or its header wrong"
            )
        if begin != reached:
            what = "an overlap with" if begin < reached else "a hole after"
            raise CorruptFile(
                f"{path}: tensor {entry.name!r}: expected its data at byte {reached}, found it at byte "
                f"{begin}: {what} {last}"
            )
        reached, last = end, f"tensor {entry.name!r}"
    if reached != n_file:
        raise CorruptFile(
            f"{path}: expected the file to end at byte {reached}, after {last}, found {n_file - reached} more bytes"
        )
