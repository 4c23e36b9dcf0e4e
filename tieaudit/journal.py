"""What a replacement of files is about to do, written down before it begins, so that a killed one can be taken back.

A journal is a hidden folder beside the files: `old/` holds what they were (further names of the same bytes, which cost
nothing), `new/` what they become, `journal.json` says which is which, by digests. It appears by one rename, complete,
and ends by another, to the name of something that is over; whoever finds it in between puts everything back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tieaudit.errors import CorruptFile, RewriteRefused
from tieaudit.formats import NOT_CARRIED
from tieaudit.printable import counted
from tieaudit.replacing import flush_folder
from tieaudit.rewrite import flush, running, this_machine
from tieaudit.whole import digest_of

SCHEMA = "tieaudit/replacing/1"
_MARK = ".tieaudit-replacing-"
_OVER = ".tieaudit-replaced-"
_NAME = re.compile(rf"\..*(?:{re.escape(_MARK)}|{re.escape(_OVER)})[0-9a-f]{{8}}", re.DOTALL)
_JOURNAL = "journal.json"
_SECONDS_OF_DOUBT = 3600
"""So long a replacement that another machine began may still be at work; it takes as long as the renames take."""


@dataclass(frozen=True)
class Step:
    """One file: what it is, and what it becomes."""

    name: str
    """Relative to the folder in which the journal lies."""
    before: str | None
    """Its identity (see `identity`); None: not there."""
    after: str | None
    """None: it goes."""


@dataclass(frozen=True)
class Journal:
    """A replacement that was written down."""

    folder: Path
    steps: tuple[Step, ...]
    machine: str = ""
    process: int = 0

    @property
    def home(self) -> Path:
        """The folder in which the files lie."""
        return self.folder.parent

    def old(self, number: int) -> Path:
        """Where what the file of a step was is kept."""
        return self.folder / "old" / str(number)

    def new(self, number: int) -> Path:
        """Where what it becomes waits."""
        return self.folder / "new" / str(number)


def identity(path: Path) -> str | None:
    """What is under a name: the sha256 of a file, of a link the text, and None if there is nothing.

    RewriteRefused for anything else. Cost: one pass over the bytes of a file.
    """
    if path.is_symlink():
        return f"link:{hashlib.sha256(os.fsencode(os.readlink(path))).hexdigest()}"
    if not path.exists():
        return None
    if not path.is_file():
        raise RewriteRefused(f"{path}: expected a regular file, found something else; nothing was replaced")
    return digest_of(path)


def name_of(model: Path) -> str:
    """How the journal of a model is called, so that two runs on one model meet."""
    kind, name = ("folder", "model") if model.is_dir() else ("file", model.name)
    mark = hashlib.sha256(os.fsencode(f"{kind}:{name}")).hexdigest()[:8]
    return f".{name[:40]}{_MARK}{mark}"


def write(folder: Path, steps: Sequence[Step]) -> Journal:
    """Write down a replacement in `folder`, which holds `old/` and `new/` already."""
    journal = Journal(folder, tuple(steps), this_machine(), os.getpid())
    content = {
        "schema": SCHEMA,
        "machine": journal.machine,
        "process": journal.process,
        "steps": [asdict(step) for step in steps],
        "what": "tieaudit was replacing these files: `tieaudit check --fix --in-place` puts them back as they were",
    }
    (folder / _JOURNAL).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(folder / _JOURNAL)
    for one in (folder / "old", folder / "new", folder):
        flush_folder(one)
    return journal


def read(folder: Path) -> Journal | None:
    """The journal in a folder; None if what it says is done. CorruptFile if it is none of ours, or leads elsewhere."""
    file = folder / _JOURNAL
    if has_ended(folder):
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        steps = tuple(Step(**step) for step in content["steps"])
        known = content["schema"] == SCHEMA and all(_is_step(step) for step in steps)
        journal = Journal(folder, steps, str(content["machine"]), int(content["process"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptFile(f"{file}: expected the journal of a replacement, which cannot be read: {error}") from error
    home = journal.home.resolve()
    inside = all((journal.home / step.name).parent.resolve().is_relative_to(home) for step in steps)
    if not known or not inside:
        raise CorruptFile(f"{file}: expected the journal of a replacement, found something else; nothing was touched")
    return journal


def _is_step(step: Step) -> bool:
    texts = all(one is None or isinstance(one, str) for one in (step.before, step.after))
    plain = isinstance(step.name, str) and step.name and "\0" not in step.name
    return bool(texts and plain) and not os.path.isabs(step.name) and ".." not in Path(step.name).parts


def has_ended(folder: Path) -> bool:
    """Whether what lies in a journal's folder is only the rest of a replacement that is over."""
    return _OVER in folder.name


def interrupted(path: Path) -> list[Path]:
    """Journals of a path: in a folder and below it, or those that name a file. Cost: a walk through the folder."""
    if path.is_dir():
        return sorted(_below(path))
    beside = path.absolute().parent
    return sorted(one for one in _of(beside) if _concerns(one, path)) if beside.is_dir() else []


def _below(home: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(home):
        yield from _of(Path(folder))
        names[:] = [name for name in names if name not in NOT_CARRIED and not name.startswith(".")]


def _of(home: Path) -> Iterator[Path]:
    """Journals that lie in this folder."""
    for path in home.iterdir():
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


def _concerns(folder: Path, file: Path) -> bool:
    if folder.name == name_of(file):
        return True
    with suppress(CorruptFile):
        journal = read(folder)
        return journal is not None and any(step.name == file.name for step in journal.steps)
    return False


def recover(path: Path) -> list[str]:
    """Put back what interrupted replacements at a path (see `interrupted`) had begun; a sentence for each.

    RewriteRefused if a run may be at work there, or if a file is neither what it was nor what it was to become:
    somebody changed it since, and then nothing is touched. Killed itself, it is done again by the next call.
    """
    return [_recovered(folder) for folder in interrupted(path)]


def _recovered(folder: Path) -> str:
    journal = read(folder)
    if journal is None:
        sweep(folder)
        return f"{folder.parent}: removed the rest of a replacement that had ended"
    _check_abandoned(journal)
    n_back = roll_back(journal)
    sweep(close(journal))
    files = counted(n_back, "file")
    return f"{folder.parent}: a replacement was interrupted; {files} put back, everything is as it was before it"


def _check_abandoned(journal: Journal) -> None:
    """RewriteRefused if whoever wrote it may be at work."""
    if journal.machine == this_machine():
        if journal.process != os.getpid() and running(journal.process):
            raise RewriteRefused(f"{journal.home}: process {journal.process} is replacing files here; run again later")
        return
    seconds = time.time() - (journal.folder / _JOURNAL).stat().st_mtime
    if seconds < _SECONDS_OF_DOUBT:
        when = f"{round(seconds / 60)} minutes ago" if seconds >= 0 else "at a time that is still to come by this clock"
        raise RewriteRefused(
            f"{journal.home}: another machine, or this one before it was started again, began to replace files here "
            f"{when} and may be at work",
            hint=f"run again an hour after it began, or when {journal.folder / _JOURNAL} has an older time",
        )


def roll_back(journal: Journal) -> int:
    """Make every file what it was; how many were not. RewriteRefused, before anything is touched, if one is neither."""
    todo = []
    for number, step in enumerate(journal.steps):
        now = identity(journal.home / step.name)
        if now == step.before:
            continue
        kept = step.before is None or identity(journal.old(number)) == step.before
        if now not in (step.after, None) or not kept:
            raise RewriteRefused(
                f"{journal.home / step.name}: expected what it was before a replacement that was interrupted, or what "
                "it was to become, found something else; nothing was touched",
                hint=f"what it was is kept in {journal.old(number)}; put it where you want it, then remove "
                f"{journal.folder}",
            )
        todo.append((number, step))
    for number, step in reversed(todo):
        if step.before is None:
            (journal.home / step.name).unlink()
        else:
            os.replace(journal.old(number), journal.home / step.name)
    for parent in sorted({(journal.home / step.name).parent for _, step in todo}):
        flush_folder(parent)
    return len(todo)


def close(journal: Journal) -> Path:
    """It is over, one way or the other. By one rename: what is left is the rest, which `sweep` removes."""
    over = journal.folder.with_name(journal.folder.name.replace(_MARK, _OVER))
    shutil.rmtree(over, ignore_errors=True)  # of an earlier one, which was killed while it was swept
    journal.folder.rename(over)
    return over


def sweep(over: Path) -> None:
    """Remove what a replacement that is over has kept. Never fails: the next run finds what stays."""
    with suppress(OSError):
        flush_folder(over.parent)
    shutil.rmtree(over, ignore_errors=True)
