"""Text from files, made safe to print: names are untrusted and may hold escape codes or reversed writing.

Also the units of the reports: sizes are decimal (1 MB = 1,000,000 bytes), counts have thousands separators.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FIRST_ON_THE_LINE = re.compile(r"^((?:\s|\x1b\[[0-9;]*m)*)::")
_ANYWHERE = re.compile(r"##(?=\[|\w+\[)")

N_MOST = 200
N_MOST_MESSAGE = 2000
"""Characters of an error: a name of a megabyte in it is no help."""


def printable(text: str, n_most: int | None = N_MOST) -> str:
    """`text` on one line, without characters that hide or act, shortened in the middle to `n_most` characters.

    Idempotent: what was made printable once stays as it is. None for `n_most` never shortens.
    """
    if n_most is not None and len(text) > 2 * n_most:  # the rest would be cut anyway; do not escape a megabyte
        text = shorten(text, 2 * n_most)
    safe = text if text.isprintable() else "".join(_escaped(character) for character in text)
    return safe if n_most is None else shorten(safe, n_most)


def _escaped(character: str) -> str:
    # not printable: control and format characters (bidirectional marks, zero width), surrogates, private use,
    # unassigned, and every separator but the plain space: none of them shows what it is
    if character.isprintable():
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def inert(line: str) -> str:
    """A line that no CI service takes for a command when it is in its log; others stay as they are.

    `::name::` counts at the start of a line, after blanks, and `##[name]` anywhere (actions/runner, ActionCommand.cs);
    Azure Pipelines and TeamCity read `##vso[` and `##teamcity[`. Names are printable, but may hold these.
    """
    if "::" in line:
        line = _FIRST_ON_THE_LINE.sub(r"\1\\x3a:", line)
    return _ANYWHERE.sub(r"#\\x23", line) if "##" in line else line


def shorten(text: str, n_most: int) -> str:
    """At most `n_most` characters, the middle replaced by an ellipsis: both ends of a name tell something."""
    if len(text) <= n_most:
        return text
    n_head = (n_most - 1) // 2
    n_tail = n_most - 1 - n_head
    return text[:n_head] + "…" + (text[-n_tail:] if n_tail else "")


def listed(names: tuple[str, ...], n_most: int = 4) -> str:
    """Names for a sentence: `a`, `a and b`, `a, b, c and d`, or the first few and how many more."""
    shown = [printable(name) for name in names[:n_most]]
    if len(names) > n_most:
        return f"{', '.join(shown)} and {len(names) - n_most:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def columns(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """One line per row, with two spaces between columns that are as wide as their widest cell.

    `align` has one character per column: `<` or `>`. A list, so that a report can put other lines between.
    Cost: linear. A library for tables takes longer to import than a scan of a small model takes.
    """
    widths = [max(map(_width, column), default=0) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for cell, width, side in zip(row, widths, align, strict=True):
            gap = " " * (width - _width(cell))
            cells.append(cell + gap if side == "<" else gap + cell)
        lines.append("  ".join(cells).rstrip())
    return lines


def _width(text: str) -> int:
    """Columns that a terminal gives a text: two to a wide character (Unicode Standard Annex 11), none to a mark."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(one) else 2 if east_asian_width(one) in "WF" else 1 for one in text)


def size(n_bytes: int) -> str:
    """A number of bytes in the unit that leaves one to three digits before the point; decimal units."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    value = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            return f"{value:,.1f} {unit}"
    raise AssertionError("unreachable: the last unit always returns")


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 finding`, `2 findings`, `12,345 weights`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
