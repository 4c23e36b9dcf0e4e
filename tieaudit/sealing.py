"""Stage: Subject → the ties that a lock file keeps, each with a digest of its value that no layout changes."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tieaudit.compare import comparable, transposed_blocks
from tieaudit.dtypes import dtype
from tieaudit.equality import copies, declared, of_buffers
from tieaudit.model import Model, Tie, Weight, classes, storage_of
from tieaudit.sealed import Change, Held, Locked, LockedMember, LockedTie
from tieaudit.since import tie_changes
from tieaudit.storage import blocks, reading
from tieaudit.verdict import Subject
from tieaudit.view import AS_STORED, TRANSPOSED, View

OTHER = "other"


def sealed(subject: Subject) -> tuple[LockedTie, ...]:
    """Every tie and every class of equal copies: the closure of what is aliased, absent or measured, in order of ids.

    Constants and buffers are no ties. One stored tensor that serves several operations is a tie by its uses. Raises
    CorruptFile and OSError where bytes cannot be read. Cost: one value of each class is read once, a square matrix
    twice; memory: a few blocks.
    """
    model, found = subject.model, subject.found
    kept = [
        tie
        for tie in found.ties
        if tie.origin in ("aliased", "absent", "measured")
        and not of_buffers(model, tie)
        and not found.constants.intersection(tie.ids)
    ]
    names = classes(tie.ids for tie in kept)
    home = {id: index for index, ids in enumerate(names) for id in ids}
    inside: list[list[Tie]] = [[] for _ in names]
    for tie in kept:
        if tie.ids[0] in home and not tie.members[0].use:
            inside[home[tie.ids[0]]].append(tie)
    claims = [frozenset(claim.members) for claim in declared(model, active=True)]
    with reading():
        named = [_by_names(subject, sorted(ids), ties, claims) for ids, ties in zip(names, inside, strict=True)]
        used = [_by_uses(subject, tie) for tie in kept if tie.members[0].use]
    return tuple(sorted([*named, *used], key=lambda tie: (tie.ids, tie.by_uses)))


def _by_names(subject: Subject, ids: Sequence[str], ties: Sequence[Tie], claims: Sequence[frozenset[str]]) -> LockedTie:
    model = subject.model
    views = _views(model, ids[0], ties)
    number = {id: index for index, names in enumerate(copies(model, ids)) for id in names}
    for tie in ties:
        if tie.origin == "absent" and tie.ids[0] in number:
            number |= {id: number.get(id, number[tie.ids[0]]) for id in tie.ids}
    members = tuple(LockedMember(id, _kind(subject, id), str(views.get(id, AS_STORED)), copy=number.get(id, 0))
                    for id in ids)  # fmt: skip
    stored = [model.by_id[id] for id in ids if not model.by_id[id].absent]
    shape = _views(model, stored[0].id, ties).get(ids[0], AS_STORED).shape(stored[0].shape)
    n_copies = len(set(number.values()))
    origin: Held = "declared" if any(claim >= set(ids) for claim in claims) else "measured"
    if n_copies == 1:
        origin = "aliased" if len(stored) == len(ids) else "absent"
    return LockedTie(members, origin, stored[0].dtype, shape, _digest(subject, stored))


def _by_uses(subject: Subject, tie: Tie) -> LockedTie:
    weight, kind = subject.model.by_id[tie.members[0].id], _kind(subject, tie.members[0].id)
    members = [LockedMember(one.id, kind, str(one.view), use=one.use.partition(" @ ")[0]) for one in tie.members]
    members.sort(key=lambda one: (one.view != str(AS_STORED), one.use, one.view))
    return LockedTie(tuple(members), "aliased", weight.dtype, weight.shape, _digest(subject, [weight]))


def n_by_kind(subject: Subject) -> dict[str, int]:
    """Kind of role → how many weights have it, absent ones included."""
    kinds = Counter(subject.roles[one.id].kind for one in subject.model.weights if one.id in subject.roles)
    return dict(sorted(kinds.items()))


def _kind(subject: Subject, id: str) -> str:
    role = subject.roles.get(id)
    return role.kind if role is not None else OTHER


def _views(model: Model, anchor: str, ties: Sequence[Tie]) -> dict[str, View]:
    """How each member is seen from the anchor, through the views that the ties give from their first members."""
    steps: dict[str, list[tuple[str, View]]] = {}
    for tie in ties:
        first = tie.members[0]
        for other in tie.members[1:]:
            steps.setdefault(first.id, []).append((other.id, other.view))
            back = other.view.inverse(model.by_id[first.id].shape)
            if back is not None:
                steps.setdefault(other.id, []).append((first.id, back))
    found, pending = {anchor: AS_STORED}, [anchor]
    while pending:
        here = pending.pop()
        for id, view in steps.get(here, ()):
            if id not in found:
                found[id] = found[here].compose(view)
                pending.append(id)
    return found


def _digest(subject: Subject, stored: Sequence[Weight]) -> str:
    hidden = subject.unseen(weight.id for weight in stored)
    held = next((weight for weight in stored if weight.id not in hidden), None)
    return "" if held is None else fingerprint(held)


def fingerprint(weight: Weight, as_type: str = "") -> str:
    """sha256 of the little-endian bytes of a weight, the same for a matrix and for its transpose.

    A matrix is digested with its longer side as rows, whichever way it is stored; of a square one both ways are
    digested and the digest that sorts first counts. Every other tensor is digested as stored, row by row. Element type
    and shape are not in the digest: compare them beside it. `as_type`: numbers are converted to this type first,
    rounding to nearest even.
    Cost: reads the weight once, a square matrix twice, in blocks.
    """
    return min(_hashed(_converted(pieces, weight.dtype, as_type)) for pieces in _layouts(weight))


def _layouts(weight: Weight) -> Iterator[Iterable[bytes]]:
    shape = weight.shape
    dense = weight.n_bytes == dtype(weight.dtype).n_bytes(weight.n_elements)
    turns = len(shape) == 2 and min(shape) > 1 and dense and comparable(weight.dtype, TRANSPOSED)
    if not turns or shape[0] >= shape[1]:
        yield blocks(storage_of(weight))
    if turns and shape[0] <= shape[1]:
        yield transposed_blocks(weight)


def _converted(pieces: Iterable[bytes], before: str, after: str) -> Iterator[bytes]:
    if not after or after == before:
        yield from pieces
        return
    import numpy as np

    one, other = dtype(before).numpy(), dtype(after).numpy()
    for piece in pieces:
        with np.errstate(over="ignore", invalid="ignore"):
            yield np.frombuffer(piece, one).astype(other).tobytes()


def _hashed(pieces: Iterable[bytes]) -> str:
    running = hashlib.sha256()
    for piece in pieces:
        running.update(piece)
    return running.hexdigest()


_latest: list[tuple[weakref.ref[Subject], tuple[Change, ...]]] = []
"""The subject that was looked at last and its changes: two rules ask one after the other, and digests are dear."""


def changes_since(subject: Subject) -> tuple[Change, ...]:
    """What became of the ties that were locked of this model, for rules. Nothing where nothing was locked.

    Cost: as `sealed`, once for a subject however often it is asked.
    """
    if subject.locked is None:
        return ()
    if not _latest or _latest[0][0]() is not subject:
        after = sealed(replace(subject, locked=None))
        roles = subject.locked.roles, n_by_kind(subject)
        said = tuple(tie_changes(subject.locked.ties, after, subject.model.by_id, roles))
        _latest[:] = [(weakref.ref(subject), said)]
    return _latest[0][1]


def doubtful(subject: Subject) -> tuple[str, ...]:
    """Members of locked ties whose bytes nobody here has seen, so that nothing is known about their ties."""
    if subject.locked is None:
        return ()
    return tuple(subject.unseen(dict.fromkeys(id for tie in subject.locked.ties for id in tie.ids)))


def as_locked(subject: Subject) -> Locked:
    """A model's ties as a lock file would have them, without its totals of bytes: what the examples of rules need."""
    return Locked(subject.model.path, subject.model.format, None, 0, 0, sealed(subject), n_by_kind(subject))
