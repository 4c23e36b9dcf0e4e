"""Changing one value in a JSON text: every other byte stays as it is, numbers keep their spelling."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
scanstring = json.decoder.scanstring  # type: ignore[attr-defined]


def with_value(text: str, path: tuple[str, ...], value: object) -> str:
    """The text with `value` at `path`, an existing value replaced, a missing key added last in its object.

    ValueError if the text is no JSON object.
    """
    return _set(text, _skip(text, 0), path, value)


def _set(text: str, start: int, path: tuple[str, ...], value: object) -> str:
    if text[start : start + 1] != "{":
        raise ValueError(f"expected a JSON object at character {start}")
    members = list(_members(text, start))
    found = [member for member in members if member[0] == path[0]]
    if not found:
        return _added(text, start, members, path, value)
    _, _, begin, end = found[-1]  # readers take the last of two
    if len(path) > 1 and text[begin] == "{":
        return _set(text, begin, path[1:], value)
    return text[:begin] + json.dumps(_nested(path[1:], value)) + text[end:]


def _members(text: str, start: int) -> Iterator[tuple[str, int, int, int]]:
    """(key, where the key begins, where its value begins, where that ends) of the object at `start`."""
    position = _skip(text, start + 1)
    while text[position] != "}":
        if text[position] != '"':
            raise ValueError(f"expected a key at character {position}")
        key, after = scanstring(text, position + 1, True)
        colon = _skip(text, after)
        if text[colon] != ":":
            raise ValueError(f"expected ':' at character {colon}")
        begin = _skip(text, colon + 1)
        _, end = _DECODER.raw_decode(text, begin)
        yield key, position, begin, end
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _added(
    text: str, start: int, members: list[tuple[str, int, int, int]], path: tuple[str, ...], value: object
) -> str:
    new = f"{json.dumps(path[0])}: {json.dumps(_nested(path[1:], value))}"
    if not members:
        return text[: start + 1] + new + text[start + 1 :]
    key_begin, end = members[-1][1], members[-1][3]
    before = text.rfind("," if len(members) > 1 else "{", start, key_begin)
    return text[:end] + "," + text[before + 1 : key_begin] + new + text[end:]


def _nested(path: tuple[str, ...], value: object) -> object:
    for key in reversed(path):
        value = {key: value}
    return value


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
