"""A small file written whole or not at all, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """Give `path` this content, as `replace_whole` does. UsageError if it cannot be written."""
    try:
        replace_whole(path, text.encode("utf-8", "surrogatepass"), durable=durable)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error


def replace_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Give `path` this content by one rename of a temporary file beside it: at every moment it has the whole old or the
    whole new one. A link stays a link, and what it leads to is replaced; a file keeps its permissions.

    `durable`: flushed to the disk first, and the rename after it, so that not even a power failure leaves half of it.
    OSError that names `path` if the system refuses, or if there is no file to be replaced; the old one stays then.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        said = "expected a file to be replaced, found a folder, a device or a pipe"
        raise OSError(errno.EINVAL, said, str(path))
    temporary = target.with_name(f".{target.name[:100]}.tieaudit-{secrets.token_hex(6)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        with suppress(OSError):
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush_folder(target.parent)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While this is held nobody else who asks for it, on this machine, changes the file at `path`: for whoever writes
    what was there and something new.

    The folder is locked, which leaves nothing behind and ends with the process. Where a file system or a system cannot,
    nothing is held. OSError that names `path` if its folder is not there.
    """
    folder = Path(os.path.realpath(path)).parent
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # of a folder that nobody may list nothing can be held; whether it can be written is seen
        yield
        return
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, so that renames survive a loss of power.

    Not every system lets a folder be opened for that, nor every file system flush one; any other failure is an OSError.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
