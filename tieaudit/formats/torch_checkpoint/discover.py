"""Which files are PyTorch checkpoints: by their first bytes, since `.bin`, `.pt` and `.ckpt` may be anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tieaudit.formats.safetensors.sharded import read_index
from tieaudit.formats.torch_checkpoint.legacy import MAGIC

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".jit", ".ptl", ".th", ".model", ".pkl")
"""Names that PyTorch's files have. A zip archive or a pickle of another name is looked at no further."""
INDEX_SUFFIX = ".bin.index.json"
_NO_MODEL = re.compile(r"^(optimizer|scheduler|scaler|rng_state.*|random_states.*|training_args)\.(pt|pth|bin|pkl)$")
"""What a trainer leaves beside the weights; named alone, such a file is described, but it is no model."""
_SURE = (".pt", ".pth", ".ckpt")
_N_HEAD = 512

Kind = Literal["zip", "legacy", ""]


def owns(path: Path) -> bool:
    """Whether a file is a checkpoint, or an index of sharded ones. Reads 512 bytes."""
    if path.name.endswith(INDEX_SUFFIX):
        return path.is_file()
    if not path.name.endswith(SUFFIXES) or _NO_MODEL.match(path.name) or not path.is_file():
        return False
    kind, _ = what_is(path)
    return bool(kind) and (path.name.endswith(_SURE) or _is_pytorch(path, kind))


def group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    """A shard belongs to its index; every other file is a model of its own."""
    found: dict[Path, tuple[Path, ...]] = {}
    for path in paths:
        main = path if path.name.endswith(INDEX_SUFFIX) else _index_of(path) or path
        if main not in found:
            shards = dict.fromkeys(read_index(main).values()) if main.name.endswith(INDEX_SUFFIX) else ()
            found[main] = (main, *(main.parent / name for name in shards))
    return list(found.items())


def _index_of(path: Path) -> Path | None:
    shard = re.search(r"-\d{5}-of-\d{5}\.bin$", path.name)
    index = path.with_name(path.name[: shard.start()] + INDEX_SUFFIX) if shard else None
    return index if index is not None and index.is_file() else None


def what_is(path: Path) -> tuple[Kind, str]:
    """The layout of a file by its first bytes; for none, what it is instead."""
    with path.open("rb") as file:
        head = file.read(_N_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return "zip", ""
    if head[:1] == b"\x80" and MAGIC in head[:32]:
        return "legacy", ""
    if not head:
        return "", "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "", "a git-LFS pointer, the weights are elsewhere: run `git lfs pull`"
    if head[257:262] == b"ustar":
        return "", (
            "a tar archive: PyTorch before 0.1.10 wrote such checkpoints, and its safe loader refuses them too; load "
            "it once in a place where it can do no harm, and save it again"
        )
    if head[:1] == b"\x80" and b"\x00" <= head[1:2] <= b"\x05":
        return "", "a Python pickle that `torch.save` did not write"
    return "", f"a file that begins with {head[:8]!r}"


def _is_pytorch(path: Path, kind: Kind) -> bool:
    """Whether an archive of a name that others use too is PyTorch's: its first member is the pickle."""
    if kind == "legacy":
        return True
    with path.open("rb") as file:
        head = file.read(_N_HEAD)
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")
    return name.endswith(("/data.pkl", "/version", "/byteorder", "/data/0", "/.format_version"))
