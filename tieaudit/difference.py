"""Stage: two models → the ties lost and gained between them, in the names of both, whatever their formats.

What is asked is: where one stored tensor is several weights on one side, what are they on the other? Weights are
matched by name where that is possible, by value, by the end of their names, and by what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tieaudit.counterparts import Counterparts, Side, Value
from tieaudit.printable import counted, listed, printable, size
from tieaudit.verdict import Subject

Outcome = Literal["lost", "gained", "cannot tell", "kept"]
OUTCOMES: tuple[Outcome, ...] = ("lost", "gained", "cannot tell", "kept")


@dataclass(frozen=True)
class Told:
    """What became of one value."""

    outcome: Outcome
    before: tuple[str, ...]
    """Ids on the one side."""
    after: tuple[str, ...]
    """Their counterparts on the other."""
    because: str
    """One sentence; names in it are printable."""
    matched_by: Mapping[str, str]
    """Id on the side whose value it is (of a gained one: after) → how its counterparts were found: name, values, end of
    name, or role."""
    n_bytes: int = 0
    """Bytes stored again, or saved."""


@dataclass(frozen=True)
class Difference:
    """Ties lost and gained between two models."""

    before: str
    after: str
    told: tuple[Told, ...]
    """Lost ones first, then gained, cannot tell, kept; the largest first."""
    n_bytes_read: int
    """Bytes of tensors read to match values."""

    def of(self, outcome: Outcome) -> tuple[Told, ...]:
        return tuple(one for one in self.told if one.outcome == outcome)


def difference(before: Subject, after: Subject) -> Difference:
    """Ties lost from `before` to `after`, gained, kept, and what cannot be told.

    A tie is lost if its members are one value on the one side, and on the other they are stored more often or differ.
    A weight that is stored once here and several times there has lost a tie, too, though it has but one name here:
    that is what an export of shared layers leaves. Raises CorruptFile and OSError where bytes cannot be read.
    Cost: names and shapes of all weights; bytes only of values that are tied on one side, and of those on the other
    side with their shape whose probed numbers agree; memory: a few blocks.
    """
    one, other = Side(before), Side(after)
    forward = Counterparts(one, other)
    forward.match()
    back = forward.reversed()
    told = [*_judged((one, other), (forward, back), "lost"), *_judged((other, one), (back, forward), "gained")]
    told.sort(key=lambda item: (OUTCOMES.index(item.outcome), -item.n_bytes, item.before, item.after))
    return Difference(before.model.path, after.model.path, tuple(told), forward.n_bytes_read)


def _judged(
    sides: tuple[Side, Side], pairs: tuple[Counterparts, Counterparts], outcome: Literal["lost", "gained"]
) -> Iterator[Told]:
    """What the values of the first side are on the second. Gained is lost, looked at from the other end."""
    for value in sides[0].values:
        if not (value.is_tie or any(sides[1].values[at].is_tie for at in pairs[0].values_of(value))):
            continue
        found = _told(value, sides, pairs, outcome)
        # what cannot be told of ties that are only on the other side is said from there
        if found is not None and (outcome == "lost" or found.outcome in ("gained", "cannot tell")):
            yield found


def _told(
    value: Value, sides: tuple[Side, Side], pairs: tuple[Counterparts, Counterparts], outcome: Literal["lost", "gained"]
) -> Told | None:
    """What became of one value of the first side; None where there is nothing to say, or the other end says it."""
    (one, other), (matched, back) = sides, pairs
    there = [other.values[at] for at in matched.values_of(value)]
    how = {id: by for id in value.ids if (by := matched.how(id))}
    here, yonder = ("before", "after") if outcome == "lost" else ("after", "before")
    ids = tuple(dict.fromkeys(id for each in there for id in each.ids))
    near, far = (value.ids, ids) if outcome == "lost" else (ids, value.ids)
    names = _named(value)

    def say(what: Outcome, because: str, n_bytes: int = 0) -> Told:
        return Told(what, near, far, because, how, n_bytes)

    if not there:
        return say("cannot tell", f"{names}: {_no_counterpart(value, yonder)}") if value.is_tie else None
    if len(there) > 1:
        if not value.is_tie:
            return None
        because = f"{names}: one value {here}; {yonder}, {_apart(there)} differ"
        return say(outcome, because, sum(each.n_bytes for each in there[1:]))
    (same,) = there
    n_here = sum(one.values[at].n_copies for at in back.values_of(same)) or value.n_copies
    if same.n_copies > n_here:
        n_bytes = same.n_bytes * (same.n_copies - n_here)
        times = {here: _times(n_here), yonder: f"{_times(same.n_copies)} {yonder} (as {listed(same.stored)})"}
        times[here] += f" {here}"
        because = f"{names}: stored {times['before']} and {times['after']}; {size(n_bytes)}"
        return say(outcome, because + (" again" if outcome == "lost" else " less"), n_bytes)
    if not value.is_tie or value.n_copies > same.n_copies:  # what is stored more often here is told from the other end
        return None
    doubtful = matched.doubtful(value, same)
    if doubtful:
        because = f"{names}: {printable(doubtful[0])} has no counterpart of its own {yonder}"
        return say("cannot tell", f"{because}, and it might be {listed(doubtful[1])}")
    return say("kept", f"{names}: one value {yonder}, too, as {_named(same)}")


def _named(value: Value) -> str:
    """A value by its names, or by its only name and what it serves."""
    names = " = ".join(printable(id) for id in value.ids[:6])
    names += f" and {len(value.ids) - 6:,} more" if len(value.ids) > 6 else ""
    return f"{names} (for {listed(value.served)})" if value.served and len(value.ids) == 1 else names


def _apart(there: Sequence[Value]) -> str:
    return listed(tuple(each.ids[0] for each in there))


def _times(n_copies: int) -> str:
    return {1: "once", 2: "twice"}.get(n_copies, f"{n_copies:,} times")


def _no_counterpart(value: Value, yonder: str) -> str:
    what = "its" if len(value.ids) == 1 else "their"
    return f"nothing {yonder} has {what} name, {what} value, or alone {what} role and shape"


def shown(found: Difference, format_name: str, *, formats: tuple[str, str] = ("", "")) -> str:
    """The difference as text or Markdown. Names are printable; Markdown has them in a block that nothing parses."""
    lines = [f"before  {printable(found.before)}  {formats[0]}".rstrip(),
             f"after   {printable(found.after)}  {formats[1]}".rstrip()]  # fmt: skip
    counts = " · ".join(f"{len(found.of(one))} {one}" for one in ("kept", "lost", "gained", "cannot tell"))
    body: list[str] = []
    for outcome in OUTCOMES:
        body += _shown(found.of(outcome), format_name)
    if format_name != "markdown":
        return "\n".join([*lines, *body, counts])
    inside = [*lines, *body]
    fence = "`" * max(3, 1 + max(_ticks(line) for line in inside))
    verdict = "Ties were lost" if found.of("lost") else "No tie was lost"
    return "\n".join([f"### {verdict}", "", f"{fence}diff", *inside, fence, "", f"{counts}"])


N_MOST_TOLD = 20
_MARKS = {"lost": "-", "gained": "+", "cannot tell": "!", "kept": " "}


def _shown(told: Sequence[Told], format_name: str) -> Iterator[str]:
    for one in told[:N_MOST_TOLD]:
        mark = _MARKS[one.outcome] + " " if format_name == "markdown" else ""
        yield f"{mark}{one.outcome:<6}  {one.because}"
    if len(told) > N_MOST_TOLD:
        more = counted(len(told) - N_MOST_TOLD, "more value")
        yield f"{'  ' if format_name == 'markdown' else ''}… {told[0].outcome}: {more} (--format json lists all)"


def _ticks(text: str) -> int:
    """The longest run of backticks."""
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
