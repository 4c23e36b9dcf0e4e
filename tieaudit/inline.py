"""Values of TOML on one line, written and read: texts, whole numbers, lists, and tables with bare keys.

Only what the lock file needs. A text never holds a character that hides or acts on a screen: each is escaped. Code
points that are no characters (lone surrogates, as broken file names have) are escaped, too, which TOML forbids.
"""

from __future__ import annotations

import re

INTEGER = 19
"""Most digits of a number: sizes in bytes of anything have fewer."""
_DEPTH = 4
_TOKEN = re.compile(
    r'\s*(?:(?P<text>"(?:[^"\\\x00-\x1f]|\\.)*")|(?P<number>[0-9]+)(?![\w.])|(?P<key>[A-Za-z_][\w-]*)|(?P<mark>[][{},=]))'
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
_SHORT = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}


def quoted(text: str) -> str:
    """A text as TOML's basic string, in one line."""
    return '"' + "".join(_escaped(one) for one in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def value_of(text: str) -> object:
    """The value that a line holds: str, int, list or dict. ValueError saying what was expected, if it is none.

    Cost: linear in the text; lists and tables are nested a few levels at most.
    """
    reader = _Tokens(text)
    value = reader.value(0)
    if reader.kind is not None:
        raise ValueError("one value and the end of the line")
    return value


class _Tokens:
    """Tokens of one line, the next one looked at."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.kind: str | None = None
        self.said = ""
        self.step()

    def step(self) -> None:
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            if self.text[self.at :].strip():
                raise ValueError("a text in quotes, a whole number, [ … ] or { … }")
            self.kind, self.said = None, ""
            return
        self.at, self.kind = match.end(), match.lastgroup
        self.said = match[match.lastgroup or 0]

    def take(self, mark: str) -> bool:
        """Whether the next token is this mark, which is then passed."""
        if self.kind == "mark" and self.said == mark:
            self.step()
            return True
        return False

    def value(self, depth: int) -> object:
        if depth > _DEPTH:
            raise ValueError(f"lists and tables nested at most {_DEPTH} deep")
        if self.kind == "text":
            text = _unescaped(self.said[1:-1])
            self.step()
            return text
        if self.kind == "number" and len(self.said) <= INTEGER:
            number = int(self.said)
            self.step()
            return number
        if self.take("["):
            return self.listed(depth)
        if self.take("{"):
            return self.table(depth)
        raise ValueError("a text in quotes, a whole number, [ … ] or { … }")

    def listed(self, depth: int) -> list[object]:
        found: list[object] = []
        while not self.take("]"):
            found.append(self.value(depth + 1))
            if not self.take(",") and not (self.kind == "mark" and self.said == "]"):
                raise ValueError("a comma or ] in a list")
        return found

    def table(self, depth: int) -> dict[str, object]:
        found: dict[str, object] = {}
        while not self.take("}"):
            key = self.said
            if self.kind != "key" or key in found:
                raise ValueError("a key, each one once, in { … }")
            self.step()
            if not self.take("="):
                raise ValueError(f"= behind {key}")
            found[key] = self.value(depth + 1)
            if not self.take(",") and not (self.kind == "mark" and self.said == "}"):
                raise ValueError("a comma or } in a table")
        return found


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_character, text) if "\\" in text else text


def _character(match: re.Match[str]) -> str:
    said = match[1]
    if len(said) > 1:
        code = int(said[1:], 16)
        if code > 0x10FFFF:
            raise ValueError("an escape of a character that exists")
        return chr(code)
    if said not in _SHORT:
        raise ValueError('an escape that TOML knows: \\" \\\\ \\b \\t \\n \\f \\r \\uXXXX \\UXXXXXXXX')
    return _SHORT[said]
