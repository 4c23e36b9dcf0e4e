"""What git ignores: `.gitignore` files of all levels and `.git/info/exclude`, as git reads them, without running git.

A person's own ignore file (`core.excludesFile`) is not read: a run must not differ from machine to machine. A pattern
that git could not read either is passed over, as git does. Source: gitignore(5), gitrepository-layout(5).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.errors import UsageError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

    Layers = tuple[tuple[int, GitIgnoreSpec], ...]
    """Patterns, those of the outermost folder first, each with the length of that folder's path below the top."""

IGNORE_FILE = ".gitignore"
_N_MOST_BYTES = 1 << 20


def patterns(lines: Iterable[str]) -> GitIgnoreSpec:
    """Patterns in the syntax of `.gitignore`. UsageError names one that cannot be read."""
    lines = list(lines)
    for line in lines:
        if (because := _unusable(line)) is not None:
            raise UsageError(f"exclude: expected a pattern as in .gitignore, found {line[:80]!r}: {because}")
    return _spec(lines)


def _spec(lines: Iterable[str]) -> GitIgnoreSpec:
    """Compiled patterns. Python's own expressions, whatever else is installed: no other engine knows atomic groups."""
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(lines, _steady(), backend="simple")


@cache
def _steady() -> type[GitIgnoreSpecPattern]:
    """Patterns as pathspec reads them, that take no more than quadratic time."""
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

    class Steady(GitIgnoreSpecPattern):
        @classmethod
        def pattern_to_regex(cls, pattern: str) -> tuple[str | None, bool | None]:  # type: ignore[override]
            regex, include = super().pattern_to_regex(pattern)
            return None if regex is None else steady(regex), include

    return Steady


_STAR, _FOLDERS, _ANY_FOLDER = "[^/]*", "(?:/.+)?", "^(?:.+/)?"
"""What pathspec makes of `*`, of `/**` inside of a pattern, and of `**/` at its beginning."""
_SLASH = re.compile(r"(?<!\[\^)/")
"""A slash of the path, not that of `[^/]`."""
_NOT = re.compile(r"(?<!\\)\[\^(?![/\]])")
"""How a set of other characters begins. In git none of them is a slash (wildmatch.c, WM_PATHNAME)."""


def steady(regex: str) -> str:
    """The same expression without the backtracking that takes a power of a name's length: n^7 for `*a*a*a*a*a*a*b`.

    What stands between two stars has one length, so its first place is as good as any later one: the second star takes
    what is in between. The same holds for the folders between two `**`. So neither is ever tried again (an atomic
    group), and only the last star and the last `**` are searched from the end.
    """
    regex = _NOT.sub("[^/", regex)
    anywhere = regex.startswith(_ANY_FOLDER)
    parts = regex.removeprefix(_ANY_FOLDER).split(_FOLDERS)
    parts = ["/".join(map(_steady_name, _SLASH.split(part))) for part in parts]
    *before, last = parts
    if not before:
        return (_ANY_FOLDER if anywhere else "") + last
    first = f"^(?>(?:.+?/)??{before[0]}(?=/))" if anywhere else f"(?>{before[0]}(?=/))"
    return "".join([first, *(f"(?>(?:/.+?)??{part}(?=/))" for part in before[1:]), _FOLDERS, last])


def _steady_name(name: str) -> str:
    """The expression of one name, up to the next slash, with all stars but the last at their first place for good."""
    begin, *chunks = name.split(_STAR)
    if len(chunks) < 2:
        return name
    *inner, last = chunks
    return "".join([begin, *(f"(?>{_STAR}?{chunk})" for chunk in inner if chunk), _STAR, last])


def _unusable(line: str) -> str | None:
    try:
        _spec([line])
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return None


def outer_layers(folder: Path) -> tuple[str, Layers]:
    """(path of the folder below the top of its repository, `a/b/`; what applies in it from the folders above).

    Where the folder itself is ignored, somebody named it all the same, and nothing from above applies. The same
    outside of a repository. OSError for an ignore file that cannot be read.
    """
    home = Path(os.path.abspath(folder))
    top = next((one for one in (home, *home.parents) if os.path.lexists(one / ".git")), None)
    if top is None:
        return "", ()
    layers: Layers = ()
    if (lines := _lines(exclude_file(top / ".git"))) is not None:
        layers = ((0, _readable(tuple(lines))),)
    prefix, here = "", top
    for part in home.relative_to(top).parts:
        layers = with_own(layers, here, prefix)
        if is_ignored(layers, f"{prefix}{part}", folder=True):
            layers = ()
        prefix, here = f"{prefix}{part}/", here / part
    return prefix, layers


def with_own(layers: Layers, folder: Path, prefix: str) -> Layers:
    """The layers, and on top of them what the folder's own `.gitignore` says. OSError if it cannot be read."""
    lines = _lines(folder / IGNORE_FILE)
    return layers if lines is None else (*layers, (len(prefix), _readable(tuple(lines))))


def is_ignored(layers: Layers, name: str, *, folder: bool = False) -> bool:
    """Whether a path below the top is ignored: the innermost file with an opinion decides.

    Asked of each folder on the way down, since nothing inside of an ignored folder can be brought back.
    """
    for n_base, spec in reversed(layers):
        told = spec.check_file(name[n_base:] + ("/" if folder else "")).include
        if told is not None:
            return bool(told)
    return False


@lru_cache(maxsize=64)
def _readable(lines: tuple[str, ...]) -> GitIgnoreSpec:
    """Patterns of a file; compiled once, though thousands of named files may ask for those of one repository."""
    try:
        return _spec(lines)
    except Exception:  # one bad line: whichever error the expression compiler has for it, that line is passed over
        return _spec([line for line in lines if _unusable(line) is None])


def _lines(path: Path | None) -> list[str] | None:
    """Lines of an ignore file; None if there is none. A link in its place counts as none, as in git."""
    if path is None:
        return None
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size > _N_MOST_BYTES:
        return None
    return os.fsdecode(path.read_bytes()).splitlines()


def exclude_file(git: Path) -> Path | None:
    """`info/exclude` of a repository; of a linked worktree or a submodule, where its `.git` file leads."""
    if git.is_dir():
        return git / "info" / "exclude"
    lines = _lines(git)
    if not lines or not lines[0].startswith("gitdir: "):
        return None
    home = git.parent / lines[0].removeprefix("gitdir: ").strip()
    common = _lines(home / "commondir")
    return (home / common[0].strip() if common else home) / "info" / "exclude"
