"""Stage: Model → Found. Which weights are one, by region, by declaration, and by their bytes.

Measured ties cost what collides, not what is stored: bucket by element type and shape, split by a few probed
elements, and only what still collides is compared in full, in blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tieaudit.compare import N_ROUNDS, comparable, constant_value, digest, head, probe, same_through
from tieaudit.dtypes import dtype
from tieaudit.errors import UnreadableModel
from tieaudit.model import Declaration, Member, Model, Tie, Use, Weight, classes, storage_of
from tieaudit.regions import Names, aliases, overlaps
from tieaudit.registry import discover
from tieaudit.relations import Relation
from tieaudit.storage import no_values, reading
from tieaudit.strided import own_strides
from tieaudit.verdict import Apart, Found
from tieaudit.view import AS_STORED, TRANSPOSED, Shape, View

_NOT_A_ROLE = frozenset({"Shape", "Size"})
"""Consumers that look at a weight without using its values."""

Progress = Callable[[int], None]


def find(model: Model, *, progress: Progress | None = None) -> Found:
    """Every tie of the model, of every origin, and the constants.

    Cost: a few small reads per weight, plus both members of every colliding pair once. `progress` is told the
    bytes compared in full. Weights whose bytes cannot be read end up in `Found.unreadable`.
    """
    with reading(scattered=True) as files:
        found = _find(model, progress)
        return replace(found, n_bytes_read=files.n_bytes)


def _find(model: Model, progress: Progress | None) -> Found:
    unreadable: dict[str, str] = {}
    stored = [weight for weight in model.weights if weight.storage is not None and weight.n_elements > 0]
    shared = aliases(stored)
    names = {group[0][0].id: group for alias in shared for group in _one_by_relation(alias)}
    representatives = [group[0][0] for group in names.values() if not no_values(storage_of(group[0][0]))]

    looks: dict[str, _Look] = {}
    constants = _constants(representatives, looks, unreadable)
    readable = [w for w in representatives if w.id not in constants and w.id not in unreadable]
    ties = [*_aliased(shared), *_shared_uses(model, constants, names)]
    position = {weight.id: index for index, weight in enumerate(model.weights)}
    for members in _measured(readable, looks, unreadable, progress):
        ties.append(_measured_tie(position, members, names))
    far: tuple[Apart, ...] = ()
    if model.quantised:
        from tieaudit.dequantise import apart, repacked

        ties.extend(repacked(model))
        one_value = classes(tie.ids for tie in ties if tie.origin in ("measured", "aliased"))
        far = tuple(apart(model, {id: index for index, ids in enumerate(one_value) for id in ids}))
    ties.extend(_declared(model))
    constant_ids = frozenset(w.id for first in constants for w, _ in names[first])
    slices = overlaps(shared)
    return Found(tuple(ties), constant_ids, _constant_classes(constants, names), far, unreadable, overlaps=slices)


def _aliased(shared: Iterable[Names]) -> Iterable[Tie]:
    """Names of exactly the same bytes: one value by construction. Partial overlaps are no equality."""
    for names in shared:
        if len(names) > 1:
            where = storage_of(names[0][0]).region
            because = f"{len(names)} names of bytes {where[1]}–{where[2]} of {where[0].rsplit('/', 1)[-1]}"
            yield Tie(tuple(Member(weight.id, view) for weight, view in names), "aliased", because)


def _one_by_relation(names: Names) -> list[Names]:
    """Names of one region by who can stand for whom when copies are looked for: as stored, or transposed.

    One that is stored row by row stands for the others: it is read in one piece.
    """
    found: dict[object, Names] = {}
    for weight, view in names:
        simple = view in (AS_STORED, TRANSPOSED)
        found.setdefault(None if simple else (weight.shape, view), []).append((weight, view))
    groups = []
    for group in found.values():
        group = [(weight, AS_STORED if view not in (AS_STORED, TRANSPOSED) else view) for weight, view in group]
        at = next((n for n, (weight, _) in enumerate(group) if own_strides(storage_of(weight)) is None), 0)
        turn = group[at][1]  # its own inverse
        others = [(weight, turn.compose(view)) for weight, view in (*group[:at], *group[at + 1 :])]
        groups.append([(group[at][0], AS_STORED), *others])
    return groups


def _shared_uses(model: Model, constants: Iterable[str], names: Mapping[str, Names]) -> Iterable[Tie]:
    """One stored parameter that serves several operations of the graph.

    Where the graph knows modules, the same operation in a further call of its module is no further role, and modules
    that each have a name for the parameter are a tie of names.
    """
    constant = set(constants)
    n_names = {weight.id: len(group) for group in names.values() for weight, _ in group}
    for id, uses in model.uses_of.items():
        weight = model.by_id[id]
        if weight.parameter is not True or id in constant or weight.n_elements < 2:
            continue
        consumers: dict[tuple[object, ...], Use] = {}
        for use in _one_call_of_each(uses):
            if use.op not in _NOT_A_ROLE and not use.node.startswith("@"):
                consumers.setdefault((use.part, use.scope, use.calls, use.node, use.slot), use)
        if uses[0].call and len(consumers) <= n_names.get(id, 1):
            continue
        if len(consumers) > 1 and not _cut_up(tuple(consumers.values())):
            members = tuple(Member(id, use.view, _reader(use)) for use in consumers.values())
            yield Tie(members, "aliased", f"one stored tensor serves {len(consumers)} operations")


def _one_call_of_each(uses: Sequence[Use]) -> list[Use]:
    """The uses in one call of every module, that with most of them; all uses where the graph knows no modules."""
    by_call: dict[tuple[str, str], list[Use]] = defaultdict(list)
    for use in uses:
        path, _, number = use.call[-1].rpartition("@") if use.call else ("", "", "")
        by_call[path, number].append(use)
    fullest: dict[str, list[Use]] = {}
    for (path, _), found in by_call.items():
        if len(found) > len(fullest.get(path, ())):
            fullest[path] = found
    return [use for found in fullest.values() for use in found]


_N_MOST_PARTS = 256


def _cut_up(uses: Sequence[Use]) -> bool:
    """Whether every consumer reads another part: the gates of one recurrent cell are one use, however often it is cut.

    Cost: quadratic in the uses, up to `_N_MOST_PARTS`.
    """
    boxes = [use.box for use in uses]
    if len(boxes) > _N_MOST_PARTS or not all(boxes) or len({use.view for use in uses}) > 1:
        return False
    return all(
        any(min(end, other_end) <= max(begin, other_begin)
            for (begin, end), (other_begin, other_end) in zip(one, other, strict=True))
        for index, one in enumerate(boxes) for other in boxes[:index]
    )  # fmt: skip


def _reader(use: Use) -> str:
    """The consumer as a report names it."""
    return f"{use.op} @ {use.node}" + (f" in {' / '.join(use.calls)}" if use.calls else "")


@dataclass(frozen=True, slots=True)
class _Look:
    """What the first read of a weight showed."""

    head: int
    """Hash of its beginning."""
    corner: bytes
    """Its first element, which is that of its transposes, too; empty where elements are no whole bytes."""


def _constants(
    weights: Iterable[Weight], looks: dict[str, _Look], unreadable: dict[str, str]
) -> dict[str, tuple[Weight, bytes]]:
    """The constants among the weights, and a first look at every one of them."""
    found = {}
    for weight in weights:
        try:
            beginning = head(weight)
            looks[weight.id] = _Look(hash(beginning), beginning[: dtype(weight.dtype).item_bytes or 0])
            value = constant_value(weight, beginning)
        except (UnreadableModel, OSError) as error:
            unreadable[weight.id] = str(error)
            continue
        if value is not None:
            found[weight.id] = (weight, value)
    return found


def _constant_classes(
    constants: dict[str, tuple[Weight, bytes]], names: Mapping[str, Names]
) -> tuple[tuple[str, ...], ...]:
    by_value: dict[tuple[str, tuple[int, ...], bytes], list[str]] = defaultdict(list)
    for weight, value in constants.values():
        if weight.dtype == "string":  # a lone string is one value, but two of them need not be the same one
            value = b"".join(storage_of(weight).read_ranges([(0, weight.n_bytes)]))
        by_value[weight.dtype, weight.shape, value].extend(w.id for w, _ in names[weight.id])
    return tuple(tuple(ids) for ids in by_value.values() if len(ids) > 1)


def _measured(
    weights: Sequence[Weight], looks: Mapping[str, _Look], unreadable: dict[str, str], progress: Progress | None
) -> Iterable[list[tuple[Weight, View]]]:
    """Classes under the exact relations: each member with the view through which the first one becomes it."""
    relations = sorted(discover("relations", Relation).values(), key=lambda relation: relation.precedence)
    buckets: dict[object, list[Weight]] = defaultdict(list)
    for weight in weights:
        kind = "sparse" if weight.held_as == "sparse_initializer" else "dense"
        buckets[kind, weight.dtype, weight.n_bytes, tuple(sorted(weight.shape))].append(weight)
    for bucket in buckets.values():
        if len(bucket) < 2:
            continue
        shapes = {weight.shape for weight in bucket}
        views = {relation.fits(a, b) for relation in relations for a in shapes for b in shapes}
        by_look: dict[object, list[Weight]] = defaultdict(list)
        for weight in bucket:
            look = looks[weight.id]
            by_look[look.head if views <= {AS_STORED, None} else look.corner].append(weight)
        for crowd in _refined([crowd for crowd in by_look.values() if len(crowd) > 1], unreadable):
            try:
                yield from _classes(crowd, relations, progress)
            except (UnreadableModel, OSError) as error:
                unreadable.update({weight.id: str(error) for weight in crowd})


def _refined(crowds: list[list[Weight]], unreadable: dict[str, str]) -> list[list[Weight]]:
    """Split by probes until only what collides everywhere is together."""
    for round_number in range(N_ROUNDS):
        split: list[list[Weight]] = []
        for crowd in crowds:
            by_probe: dict[bytes, list[Weight]] = defaultdict(list)
            for weight in crowd:
                try:
                    by_probe[probe(weight, round_number)].append(weight)
                except (UnreadableModel, OSError) as error:
                    unreadable[weight.id] = str(error)
            split.extend(group for group in by_probe.values() if len(group) > 1)
        crowds = split
    return crowds


def _classes(
    crowd: list[Weight], relations: Sequence[Relation], progress: Progress | None
) -> Iterable[list[tuple[Weight, View]]]:
    """Two are compared directly, with an end at the first difference; more are told apart by digests, in linear time:

    comparing each with every class would take hours for thousands of masks that differ in one element.
    """
    found: list[list[tuple[Weight, View]]] = []
    by_digest: dict[Shape, dict[str, list[tuple[Weight, View]]]] = {}
    for weight in crowd:
        home = (
            _home(weight, found, relations, progress)
            if len(crowd) == 2
            else _home_by_digest(weight, by_digest, relations)
        )
        if home is not None:
            home[0].append((weight, home[1]))
            continue
        found.append([(weight, AS_STORED)])
        if len(crowd) > 2:
            by_digest.setdefault(weight.shape, {})[digest(weight)] = found[-1]
    for members in found:
        if len(members) > 1:
            yield members


def _home(
    weight: Weight, found: list[list[tuple[Weight, View]]], relations: Sequence[Relation], progress: Progress | None
) -> tuple[list[tuple[Weight, View]], View] | None:
    """The class that this weight belongs to and the view through which its first member is the weight; or None."""
    for members in found:
        first = members[0][0]
        for relation in relations:
            view = relation.fits(first.shape, weight.shape)
            if view is not None and same_through(first, weight, view, progress=progress):
                return members, view
    return None


def _home_by_digest(
    weight: Weight, by_digest: dict[Shape, dict[str, list[tuple[Weight, View]]]], relations: Sequence[Relation]
) -> tuple[list[tuple[Weight, View]], View] | None:
    """As `_home`: what the first member of the class must be, were it related, is looked up by its digest."""
    for relation in relations:
        for shape, known in by_digest.items():
            view = relation.fits(shape, weight.shape)
            back = view.inverse(shape) if view is not None else None
            if view is None or back is None or not comparable(weight.dtype, back):
                continue
            members = known.get(digest(weight, back))
            if members is not None:
                return members, view
    return None


def _measured_tie(position: Mapping[str, int], members: list[tuple[Weight, View]], names: Mapping[str, Names]) -> Tie:
    every = [Member(alias.id, view.compose(seen)) for weight, view in members for alias, seen in names[weight.id]]
    every.sort(key=lambda member: position[member.id])
    if every[0].view != AS_STORED:  # make the first name the anchor: a transpose is its own inverse
        every = [Member(m.id, m.view.compose(every[0].view)) for m in every]
    n_transposed = sum(member.view != AS_STORED for member in every)
    because = f"{len(members)} stored copies with identical bytes"
    if n_transposed:
        because += f", {n_transposed} of them transposed"
    return Tie(tuple(every), "measured", because, sum(weight.n_bytes for weight, _ in members[1:]))


def _declared(model: Model) -> Iterable[Tie]:
    for declaration in model.declarations:
        known = [id for id in declaration.members if id in model.by_id]
        stored = [id for id in known if not model.by_id[id].absent]
        if not declaration.active or len(known) < 2 or not stored:
            continue
        members = tuple(Member(id) for id in known)
        yield Tie(members, "declared", f"{declaration.claimed_by}: {declaration.because}".rstrip(": "))
        if declaration.restores and len(stored) < len(known):
            kept = (stored[0], *(id for id in known if model.by_id[id].absent))
            yield Tie(
                tuple(Member(id) for id in kept),
                "absent",
                _restored(declaration, stored[0]),
            )


def _restored(declaration: Declaration, stored: str) -> str:
    """Who fills what is not stored: everybody from the first member of the tie, not everybody from another one."""
    if stored == declaration.members[0]:
        return f"not stored; {', '.join(declaration.honoured_by) or 'the loader'} restores it from {stored}"
    return f"not stored; tied to {stored}, from which not every loader restores it"
