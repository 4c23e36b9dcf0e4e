"""What is tied, kept in a file that is committed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tieaudit.console import Command, print_lines, progress, say
from tieaudit.errors import TieAuditError, UsageError, in_one_line
from tieaudit.printable import N_MOST_MESSAGE, counted, printable

if TYPE_CHECKING:
    from tieaudit.sealed import Change, Locked

_EPILOG = """\b
Examples:
  tieaudit lock
  tieaudit lock ./my-model-folder --check
"""
_N_MOST = 20
_N_MOST_UNTIED = 5


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The lock file. Default: tieaudit.lock beside the policy (the nearest tieaudit.toml, or pyproject.toml with "
    "[tool.tieaudit]); else in the current folder.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if the lock file would change.")
def lock(paths: tuple[str, ...], to: Path | None, check: bool) -> None:
    """Write to tieaudit.lock what is tied, and say what changed since.

    Without PATH: every model below the lock file's folder; models that are gone leave the lock. With PATH: these
    models only, the others stay in the lock as they are.

    Exit code: 0 written, or nothing to change · 1 with --check: it would change · 2 a model or the lock is unreadable;
    nothing written.
    """
    from tieaudit.locked import lock_text, read_lock, write_lock
    from tieaudit.replacing import alone

    file = to or _file_for(paths)
    before = read_lock(file) if os.path.lexists(file) else {}
    found, told = _locked(paths, file, before)
    after = {**(before if paths else {}), **found}
    for gone in sorted(before.keys() - after.keys()):
        told += [printable(gone), "  gone: it is not there any more"]
    same = before == after and (not before or lock_text(before).encode() == file.read_bytes())
    n_ties = sum(len(one.ties) for one in after.values())
    held = f"{counted(len(after), 'model')}, {counted(n_ties, 'tie')}"
    if check:
        print_lines("\n".join([*told, f"{printable(str(file))}: {held}; {'up to date' if same else 'would change'}"]))
        sys.exit(0 if same else 1)
    try:
        with alone(file):
            # what another run wrote while this one was reading models stays: see docs/decisions/lock-file.md
            now = read_lock(file) if os.path.lexists(file) else {}
            meanwhile = {key: one for key, one in now.items() if before.get(key) != one}
            written = write_lock(file, {**(now if paths else meanwhile), **found})
    except OSError as error:
        raise UsageError(f"{error.filename or file}: the lock cannot be written: {error.strerror}") from error
    print_lines("\n".join([*told, f"{printable(str(file))}: {held}; {'written' if written else 'up to date'}"]))


def _locked(paths: Sequence[str], file: Path, before: Mapping[str, Locked]) -> tuple[dict[str, Locked], list[str]]:
    """Every model that is to be locked, and lines about what changed. UnreadableModel after saying what is unreadable:
    half a lock would call the rest lost."""
    from tieaudit.called import key_of
    from tieaudit.govern import policy_for
    from tieaudit.locked import changes, lock_of
    from tieaudit.patrol import excluded_by_its_own
    from tieaudit.repository import gather
    from tieaudit.scan import look

    policy = policy_for(file.parent)
    gathered = gather(paths, root=file.parent, exclude=policy.exclude, respect_gitignore=policy.respect_gitignore)
    errors = list(gathered.errors)
    sources = [
        source for source in gathered.sources if not excluded_by_its_own(source, policy_for(source.path), policy.root)
    ]
    if not sources and not errors and not before:
        raise TieAuditError(f"{file.parent}: no model in this folder", hint="name the models, or their folder")
    found: dict[str, Locked] = {}
    told: list[str] = []
    new: list[Locked] = []
    for source in sources:
        try:
            with progress(source.path.name) as shown:
                subject = look(source.load(), progress=shown)
                one = lock_of(subject, key_of(source, file.parent))
        except (TieAuditError, OSError, RecursionError, MemoryError) as error:
            errors.append((str(source.path), str(in_one_line(error, str(source.path)))))
            continue
        found[one.path] = one
        old = before.get(one.path)
        present = frozenset(subject.model.by_id)
        if old is None:
            new.append(one)
        told += [] if old is None else _told(one, changes(old, one, present))
    for _, message in errors[:-1]:
        say(f"error: {printable(message, N_MOST_MESSAGE)}")
    if errors:
        raise TieAuditError(errors[-1][1], hint="nothing was written")
    return found, [*_new(new), *told]


def _new(new: Sequence[Locked]) -> list[str]:
    """What is locked for the first time; models in which nothing is tied are named while they are few."""
    untied = [one for one in new if not one.ties]
    many = len(untied) > _N_MOST_UNTIED
    lines = [f"{len(untied):,} new models without ties"] if many else []
    for one in new:
        if one.ties or not many:
            lines += [printable(one.path), f"  new: {counted(len(one.ties), 'tie')}"]
    return lines


def _told(one: Locked, found: Sequence[Change]) -> list[str]:
    lines = [f"  {change.message}" for change in found[:_N_MOST]]
    lines += [f"  … and {len(found) - _N_MOST:,} more changes"] if len(found) > _N_MOST else []
    return [printable(one.path), *lines] if lines else []


def _file_for(paths: Sequence[str]) -> Path:
    """The lock file of these models: where the policy that rules all of them says."""
    from tieaudit.govern import forget, policy_for

    forget()
    here = Path.cwd()
    known = [os.path.realpath(path) for path in paths if os.path.lexists(path)]
    policy = policy_for(Path(os.path.commonpath(known)) if known else here)
    file = Path(policy.root, policy.lock)
    return file.relative_to(here) if file.is_relative_to(here) else file
