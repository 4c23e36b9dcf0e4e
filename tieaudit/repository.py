"""Stage: paths → the models that a run of the gate is about, in a repository as it is.

What git ignores is left out, and what the policy excludes; a file that is named or changed means the model that it
belongs to. Nothing of a model is read here beyond the first bytes of its files, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit import ignored
from tieaudit.changed import changed_since
from tieaudit.errors import TieAuditError, UsageError
from tieaudit.formats import Format
from tieaudit.load import Source, expand, named_model, sources_of
from tieaudit.owners import Claim, Owners
from tieaudit.pointers import DVC, dvc_targets, elsewhere

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

_NEVER = frozenset({"__pycache__", "node_modules", "site-packages"})
_ENVIRONMENT = ("pyvenv.cfg", "conda-meta")
"""What lies in a virtual environment, whatever its folder is called."""


@dataclass(frozen=True)
class Gathered:
    """The models that a run is about."""

    sources: tuple[Source, ...]
    """Each once, by path; what lies below the root is named from there: `root / "models" / "a.onnx"`."""
    errors: tuple[tuple[str, str], ...]
    """(path, message) of what could not be looked at."""
    skipped: tuple[tuple[str, str], ...]
    """(path, reason) of what was named and is no model, nor a part of one, and of what DVC keeps and nobody knows."""
    complete: bool
    """Whether everything below the root was looked at: no narrower path, no revision, no folder that cannot be read."""


def gather(
    paths: Sequence[str],
    *,
    root: Path,
    exclude: Sequence[str] = (),
    respect_gitignore: bool = True,
    since: str | None = None,
    steered_by: Callable[[Path], Path | None] = lambda file: None,
) -> Gathered:
    """The models below the paths (none: below `root`), or those among them that changed since a revision.

    A folder is searched to the bottom, links to folders not followed; hidden folders, virtual environments and
    node_modules never. A file that is named is looked at even if git ignores it, a folder that is named too, but not
    what is ignored inside of it. `exclude` holds for everything: patterns of .gitignore, relative to `root`.
    `steered_by`: the folder whose models a file says something about without being a part of them, such as a policy;
    named or changed it means all of them.

    Paths are relative to the working directory. UsageError for a pattern that cannot be read, for a revision that git
    does not know, and for a path outside of `root` together with a revision.
    Cost: linear in the files that are not ignored; a few processes of git with `since`, else none.
    """
    run = _Run(root, ignored.patterns(exclude), respect_gitignore, steered_by)
    whole = True
    if since is not None:
        whole = False
        run.changed(paths, since)
    else:
        for path in paths or (str(root),):
            run.named(path)
        whole = not paths or any(_holds(os.path.abspath(path), run.home) for path in paths)
    return Gathered(tuple(run.sources()), tuple(run.errors), tuple(run.skipped), whole and run.saw_all)


def leaves_out(root: Path, exclude: Sequence[str], source: Source) -> bool:
    """Whether the `exclude` of a policy whose folder is `root` leaves a model out, alone or with every file of it."""
    return bool(exclude) and _Run(root, ignored.patterns(exclude), False)._left_out(source)


def _holds(folder: str, inner: str) -> bool:
    return inner == folder or inner.startswith(folder.rstrip(os.sep) + os.sep)


@dataclass
class _Place:
    """A folder on the way, under all the names that it has."""

    path: str
    shown: Path
    below: str | None
    """Path below the root with a slash behind, as the policy's patterns see it; None outside of the root."""
    prefix: str
    """The same below the top of the repository, as git's patterns see it."""
    layers: ignored.Layers
    names: frozenset[str] = frozenset()

    def entries(self, respect_gitignore: bool) -> list[os.DirEntry[str]]:
        """What lies in it; from here on its own `.gitignore` counts."""
        if respect_gitignore:
            self.layers = ignored.with_own(self.layers, Path(self.path), self.prefix)
        with os.scandir(self.path) as found:
            entries = list(found)
        self.names = frozenset(entry.name for entry in entries)
        return entries

    def ignores(self, name: str, *, folder: bool = False) -> bool:
        """Whether git ignores an entry for another reason than that DVC keeps it: the note is what git has of it."""
        return name + DVC not in self.names and ignored.is_ignored(self.layers, self.prefix + name, folder=folder)

    def inner(self, name: str) -> _Place:
        """A folder in it. What ignores a folder ignores all of it, which DVC's must not."""
        layers = () if name + DVC in self.names else self.layers
        below = None if self.below is None else f"{self.below}{name}/"
        return _Place(f"{self.path}/{name}", self.shown / name, below, f"{self.prefix}{name}/", layers)


@dataclass
class _Run:
    root: Path
    excluded: GitIgnoreSpec
    respect_gitignore: bool
    steered_by: Callable[[Path], Path | None] = lambda file: None
    owners: Owners = field(default_factory=Owners)
    claims: dict[tuple[str, Path], tuple[Format, list[Path]]] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    saw_all: bool = True
    walked: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.home = os.path.abspath(self.root)

    def sources(self) -> list[Source]:
        """The models of all claims, each once. One that cannot be grouped hides none but those of its folder."""
        found: dict[tuple[Path, tuple[Path, ...]], Source] = {}
        for format_, paths in self.claims.values():
            apart = [path for path in paths if path.name.endswith(".index.json") and self._is_away(path, format_)]
            every = [Source(path, format_, (path,)) for path in dict.fromkeys(apart)]
            try:
                if len(apart) < len(paths):
                    every += self._grouped(format_, [path for path in paths if path not in apart])
            except OSError as error:
                self._cannot_read(str(paths[0]), error)
            for source in every:
                if not self._left_out(source):
                    found.setdefault((source.path, source.files), source)
        return sorted(found.values(), key=lambda source: (str(source.path), source.files))

    def _grouped(self, format_: Format, paths: Sequence[Path]) -> list[Source]:
        """The models of files of one folder: with the other parts, where some were named or changed alone."""
        folder, beside = paths[0].parent, list[Path]()
        if format_.has_parts and folder not in self.walked:
            beside = [path for path in self._kept_beside(folder) if path.name.endswith(format_.sure_names)]
        every = sorted(dict.fromkeys([*paths, *beside]), key=lambda path: (path.stem, path.name))
        sources = sources_of([(format_, every)], self.errors)
        if not beside:
            return sources
        meant = {file for path in paths for _, files in format_.group([path]) for file in files}
        return [source for source in sources if meant.intersection(source.files)]

    def _kept_beside(self, folder: Path) -> list[Path]:
        """Files of a folder that a search would look at."""
        if not folder.is_dir():
            return []
        here = self._place(str(folder))
        kept = self._kept_entries(here, here.entries(self.respect_gitignore))
        return [folder / entry.name for entry, is_folder in kept if not is_folder and not here.ignores(entry.name)]

    def _is_away(self, index: Path, format_: Format) -> bool:
        return not format_.loads_without_weights and elsewhere(index) is not None

    def _left_out(self, source: Source) -> bool:
        """Whether a model that a kept file led to is itself excluded, alone or with every file of it."""
        names = [self.below(str(file)) for file in source.files]
        return (
            self._is_excluded(self.below(str(source.path)), source.path.is_dir())
            or bool(names)
            and all(self._is_excluded(name) for name in names)
        )

    # ---- paths ----

    def below(self, path: str) -> str | None:
        """The path below the root, POSIX; None outside; empty for the root itself."""
        full = os.path.abspath(path)
        if full == self.home:
            return ""
        start = self.home.rstrip(os.sep) + os.sep
        return full[len(start) :].replace(os.sep, "/") if full.startswith(start) else None

    def shown(self, path: str) -> Path:
        """How a path is named from here on: from the root, if it lies below."""
        name = self.below(path)
        return Path(path) if name is None else self.root / name

    def _is_excluded(self, name: str | None, folder: bool = False) -> bool:
        if not name or not self.excluded.patterns:
            return False
        return self.excluded.match_file(name + "/" if folder else name)

    # ---- what is named ----

    def named(self, path: str) -> None:
        """A path as the user wrote it: a file, a folder, a glob, a factory."""
        try:
            if os.path.lexists(path) or self._kept(path):
                self.file_or_folder(path)
            elif (factory := named_model(path)) is not None:
                self.claim([(Path(path), factory)])
            else:
                for match in expand(path):
                    self.file_or_folder(str(match))
        except TieAuditError as error:
            self.errors.append((path, str(error)))
        except OSError as error:
            self.errors.append((path, f"{error.filename or path}: cannot be read: {error.strerror or error}"))

    def _kept(self, path: str) -> bool:
        return os.path.isfile(path + DVC)

    def file_or_folder(self, path: str, *, asked_for: bool = True) -> None:
        """What exists, existed, or is kept by DVC; `asked_for`: somebody wants to hear why it is skipped."""
        name, folder = self.below(path), os.path.isdir(path)
        if self._is_excluded(name, folder):
            self._skip(path, "excluded by the policy", asked_for)
        elif folder:
            self.walk(path)
        elif (steered := self.steered_by(Path(path))) is not None:
            self.walk(str(self.shown(str(steered))))
        else:
            shown = self.shown(path)
            folders = [kept for kept in self._kept_by(shown) if kept.is_dir()]
            for kept in folders:
                self.walk(str(kept))
            claims = self.owners.of(shown)
            self.claim(claims)
            if not claims and not folders:
                self._skip(path, self.owners.why_none(shown), asked_for)

    def _kept_by(self, path: Path) -> list[Path]:
        return dvc_targets(path) if path.name.endswith(DVC) and os.path.lexists(path) else []

    def _skip(self, path: str, reason: str, asked_for: bool) -> None:
        if asked_for:
            self.skipped.append((str(self.shown(path)), reason))

    def claim(self, claims: Sequence[Claim]) -> None:
        for path, format_ in claims:
            self.claims.setdefault((format_.name, path.parent), (format_, []))[1].append(path)

    # ---- what changed ----

    def changed(self, paths: Sequence[str], since: str) -> None:
        """The files that differ from a revision, and lie below one of the paths."""
        wanted = {self._inside(path): path for path in paths or (str(self.root),)}
        met: set[str] = set()
        for changed in changed_since(since, self.root):
            name = changed.rstrip("/")
            under = next((one for one in _upwards(name) if one in wanted), None)
            if under is None or any(_is_never(part) for part in name[len(under) :].split("/")):
                continue
            met.add(under)
            try:
                self.file_or_folder(str(self.root / name), asked_for=False)
            except TieAuditError as error:
                self.errors.append((str(self.root / name), str(error)))
            except OSError as error:
                self._cannot_read(str(self.root / name), error)
        for name, path in wanted.items():
            if name not in met and not os.path.lexists(path) and not self._kept(path):
                self.errors.append((path, f"{path}: no such file or folder, and it did not change"))

    def _inside(self, path: str) -> str:
        name = self.below(path)
        if name is None:
            raise UsageError(f"--since: {path} lies outside of {self.root}, below which changes are looked for")
        return name

    # ---- folders ----

    def walk(self, folder: str) -> None:
        """Every file below a folder that neither git nor the policy leaves out."""
        try:
            pending = [self._place(folder)]
        except OSError as error:
            self._cannot_read(folder, error)
            return
        while pending:
            here = pending.pop()
            try:
                entries = here.entries(self.respect_gitignore)
            except OSError as error:
                self._cannot_read(here.path, error)
                continue
            if here.path != folder and any(entry.name in _ENVIRONMENT for entry in entries):
                continue
            self.walked.add(here.shown)
            for entry, is_folder in self._kept_entries(here, entries):
                if not is_folder:
                    self._met(here, entry.name)
                elif not here.ignores(entry.name, folder=True):
                    pending.append(here.inner(entry.name))

    def _place(self, folder: str) -> _Place:
        prefix, layers = ignored.outer_layers(Path(folder)) if self.respect_gitignore else ("", ())
        below = self.below(folder)
        return _Place(folder, self.shown(folder), f"{below}/" if below else below, prefix, layers)

    def _kept_entries(
        self, here: _Place, entries: Sequence[os.DirEntry[str]]
    ) -> Iterator[tuple[os.DirEntry[str], bool]]:
        """What is looked at unless git ignores it, and whether it is a folder."""
        for entry in entries:
            folder = _is_folder(entry)
            if _is_never(entry.name) or folder and entry.is_symlink():  # a linked folder may lead back up
                continue
            if not (folder or entry.is_symlink() or entry.is_file()):  # a device, a pipe, a socket
                continue
            if here.below is None or not self._is_excluded(here.below + entry.name, folder):
                yield entry, folder

    def _met(self, here: _Place, name: str) -> None:
        """A file on the way. Most are no model, and asking that costs less than whether git ignores them."""
        path = here.shown / name
        try:
            claims = self.owners.at(path)
            unknown = not claims and not any(map(os.path.lexists, self._kept_by(path))) and name.endswith(DVC)
            if not (claims or unknown) or here.ignores(name):
                return
            if unknown:
                self._skip(str(path), self.owners.why_none(path), True)
            self.claim(claims)
        except OSError as error:
            if not here.ignores(name):
                self._cannot_read(str(path), error)

    def _cannot_read(self, path: str, error: OSError) -> None:
        self.saw_all = False
        shown = self.shown(str(error.filename or path))
        self.errors.append((str(shown), f"{shown}: cannot be read: {error.strerror or error}"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _is_never(name: str) -> bool:
    return name.startswith(".") or name in _NEVER


def _upwards(name: str) -> Iterator[str]:
    """A path below the root, then every folder that holds it, the root (an empty text) last."""
    while name:
        yield name
        name = name.rpartition("/")[0]
    yield ""
