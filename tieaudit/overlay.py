"""A copy of a model in which some weights hold other bytes: for controls, and for the reference of a lossy plan.

Untouched files are linked, not copied. The original is never written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from tieaudit.copying import copy_file
from tieaudit.dtypes import dtype
from tieaudit.model import Model, Part, Weight
from tieaudit.runners import Array
from tieaudit.storage import FileStorage, MemoryStorage, Region, Storage

Change = Callable[[Array], None]
"""Changes an array of a weight's logical shape in place; sub-byte types and strings come as flat uint8."""


class CannotChange(Exception):
    """This weight's bytes cannot be replaced in a copy; the message says why."""


class Overlay:
    """A context manager; `path` is the copy. Cost: one copy of each file that holds a changed weight."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.home = _home(model)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._copied: dict[Path, Path] = {}
        """Copy → its original, for those that are real bytes."""
        self._kept: dict[str, bytes] = {}
        """Weight id → its bytes, for those that are no range of a file."""
        self._mapped: dict[Path, list[FileStorage]] = {}
        """Copy → ranges of its original that were changed in place."""
        self._moved_about: set[Path] = set()
        """Copies that were written anew, so that nothing is any more where the original has it."""
        self._ranges: dict[Region, bytes] = {}
        """Changed ranges of such originals."""

    def __enter__(self) -> Overlay:
        self._folder = tempfile.TemporaryDirectory(prefix="tieaudit-overlay-")
        for file in self._files():
            target = self._target(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def path(self) -> Path:
        """The copy, named like the original."""
        original = Path(self.model.path)
        return self._root() if original.is_dir() else self._root() / original.name

    def file(self, original: str) -> Path:
        """Where a file of the model lies in the copy."""
        return self._target(Path(original))

    def change(self, weight: Weight, change: Change) -> None:
        """Let `change` edit the bytes of a weight (and so of everything stored in the same bytes). CannotChange."""
        if weight.storage is None:
            raise CannotChange(f"{weight.id} is not stored")
        if weight.held_as == "sparse_initializer" or weight.dtype == "string":
            raise CannotChange(f"{weight.id} is {weight.held_as if weight.dtype != 'string' else 'made of strings'}")
        storage = weight.storage
        if isinstance(storage, FileStorage) and self._target(Path(storage.path)) not in self._moved_about:
            target = self._own(Path(storage.path))
            self._mapped.setdefault(target, []).append(storage)
            mapped = np.memmap(target, np.uint8, "r+", storage.offset, (storage.n_bytes,))
            change(_shaped(mapped, weight))
            mapped.flush()
        elif self.model.format == "onnx":
            from tieaudit.formats.onnx.patch import put_bytes

            known = self._kept.get(weight.id) or self._ranges.get(storage.region)
            plain = np.frombuffer(bytearray(known or storage.read_ranges([(0, weight.n_bytes)])[0]), np.uint8)
            change(_shaped(plain, weight))
            main = self._own(Path(next(part.paths[0] for part in self.model.parts if part.name == weight.part)))
            self._remember(main)
            try:
                put_bytes(main, weight.scope, weight.name, plain.tobytes())
            except KeyError as error:
                raise CannotChange(f"{weight.id} is not held as a tensor") from error
            if isinstance(storage, FileStorage):
                self._ranges[storage.region] = plain.tobytes()
            else:
                self._kept[weight.id] = plain.tobytes()
        else:
            raise CannotChange(f"{weight.id} is not stored in a range of a file")

    def _remember(self, copy: Path) -> None:
        """Keep what was changed in a copy that is about to be written anew."""
        if copy not in self._moved_about:
            self._moved_about.add(copy)
            for storage in self._mapped.get(copy, ()):
                self._ranges[storage.region] = replace(storage, path=str(copy)).read_ranges([(0, storage.n_bytes)])[0]

    def reset(self) -> None:
        """Undo all changes."""
        for target, file in sorted(self._copied.items()):
            target.unlink(missing_ok=True)
            _link(file, target)
        for known in (self._copied, self._kept, self._mapped, self._moved_about, self._ranges):
            known.clear()

    def as_model(self) -> Model:
        """The copy as a model: its path, its files, and the bytes as they are now. Lives as long as the copy."""
        weights = tuple(replace(weight, storage=self._moved(weight)) for weight in self.model.weights)
        parts = tuple(Part(one.name, tuple(str(self.file(path)) for path in one.paths)) for one in self.model.parts)
        return replace(self.model, path=str(self.path), weights=weights, parts=parts)

    def _moved(self, weight: Weight) -> Storage | None:
        if weight.id in self._kept:
            return MemoryStorage(self._kept[weight.id], f"overlay {weight.id}")
        if isinstance(weight.storage, FileStorage):
            target = self._target(Path(weight.storage.path))
            if target not in self._moved_about:
                return replace(weight.storage, path=str(target))
            if weight.storage.region in self._ranges:
                return MemoryStorage(self._ranges[weight.storage.region], f"overlay {weight.storage.region}")
        return weight.storage

    def _root(self) -> Path:
        if self._folder is None:
            raise RuntimeError("an overlay is used inside its with statement")
        return Path(self._folder.name)

    def _target(self, file: Path) -> Path:
        file = file.absolute()
        for home in (self.home, self.home.resolve()):
            if file.is_relative_to(home):
                return self._root() / file.relative_to(home)
        for inside in self._files():  # a link inside the folder to bytes elsewhere
            if inside.resolve() == file:
                return self._root() / inside.relative_to(self.home)
        raise CannotChange(f"{file} lies outside {self.home}")

    def _own(self, file: Path) -> Path:
        """The copy of one file, as real bytes."""
        target = self._target(file)
        if target not in self._copied:  # by the copy: a file may be known under a relative and an absolute name
            target.unlink(missing_ok=True)
            self._copied[target] = file
            try:
                copy_file(file, target)
            except OSError as error:
                raise CannotChange(f"there is no copy of {file} in {target.parent}: {error.strerror}") from error
        return target

    def _files(self) -> list[Path]:
        if Path(self.model.path).is_dir() and self.model.format != "onnx":
            return [file for file in sorted(self.home.rglob("*")) if file.is_file()]
        found = [Path(path).absolute() for part in self.model.parts for path in part.paths]
        return [path for path in dict.fromkeys(found) if path.is_file()]


def _home(model: Model) -> Path:
    path = Path(model.path).absolute()
    return path if path.is_dir() else path.parent


def _shaped(plain: Array, weight: Weight) -> Array:
    kind = dtype(weight.dtype)
    return plain if kind.item_bytes is None else plain.view(kind.numpy()).reshape(weight.shape)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file.resolve(), target)  # runtimes refuse symbolic links to external data more often than hard ones
    except OSError:
        try:
            target.symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, target)
