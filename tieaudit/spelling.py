"""Values of a policy file: what each must be, where it stands, and what is said if it is another thing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tieaudit.errors import UsageError

_UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Key:
    """One key of a policy file."""

    name: str
    takes: str
    """What it holds, for people."""
    meaning: str
    read: Callable[[Any, Where], Any]
    per_path: bool = True
    """Whether a per-path section may have it."""


@dataclass(frozen=True)
class Where:
    """A place in a policy file, for messages."""

    file: Path
    text: str
    key: str = ""

    def at(self, key: str) -> Where:
        return Where(self.file, self.text, f"{self.key}.{key}" if self.key else key)

    @property
    def line(self) -> int:
        """Line of the first place that sets the last word of the key; 0 if it is spelt otherwise."""
        word = self.key.rpartition(".")[2].strip('"')
        for number, line in enumerate(self.text.splitlines(), start=1):
            if line.strip().split("=")[0].strip().strip("\"'") == word or line.strip().strip("[] ").endswith(word):
                return number
        return 0

    def refuse(self, expected: str, found: object, hint: str = "") -> UsageError:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        return UsageError(f"{place}: {self.key}: expected {expected}, found {_shown(found)}", hint=hint)


def _shown(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 80 else text[:77] + "…"


def values_of(content: Mapping[str, Any], where: Where, keys: Sequence[Key]) -> dict[str, Any]:
    """Every key read by its row of the table; UsageError with the nearest spelling for one that has none."""
    known = {key.name: key for key in keys}
    values = {}
    for name, value in content.items():
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(sorted(known))}"
            place = where.at(name)
            line = f":{place.line}" if place.line else ""
            raise UsageError(f"{where.file}{line}: {place.key} is no key of a policy", hint=hint)
        values[name] = known[name].read(value, where.at(name))
    return values


def table_of(value: Any, where: Where) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise where.refuse("a table", value)
    return value


def texts(value: Any, where: Where) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise where.refuse('a list of texts such as ["a", "b"]', value)
    return tuple(value)


def text_of(value: Any, where: Where) -> str:
    if not isinstance(value, str) or not value.strip():
        raise where.refuse("a text", value)
    return value


def flag(value: Any, where: Where) -> bool:
    if not isinstance(value, bool):
        raise where.refuse("true or false", value)
    return value


def count(value: Any, where: Where) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise where.refuse("a whole number of 0 or more", value)
    return value


def n_bytes(value: Any, where: Where) -> int:
    """A number of bytes, or a text such as "1.5 MB" in decimal units, or "1.5 MiB" in binary ones."""
    if isinstance(value, str):
        said = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", value)
        if said is None or said[2] not in _UNITS or len(said[1]) > 30:
            raise where.refuse('bytes, or a text such as "1.5 MB" (B, kB, MB, GB, TB; KiB, MiB, GiB, TiB)', value)
        return int(Fraction(said[1]) * _UNITS[said[2]])
    return count(value, where)


def severity(value: Any, where: Where) -> str:
    if value not in _SEVERITIES:
        raise where.refuse(f"one of {', '.join(_SEVERITIES)}", value)
    return str(value)
