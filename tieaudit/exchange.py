"""Stage: a proved result → the model's own files, exchanged one by one; after a kill at any moment all old or all new.

Files that come out as they were are not touched. Every other one is replaced by a rename inside its folder, never
written through: where a name is a link, or one of several names of a file, the others keep what they have. A file of
the model that the result has not is removed last. What each file was is kept until all are exchanged (`journal.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from tieaudit import journal as journals
from tieaudit.change import Plan, Proof, Written
from tieaudit.deliver import RECEIPT_SUFFIX, Delivered, read_receipt, write_receipt
from tieaudit.errors import RewriteRefused, TieAuditError
from tieaudit.formats import RECEIPT_NAME, Format
from tieaudit.journal import Journal, Step, identity
from tieaudit.model import Model
from tieaudit.registry import choose, discover
from tieaudit.replacing import flush_folder
from tieaudit.rewrite import keep_private
from tieaudit.whole import digest_of

_NOTHING = "nothing was replaced"


def home_of(model: Model) -> Path:
    """The folder in which the files of a model lie. RewriteRefused for a model that has none."""
    path = Path(model.path)
    if not path.exists():
        raise RewriteRefused(f"{path}: expected a model in files, found none there: {_NOTHING}")
    return path if path.is_dir() else path.absolute().parent


def check_replaceable(model: Model) -> None:
    """Refuse early, before anything is written, what `exchange` would refuse whatever the result.

    RewriteRefused if a folder of the model's files cannot be written, or a replacement of it has begun already.
    """
    home = home_of(model)
    for folder in sorted({home, *((home / name).parent for name in _own(model, home))}):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RewriteRefused(
                f"{folder}: expected a folder that may be written, found one that may not; {_NOTHING}",
                hint="give --to a folder instead of --in-place",
            )
    begun = home / journals.name_of(Path(model.path))
    if os.path.lexists(begun):
        raise RewriteRefused(
            f"{model.path}: a replacement of its files was begun before and has not ended ({begun}); {_NOTHING}",
            hint="run again: the next run takes it back if nobody is at work there",
        )


def exchange(model: Model, plan: Plan, written: Written, proof: Proof, folder: Path) -> Delivered:
    """Put what was written into `folder`, a workspace beside the model's files, in the place of these; with a receipt.

    RewriteRefused, with every file as it was, if one cannot be replaced: another model reads it, it has become
    something else, the system refuses. Cost: reads the old and the new files once each.
    """
    home = home_of(model)
    check_replaceable(model)
    try:
        steps = _planned(model, plan, written, proof, folder, home)
        _carry_out(_written_down(model, steps, folder, home))
    except OSError as error:
        where = error.filename2 or error.filename or home
        raise RewriteRefused(f"{where}: cannot be replaced: {error.strerror}; every file is as it was") from error
    return Delivered(Path(model.path), home / _receipt_name(model))


def _planned(model: Model, plan: Plan, written: Written, proof: Proof, folder: Path, home: Path) -> list[Step]:
    steps = _ordered(model, list(_differences(model, written, folder, home)))
    if not steps:
        raise RewriteRefused(f"{model.path}: the result is what is there already; {_NOTHING}")
    _check_shared(model, [step for step in steps if step.before is not None], home)
    receipt = _receipt(model, plan, written, proof, folder, home, steps)
    n_going = sum(step.after is None for step in steps)
    steps.insert(len(steps) - n_going, receipt)
    return steps


def _carry_out(journal: Journal) -> None:
    """All steps, or none of them: whatever interrupts them, an error or the user, they are taken back."""
    try:
        flush_folder(journal.home)
        for number, step in enumerate(journal.steps):
            _make(journal, number, step)
        for parent in sorted({(journal.home / step.name).parent for step in journal.steps}):
            flush_folder(parent)
        over = journals.close(journal)
    except BaseException:
        if journal.folder.exists():
            journals.roll_back(journal)
            journals.sweep(journals.close(journal))
        raise
    journals.sweep(over)


def _own(model: Model, home: Path) -> list[str]:
    """The files that the model reads, by their names in `home`."""
    base = home.absolute()
    paths = {Path(path).absolute() for part in model.parts for path in part.paths}
    outside = sorted(str(path) for path in paths if not path.is_relative_to(base))
    if outside:
        raise RewriteRefused(f"{outside[0]}: lies outside {home}, with which it would be replaced; {_NOTHING}")
    return sorted(path.relative_to(base).as_posix() for path in paths)


def _differences(model: Model, written: Written, folder: Path, home: Path) -> Iterator[Step]:
    """What must be exchanged so that the model's files are those that were written.

    What lies beside them in the folder is nobody's business here: it was carried along so that the result is whole, and
    may have changed since.
    """
    own, beside = set(_own(model, home)), {Path(name).as_posix() for name in written.copied}
    for name in (one for one in dict.fromkeys(Path(name).as_posix() for name in written.files) if one not in beside):
        place, new = home / name, folder / name
        if place.is_file() and place.stat().st_size == new.stat().st_size and digest_of(place) == digest_of(new):
            continue
        before = identity(place)
        if before is not None and name not in own:
            raise RewriteRefused(f"{place}: exists, and is no file of this model; {_NOTHING}", hint="move it away")
        _check_place(place, home)
        yield Step(name, before, digest_of(new))
    for name in sorted(own - {Path(name).as_posix() for name in written.files}):
        if os.path.lexists(home / name):
            _check_place(home / name, home)
            yield Step(name, identity(home / name), None)


def _check_place(place: Path, home: Path) -> None:
    """RewriteRefused if a rename inside its folder is not all that replacing a file takes."""
    parent = place.parent
    if not parent.is_dir() or not parent.resolve().is_relative_to(home.resolve()):
        raise RewriteRefused(f"{place}: expected a folder below {home} to put it into, found none; {_NOTHING}")
    if parent.stat().st_dev != home.stat().st_dev:
        raise RewriteRefused(f"{place}: lies on another file system than {home}; {_NOTHING}", hint="give --to")


def _ordered(model: Model, steps: list[Step]) -> list[Step]:
    """New files first, what only others name next, the model's main files last, and after them what goes."""
    mains = {Path(part.paths[0]).name for part in model.parts}

    def rank(step: Step) -> tuple[int, str]:
        if step.after is None:
            return 3, step.name
        return 0 if step.before is None else 2 if Path(step.name).name in mains else 1, step.name

    return sorted(steps, key=rank)


def _check_shared(model: Model, steps: list[Step], home: Path) -> None:
    """RewriteRefused if another model of this folder reads a data file or a shard that would change or go.

    Cost: nothing if only main files change; else the other models of the folder are loaded, without their tensors.
    """
    mains = {Path(part.paths[0]).absolute() for part in model.parts}
    own = {Path(path).absolute() for part in model.parts for path in part.paths}
    touched = {(home / step.name).absolute() for step in steps} & own - mains
    if not touched:
        return
    format_ = choose(discover("formats", Format), model.format, "format")
    folders = {home.absolute(), *(path.parent for path in touched)}
    beside = [path for folder in sorted(folders) for path in sorted(folder.iterdir()) if path.is_file()]
    for path, files in format_.group([one for one in beside if format_.owns(one)]):
        if path.absolute() == Path(model.path).absolute() and own.issuperset(file.absolute() for file in files):
            continue
        mine = any(file.absolute() in mains for file in files)  # with others that the user did not name
        for one, of_one in (
            [(file, (file,)) for file in files if file.absolute() not in own] if mine else [(path, files)]
        ):
            _check_apart(format_, one, of_one, touched)


def _check_apart(format_: Format, path: Path, files: tuple[Path, ...], touched: set[Path]) -> None:
    """RewriteRefused if this model reads one of the files that would change, or if that cannot be told."""
    try:
        read = {Path(one).absolute() for part in format_.load(path, files).parts for one in part.paths}
    except (TieAuditError, OSError) as error:
        raise RewriteRefused(
            f"{min(touched)}: would change, and whether {path} reads it too cannot be told: {error}; {_NOTHING}",
            hint="give --to",
        ) from error
    if common := sorted(touched & read):
        raise RewriteRefused(
            f"{common[0]}: {path} reads it too, and would read other bytes afterwards; {_NOTHING}",
            hint="mend both as one model (their folder), or give --to",
        )


def _receipt_name(model: Model) -> str:
    path = Path(model.path)
    return RECEIPT_NAME if path.is_dir() else f"{path.name}{RECEIPT_SUFFIX}"


def _receipt(
    model: Model, plan: Plan, written: Written, proof: Proof, folder: Path, home: Path, steps: Iterable[Step]
) -> Step:
    """The receipt, written into the workspace; its own step."""
    name = _receipt_name(model)
    if os.path.lexists(home / name):
        try:
            read_receipt(home / name)
        except TieAuditError as error:
            raise RewriteRefused(f"the receipt would take the place of another file: {error}; {_NOTHING}") from error
    changed = {step.name: {"before": step.before, "after": step.after} for step in steps}
    write_receipt(folder / name, model, plan, written, proof, folder, home, replaced=changed)
    keep_private(model, folder, [name])
    return Step(name, identity(home / name), digest_of(folder / name))


def _written_down(model: Model, steps: list[Step], folder: Path, home: Path) -> Journal:
    """The journal in its place, with what every file becomes and, where the file system can, what it is."""
    inside = folder / journals.name_of(Path(model.path))
    (inside / "old").mkdir(parents=True, mode=0o700)
    (inside / "new").mkdir(mode=0o700)
    for number, step in enumerate(steps):
        if step.after is not None:
            _like(home / step.name, folder / step.name)
            (folder / step.name).rename(inside / "new" / str(number))
        if step.before is not None:
            _keep(home / step.name, inside / "old" / str(number))
    journals.write(inside, steps)
    place = home / inside.name
    inside.rename(place)  # refused by the system if another run has put one there meanwhile: it is not empty
    return Journal(place, tuple(steps))


def _like(old: Path, new: Path) -> None:
    """Give a new file the permissions of the one that it replaces; owner and access lists as far as the user may."""
    if not old.exists():
        return
    known = old.stat()
    new.chmod(known.st_mode & 0o777)
    with suppress(OSError):
        if (new.stat().st_uid, new.stat().st_gid) != (known.st_uid, known.st_gid):
            os.chown(new, known.st_uid, known.st_gid)
    with suppress(OSError, AttributeError):  # not every system, and not every file system, has them
        os.setxattr(new, "system.posix_acl_access", os.getxattr(old, "system.posix_acl_access"))


def _keep(old: Path, place: Path) -> None:
    """A second name for what a file is. Where there can be none, `_make` moves the file there."""
    if old.is_symlink():
        place.symlink_to(os.readlink(old))
        return
    with suppress(OSError):
        os.link(old, place)


def _make(journal: Journal, number: int, step: Step) -> None:
    place, old = journal.home / step.name, journal.old(number)
    if step.before is None and os.path.lexists(place):
        raise RewriteRefused(f"{place}: appeared meanwhile; everything was put back")
    if step.before is not None and not os.path.lexists(old):
        os.rename(place, old)
    elif step.after is None:
        place.unlink()
    if step.after is not None:
        os.replace(journal.new(number), place)
