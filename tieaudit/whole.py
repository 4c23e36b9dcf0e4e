"""Files read whole: never a pipe or a device, which may have no end, or nobody at the other one; and their digests."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path


def read_whole(path: str | Path, n_most: int) -> bytes:
    """The bytes of a regular file, links followed. OSError if there is none, or more than `n_most` bytes of it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe waits for a writer
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "expected the name of a file, found one with a null character", str(path))
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "expected a file, found a device or a pipe", str(path))
        data = file.read(n_most + 1)
    if len(data) > n_most:
        raise OSError(errno.EFBIG, f"expected at most {n_most:,} bytes, found more", str(path))
    return data


def digest_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal; read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
