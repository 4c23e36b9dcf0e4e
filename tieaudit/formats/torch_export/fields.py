"""The JSON of an exported program, read field by field: whatever is not as the schema says is one line of text.

Source: torch/_export/serde/schema.py, SCHEMA_VERSION 8.20 (PyTorch 2.13).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tieaudit.errors import CorruptFile
from tieaudit.formats.torch_checkpoint.archive import Archive

MAX_JSON_BYTES = 256 * 1024 * 1024
"""Of one JSON file: the graph of a model of 100 layers has 10 MB."""
Json = Mapping[str, Any]


class Fields:
    """One JSON object of an archive, and where it is."""

    __slots__ = ("value", "where")

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CorruptFile(f"{where}: expected an object, found {_kind(value)}")
        self.value: Json = value
        self.where = where

    def object(self, name: str) -> Fields:
        return Fields(self.value.get(name), f"{self.where}.{name}")

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        found = self._of(name, list, "a list")
        return [Fields(one, f"{self.where}.{name}[{index}]") for index, one in enumerate(found)]

    def mapping(self, name: str, *, optional: bool = False) -> Iterator[tuple[str, Fields]]:
        """The entries of an object of objects."""
        if optional and self.value.get(name) is None:
            return
        held = self.object(name)
        for key, value in held.value.items():
            yield key, Fields(value, f"{held.where}[{key[:80]!r}]")

    def text(self, name: str) -> str:
        return str(self._of(name, str, "a text"))

    def flag(self, name: str) -> bool:
        return bool(self._of(name, bool, "true or false"))

    def size(self, name: str) -> int:
        """A whole number that is not negative."""
        found = self._of(name, int, "a whole number")
        if isinstance(found, bool) or found < 0:
            raise self.wrong(name, "a whole number of at least 0", found)
        return int(found)

    def union(self) -> tuple[str, Any]:
        """Tag and value of a tagged union: an object with one field that is not null."""
        set_ = [(tag, value) for tag, value in self.value.items() if value is not None]
        if len(set_) != 1:
            raise CorruptFile(f"{self.where}: expected one field that says what this is, found {len(set_)}")
        return set_[0]

    def wrong(self, name: str, expected: str, found: Any) -> CorruptFile:
        return CorruptFile(f"{self.where}.{name}: expected {expected}, found {_kind(found)}")

    def _of(self, name: str, kind: type, expected: str) -> Any:
        found = self.value.get(name)
        if not isinstance(found, kind):
            raise self.wrong(name, expected, found)
        return found


def _kind(value: object) -> str:
    if isinstance(value, (int, float, str, bool)) or value is None:
        return repr(value)[:80]
    return "a list" if isinstance(value, list) else "an object"


def read_json(archive: Archive, name: str) -> Fields:
    """One JSON object of an archive. CorruptFile if it is none, or huge."""
    where = f"{archive.where}, {name}"
    data = archive.read(name, MAX_JSON_BYTES)
    try:
        value = json.loads(data)
    except RecursionError:
        raise CorruptFile(f"{where}: nested too deeply to be read safely") from None
    except ValueError as error:
        raise CorruptFile(f"{where}: expected JSON: {str(error)[:200]}") from None
    return Fields(value, where)
