"""What no input may make a reader do, watched while it reads: leave the folder, write, start something, take long."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5.0
"""Longest time that one input of a few KiB may take."""
_CHANGES = frozenset(
    "os.mkdir os.remove os.rename os.rmdir os.link os.symlink os.truncate os.chmod os.chown os.utime os.mkfifo "
    "subprocess.Popen os.system os.exec os.fork os.forkpty os.posix_spawn socket.connect socket.bind "
    "shutil.copyfile shutil.move shutil.rmtree tempfile.mkstemp tempfile.mkdtemp ctypes.dlopen".split()
)


class Violation(AssertionError):
    """A reader did what it may not do."""


class _Watch:
    """The one audit hook of the process: hooks cannot be removed, so it is switched on and off."""

    def __init__(self) -> None:
        self.home: str | None = None
        self.allowed: frozenset[str] = frozenset()
        self.found: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.home is None:
            return
        if event == "open":
            self._opened(arguments)
        elif event in _CHANGES:
            self.found.append(f"{event} {arguments!r}")

    def _opened(self, arguments: tuple[object, ...]) -> None:
        home, path = self.home, arguments[0]
        mode, flags = arguments[1], arguments[2]
        if home is None or isinstance(path, int) or not isinstance(path, (str, bytes)):
            return
        self.home = None  # what the look-up itself opens is not the reader's
        try:
            where = os.path.realpath(os.fsdecode(path))
            writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            writes = writes or isinstance(mode, str) and any(sign in mode for sign in "wax+")
            inside = where == home or where.startswith(home + os.sep)
            if writes or not inside and where not in self.allowed and not _of_the_interpreter(where):
                self.found.append(f"open {where!r} {mode!r}")
        finally:
            self.home = home


_INTERPRETER = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix, *sys.path)})
_ENDINGS = (".py", ".pyc", ".so", ".json", ".txt", ".zip", "METADATA")


def _of_the_interpreter(path: str) -> bool:
    """A module or its data: what is imported late is no part of the input."""
    return (path + os.sep).startswith(_INTERPRETER) and path.endswith(_ENDINGS)


_WATCH: list[_Watch] = []


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder in memory where the system has one; removed afterwards."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="tieaudit-fuzz-", dir=home)).resolve()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def guarded(home: Path, linked: frozenset[str] = frozenset(), seconds: float = SECONDS) -> Iterator[None]:
    """Nothing outside `home` (and `linked`) is opened, nothing is written, and it ends in time. Violation if not."""
    if not _WATCH:
        _WATCH.append(_Watch())
    watch = _WATCH[0]
    before = _listing(home)
    watch.found, watch.allowed = [], linked
    began = time.perf_counter()
    watch.home = str(home)
    try:
        yield
    finally:
        watch.home = None
    took = time.perf_counter() - began
    if watch.found:
        raise Violation("; ".join(watch.found[:3]))
    if took > seconds:
        raise Violation(f"took {took:.1f} s")
    if _listing(home) != before:
        raise Violation(f"the folder changed: {sorted(_listing(home) ^ before)[:3]}")


def _listing(home: Path) -> set[tuple[str, int]]:
    return {(entry.name, entry.lstat().st_mtime_ns) for entry in home.iterdir()}
