"""What happened to each original use while edits follow one another."""

from __future__ import annotations

from collections.abc import Iterable

from tieaudit.change import Adjusted, Factor, Repeated, Rewritten
from tieaudit.model import Use

Key = tuple[str, str, int]
"""(scope, node, slot)."""


class Records:
    """Original use → where it is now. A use that is rewritten twice is recorded once, from its first place."""

    def __init__(self) -> None:
        self._now: dict[tuple[str, Key], tuple[tuple[str, Key], str]] = {}
        self._adjusted: list[tuple[str, str, Key, tuple[Factor, ...]]] = []
        self._repeated: list[Repeated] = []

    def add(self, part: str, before: Key, after: Key, pattern: str) -> None:
        """One use moved from `before`, as the graph is now, to `after`.

        Of two patterns the first one's name stays where it says that other values come out.
        """
        origin = self._origin(part, before)
        known = self._now.get(origin)
        adjusted = {(part, key) for _, part, key, _ in self._adjusted}
        self._now[origin] = ((part, after), known[1] if known is not None and origin in adjusted else pattern)

    def adjust(self, weight: str, part: str, now: Key, factors: tuple[Factor, ...]) -> None:
        """A use, at `now` as the graph is, sees what the factors make of the common value."""
        self._adjusted.append((weight, part, self._origin(part, now)[1], factors))

    def repeat(self, weight: str, part: str, now: Key, result: str) -> None:
        """The heads of a projection, used at `now` as the graph is, are repeated up to the value `result`."""
        _, (scope, node, slot) = self._origin(part, now)
        self._repeated.append(Repeated(weight, part, scope, node, slot, result))

    def repeated(self) -> tuple[Repeated, ...]:
        """The projections whose heads were pooled."""
        return tuple(self._repeated)

    def _origin(self, part: str, key: Key) -> tuple[str, Key]:
        return next((old for old, (now, _) in self._now.items() if now == (part, key)), (part, key))

    def rewritten(self, uses: Iterable[Use]) -> tuple[Rewritten, ...]:
        """The records of those slots that are uses of weights in the original."""
        known = {(use.part, (use.scope, use.node, use.slot)) for use in uses}
        return tuple(
            Rewritten(part, scope, node, slot, now[1], now[2], pattern)
            for (part, (scope, node, slot)), ((_, now), pattern) in self._now.items()
            if (part, (scope, node, slot)) in known
        )

    def adjusted(self) -> tuple[Adjusted, ...]:
        """The uses that see the common value adjusted, by their original places."""
        return tuple(
            Adjusted(weight, part, scope, node, slot, factors)
            for weight, part, (scope, node, slot), factors in self._adjusted
        )
