"""A whole run of the gate, kept as one file: where nothing below the paths changed, nothing is located or asked again.

Everything that a run may look at is summed up in one digest of names, sizes and times, which costs one walk. Anything
new in it, and the run is done as usual, model by model, from the cache of single answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieaudit.cached import FOLDER, checked_of, document_of, environment, ignored, settled
from tieaudit.checked import Run
from tieaudit.errors import UsageError
from tieaudit.replacing import replace_text

N_MOST_ENTRIES = 300_000
"""Files below the paths up to which summing up is worth it."""
NEVER = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv", FOLDER})
"""Folders that no run looks into."""
_NAMES_ONLY = (".md", ".txt", ".log", ".sarif", ".xml", ".html", ".py", ".sh", ".csv", ".png", ".jpg", ".svg")
"""What no loader reads: its name may matter (a folder's listing is part of a model), its content does not."""
_UPWARDS = ("tieaudit.toml", "pyproject.toml", ".gitignore", ".git/info/exclude")
"""Files above the paths that steer a run."""
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

    def recall(self) -> Remembered | None:
        """The run, if everything it rests on looks as it did; None otherwise."""
        try:
            document = json.loads(self.file.read_bytes())
            if document["format"] != _FORMAT or document["state"] != self.state:
                return None
            if not all(_stamp(name) == known for name, known in document["besides"]):
                return None
            return Remembered(_run_of(document["run"]), int(document["exit_code"]), tuple(document["notes"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def keep(self, found: Remembered, roots: Sequence[Path], again: Memory | None) -> None:
        """Keep a run over `roots`, if nothing moved while it was made (`again`: the state after it).

        Not one with errors, crashes or unreadable bytes: those are tried again.
        """
        run = found.run
        if again is None or again.state != self.state or run.errors:
            return
        if any(model.crashed or model.unreadable for model in run.models):
            return
        inside = tuple(f"{root}{os.sep}" for root in roots)
        files = {name for model in run.models for name in model.files}
        besides = sorted(name for name in files if not os.path.abspath(name).startswith(inside))
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


def memory(folder: Path, asked: str, roots: Sequence[Path], files: Sequence[Path], since_ns: int) -> Memory | None:
    """The memory of a run; None where its paths hold too much, or something changed a moment ago.

    `folder`: the cache; `asked`: all arguments; `roots`: absolute paths that are looked through; `files`: others that
    steer the run (lock, baseline). Cost: one walk with a stat for each file.
    """
    running = hashlib.sha256()
    n_left = N_MOST_ENTRIES
    try:
        for root in roots:
            for row, found in _below(root):
                n_left -= 1
                if n_left < 0 or found is not None and not settled(found, since_ns):
                    return None
                running.update(row)
        for file in [*files, *(place / name for root in roots for place in root.parents for name in _UPWARDS)]:
            running.update(json.dumps(_stamp(str(file))).encode())
    except OSError:
        return None
    name = hashlib.sha256(f"{os.getcwd()}\0{asked}".encode("utf-8", "surrogatepass")).hexdigest()
    return Memory(folder / environment() / "runs" / f"{name}.json", folder, running.hexdigest())


def _below(root: Path) -> Iterator[tuple[bytes, os.stat_result | None]]:
    """(bytes that tell a file from any other, its stat where the content matters) of everything below, in order.

    Of a file those beside it: which of them are one model with it depends on what else lies there.
    """
    deep = os.path.isdir(root)
    waiting = [os.fspath(root if deep else root.parent)]
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                if deep and entry.name not in NEVER:
                    waiting.append(entry.path)
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
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _document(run: Run) -> dict[str, Any]:
    return {
        "models": [document_of(model) for model in run.models],
        "skipped": [list(pair) for pair in run.skipped],
        "root": run.root,
        "policy": run.policy,
        "facts": dict(run.facts),
    }


def _run_of(document: Mapping[str, Any]) -> Run:
    return Run(
        tuple(checked_of(model) for model in document["models"]),
        (),
        tuple((str(path), str(because)) for path, because in document["skipped"]),
        str(document["root"]),
        str(document["policy"]),
        dict(document["facts"]),
    )
