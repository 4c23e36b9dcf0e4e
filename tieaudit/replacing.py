"""A small file written whole or not at all, whoever is killed meanwhile."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from tieaudit.errors import UsageError


def flows(path: Path) -> bool:
    """Whether what is written there goes on to somewhere else: a pipe, a device, `/dev/stdout` whatever it is."""
    open_already = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return open_already or path.exists() and not path.is_file() and not path.is_dir()


def write_on(path: Path, text: str) -> None:
    """Write to what flows; nothing of it can be taken back. UsageError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Give `path` this content by one rename of a temporary file beside it. UsageError if it cannot be written.

    `durable`: flushed to the disk first, so that not even a power failure leaves half of it.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: expected a file to be replaced, found a folder, a device or a pipe")
    temporary = path.with_name(f".{path.name[:100]}.tieaudit-{secrets.token_hex(6)}")
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        with suppress(OSError):
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
