"""A small file written whole or not at all, whoever is killed meanwhile."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from tieaudit.errors import UsageError


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Give `path` this content by one rename of a temporary file beside it. UsageError if it cannot be written.

    `durable`: flushed to the disk first, so that not even a power failure leaves half of it.
    """
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
