"""Open sets: a folder whose every module defines exactly one member of a kind. No list to edit anywhere.

Third parties join through entry points `tieaudit.<set>` (formats, relations, rules, schemes, merges, runners, reports).
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TypeVar

from tieaudit.errors import PluginError, UsageError

Kind = TypeVar("Kind")


@cache
def discover(package: str, kind: type[Kind]) -> dict[str, Kind]:
    """All members of the set `tieaudit.<package>`, by their `name`, in sorted module order.

    PluginError if a module does not define exactly one member, if a name is taken twice, or if an entry point
    gives something else.
    """
    from importlib.metadata import entry_points

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
    for entry in entry_points(group=f"tieaudit.{package}"):
        try:
            member = entry.load()
        except Exception as error:  # whatever a foreign module raises while it is imported
            raise PluginError(f"entry point {entry.name} = {entry.value}: cannot be loaded: {error}") from error
        if not isinstance(member, kind):
            raise PluginError(f"entry point {entry.name} = {entry.value}: expected a {kind.__name__}, found {member!r}")
        _add(found, member, entry.value)
    return found


def _add(found: dict[str, Kind], member: Kind, where: str) -> None:
    name = str(getattr(member, "name"))  # noqa: B009 - every kind has a name; the protocol is checked by mypy at use
    if name in found:
        raise PluginError(f"{where}: the name {name!r} is already taken in this set; choose another")
    found[name] = member


def choose(members: dict[str, Kind], name: str, what: str) -> Kind:
    """The member called `name`; UsageError with the nearest spelling otherwise."""
    if name in members:
        return members[name]
    import difflib

    near = difflib.get_close_matches(name, members, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(sorted(members))}"
    raise UsageError(f"no {what} is called {name!r}", hint=hint)
