"""A whole run of the gate, kept as one file: where nothing below the paths changed, nothing is located or asked again.

Everything that a run may look at is summed up in one digest of names, sizes and times, which costs one walk. Anything
new in it, and the run is done as usual, model by model, from the cache of single answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieaudit.cached import FOLDER, Moment, checked_of, document_of, environment, free_of_links, ignored, settled
from tieaudit.checked import Run
from tieaudit.errors import UsageError
from tieaudit.ignored import exclude_file
from tieaudit.pointers import N_FOLDERS_UP
from tieaudit.replacing import replace_text
from tieaudit.whole import read_whole

N_MOST_ENTRIES = 300_000
"""Files below the paths up to which summing up is worth it."""
NEVER = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", FOLDER})
"""Folders that no run looks into."""
_NAMES_ONLY = (".md", ".txt", ".log", ".sarif", ".xml", ".html", ".py", ".sh", ".csv", ".png", ".jpg", ".svg")
"""What is mostly no model's: its name may matter (a folder's listing is part of a model), its content only where a
model names it as its data."""
_UPWARDS = ("tieaudit.toml", "pyproject.toml", ".gitignore")
"""Files in and above the paths and the working directory that steer a run."""
_MAX_BYTES = 256_000_000
_FORMAT = "tieaudit/run/1"


@dataclass(frozen=True)
class Remembered:
    """One run as it is kept."""

    run: Run
    exit_code: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Where a run with these arguments is kept, and what the files looked like before it."""

    file: Path
    folder: Path
    state: str
    walked: frozenset[str]
    """Folders whose files are summed up in the state."""
    since: Moment
    """When the run began."""

    def recall(self) -> Remembered | None:
        """The run, if everything it rests on looks as it did; None otherwise."""
        if not free_of_links(self.folder, self.file):
            return None
        try:
            document = json.loads(read_whole(self.file, _MAX_BYTES))
            if document["format"] != _FORMAT or document["state"] != self.state:
                return None
            if not all(_stamp(name) == known for name, known in document["besides"]):
                return None
            code, notes = document["exit_code"], tuple(document["notes"])
            if code not in (0, 1, 2) or not all(isinstance(note, str) for note in notes):
                return None
            return Remembered(_run_of(document["run"]), code, notes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def keep(self, found: Remembered, again: Memory | None, consulted: Iterable[str] = ()) -> None:
        """Keep a run, if nothing moved while it was made (`again`: the state after it).

        `consulted`: other files that it asked for, there or not: locks, groups of a scheme. Not a run with errors,
        crashes or unreadable bytes: those are tried again.
        """
        run = found.run
        told = again is not None and again.state == self.state and not run.errors and self.since.is_telling
        if not told or not free_of_links(self.folder, self.file):
            return
        if any(model.crashed or model.unreadable for model in run.models):
            return
        files = {name for model in run.models for name in model.files if not self._sums_up(name)}
        besides = sorted({*files, *consulted})
        if not all(_lies_still(name, self.since.wall_ns) for name in besides):
            return
        document = {
            "format": _FORMAT,
            "state": self.state,
            "besides": [[name, _stamp(name)] for name in besides],
            "run": _document(run),
            "exit_code": found.exit_code,
            "notes": list(found.notes),
        }
        with suppress(OSError, UsageError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            ignored(self.folder)
            replace_text(self.file, json.dumps(document), durable=False)

    def _sums_up(self, name: str) -> bool:
        """Whether the state tells if the content of a file changed."""
        return os.path.dirname(os.path.abspath(name)) in self.walked and not name.endswith(_NAMES_ONLY)


def memory(
    folder: Path,
    asked: str,
    roots: Sequence[Path],
    files: Sequence[Path],
    since: Moment,
    written: frozenset[str] = frozenset(),
) -> Memory | None:
    """The memory of a run; None where its paths hold too much, or something changed a moment ago.

    `folder`: the cache; `asked`: all arguments; `roots`: absolute paths that are looked through; `files`: others that
    steer the run (lock, baseline); `written`: reports of the run itself, which every run makes anew. Cost: one walk
    with a stat for each file.
    """
    running = hashlib.sha256()
    n_left = N_MOST_ENTRIES
    walked: set[str] = set()
    try:
        for root in roots:
            for row, found in _below(root, walked, written):
                n_left -= 1
                if n_left < 0 or found is not None and not settled(found, since.wall_ns):
                    return None
                running.update(row)
        for name in [*map(str, files), *_steering(roots)]:
            if not _lies_still(name, since.wall_ns):
                return None
            running.update(json.dumps([name, _stamp(name)]).encode())
    except OSError:
        return None
    name = hashlib.sha256(f"{os.getcwd()}\0{asked}".encode("utf-8", "surrogatepass")).hexdigest()
    file = folder / environment() / "runs" / f"{name}.json"
    return Memory(file, folder, running.hexdigest(), frozenset(walked), since)


def _steering(roots: Sequence[Path]) -> Iterator[str]:
    """Files that may rule these paths or the working directory, or have git ignore something, there or not."""
    for place in dict.fromkeys(place for root in [*roots, Path.cwd()] for place in (root, *root.parents)):
        yield from (str(place / name) for name in _UPWARDS)
        git = place / ".git"
        if os.path.lexists(git):  # whether there is a repository matters, its own times do not
            yield str(exclude_file(git))


def _below(root: Path, walked: set[str], written: frozenset[str]) -> Iterator[tuple[bytes, os.stat_result | None]]:
    """(bytes that tell a file from any other, its stat where the content matters) of everything below, in order.

    Of a file those beside it and in the folders just above: which of them are one model with it depends on what else
    lies there. `walked` gets the folders that were looked into.
    """
    deep = os.path.isdir(root)
    # a named file may be data of a model in a folder above: see owners.py
    above = (root.parent, *root.parent.parents)[: N_FOLDERS_UP + 1]
    waiting = [os.fspath(root)] if deep else [os.fspath(one) for one in above]
    while waiting:
        folder = waiting.pop()
        walked.add(folder)
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                if deep and entry.name not in NEVER:
                    yield b"\0/" + os.fsencode(entry.path), None  # an empty one may mark what is no place for models
                    waiting.append(entry.path)
                continue
            if entry.path in written:
                continue
            name = os.fsencode(entry.path)
            if entry.name.endswith(_NAMES_ONLY):
                yield b"\0" + name, None
                continue
            try:
                found = entry.stat()
            except OSError:  # a link that leads nowhere
                yield b"\0?" + name, None
                continue
            yield _row(name, found), found


def _row(name: bytes, found: os.stat_result) -> bytes:
    return b"\0%b\0%d %d %d %d" % (name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _stamp(name: str) -> list[int] | None:
    try:
        found = os.stat(name)
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _lies_still(name: str, since_ns: int) -> bool:
    """Whether a file that is read from `since_ns` on is the one that `_stamp` will know; also one that is not there."""
    try:
        return settled(os.stat(name), since_ns)
    except (OSError, ValueError):
        return True


def _document(run: Run) -> dict[str, Any]:
    return {
        "models": [document_of(model) for model in run.models],
        "skipped": [list(pair) for pair in run.skipped],
        "root": run.root,
        "top": run.top,
        "policy": run.policy,
        "facts": dict(run.facts),
    }


def _run_of(document: Mapping[str, Any]) -> Run:
    return Run(
        models=tuple(checked_of(model) for model in document["models"]),
        skipped=tuple((str(path), str(because)) for path, because in document["skipped"]),
        root=str(document["root"]),
        top=str(document["top"]),
        policy=str(document["policy"]),
        facts=dict(document["facts"]),
    )
