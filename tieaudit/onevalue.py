"""Which weights hold one value, bit for bit, and seen how: what makes a candidate lossless.

Only what was measured, and what is one stored tensor, counts. What a class or a configuration declares is a claim about
values that nobody has read: a broken tie is declared as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tieaudit.model import Member, Tie
from tieaudit.verdict import Subject
from tieaudit.view import AS_STORED, TRANSPOSED, View


class OneValue:
    """Weights that are one value, as stored or transposed, however many ties lie between them.

    Each weight knows its class and whether it holds the class's value transposed. Cost: near linear in the members of
    the ties; nothing is read.
    """

    def __init__(self, ties: Sequence[Tie]) -> None:
        self._parent: dict[str, tuple[str, bool]] = {}
        for tie in ties:
            if tie.origin in ("measured", "aliased"):
                plain = [(one.id, swaps) for one in tie.members if (swaps := _swaps(one.view)) is not None]
                for id, swaps in plain[1:]:
                    self._join(plain[0][0], id, swaps != plain[0][1])

    def holds(self, members: Sequence[Member]) -> bool:
        """Whether every member, seen as it says, is the same array; False as well where that is not known."""
        values = set()
        for one in members:
            (root, turned), swaps = self._root(one.id), _swaps(one.view)
            if swaps is None:
                return False
            values.add((root, turned != swaps))
        return len(values) == 1

    def view(self, id: str, of: str) -> View | None:
        """How `of` is seen to be what `id` holds; None if the two are not known to be one value."""
        return next((view for view in (AS_STORED, TRANSPOSED) if self.holds((Member(id), Member(of, view)))), None)

    def _root(self, id: str) -> tuple[str, bool]:
        turned = False
        while id in self._parent:
            id, more = self._parent[id]
            turned = turned != more
        return id, turned

    def _join(self, one: str, other: str, turned: bool) -> None:
        (root, own), (parent, its) = self._root(one), self._root(other)
        if root != parent:
            self._parent[parent] = (root, (own != its) != turned)


def one_value(subject: Subject) -> OneValue:
    """What is known of this model, worked out once."""
    if "one value" not in subject.worked_out:
        subject.worked_out["one value"] = OneValue(subject.found.ties)
    return cast("OneValue", subject.worked_out["one value"])


def _swaps(view: View) -> bool | None:
    """Whether the view is a transpose; None for what is neither that nor as stored."""
    return False if view == AS_STORED else True if view == TRANSPOSED else None
