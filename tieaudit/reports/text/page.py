"""How the reports for people are laid out: what fits in a line, colours of our own, lists that are cut and counted."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tieaudit.config import DEFAULTS, Settings
from tieaudit.printable import inert, printable

LONGEST = 2000
"""Characters of a sentence that may hold text from a file."""
_COLOR = {"error": "31;1", "warning": "33;1", "info": "36", "title": "1", "quiet": "2", "command": "32"}
_NARROWEST = 60


@dataclass(frozen=True)
class Page:
    """How much fits, and whether escape codes of our own are wanted."""

    width: int
    color: bool
    most: Settings
    """How many ties, members and findings are listed."""

    def paint(self, text: str, style: str) -> str:
        """`text` in a colour, where colours are wanted."""
        return f"\x1b[{_COLOR[style]}m{text}\x1b[0m" if self.color else text

    def wrap(self, text: str, indent: str) -> list[str]:
        """Sentences, broken at spaces only: names stay whole and can be copied."""
        return textwrap.wrap(
            text, self.width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False,
        ) or [indent.rstrip()]  # fmt: skip


def page_of(settings: Mapping[str, object]) -> Page:
    """The page that the settings of a report ask for: color, width (of the terminal, in columns), thresholds."""
    width, most = settings.get("width"), settings.get("thresholds")
    return Page(
        width=max(width if isinstance(width, int) else 100, _NARROWEST),
        color=bool(settings.get("color", False)),
        most=most if isinstance(most, Settings) else DEFAULTS,
    )


def printed(lines: Iterable[str]) -> str:
    """The lines as they go to the terminal or into a log, none of them a command to the service that shows the log."""
    return "\n".join(map(inert, lines)) + "\n"


def more(n_more: int, indent: str) -> list[str]:
    """What a list that was cut ends in."""
    return [f"{indent}… and {n_more:,} more (--format json lists all)"] if n_more > 0 else []


def reasons(errors: Iterable[tuple[str, str]], page: Page) -> list[str]:
    """What could not be read or was skipped, and why: the path only where the message does not name it."""
    lines = []
    for path, message in errors:
        shown = printable(message, LONGEST)
        if printable(path, None) not in shown:
            shown = f"{printable(path)}: {shown}"
        lines += page.wrap(shown, "  ")
    return lines
