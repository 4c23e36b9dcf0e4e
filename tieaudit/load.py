"""Stage: paths → models. Decides which models a list of paths means, then lets the owning format read each."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tieaudit.errors import TieAuditError, UnknownFormat, UnreadableModel, UsageError
from tieaudit.formats import Format
from tieaudit.model import Model
from tieaudit.registry import discover


@dataclass(frozen=True)
class Source:
    """A model that was located but not read yet."""

    path: Path
    format: Format
    files: tuple[Path, ...]

    def load(self) -> Model:
        """Read it. UnreadableModel with one clear line if that fails; the system's own errors become one too."""
        try:
            return self.format.load(self.path, self.files)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreadableModel(f"{error.filename or self.path}: cannot be read: {reason}") from error
        except RecursionError as error:
            raise UnreadableModel(f"{self.path}: nested too deeply to be read safely") from error
        except MemoryError as error:
            raise UnreadableModel(f"{self.path}: declares more than fits into memory") from error


def formats() -> list[Format]:
    """All formats, those that win an argument over a path first."""
    return sorted(discover("formats", Format).values(), key=lambda one: -one.precedence)


def locate(patterns: Iterable[str]) -> tuple[list[Source], list[tuple[str, str]]]:
    """Paths, folders and globs → sources, each model once, and (path, message) for what cannot be a model.

    A shard, an index or a config.json means the model that owns it.
    """
    claimed: dict[str, tuple[Format, list[Path]]] = {}
    errors: list[tuple[str, str]] = []
    for pattern in patterns:
        try:
            for path in _expand(pattern):
                _claim(path, claimed)
        except TieAuditError as error:
            errors.append((pattern, str(error)))
        except OSError as error:
            errors.append((pattern, f"{pattern}: cannot be read: {error.strerror or error}"))
        except RecursionError:
            errors.append((pattern, f"{pattern}: folders nested too deeply to be searched; name one inside"))
    sources: dict[tuple[Path, tuple[Path, ...]], Source] = {}  # variants of one export share their folder
    for format_, paths in claimed.values():
        try:
            for path, files in format_.group(paths):
                sources.setdefault((path, files), Source(path, format_, files))
        except TieAuditError as error:
            errors.append((str(paths[0]), str(error)))
        except OSError as error:
            errors.append((str(paths[0]), f"{error.filename or paths[0]}: cannot be read: {error.strerror or error}"))
    return sorted(sources.values(), key=lambda source: str(source.path)), errors


def load_one(path: str | Path) -> Model:
    """The single model at `path`. UsageError if there are several, UnreadableModel if there is none.

    A folder means the model whose folder it is, the plain one of several variants, not other files that lie in it.
    """
    sources, errors = locate([str(path)])
    if errors:
        raise UnreadableModel(errors[0][1])
    sources = [source for source in sources if source.path == Path(path)][:1] or sources
    if len(sources) != 1:
        names = ", ".join(str(source.path) for source in sources[:4])
        raise UsageError(f"{path}: expected one model, found {len(sources)}: {names}", hint="name one of them")
    return sources[0].load()


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.exists() or path.is_symlink():
        if not path.exists():
            raise UnreadableModel(f"{pattern}: a symbolic link whose target does not exist")
        return [path]
    if "://" in pattern:
        raise UnreadableModel(f"{pattern}: expected a local path, found a URL; download the model first")
    matches = sorted(_matches(pattern))
    if not matches:
        raise UnreadableModel(f"{pattern}: no such file or folder")
    return [match for match in matches if match.is_dir() or _owner(match) is not None] or matches


def _matches(pattern: str) -> Iterable[Path]:
    """Like the shell, but `**` follows no links to folders: two that lead back up double the work at each level."""
    path = Path(pattern)
    if "**" not in path.parts:
        return map(Path, glob.glob(pattern))
    at = path.parts.index("**")
    home = Path(*path.parts[:at])
    roots = [home] if not glob.has_magic(str(home)) else map(Path, glob.glob(str(home)))
    found = ((root, match) for root in roots for match in root.glob(str(Path(*path.parts[at:]))))
    return (match for root, match in found if not any(one.startswith(".") for one in match.relative_to(root).parts))


def _owner(path: Path) -> Format | None:
    return next((one for one in formats() if one.owns(path)), None)


def _claim(path: Path, claimed: dict[str, tuple[Format, list[Path]]]) -> None:
    """Give a path to the format that owns it; a folder that nobody owns is searched, deepest models included."""
    owner = _owner(path)
    if owner is not None:
        claimed.setdefault(owner.name, (owner, []))[1].append(path)
        return
    if path.is_file():
        raise UnknownFormat(f"{path}: {_describe(path)}", hint=f"tieaudit reads {_names()}")
    if not path.is_dir():
        raise UnknownFormat(f"{path}: expected a file or a folder, found a device, a pipe or a socket")
    found = list(_models_below(path))
    if not found:
        raise UnknownFormat(f"{path}: no model in this folder", hint=f"tieaudit reads {_names()}")
    for inner in found:
        _claim(inner, claimed)


def _models_below(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink() and path.is_dir():
            continue  # a linked folder may lead back up
        if _owner(path) is not None:
            yield path
        elif path.is_dir():
            yield from _models_below(path)


def _names() -> str:
    return ", ".join(one.name for one in formats())


def _describe(path: Path) -> str:
    """What an unrecognised file is, as far as its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, the weights are elsewhere: run `git lfs pull`"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, probably an error page saved under this name: download the model again"
    return f"not a model that tieaudit recognises (begins with {head[:8]!r})"
