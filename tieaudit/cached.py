"""What the gate said of a model, kept by content: a model that did not change costs nothing to check again.

One small file for each model, written whole or not at all, so that neither a kill nor a second run beside this one can
spoil it; a file that is not as expected is a miss. Only text is ever read back: a cache that somebody else restored in
CI can make an answer wrong, but runs nothing. Design: docs/decisions/cache.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tieaudit.checked import RANK, Checked, Judged, Place
from tieaudit.errors import UsageError
from tieaudit.plain import plain
from tieaudit.replacing import replace_text
from tieaudit.verdict import CannotTell, Finding, Fix, Summary
from tieaudit.whole import digest_of, read_whole

FOLDER = ".tieaudit_cache"
N_MOST_HASHED = 32 * 2**20
"""Bytes of a file up to which its content is digested: a fresh checkout has new times, but the same content. A larger
file is known by what the system says of it; scanning it anew reads less than digesting it would."""
_TICK_NS = 50_000_000
"""A file that changed so shortly before it was read may change again without a new time."""
_COARSE_TICK_NS = 2_500_000_000
"""The same where a file system counts whole seconds (FAT counts in twos)."""
_FORMAT = "tieaudit/cache/1"
_MAX_ENTRY_BYTES = 64_000_000


@dataclass(frozen=True)
class Moment:
    """When something began: by the clock that dates files, and by one that nobody sets."""

    wall_ns: int
    steady_ns: int

    @classmethod
    def now(cls) -> Moment:
        return cls(time.time_ns(), time.monotonic_ns())

    @property
    def is_telling(self) -> bool:
        """Whether what changed since has a later time: not where the clock was set back meanwhile."""
        n_steady = time.monotonic_ns() - self.steady_ns
        return time.time_ns() - self.wall_ns >= n_steady - n_steady // 1000 - _TICK_NS  # a clock that is slowed down


@dataclass(frozen=True)
class Cache:
    """A folder of answers, all by this version of tieaudit, its plug-ins and the libraries that it asks."""

    folder: Path

    def entry(self, asked: str) -> Path:
        """Where the answer to a question is kept."""
        name = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / environment() / name[:2] / f"{name}.json"

    def get(self, asked: str) -> Checked | None:
        """The answer of an earlier run, if every file it rests on is what it was; None otherwise.

        Cost: one stat a file; a file whose times changed is digested if it is small.
        """
        path = self.entry(asked)
        if not free_of_links(self.folder, path):
            return None
        try:
            document = json.loads(read_whole(path, _MAX_ENTRY_BYTES))
            if document["format"] != _FORMAT or document["asked"] != asked:
                return None
            if not all(_unchanged(*row) for row in document["files"]):
                return None
            if any(_listing(Path(folder)) != names for folder, names in document["folders"]):
                return None
            return checked_of(document["checked"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # none yet, or somebody else's: asked anew

    def put(self, asked: str, checked: Checked, files: Iterable[Path], since: Moment) -> None:
        """Keep an answer that rests on these files; not if one of them changed `since`, or it is no full one.

        A folder that cannot be written keeps nothing, and nobody is worse off.
        """
        path = self.entry(asked)
        whole = not checked.crashed and not checked.unreadable and checked.weights_here
        if not whole or not since.is_telling or not free_of_links(self.folder, path):
            return
        try:
            rows = [_row(file, since.wall_ns) for file in dict.fromkeys(files)]
        except OSError:  # it went away meanwhile, or somebody else keeps it
            return
        if None in rows:
            return
        folders = sorted({str(file) for file in files if file.is_dir()})
        document = {
            "format": _FORMAT,
            "asked": asked,
            "files": rows,
            "folders": [[folder, _listing(Path(folder))] for folder in folders],
            "checked": document_of(checked),
        }
        with suppress(OSError, UsageError):
            path.parent.mkdir(parents=True, exist_ok=True)
            ignored(self.folder)
            replace_text(path, json.dumps(document), durable=False)


def ignored(folder: Path) -> None:
    """Have git leave a cache alone: it is nobody's commit, as pytest and ruff have it."""
    with suppress(FileExistsError), open(folder / ".gitignore", "x", encoding="utf-8") as mark:  # through no link
        mark.write("# made by tieaudit\n*\n")


def free_of_links(folder: Path, file: Path) -> bool:
    """Whether no folder on the way from a cache to one of its files is a link: a repository may hold one to anywhere.

    `file` lies below `folder`. Cost: one question to the system for each folder.
    """
    here = file.parent
    while not here.is_symlink():
        if here == folder:
            return True
        here = here.parent
    return False


def question(path: str, shown_as: str, format_name: str, files: Sequence[Path], said: Sequence[object]) -> str:
    """The whole question to which an answer belongs: which model, called how, under which terms.

    What is `said` are nouns of plain values, whose text is the same in every run.
    """
    names = [str(file) for file in files]
    return repr((path, shown_as, format_name, names, *said))


def content_of(name: str) -> str:
    """Digest of a small file that a question is about; empty if it cannot be read."""
    try:
        return hashlib.sha256(read_whole(name, N_MOST_HASHED)).hexdigest()
    except (OSError, ValueError):
        return ""


def _row(file: Path, since_ns: int) -> tuple[str, int, list[int] | None, str] | None:
    """What is known of a file: its size, its times where they can be relied on, and the digest of a small one."""
    if file.is_dir():
        return (str(file), -1, None, "")
    found = os.stat(file)
    if _last_change(found) >= since_ns:
        return None
    times = _times(found) if settled(found, since_ns) else None
    digest = digest_of(file) if found.st_size <= N_MOST_HASHED else ""
    return (str(file), found.st_size, times, digest) if times or digest else None


def settled(found: os.stat_result, since_ns: int) -> bool:
    """Whether a file that is read from `since_ns` on cannot change any more without another time.

    Never where the system has no time of its own for it: a file of 1970 has the same one whatever it holds.
    """
    tick = _COARSE_TICK_NS if found.st_ctime_ns % 1_000_000_000 == 0 else _TICK_NS
    return found.st_ctime_ns >= _TICK_NS and _last_change(found) < since_ns - tick


def _last_change(found: os.stat_result) -> int:
    """When a file changed last. A time that is still to come was set (by an archive, by `touch`) and tells nothing:
    the system's own one says when that was."""
    set_by_hand = found.st_mtime_ns > time.time_ns()
    return found.st_ctime_ns if set_by_hand else max(found.st_mtime_ns, found.st_ctime_ns)


def _times(found: os.stat_result) -> list[int]:
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _unchanged(name: str, n_bytes: int, times: list[int] | None, digest: str) -> bool:
    if n_bytes < 0:
        return True  # a folder: what it lists is compared apart
    found = os.stat(name)
    if found.st_size != n_bytes:
        return False
    return _times(found) == times or bool(digest) and digest_of(Path(name)) == digest


def _listing(folder: Path) -> str:
    """Digest of the names in a model's folder: a shard or an alternative that came or went changes what is read."""
    names = sorted(os.fsencode(name) for name in os.listdir(folder) if name != FOLDER)
    return hashlib.sha256(b"\0".join(names)).hexdigest()


@cache
def environment() -> str:
    """Digest of everything but the model and the policy that an answer depends on: this program, plug-ins, libraries.

    The program by the content of its files: an unreleased version has the number of the released one.
    """
    from tieaudit.registry import joined

    running = hashlib.sha256()
    for file in sorted(_sources(os.path.dirname(__file__))):
        with open(file, "rb", buffering=0) as stream:
            running.update(os.fsencode(file.rpartition(os.sep)[2]) + b"\0" + stream.read())
    for text in (*sorted(_libraries()), *joined()):
        running.update(f"{text}\n".encode())
    return running.hexdigest()[:16]


def _sources(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _sources(entry.path)
            elif entry.name.endswith((".py", ".json")):
                yield entry.path


_ASKED = ("ml_dtypes-", "numpy-", "onnx-", "safetensors-", "torch-", "transformers-")


def _libraries() -> Iterator[str]:
    """Name and version of the libraries that an answer may depend on, as their folders are called."""
    for entry in dict.fromkeys(sys.path):
        with suppress(OSError):
            yield from (name for name in os.listdir(entry) if name.startswith(_ASKED) and name.endswith(".dist-info"))


def document_of(checked: Checked) -> dict[str, Any]:
    """An answer as plain JSON."""
    document = asdict(checked)
    for judged in (*document["findings"], *document["known"]):
        judged["finding"]["evidence"] = plain(judged["finding"]["evidence"])
    document["crashed"] = []
    return document


def checked_of(document: Mapping[str, Any]) -> Checked:
    """The answer that `document_of` wrote. KeyError, TypeError or ValueError for anything else."""
    fields = dict(document)
    fields["findings"] = tuple(_judged(one) for one in document["findings"])
    fields["known"] = tuple(_judged(one) for one in document["known"])
    fields["cannot_tell"] = tuple(
        _typed(CannotTell(one["because"], tuple(one["ids"]), one["code"])) for one in document["cannot_tell"]
    )
    fields["crashed"] = ()
    fields.update((name, tuple(document[name])) for name in ("used", "ran", "files"))
    fields["summary"] = _typed(Summary(**document["summary"])) if document["summary"] is not None else None
    fields["cached"] = True
    return _typed(Checked(**fields))


def _judged(one: Mapping[str, Any]) -> Judged:
    fields = dict(one["finding"])
    fields["ids"] = tuple(fields["ids"])
    fields["fix"] = _typed(Fix(**fields["fix"])) if fields["fix"] is not None else None
    return Judged(_typed(Finding(**fields)), _typed(Place(**one["place"])), str(one["fingerprint"]))


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


_KINDS: Mapping[str, Callable[[object], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _count,
    "int | None": lambda value: value is None or _count(value),
    "bool": lambda value: isinstance(value, bool),
    "tuple[str, ...]": lambda value: isinstance(value, tuple) and all(isinstance(one, str) for one in value),
    "Mapping[str, object]": lambda value: isinstance(value, dict),
    "Severity": lambda value: isinstance(value, str) and value in RANK,
    "Literal['safe', 'unsafe', 'manual']": lambda value: value in ("safe", "unsafe", "manual"),
}
"""Plain fields of an answer, by their annotation, and what they may hold. Every number is a count."""
Noun = TypeVar("Noun", Checked, CannotTell, Finding, Fix, Place, Summary)


def _typed(noun: Noun) -> Noun:
    """What was read, if its plain fields hold what they are for; TypeError otherwise."""
    kind_of: Any = type(noun)
    for name, kind in _plain_fields(kind_of):
        if not kind(getattr(noun, name)):
            raise TypeError(f"{name}: {getattr(noun, name)!r:.80}")
    return noun


@cache
def _plain_fields(kind: type[Any]) -> tuple[tuple[str, Callable[[object], bool]], ...]:
    return tuple((one.name, _KINDS[str(one.type)]) for one in fields_of(kind) if one.type in _KINDS)
