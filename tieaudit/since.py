"""Stage: two states of a model's ties → the changes between them, in sentences that read like a code review.

Nothing is read: what is needed of the bytes is in the digests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tieaudit.printable import listed, printable, size
from tieaudit.sealed import Change, LockedMember, LockedTie


def tie_changes(
    before: Sequence[LockedTie],
    after: Sequence[LockedTie],
    present: Container[str] = frozenset(),
    roles: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {}),
) -> Iterator[Change]:
    """What became of each tie, lost ones first in the order of the lock; then what is new.

    `present`: ids of the model as it is now. A member that is there, but outside the tie, is lost from it; one that is
    not there may have been renamed, and is taken as such where the tie has another name in its place. Ties that share
    no name are matched by the digest of their value, then by what their members are for, where that is unambiguous.
    `roles`: kind → how many weights, before and after: a tensor that serves fewer operations has lost a tie where a
    copy of it, or one more weight for its purpose, serves the others.
    Cost: linear in the members.
    """
    paired = _paired(before, after, present)
    partners = {id(new) for _, new in paired if new is not None}
    n_before, n_after = _n_copies(before), _n_copies(after)
    for old, new in paired:
        between: Iterable[Change] = [_gone(old, present, _more(old, *roles))]
        if new is not None:
            copied = n_after.get(new.ids[0], 1) > n_before.get(old.ids[0], 1)
            beside = "beside a copy of it" if copied else _more(old, *roles)
            between = _Between(old, new, present, beside).changes()
        yield from (replace(change, n_bytes_tie=old.n_bytes) for change in between)
    pieces = {tie_id: index for index, old in enumerate(before) if not old.by_uses for tie_id in old.ids}
    for new in after:
        homes = {pieces.get(one) for one in new.ids}
        split_off = len(homes) == 1 and None not in homes  # what a tie fell into is told as its loss
        if id(new) not in partners and not (split_off and not new.by_uses):
            yield replace(_new(new), n_bytes_tie=new.n_bytes)


def _paired(
    before: Sequence[LockedTie], after: Sequence[LockedTie], present: Container[str]
) -> list[tuple[LockedTie, LockedTie | None]]:
    by_id: dict[str, list[int]] = {}
    for index, new in enumerate(after):
        for one in new.ids:
            by_id.setdefault(one, []).append(index)
    found: dict[int, int] = {}
    for index, old in enumerate(before):
        shared = Counter(at for one in old.ids for at in by_id.get(one, ()))
        # of two equally near ones that with the names in order: what happens must not depend on a dictionary
        best = max(shared, key=lambda at: (after[at].by_uses == old.by_uses, shared[at], -at), default=None)
        if best is not None:
            found[index] = best
    taken = set(found.values())
    for key in (_by_digest, _by_purpose):
        free: dict[object, list[int]] = {}
        for at, new in enumerate(after):
            if at not in taken and key(new) is not None:
                free.setdefault(key(new), []).append(at)
        wanted = Counter(key(old) for index, old in enumerate(before) if index not in found)
        for index, old in enumerate(before):
            places = free.get(key(old), []) if index not in found else []
            stays = any(one in present for one in old.ids)
            if places and not stays and (key is _by_digest or wanted[key(old)] == len(places) == 1):
                found[index] = places.pop(0)
                taken.add(found[index])
    return [(old, after[found[index]] if index in found else None) for index, old in enumerate(before)]


def _by_digest(tie: LockedTie) -> object:
    return (tie.dtype, tuple(sorted(tie.shape)), tie.digest) if tie.digest else None


def _by_purpose(tie: LockedTie) -> object:
    roles = tuple(sorted(member.role for member in tie.members))
    return (tuple(sorted(tie.shape)), roles) if set(roles) != {"other"} else None


def _n_copies(ties: Sequence[LockedTie]) -> dict[str, int]:
    """Id → how often its value is stored."""
    return {one: tie.n_copies for tie in ties if not tie.by_uses for one in tie.ids}


def _more(tie: LockedTie, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Words for one more weight of a tie's purpose than there was; a table that is its own head is a head, too."""
    kind = tie.members[0].role
    for one in ("output_head", kind) if kind == "token_embedding" else (kind,):
        n_before, n_now = before.get(one, 0), after.get(one, 0)
        if n_now > n_before and one not in ("other", "buffer"):
            return f"beside {n_now:,} × {printable(one)}, {n_before:,} before"
    return ""


def _gone(old: LockedTie, present: Container[str], beside: str) -> Change:
    stay = tuple(one for one in old.ids if one in present)
    if old.by_uses:
        name = printable(old.ids[0])
        if stay:  # a copy would have made it a tie of two names
            said = f"{name} serves one operation at most, before {_uses(old)}"
            if beside:
                return Change("lost", f"{said}, {beside}; {size(old.n_bytes)} again", old.ids, stay, old.n_bytes)
            return Change("members", f"{said}; no copy of it is stored", old.ids, stay)
        said = f"{name}, which served {_uses(old)}, is not there, nor is another tie of its value"
        return Change("lost", said, old.ids)
    anchor = old.anchor
    others = tuple(one for one in old.ids if one != anchor)
    said = f"{listed(others)} {_is(others)} no longer {printable(anchor)} (was {old.origin})"
    if not stay:
        said += "; none of them is there, nor is another tie of their value"
    elif old.tied and old.n_copies == 1:
        said += f"; {size(old.n_bytes)} again"
    return Change("lost", said, old.ids, stay, old.n_bytes if stay else 0)


def _new(new: LockedTie) -> Change:
    if new.by_uses:
        return Change("gained", f"{printable(new.ids[0])} serves {_uses(new)}", (), new.ids)
    others = tuple(one for one in new.ids if one != new.anchor)
    said = f"{listed(others)} {_is(others)} {printable(new.anchor)} ({new.origin})"
    if new.n_copies > 1:
        said += f", stored {new.n_copies:,} times: {size(new.n_bytes * (new.n_copies - 1))} again"
    return Change("gained", said, (), new.ids, new.n_bytes * (new.n_copies - 1))


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _uses(tie: LockedTie) -> str:
    counts = Counter(member.use for member in tie.members)
    return listed(tuple(f"{n:,} × {use}" if n > 1 else use for use, n in sorted(counts.items())))


@dataclass(frozen=True)
class _Between:
    """One tie that has a counterpart."""

    old: LockedTie
    new: LockedTie
    present: Container[str]
    beside: str = ""
    """What may serve the operations that the tensor of a tie by uses does not serve any more, or empty."""

    def changes(self) -> Iterator[Change]:
        if self.old.by_uses:
            yield from self._of_uses()
        elif self.new.by_uses:
            yield from self._into_one()
        else:
            yield from self._of_names()
        yield from self._value()

    def _of_uses(self) -> Iterator[Change]:
        old, new = self.old, self.new
        name = printable(old.ids[0])
        if not new.by_uses:
            if new.n_copies > 1:
                others = tuple(one for one in new.ids if one != old.ids[0])
                said = (
                    f"{name} no longer serves {_uses(old)} alone: {listed(others)} {_is(others)} stored apart from it"
                )
                said += f"; {size(new.n_bytes * (new.n_copies - 1))} again"
                yield Change("lost", said, old.ids, new.ids, new.n_bytes * (new.n_copies - 1))
            elif old.ids != new.ids:
                yield Change("renamed", f"{name} is now {listed(new.ids)}", old.ids, new.ids)
            return
        if old.ids != new.ids:
            yield Change("renamed", f"{name} is now {printable(new.ids[0])}", old.ids, new.ids)
        n_before, n_now = len(old.members), len(new.members)
        if n_now < n_before and self.beside:
            said = f"{name} serves {_uses(new)} only, before {_uses(old)}, {self.beside}; {size(old.n_bytes)} again"
            yield Change("lost", said, old.ids, new.ids, old.n_bytes)
        elif _readers(old) != _readers(new):
            yield Change("members", f"{name} serves {_uses(new)}, before {_uses(old)}", old.ids, new.ids)

    def _into_one(self) -> Iterator[Change]:
        """Several names before, one stored tensor with several uses now."""
        old, new = self.old, self.new
        apart = self._missing()
        if apart:
            yield self._lost(apart)
        elif old.n_copies > 1:
            said = f"{listed(old.ids)} are one stored tensor now, {printable(new.ids[0])}, for {_uses(new)}"
            yield Change("gained", said, old.ids, new.ids)
        else:
            yield Change("renamed", f"{listed(old.ids)} are now {printable(new.ids[0])}", old.ids, new.ids)

    def _missing(self) -> tuple[str, ...]:
        """Members that are there, outside the tie."""
        return tuple(one for one in self.old.ids if one not in self.new.ids and one in self.present)

    def _of_names(self) -> Iterator[Change]:
        old, new = self.old, self.new
        missing = tuple(one for one in old.ids if one not in new.ids)
        fresh = tuple(one for one in new.ids if one not in old.ids)
        now = {one: one for one in old.ids if one in new.ids}
        if missing and fresh and not self._missing():
            now |= self._renames(missing, fresh)
            names = sorted((one, now[one]) for one in missing if one in now)
            said = ", ".join(f"{printable(one)} is now {printable(other)}" for one, other in names[:4])
            said += f" and {len(names) - 4:,} more" if len(names) > 4 else ""
            yield Change("renamed", said, tuple(one for one, _ in names), tuple(other for _, other in names))
            missing = tuple(one for one in missing if one not in now)
            fresh = tuple(one for one in fresh if one not in now.values())
        if missing:
            yield self._lost(missing)
        if fresh:
            anchor = new.anchor if new.anchor not in fresh else next(one for one in new.ids if one not in fresh)
            yield Change("members", f"{listed(fresh)} {_is(fresh)} {printable(anchor)}, too", old.ids, fresh)
        yield from self._copies(now)

    def _lost(self, missing: tuple[str, ...]) -> Change:
        old = self.old
        rest = tuple(one for one in old.ids if one not in missing)
        anchor = old.anchor if old.anchor not in missing or not rest else rest[0]
        others = tuple(one for one in missing if one != anchor)
        said = f"{listed(others)} {_is(others)} no longer {printable(anchor)} (was {old.origin})"
        gone = tuple(one for one in others if one not in self.present)
        if self.present and gone:
            said += f"; {listed(gone)} {_is(gone)} not there any more"
        elif old.tied and old.n_copies == 1:
            said += f"; {size(old.n_bytes)} again"
        return Change("lost", said, old.ids, rest, old.n_bytes if not gone else 0)

    def _renames(self, missing: Sequence[str], fresh: Sequence[str]) -> dict[str, str]:
        """Old names to new ones, as far as there are new ones: of one role where there is one, then in order."""
        roles = {member.id: member.role for member in (*self.old.members, *self.new.members)}
        left, found = list(fresh), dict[str, str]()
        for alike in (True, False):
            for one in missing:
                fitting = [other for other in left if roles[other] == roles[one] or not alike]
                if one not in found and fitting:
                    found[one] = fitting[0]
                    left.remove(fitting[0])
        return found

    def _copies(self, now: dict[str, str]) -> Iterator[Change]:
        """Members that are stored apart, and were not; or are stored once, and were not."""
        old, new = self.old, self.new
        before, after = _copy_of(old.members), _copy_of(new.members)
        pairs = {one: (before[one], after[other]) for one, other in now.items()}
        n_before, n_now = len({one for one, _ in pairs.values()}), len({other for _, other in pairs.values()})
        n_bytes = old.n_bytes * (n_now - n_before)
        anchor = old.anchor if old.anchor in pairs else next(iter(pairs), "")
        others = tuple(one for one in pairs if one != anchor)
        apart = tuple(one for one in others if pairs[one][1] != pairs[anchor][1])
        ids = tuple(now.values())
        if n_now > n_before:
            who = apart or others
            said = f"{listed(who)} {_is(who)} stored apart from {printable(anchor)} (was {old.origin})"
            yield Change("lost", f"{said}; {size(n_bytes)} again", old.ids, ids, n_bytes)
        elif n_now < n_before:
            said = f"{listed(others)} {_is(others)} stored once with {printable(anchor)}"
            yield Change("gained", f"{said}; {size(-n_bytes)} less", old.ids, ids)
        elif old.tied and not new.tied and n_now > 1:
            said = f"{listed(others)} {_is(others)} no longer declared to be {printable(anchor)}; equal, stored apart"
            yield Change("lost", said, old.ids, ids)
        elif new.tied and not old.tied and n_now > 1:
            said = f"{listed(others)} {_is(others)} now declared to be {printable(anchor)}"
            yield Change("gained", said, old.ids, ids)

    def _value(self) -> Iterator[Change]:
        old, new = self.old, self.new
        if old.dtype != new.dtype or sorted(old.shape) != sorted(new.shape):
            said = f"{listed(new.ids)}: {new.dtype} {_shape(new)}, before {old.dtype} {_shape(old)}"
            yield Change("value", said, old.ids, new.ids)
        elif old.digest and new.digest and old.digest != new.digest:
            said = f"{listed(new.ids)}: other values, sha256 {new.digest[:12]}…, before {old.digest[:12]}…"
            yield Change("value", said, old.ids, new.ids)


def _copy_of(members: Sequence[LockedMember]) -> dict[str, int]:
    return {member.id: member.copy for member in members}


def _readers(tie: LockedTie) -> Counter[tuple[str, str]]:
    return Counter((member.use, member.view) for member in tie.members)


def _shape(tie: LockedTie) -> str:
    return "×".join(map(str, tie.shape)) or "scalar"
