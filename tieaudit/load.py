"""Stage: paths → models. Decides which models a list of paths means, then lets the owning format read each."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tieaudit.errors import TieAuditError, UnknownFormat, UnreadableModel, UsageError, WeightsNotHere
from tieaudit.formats import Format
from tieaudit.model import Model
from tieaudit.pointers import elsewhere
from tieaudit.registry import discover


@dataclass(frozen=True)
class Source:
    """A model that was located but not read yet."""

    path: Path
    format: Format
    files: tuple[Path, ...]

    def load(self, key: str = "", inputs: Path | None = None) -> Model:
        """Read it. UnreadableModel with one clear line if that fails; the system's own errors become one too.

        WeightsNotHere, which is one of those, for a pointer to the model: nothing is known to be wrong with it.

        `key`: of a file that holds several models, the one under this key; UsageError for other formats. `inputs`:
        sample inputs of a live module, an .npz; UsageError for other formats and if it holds no plain arrays.
        """
        try:
            self._expect_weights()
            if inputs is not None:
                if self.format.load_inputs is None:
                    raise UsageError(f"{self.path}: sample inputs are of use for `package.module:factory` only")
                from tieaudit.inputs import read_inputs

                read_inputs(inputs)  # says what is wrong with the file before anything is built
                return self.format.load_inputs(self.path, self.files, inputs)
            if not key:
                return self.format.load(self.path, self.files)
            if self.format.load_key is None:
                raise UsageError(f"{self.path}: a model of the format {self.format.name} holds no keys to choose from")
            return self.format.load_key(self.path, self.files, key)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreadableModel(f"{error.filename or self.path}: cannot be read: {reason}") from error
        except RecursionError as error:
            raise UnreadableModel(f"{self.path}: nested too deeply to be read safely") from error
        except MemoryError as error:
            raise UnreadableModel(f"{self.path}: declares more than fits into memory") from error

    def _expect_weights(self) -> None:
        """WeightsNotHere where a main file is a pointer, unless the format has something to say without it."""
        for file in () if self.format.loads_without_weights else self.files:
            if (away := elsewhere(file)) is not None:
                raise WeightsNotHere(f"{file}: {away.because}, the weights are not here", hint=away.hint)


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
            name = named_model(pattern)
            if name is not None:
                claimed.setdefault(name.name, (name, []))[1].append(Path(pattern))
                continue
            for path in expand(pattern):
                _claim(path, claimed)
        except TieAuditError as error:
            errors.append((pattern, str(error)))
        except OSError as error:
            errors.append((pattern, f"{pattern}: cannot be read: {error.strerror or error}"))
        except RecursionError:
            errors.append((pattern, f"{pattern}: folders nested too deeply to be searched; name one inside"))
    sources = sources_of(claimed.values(), errors)
    return sources, errors


def sources_of(claimed: Iterable[tuple[Format, Sequence[Path]]], errors: list[tuple[str, str]]) -> list[Source]:
    """Owned paths → the models that they mean, each once, by their paths; what cannot be told goes to `errors`."""
    sources: dict[tuple[Path, tuple[Path, ...]], Source] = {}  # variants of one export share their folder
    for format_, paths in claimed:
        try:
            for path, files in format_.group(paths):
                sources.setdefault((path, files), Source(path, format_, files))
        except TieAuditError as error:
            errors.append((str(paths[0]), str(error)))
        except OSError as error:
            errors.append((str(paths[0]), f"{error.filename or paths[0]}: cannot be read: {error.strerror or error}"))
    return sorted(sources.values(), key=lambda source: str(source.path))


def load_one(path: str | Path, *, together: bool = False, key: str = "", unfetched: bool = False) -> Model:
    """The single model at `path`. UsageError if there are several, UnreadableModel if there is none.

    A folder means the model whose folder it is, the plain one of several variants, not other files that lie in it,
    and not models of folders inside; `together`: all its ONNX files, as parts of one model. `key`: see `Source.load`.
    `unfetched`: what can be said of a folder whose weights are elsewhere, instead of WeightsNotHere.
    """
    sources, errors = locate([str(path)])
    if errors:
        raise UnreadableModel(errors[0][1])
    folder = Path(path)
    if together:
        return _together(folder, sources)
    whole = [source for source in sources if source.path == folder][:1]
    sources = whole or [source for source in sources if source.path.parent in (folder, folder / "onnx")] or sources
    if len(sources) != 1:
        names = ", ".join(str(source.path) for source in sources[:4])
        raise UsageError(f"{path}: expected one model, found {len(sources)}: {names}", hint="name one of them")
    model = sources[0].load(key)
    if not (model.weights_here or unfetched):  # it is to be written, run or compared
        raise WeightsNotHere(f"{model.path}: the weights are {model.metadata['weights']}")
    return model


def _together(folder: Path, sources: list[Source]) -> Model:
    """All ONNX files of one folder as parts of one model."""
    for home in (folder, folder / "onnx"):
        here = [one for one in sources if one.format.name == "onnx" and all(f.parent == home for f in one.files)]
        files = sorted(dict.fromkeys(file for one in here for file in one.files))
        if len(files) > 1:
            return here[0].format.load(home, tuple(files))
    raise UsageError(f"{folder}: expected a folder of several ONNX files, which could share a data file, found none")


def named_model(text: str) -> Format | None:
    """The format of which this is a model's name rather than a path; what exists is a path."""
    if os.path.lexists(text):
        return None
    return next((one for one in formats() if one.named is not None and one.named(text)), None)


def expand(pattern: str) -> list[Path]:
    """The paths that a path or a glob means. UnreadableModel if there are none."""
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
    return [match for match in matches if match.is_dir() or owner_of(match) is not None] or matches


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


def owner_of(path: Path) -> Format | None:
    """The format to which an existing path belongs, by its name and a few bytes. Raises OSError."""
    return next((one for one in formats() if one.owns(path)), None)


def _claim(path: Path, claimed: dict[str, tuple[Format, list[Path]]]) -> None:
    """Give a path to the format that owns it; a folder is searched to the bottom, whether or not it is a model."""
    owner = owner_of(path)
    if owner is None and path.is_file():
        raise UnknownFormat(f"{path}: {describe(path)}", hint=f"tieaudit reads {_names()}")
    if owner is None and not path.is_dir():
        raise UnknownFormat(f"{path}: expected a file or a folder, found a device, a pipe or a socket")
    found = [(path, owner)] if owner is not None else []
    if path.is_dir():
        found.extend(_models_below(path, owner))
    if not found:
        raise UnknownFormat(f"{path}: no model in this folder", hint=f"tieaudit reads {_names()}")
    for model, whose in found:
        claimed.setdefault(whose.name, (whose, []))[1].append(model)


def _models_below(folder: Path, holder: Format | None) -> Iterator[tuple[Path, Format]]:
    """What lies in a folder and belongs to a format. Files of the format that holds the folder come with the folder."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink() and path.is_dir():
            continue  # a linked folder may lead back up
        owner = owner_of(path)
        if owner is not None and (path.is_dir() or holder is None or owner.name != holder.name):
            yield path, owner
        if path.is_dir():
            yield from _models_below(path, owner)


def _names() -> str:
    return ", ".join(one.name for one in formats())


def describe(path: Path) -> str:
    """What an unrecognised file is, as far as its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, the weights are elsewhere: run `git lfs pull`"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, probably an error page saved under this name: download the model again"
    if head.startswith(b"PK\x03\x04") and (first := _first_entry(head)).endswith(("/data.pkl", "/data/0", "/version")):
        return f"a PyTorch file (a zip archive, first entry {first!r}) {_NOT_BY_NAME}"
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):  # torch/serialization.py, MAGIC_NUMBER
        return f"a PyTorch file in the format before 1.6 (a pickle) {_NOT_BY_NAME}"
    for magic, what in _NOT_YET:
        if head.startswith(magic):
            return f"{what}, which is not supported yet"
    return f"not a model that tieaudit recognises (begins with {head[:8]!r})"


_NOT_BY_NAME = "whose name is none of a checkpoint with weights: rename it to .pt to have it read all the same"
_NOT_YET = (
    *((b"\x80" + version, "a Python pickle") for version in (b"\x02", b"\x03", b"\x04", b"\x05")),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
)
"""First bytes of other kinds of models; none of them is opened."""


def _first_entry(head: bytes) -> str:
    """Name of the first file of a zip archive: PKWARE's APPNOTE 4.3.7, its length at byte 26, itself at byte 30."""
    return head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")
