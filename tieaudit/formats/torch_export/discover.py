"""Which files are archives of exported programs: zip archives by the name of their first members."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SUFFIX = ".pt2"
_OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ep", ".zip")
"""Names under which `torch.export.save` and older PyTorch wrote such archives, with a warning or without."""
_FIRST = re.compile(
    r"([^/]+/)?(data/(weights|constants|sample_inputs|aotinductor)/|models/[^/]+\.json|archive_format$|archive_version$)"
    r"|serialized_exported_program\.json$|serialized_state_dict\.(pt|json)$"
)
_N_HEAD = 512


def owns(path: Path) -> bool:
    """Whether a file is such an archive. Reads 512 bytes."""
    if not path.name.endswith((SUFFIX, *_OTHER_SUFFIXES)) or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_N_HEAD)
    if not head.startswith(b"PK\x03\x04"):
        return False
    if path.name.endswith(SUFFIX):
        return True
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")
    return _FIRST.match(name) is not None


def group(paths: Sequence[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    """Every archive is a model of its own."""
    return [(path, (path,)) for path in dict.fromkeys(paths)]
