"""Stage: Plan → a rewritten model in a temporary folder beside its destination, flushed and read back.

Nothing is written in place. `deliver.py` alone moves the result to its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tieaudit.change import Plan, Written
from tieaudit.errors import RewriteRefused, TieAuditError, UnreadableModel
from tieaudit.formats import KEY_GIVEN, Format, carried
from tieaudit.model import Model
from tieaudit.registry import choose, discover

SPARE_BYTES = 16 * 1024 * 1024
"""Room that is left for receipts and headers when disk space is checked."""
MARK = ".tieaudit-"
_WORKSPACE = re.compile(r"\..*\.tieaudit-(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,10})-[0-9a-f]{12}", re.DOTALL)
ALIGNMENT_BYTES = 65536
"""The most that comes before a large tensor in a data file, so that it can be mapped."""


@dataclass(frozen=True)
class Stamps:
    """What the system says about the files of a model, to notice that somebody else writes to one."""

    files: tuple[tuple[str, tuple[int, int, int] | None], ...]
    """Path → inode, size and time of change; None for a file that is not there."""

    def check(self) -> None:
        """RewriteRefused if a file is no longer what it was."""
        for path, known in self.files:
            if _stamp(path) != known:
                raise RewriteRefused(
                    f"{path}: expected a file that stays as it is while it is read, found it changed meanwhile; "
                    "nothing was delivered",
                    hint="run again when whoever writes to it is done",
                )


def stamps(model: Model) -> Stamps:
    """The files of a model as they are now."""
    paths = dict.fromkeys(path for part in model.parts for path in part.paths)
    return Stamps(tuple((path, _stamp(path)) for path in paths))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def workspace(destination: Path, *, replacing: bool = False) -> Iterator[Path]:
    """An empty folder on the destination's file system, removed afterwards whatever happens.

    RewriteRefused if the destination exists (unless it is to be replaced) or its place cannot be written.
    """
    if not replacing and os.path.lexists(destination):
        raise RewriteRefused(f"{destination}: exists already; nothing is ever overwritten", hint="give another --to")
    home = nearest_existing(destination)
    try:
        # cut: a name may have 255 bytes, and that of the destination may have nearly as many
        folder = home / f".{destination.name[:40]}{MARK}{this_machine()}-{os.getpid()}-{secrets.token_hex(6)}"
        folder.mkdir(
            0o700
        )  # nobody else reads what is not proved yet; `deliver` gives it the permissions it is to have
    except OSError as error:
        raise RewriteRefused(f"{home}: cannot be written: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def left_behind(destination: Path) -> list[str]:
    """Sentences about workspaces beside a destination that killed runs left, after removing those that are surely dead.

    Surely dead: of this machine since it was started and of this space of process numbers, and no such process is
    running. Whatever else has such a name may be somebody's at work, and is only named.
    """
    found = []
    with suppress(OSError, RewriteRefused):
        for path in sorted(nearest_existing(destination).glob(f".*{MARK}*")):
            name = _WORKSPACE.fullmatch(path.name)
            if name is None or path.is_symlink() or not path.is_dir():
                continue
            if name["machine"] == this_machine() and not running(int(name["pid"])):
                shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                found.append(f"removed {path}, which a run that was killed had left")
            elif int(name["pid"]) != os.getpid():
                found.append(
                    f"{path} belongs to another run; if none is at work there, it was killed: remove the folder"
                )
    return found


def running(pid: int) -> bool:
    """Whether a process of this number runs, on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


@cache
def this_machine() -> str:
    """Equal in two processes only if a process number means the same in both: one start of one machine, one namespace.

    Empty facts where the system does not tell make another value in every process, so that nothing is taken for dead.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(4)
    return hashlib.sha256(f"{socket.gethostname()}\0{started}\0{namespace}".encode()).hexdigest()[:8]


def nearest_existing(path: Path) -> Path:
    """The closest ancestor folder that exists: where temporary files can be made without creating anything else."""
    home = path.absolute().parent
    try:
        while not home.exists():
            home = home.parent
    except OSError as error:  # a path that is too long, or a folder that may not be looked into
        raise RewriteRefused(f"{path}: cannot be written: {error.strerror}", hint="give another --to") from error
    if not home.is_dir():
        raise RewriteRefused(f"{home}: expected a folder, found a file")
    return home


def rewrite(model: Model, plan: Plan, folder: Path) -> tuple[Written, Model]:
    """Write the planned model into `folder`, flush it to disk and read it back.

    RewriteRefused if there is too little room or the system refuses; UnreadableModel if what was written cannot be
    read again (nothing is delivered then). Cost: one copy of the model's files.
    """
    format_ = choose(discover("formats", Format), _format_name(model, plan), "format")
    write = format_.edit if plan.into is None else format_.create
    if write is None:
        raise RewriteRefused(f"{model.path}: the format {format_.name} can be read but not written yet")
    try:
        _check_room(model, plan, folder)
        written = write(model, plan, folder)
        keep_private(model, folder, written.files)
        for name in written.files:
            flush(folder / name)
        return written, read_back(model, plan, folder)
    except OSError as error:
        raise RewriteRefused(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error


def _format_name(model: Model, plan: Plan) -> str:
    """The format of what is written."""
    if plan.into is None or not plan.into.file:
        return model.format
    return "safetensors" if plan.into.form == "safetensors" else "torch_checkpoint"


def keep_private(model: Model, folder: Path, names: Iterable[str]) -> None:
    """Nobody may read a new file who may not read what it was made of; its owner may always write it.

    A file has the permissions of the source's file of its name, a new one those that all files of the model have in
    common, both within what the user's own settings give to new files. Folders likewise.
    """
    home = Path(model.path) if Path(model.path).is_dir() else Path(model.path).absolute().parent
    common = 0o777
    for path in (path for part in model.parts for path in part.paths):
        with suppress(OSError):
            common &= os.stat(path).st_mode
    for name in names:
        given = common
        with suppress(OSError):
            given = os.stat(home / name).st_mode
        _narrow(folder / name, given)
        for parent in (one for one in Path(name).parents if one != Path()):
            with suppress(OSError):
                _narrow(folder / parent, os.stat(home / parent).st_mode)


def _narrow(path: Path, mode: int) -> None:
    now = path.stat().st_mode
    path.chmod(now & 0o777 & (mode | (0o700 if path.is_dir() else 0o600)))


def read_back(model: Model, plan: Plan, folder: Path) -> Model:
    """What was written for a model into `folder`, read again as that model is. UnreadableModel if it cannot be."""
    format_: Format = choose(discover("formats", Format), _format_name(model, plan), "format")
    path = folder if Path(model.path).is_dir() else folder / Path(model.path).name
    try:
        if plan.into is not None:
            path = folder / plan.into.file
            return format_.load(*format_.group([path])[0])
        mains = [Path(part.paths[0]) for part in model.parts]
        if len(mains) > 1:  # whatever else they would be taken for, these are the parts that were planned for
            return format_.load(path, tuple(folder / main.relative_to(model.path) for main in mains))
        if format_.load_key is not None and (key := model.metadata.get(KEY_GIVEN)):
            return format_.load_key(path, (path,), key)
        groups = format_.group([path])
        same = [group for group in groups if {file.name for file in group[1]} == {main.name for main in mains}]
        return format_.load(*(same or groups)[0])  # not a variant that lies beside it
    except TieAuditError as error:
        raise UnreadableModel(f"what was written cannot be read back: {error.message}") from error


def _check_room(model: Model, plan: Plan, folder: Path) -> None:
    """The copy needs the room of its source, less what is saved; it is moved to its name, not copied again."""
    if plan.into is not None:
        _check_room_for(plan, cost_of(model) + SPARE_BYTES - min(plan.n_bytes_saved, 0), folder)
        return
    source = Path(model.path)
    files = {str(path) for path in carried(source)} if source.is_dir() else set[str]()
    files.update(path for part in model.parts for path in part.paths)
    n_source = sum({os.path.realpath(path): os.path.getsize(path) for path in files}.values())
    padding = sum(min(weight.n_bytes // 16, ALIGNMENT_BYTES) for weight in model.weights)
    needed = n_source - plan.n_bytes_saved + padding + SPARE_BYTES
    _check_room_for(plan, needed, folder)


def cost_of(model: Model) -> int:
    """Bytes of all tensors, those of one memory once, and of the files beside a folder's weights."""
    tensors = {one.storage.region: one.storage.n_bytes for one in model.weights if one.storage is not None}
    n_beside = 0
    if (source := Path(model.path)).is_dir():
        mine = {os.path.realpath(path) for part in model.parts for path in part.paths}
        n_beside = sum(path.stat().st_size for path in carried(source) if os.path.realpath(path) not in mine)
    return sum(tensors.values()) + n_beside


def _check_room_for(plan: Plan, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RewriteRefused(
            f"{folder.parent}: expected {needed:,} free bytes for the copy, found {free:,}; nothing was written",
            hint="make room, or give another --to",
        )


def flush(path: Path) -> None:
    """Force a file's bytes to the disk, so that the later rename never names an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
