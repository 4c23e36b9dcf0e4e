"""Open sets: a folder whose every module defines exactly one member of a kind. No list to edit anywhere.

Third parties join through entry points `tieaudit.<set>` (formats, relations, rules, schemes, merges, runners, reports).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from tieaudit.errors import PluginError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

Kind = TypeVar("Kind")


@cache
def discover(package: str, kind: type[Kind]) -> dict[str, Kind]:
    """All members of the set `tieaudit.<package>`, by their `name`, in sorted module order.

    PluginError if a module does not define exactly one member, if a name is taken twice, or if an entry point
    gives something else.
    """
    found: dict[str, Kind] = {}
    home = importlib.import_module(f"tieaudit.{package}")
    for info in sorted(pkgutil.iter_modules(home.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{home.__name__}.{info.name}")
        members = [item for item in vars(module).values() if isinstance(item, kind)]
        if len(members) != 1:
            raise PluginError(
                f"{module.__file__}: expected exactly one {kind.__name__} in the module, found {len(members)}"
            )
        _add(found, members[0], str(module.__file__))
    for entry in _entry_points(f"tieaudit.{package}"):
        try:
            member = entry.load()
        except Exception as error:  # whatever a foreign module raises while it is imported
            raise PluginError(f"entry point {entry.name} = {entry.value}: cannot be loaded: {error}") from error
        if not isinstance(member, kind):
            raise PluginError(f"entry point {entry.name} = {entry.value}: expected a {kind.__name__}, found {member!r}")
        _add(found, member, entry.value)
    return found


def _entry_points(group: str) -> Iterable[EntryPoint]:
    """What other packages bring along. Most machines have nothing of the kind, and find that out fast."""
    if not _anybody_joins():
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=group)


@cache
def joined() -> tuple[str, ...]:
    """Every entry point of ours with the package it comes from and its version, in order; mostly none."""
    if not _anybody_joins():
        return ()
    from importlib.metadata import entry_points

    groups = [group for group in entry_points().groups if group.startswith("tieaudit.")]
    ours = [entry for group in groups for entry in entry_points(group=group)]
    return tuple(
        sorted(
            f"{entry.group} {entry.name} = {entry.value} ({entry.dist.name} {entry.dist.version}{_edited(entry)})"
            if entry.dist
            else ""
            for entry in ours
        )
    )


_N_MOST_EDITED = 2000


def _edited(entry: EntryPoint) -> str:
    """Digest of the source of a plug-in that is installed editable, whose version stays while its source changes; empty
    for any other. Source: PEP 610 (`direct_url.json`, `dir_info.editable`); a bare `.egg-info` lies beside its source.

    Cost: reads the Python files of its package. Nothing is imported.
    """
    if entry.dist is None or not _is_editable(entry.dist):
        return ""
    return _digest_of_source(entry.value.partition(":")[0].partition(".")[0])


@cache
def _digest_of_source(package: str) -> str:
    found = importlib.util.find_spec(package)
    if found is None:
        return ""
    folders = list(found.submodule_search_locations or ())
    files = [(path, folder) for folder in folders for path in sorted(_python_below(folder))]
    alone = [(found.origin, os.path.dirname(found.origin))] if found.origin else []
    running = hashlib.sha256()
    for path, folder in files[:_N_MOST_EDITED] if folders else alone:
        with suppress(OSError), open(path, "rb") as file:
            running.update(os.fsencode(os.path.relpath(path, folder)) + b"\0" + file.read() + b"\0")
    return f" {running.hexdigest()[:16]}"


def _is_editable(dist: Distribution) -> bool:
    try:
        text = dist.read_text("direct_url.json")
        if text is not None:
            return bool(json.loads(text).get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError, OSError):
        return True  # whatever it is, it costs a few files to look
    return str(getattr(dist, "_path", "")).endswith(".egg-info")


def _python_below(folder: str) -> Iterator[str]:
    for home, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (os.path.join(home, name) for name in names if name.endswith((".py", ".json", ".toml")))


@cache
def _anybody_joins() -> bool:
    """Whether any installed package names a group of ours: a search for one bracket in all `entry_points.txt`.

    Parsing every package's metadata would cost more than a scan of a small model. An entry of `sys.path` that is no
    folder (an archive) is left to the library. Format: packaging.python.org, "Entry points specification".
    """
    for entry in dict.fromkeys(sys.path):
        folder = entry or os.curdir
        if os.path.isfile(folder):
            return True
        try:
            names = [name for name in os.listdir(folder) if name.endswith((".dist-info", ".egg-info", ".egg"))]
        except OSError:
            continue
        for name in names:
            inside = "EGG-INFO/entry_points.txt" if name.endswith(".egg") else "entry_points.txt"
            try:
                with open(f"{folder}/{name}/{inside}", "rb", buffering=0) as file:
                    if b"[tieaudit." in file.read():
                        return True
            except OSError:
                continue
    return False


def _add(found: dict[str, Kind], member: Kind, where: str) -> None:
    name = str(getattr(member, "name"))  # noqa: B009 - every kind has a name; the protocol is checked by mypy at use
    if name in found:
        raise PluginError(f"{where}: the name {name!r} is already taken in this set; choose another")
    found[name] = member


def named(package: str, kind: type[Kind], name: str, what: str) -> Kind:
    """The member called `name`, from the module of that name alone where it is one of ours; else as `choose` finds it.

    Cost: one import, where `discover` imports the whole set.
    """
    if name.isidentifier() and importlib.util.find_spec(f"tieaudit.{package}.{name}") is not None:
        module = importlib.import_module(f"tieaudit.{package}.{name}")
        members = [item for item in vars(module).values() if isinstance(item, kind)]
        if [getattr(member, "name", "") for member in members] == [name]:
            return members[0]
    found: Kind = choose(discover(package, kind), name, what)  # type: ignore[arg-type]  # a type is hashable
    return found


def choose(members: dict[str, Kind], name: str, what: str) -> Kind:
    """The member called `name`; UsageError with the nearest spelling otherwise."""
    if name in members:
        return members[name]
    hint = nearest(name, members) or f"one of: {', '.join(sorted(members))}"
    raise UsageError(f"no {what} is called {name!r}", hint=hint)


def nearest(name: str, known: Iterable[str]) -> str:
    """The question whether another spelling was meant; empty if nothing is spelt like it."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
