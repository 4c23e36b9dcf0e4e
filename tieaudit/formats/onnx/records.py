"""What happened to each original use while edits follow one another."""

from __future__ import annotations

from collections.abc import Iterable

from tieaudit.change import Rewritten
from tieaudit.model import Use

Key = tuple[str, str, int]
"""(scope, node, slot)."""


class Records:
    """Original use → where it is now. A use that is rewritten twice is recorded once, from its first place."""

    def __init__(self) -> None:
        self._now: dict[tuple[str, Key], tuple[tuple[str, Key], str]] = {}

    def add(self, part: str, before: Key, after: Key, pattern: str) -> None:
        """One use moved from `before`, as the graph is now, to `after`."""
        origin = next((old for old, (now, _) in self._now.items() if now == (part, before)), (part, before))
        self._now[origin] = ((part, after), pattern)

    def rewritten(self, uses: Iterable[Use]) -> tuple[Rewritten, ...]:
        """The records of those slots that are uses of weights in the original."""
        known = {(use.part, (use.scope, use.node, use.slot)) for use in uses}
        return tuple(
            Rewritten(part, scope, node, slot, now[1], now[2], pattern)
            for (part, (scope, node, slot)), ((_, now), pattern) in self._now.items()
            if (part, (scope, node, slot)) in known
        )
