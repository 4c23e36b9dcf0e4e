"""Files that stand for others: why the content of a file is not here, and how to get it.

A repository of models mostly holds pointers: git-LFS, git-annex and Git-Xet leave a small text in place of the file,
DVC a note beside it, a Hugging Face cache a link to a blob. What such a file stands for was not looked at, which is
neither clean nor broken. Only a few bytes are read, and nothing is fetched.

Sources: git-lfs docs/spec.md (the first line, at most 1024 bytes); git-annex doc/internals/pointer_file; xet-core
`pointer_file.rs` (HEADER_PREFIX); DVC's user guide, ".dvc files"; huggingface_hub `file_download.py` (links to blobs).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

LFS_MAGIC = b"version https://git-lfs"
DVC = ".dvc"
"""What DVC appends to the name of a file or folder that it keeps; the file itself is ignored by git."""
KEPT_AWAY = "cannot tell: DVC keeps "
"""How the reason begins for which a note is skipped whose output is not here and may be a model."""
N_FOLDERS_UP = 2
"""How far above a file that holds only weights the model that names it is looked for."""
N_MOST_BYTES = 1024
"""A pointer is smaller than that, and a model is not."""
_N_MOST_BYTES_DVC = 1 << 20
_KINDS = (
    (LFS_MAGIC, "a git-LFS pointer", "run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer", "run `git annex get`"),
    (b"# xet version ", "a Git-Xet pointer", "run `git xet checkout`"),
)


@dataclass(frozen=True)
class Elsewhere:
    """Why a file is not here."""

    because: str
    """Reads after "found": `a git-LFS pointer to 123 bytes`."""
    hint: str
    """What fetches the file."""


def elsewhere(path: Path) -> Elsewhere | None:
    """Why what this path names is not here, although somebody says that it exists; None where it is, or nobody does.

    Cost: one question to the system, and of a file below 1024 bytes its content. Raises OSError for a small file that
    may not be read.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _missing(path)
    except (OSError, ValueError):  # a loop of links, a name too long, a NUL: for the reader to say
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size >= N_MOST_BYTES or not found.st_size:
        return None
    with path.open("rb") as file:
        head = file.read(N_MOST_BYTES)
    for magic, what, hint in _KINDS:
        if head.startswith(magic):
            size = re.search(rb"^(?:file)?size\s*=?\s*(\d{1,19})\s*$", head, re.MULTILINE)
            return Elsewhere(f"{what} to {int(size[1]):,} bytes" if size else what, hint)
    return None


def _missing(path: Path) -> Elsewhere | None:
    if os.path.islink(path):
        target = os.readlink(path)
        annexed = ".git/annex/objects" in target.replace(os.sep, "/")
        hint = "run `git annex get`" if annexed else "fetch what it leads to, or download the model again"
        return Elsewhere("a link to a file that is not there", hint)
    if os.path.isfile(f"{path}{DVC}"):
        return Elsewhere(f"only {path.name}{DVC}", "run `dvc pull`")
    return None


def dvc_targets(note: Path) -> list[Path]:
    """What a `.dvc` file keeps, as it names it, beside its own name where it names nothing. Reads at most 1 MiB.

    Only plain paths below the folder of the file: one that leads out of it is left out. Its YAML is as DVC writes it,
    `outs:` with an item `path:`; no YAML is interpreted. Raises OSError.
    """
    named: list[str] = []
    wdir, inside = "", False
    if note.is_file() and note.stat().st_size <= _N_MOST_BYTES_DVC:
        for line in note.read_bytes().decode("utf-8", "surrogateescape").splitlines():
            if line[:1].strip() and not line.startswith(("-", "#")):
                inside = line.startswith("outs:")
                wdir = _plain(line[5:]) if line.startswith("wdir:") else wdir
            elif inside and (found := re.match(r"[-\s]+path:\s+(.+)$", line)):
                named.append(_plain(found[1]))
    names = [os.path.join(wdir, name) for name in named if name] or [note.name.removesuffix(DVC)]
    kept = (os.path.normpath(name) for name in names)
    return [note.parent / name for name in kept if not name.startswith(("..", "/", "\\")) and name not in (".", "")]


def _plain(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
