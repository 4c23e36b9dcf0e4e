"""Writing a safetensors file block by block: bounded memory, data in the order given, header as the reference pads it.

Source: `safetensors/src/tensor.rs`, `prepare`: the header is padded with spaces so that the data begins at a multiple
of 8 bytes. The reference also sorts tensors by alignment; a rewritten file keeps the order of its source instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tieaudit.copying import NewFile
from tieaudit.errors import RewriteRefused
from tieaudit.formats.safetensors.header import LENGTH_BYTES, MAX_HEADER_BYTES, SPELLINGS
from tieaudit.storage import Storage


@dataclass(frozen=True)
class NewEntry:
    """A tensor to be written: its bytes come from wherever `storage` says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: Storage


def write_safetensors(entries: Iterable[NewEntry], metadata: Mapping[str, str], dest: Path) -> None:
    """Write `entries` in their order to the new file `dest`.

    Raises: RewriteRefused if a type has no spelling in the format or the header would be too long; FileExistsError.
    Cost: one pass over the data, by the kernel where it can; else memory of one block.
    """
    entries = list(entries)
    text = header_bytes(entries, metadata)
    with NewFile(dest) as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for entry in entries:
            file.copy(entry.storage)


def header_bytes(entries: Iterable[NewEntry], metadata: Mapping[str, str]) -> bytes:
    """The JSON header for tensors laid out one after the other, padded with spaces to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.dtype not in SPELLINGS:
            raise RewriteRefused(f"tensor {entry.name!r}: safetensors has no element type {entry.dtype}")
        end = offset + entry.storage.n_bytes
        header[entry.name] = {
            "dtype": SPELLINGS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise RewriteRefused(f"the header would need {len(text)} bytes, the format allows {MAX_HEADER_BYTES}")
    return text
