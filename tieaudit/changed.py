"""What changed since a revision, as git says it: a few questions to git for any number of files.

git is asked, and nothing of it is believed to be harmless: what the user gives as a revision never becomes an option,
no monitor, hook or external diff that the repository configures is run, and nothing is written, not even the index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tieaudit.errors import UsageError

TIMEOUT_SECONDS = 300.0
_SETTINGS = ("core.fsmonitor=false", "core.hooksPath=/dev/null")


def changed_since(revision: str, folder: Path) -> list[str]:
    """Paths below the folder that differ from the revision, those that are gone and new ones that git does not ignore.

    Relative to the folder, as git spells them, each once, in order; a changed submodule and a repository inside are
    folders, the latter with a slash behind. The folder need not be the top of its repository.

    UsageError for an unknown revision, outside of a repository, and without git.
    Cost: five processes, and a copy of the index in the system's temporary folder.
    """
    commit = _commit(revision, folder)
    differ = ["diff", "--name-only", "-z", "--no-renames", "--no-ext-diff", "--ignore-submodules=dirty", "--relative"]
    with _copied_index(folder) as index:
        found = _ask([*differ, commit, "--", "."], folder, index)
        found += _ask(["ls-files", "-z", "--others", "--exclude-standard", "--", "."], folder, index)
    return list(dict.fromkeys(os.fsdecode(name) for name in found.split(b"\0") if name))


@contextmanager
def _copied_index(folder: Path) -> Iterator[Path]:
    """A copy of the index for git to refresh: `git diff` writes what it learnt about the times of files into it.

    The copy has the time of the original, by which git knows entries that may have changed right after it was written
    (Documentation/technical/racy-git.txt).
    """
    index = folder / os.fsdecode(_ask(["rev-parse", "--git-path", "index"], folder).removesuffix(b"\n"))
    with tempfile.TemporaryDirectory(prefix="tieaudit-") as home:
        copy = Path(home) / "index"
        try:
            shutil.copy2(index, copy)
        except FileNotFoundError:  # nothing was ever added
            pass
        except OSError as error:
            raise UsageError(f"--since: {error.filename or index}: {error.strerror or error}") from error
        yield copy


def _commit(revision: str, folder: Path) -> str:
    """The full name of the commit that a revision means."""
    if not revision or revision.startswith("-") or "\0" in revision or "\n" in revision:
        raise UsageError(f"--since: expected a commit, a branch or a tag, found {revision[:80]!r}")
    inside = _ask(["rev-parse", "--is-inside-work-tree"], folder)
    if inside.strip() != b"true":
        raise UsageError(f"--since: expected a work tree of git, found a bare repository at {folder}")
    done = _run(["rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], folder)
    if done.returncode == 0:
        return done.stdout.decode("ascii").strip()
    if _run(["rev-list", "--max-count=1", "--all"], folder).stdout == b"":
        raise UsageError(
            f"--since: no commit {revision[:80]!r}: this repository has none yet", hint="leave --since out"
        )
    shallow = _ask(["rev-parse", "--is-shallow-repository"], folder).strip() == b"true"
    hint = "this clone is shallow: fetch the history first (actions/checkout: fetch-depth: 0)" if shallow else ""
    raise UsageError(f"--since: no commit {revision[:80]!r} in this repository", hint=hint or "git fetch, or a typo?")


def _ask(arguments: Iterable[str], folder: Path, index: Path | None = None) -> bytes:
    """What git prints. UsageError with the first line of its complaint."""
    done = _run(arguments, folder, index)
    if done.returncode != 0:
        lines = os.fsdecode(done.stderr).strip().splitlines() or ["git failed without a word"]
        raise UsageError(f"--since: git says of {folder}: {lines[0].removeprefix('fatal: ')}")
    return done.stdout


def _run(arguments: Iterable[str], folder: Path, index: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    settings = (word for setting in _SETTINGS for word in ("-c", setting))
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    if index is not None:
        environment["GIT_INDEX_FILE"] = str(index)
    try:
        return subprocess.run(
            ["git", "--no-pager", "--literal-pathspecs", *settings, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
        )
    except FileNotFoundError as error:
        missing = "git" if error.filename == "git" else str(folder)
        raise UsageError(f"--since: {missing} is not there", hint="install git, or leave --since out") from error
    except NotADirectoryError as error:
        raise UsageError(f"--since: expected a folder, found a file: {folder}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--since: git could not be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"--since: no answer from git within {TIMEOUT_SECONDS:.0f} s") from error
