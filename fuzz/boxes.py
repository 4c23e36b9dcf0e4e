"""Several files as one input of a fuzzer: a box that is laid out as a folder before it is read.

Layout of a box: for each file one byte of kind, one byte of name length, the name, four bytes (little-endian) of
content length, the content. Kinds: 0 a file, 1 a named pipe, 2 a folder, 3 a symbolic link to the content.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from fuzz.records import mutated as mutated_records
from fuzz.texts import mutated_json, mutated_safetensors

FILE, PIPE, FOLDER, LINK = range(4)
Box = list[tuple[int, str, bytes]]
_NAMES = (
    *("model.safetensors", "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "m.onnx"),
    *("m.data", "m.onnx_data", "model.onnx", "decoder_model.onnx", "genai_config.json", "pytorch_model.bin", "x.bin"),
    *("adapter_model.safetensors", "generation_config.json", "m_fp16.onnx", "other.safetensors.index.json", ".hidden"),
)


def pack(box: Box) -> bytes:
    """The bytes of a box."""
    pieces = []
    for kind, name, content in box:
        encoded = name.encode()[:255]
        pieces.append(bytes([kind, len(encoded)]) + encoded + len(content).to_bytes(4, "little") + content)
    return b"".join(pieces)


def unpack(data: bytes) -> Box:
    """The files of a box; what is cut off at its end is a shorter file."""
    box: Box = []
    at = 0
    while at + 2 <= len(data) and len(box) < 12:
        kind, n_name = data[at] % 4, data[at + 1]
        name = data[at + 2 : at + 2 + n_name]
        at += 2 + n_name
        n_content = int.from_bytes(data[at : at + 4], "little")
        box.append((kind, name.decode("utf-8", "replace"), data[at + 4 : at + 4 + n_content]))
        at += 4 + n_content
    return box


def lay_out(box: Box, folder: Path) -> None:
    """Write the files of a box into an empty folder. Names that would leave the folder are left out."""
    for kind, name, content in box:
        path = folder / name
        if not name or len(name) > 100 or any(sign in name for sign in "/\\\0") or name in (".", ".."):
            continue
        if os.path.lexists(path):
            continue
        try:
            if kind == FILE:
                path.write_bytes(content)
            elif kind == PIPE:
                os.mkfifo(path)
            elif kind == FOLDER:
                path.mkdir()
            else:
                target = content[:200].decode("utf-8", "replace").replace("\0", "")
                path.symlink_to(target or ".")
        except (OSError, ValueError):  # a name that the system does not take
            continue


def mutated_box(data: bytes, rng: random.Random, n_most: int, bytewise: Callable[[bytes], bytes]) -> bytes:
    """One file of the box changed in the way of its format, or the set of files itself."""
    box = unpack(data) or [(FILE, "model.safetensors", b"")]
    at = rng.randrange(len(box))
    kind, name, content = box[at]
    choice = rng.random()
    if choice < 0.06:
        del box[at]
    elif choice < 0.12:
        box[at] = (kind, rng.choice((*_NAMES, *(one[1] for one in box))), content)
    elif choice < 0.17:
        box.append((kind, rng.choice(_NAMES), content))
    elif choice < 0.20:
        box[at] = (rng.choice((PIPE, FOLDER, FILE, LINK)), name, content)
    elif choice < 0.24:
        box.append(
            (LINK, rng.choice(_NAMES), rng.choice((b".", b"..", b"config.json", b"m.data", b"/etc/passwd", b"nowhere")))
        )
    elif choice < 0.32:
        box[at] = (kind, name, bytewise(content))
    elif name.endswith(".json"):
        box[at] = (kind, name, mutated_json(content, rng, n_most))
    elif name.endswith(".safetensors"):
        box[at] = (kind, name, mutated_safetensors(content, rng, n_most))
    elif name.endswith(".onnx"):
        box[at] = (kind, name, mutated_records(content, rng, n_most))
    else:
        box[at] = (kind, name, bytewise(content))
    return pack(box)[:n_most]
