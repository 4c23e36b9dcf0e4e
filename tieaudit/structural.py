"""The structural proof: every original use reads exactly the planned bytes, and nothing else changed. Runs nothing.

Bytes are compared in blocks, so memory stays bounded whatever the model's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tieaudit import adjusting, pooling
from tieaudit.change import Equalise, Plan, Pool, Respell, Rewritten, Share, Unshare, Written
from tieaudit.compare import same_through
from tieaudit.dtypes import dtype
from tieaudit.model import Member, Model, Use, Weight
from tieaudit.sameness import same_value, same_view
from tieaudit.view import AS_STORED, TRANSPOSED, Cast, Repack, Reshape, View

Place = tuple[str, str, str, int]
"""Part, scope, node and slot of a use."""
_NAMES_AXES = frozenset({"Gather", "Einsum"})
"""Operations that say which axis they read in an attribute, which no view shows."""
_IN_BLOCKS = "com.microsoft.GatherBlockQuantized"
_PRODUCTS = frozenset({"MatMul", "Gemm", "com.microsoft.FusedMatMul"})


@dataclass(frozen=True)
class Serving:
    """Which stored weight of the rewritten model serves an original one, and how each is seen from the common value."""

    id: str
    original: View
    stored: View


@dataclass
class Check:
    """What was compared and what is wrong, in sentences."""

    problems: list[str] = field(default_factory=list)
    n_untouched: int = 0
    n_bytes: int = 0
    n_uses: int = 0
    served: dict[str, Serving] = field(default_factory=dict)


def check(before: Model, after: Model, plan: Plan, written: Written) -> Check:
    """Compare the rewritten model with the original and the plan.

    Cost: every stored byte of both models is read once, in blocks; the uses are compared in linear time.
    """
    result = Check()
    touched = touched_ids(plan)
    copies = {edit.name for edit in plan.edits if isinstance(edit, Unshare)}  # absent before, stored afterwards
    _untouched_weights(before, after, touched | copies, result)
    for edit in plan.edits:
        if isinstance(edit, Share):
            _share(before, after, edit, plan, written, result)
            result.problems.extend(adjusting.problems(before, after, edit, written))
        elif isinstance(edit, Pool):
            _pool(before, after, edit, written, result)
        elif isinstance(edit, Equalise):
            _equalise(before, after, edit, result)
        elif isinstance(edit, Respell):
            _kept(before, after, edit.weight, written, result)
        elif isinstance(edit, Unshare):
            _unshare(before, after, edit, written, result)
    if before.has_graph and after.has_graph and not result.problems:
        _uses(before, after, plan, written, result)
    return result


def touched_ids(plan: Plan) -> frozenset[str]:
    """Ids of the weights that the plan names."""
    found: set[str] = set()
    for edit in plan.edits:
        if isinstance(edit, (Share, Equalise)):
            found.update(member.id for member in edit.members)
        elif isinstance(edit, Respell):
            found.add(edit.weight)
        elif isinstance(edit, Unshare):
            found.add(edit.source)
        elif isinstance(edit, Pool):
            found.update(one.id for one in edit.weights)
    return frozenset(found)


def planned_value(before: Model, share: Share | Equalise) -> Weight | None:
    """The common value of a class, in the first member's layout; None if the first member stores nothing."""
    first = before.by_id[share.members[0].id]
    storage = first.storage if share.values is None else share.values
    return None if storage is None else replace(first, storage=storage)


def planned_values(before: Model, share: Share | Equalise) -> Iterator[tuple[Weight, NDArray[Any]]]:
    """Each stored member with what it is to see, adjusted, in its own layout; codes and strings as plain bytes.

    Cost: the common value, held in memory.
    """
    common = planned_value(before, share)
    if common is None or common.storage is None:
        return
    values = np.frombuffer(common.storage.read_ranges([(0, common.n_bytes)])[0], np.uint8)
    kind = dtype(common.dtype)
    whole: NDArray[Any] = values if kind.item_bytes is None else values.view(kind.numpy()).reshape(common.shape)
    for member in share.members:
        if before.by_id[member.id].storage is None:
            continue
        adjustment = share.adjustments.get(member.id) if isinstance(share, Share) else None
        seen = whole if adjustment is None else adjusting.adjusted(whole, adjustment)
        yield before.by_id[member.id], member.view.apply(seen) if kind.item_bytes is not None else seen


def _untouched_weights(before: Model, after: Model, touched: frozenset[str], result: Check) -> None:
    met: dict[object, bool] = {}
    for weight in before.weights:
        if weight.id in touched:
            continue
        now = after.by_id.get(weight.id)
        if now is None:
            result.problems.append(f"{weight.id}: not named by the plan, but missing afterwards")
        elif weight.storage is None or now.storage is None:
            if (weight.storage is None) != (now.storage is None):
                result.problems.append(f"{weight.id}: {_stored(weight)} before, {_stored(now)} afterwards")
        elif (weight.dtype, weight.shape, weight.held_as) != (now.dtype, now.shape, now.held_as):
            result.problems.append(f"{weight.id}: expected {_kind(weight)}, found {_kind(now)}")
        else:
            regions = (weight.storage.region, now.storage.region)
            if regions not in met:  # several names of one region are read once
                met[regions] = same_through(weight, now, AS_STORED)
                result.n_bytes += weight.n_bytes
            if not met[regions]:
                result.problems.append(f"{weight.id}: not named by the plan, but its bytes changed")
            result.n_untouched += 1


def _stored(weight: Weight) -> str:
    return "not stored" if weight.absent else "stored"


def _kind(weight: Weight) -> str:
    return f"{weight.dtype}{list(weight.shape)} held as {weight.held_as}"


def _share(before: Model, after: Model, edit: Share, plan: Plan, written: Written, result: Check) -> None:
    lone = plan.into is not None and after.format == "safetensors"
    common = planned_value(before, edit)
    if common is None:
        result.problems.append(f"{edit.members[0].id}: the plan keeps its bytes, but it stores none")
        return
    if plan.lossless or edit.lossless:
        for member in edit.members:
            original = before.by_id[member.id]
            if original.storage is not None and not same_value(common, original, member.view):
                result.problems.append(f"{member.id}: the plan is lossless, but its bytes are not the planned ones")
    homes = {member.id: written.renamed.get(member.id, member.id) for member in edit.members}
    stored = {
        home: after.by_id[home] for home in homes.values() if home in after.by_id and not after.by_id[home].absent
    }
    regions = {weight.storage.region for weight in stored.values() if weight.storage is not None}
    if len(regions) != 1:
        where = ", ".join(sorted(stored)) or "nowhere"
        result.problems.append(f"{', '.join(homes)}: expected one stored tensor, found {len(regions)}: {where}")
        return
    views = {id: _stored_view(common, home, edit.members) for id, home in stored.items()}
    lost = [id for id, view in views.items() if view is None]
    if lost:
        result.problems.append(f"{lost[0]}: its bytes are not the planned ones under any member's view")
        return
    result.n_bytes += common.n_bytes
    for member in edit.members:
        home_id = homes[member.id]
        if home_id not in stored:
            if not any(_restored(after, member.id, home, lone) for home in stored):
                kept = ", ".join(stored)
                result.problems.append(f"{member.id}: not stored, and no declaration restores it from {kept}")
            home_id = next(iter(stored))
        result.served[member.id] = Serving(home_id, member.view, views[home_id] or AS_STORED)


def _equalise(before: Model, after: Model, edit: Equalise, result: Check) -> None:
    """Every member is stored and holds the common value, which is computed once: the others are held to the first."""
    common = planned_value(before, edit)
    if common is None:
        result.problems.append(f"{edit.members[0].id}: the plan keeps its bytes, but it stores none")
        return
    expected = common
    for member in edit.members:
        now = after.by_id.get(member.id)
        if now is None or now.storage is None:
            result.problems.append(f"{member.id}: expected the planned value under this name, found nothing stored")
            return
        if not same_value(expected, now, member.view):
            result.problems.append(f"{member.id}: its bytes are not the planned ones")
            return
        if expected is common and member.view == AS_STORED:
            expected = now
        result.n_bytes += now.n_bytes
        result.served[member.id] = Serving(member.id, member.view, member.view)


def _pool(before: Model, after: Model, edit: Pool, written: Written, result: Check) -> None:
    result.problems.extend(pooling.problems(before, after, edit, written))
    for one in edit.weights:
        result.served[one.id] = Serving(one.id, AS_STORED, AS_STORED)
        result.n_bytes += after.by_id[one.id].n_bytes if one.id in after.by_id else 0


def _stored_view(common: Weight, home: Weight, members: Iterable[Member]) -> View | None:
    """The view from the common value to what is stored: the own member's first, then any other's."""
    for member in sorted(members, key=lambda one: one.id != home.id):
        if same_value(common, home, member.view):
            return member.view
    if len(common.shape) == 2 and same_value(common, home, TRANSPOSED):
        return TRANSPOSED
    return None


def _restored(after: Model, id: str, home: str, lone: bool) -> bool:
    """Whether a loader gives the name its tensor. `lone`: a file without a class, where the alias map says it."""
    return any(
        one.active and (one.restores or lone) and id in one.members and home in one.members
        for one in after.declarations
    )


def _kept(before: Model, after: Model, id: str, written: Written, result: Check) -> None:
    """A weight whose bytes stay what they are while its uses are expressed differently."""
    weight, home_id = before.by_id[id], written.renamed.get(id, id)
    home = after.by_id.get(home_id)
    if home is None or weight.storage is None or home.storage is None:
        result.problems.append(f"{id}: missing afterwards")
        return
    for view in (AS_STORED, TRANSPOSED) if len(weight.shape) == 2 else (AS_STORED,):
        if same_value(weight, home, view):
            result.served.setdefault(id, Serving(home_id, AS_STORED, view))
            result.n_bytes += weight.n_bytes
            return
    result.problems.append(f"{id}: its bytes changed")


def _unshare(before: Model, after: Model, edit: Unshare, written: Written, result: Check) -> None:
    _kept(before, after, edit.source, written, result)
    source = before.by_id[edit.source]
    # a name that shares the source's storage already may see it in another order, and keeps what it sees
    named = next((w for w in before.weights if edit.name in (w.name, w.id) and not w.absent), source)
    copy = next((w for w in after.weights if edit.name in (w.name, w.id)), None)
    home = after.by_id.get(written.renamed.get(edit.source, edit.source))
    if copy is None or copy.storage is None:
        result.problems.append(f"{edit.name}: expected a stored copy of {edit.source}, found none")
    elif not same_value(named, copy):
        result.problems.append(f"{edit.name}: its bytes are not those of {edit.source}")
    elif home is not None and home.storage is not None and home.storage.region == copy.storage.region:
        result.problems.append(f"{edit.name}: expected a storage of its own, found that of {edit.source}")
    else:
        result.n_bytes += copy.n_bytes


def _place(use: Use) -> Place:
    return (use.part, use.scope, use.node, use.slot)


def _uses(before: Model, after: Model, plan: Plan, written: Written, result: Check) -> None:
    """Every original use reads through an equal view, at the same place or where the format says it went."""
    moved: Mapping[Place, Rewritten] = {(r.part, r.scope, r.node, r.slot): r for r in written.rewritten}
    copies = {place: edit.name for edit in plan.edits if isinstance(edit, Unshare) for place in edit.uses}
    now: dict[tuple[Place, str], list[Use]] = {}  # a function that is called often reads several weights in one place
    for use in after.uses:
        now.setdefault((_place(use), use.weight), []).append(use)
    for use in before.uses:
        result.n_uses += 1
        place = _place(use)
        rewritten = moved.get(place)
        if rewritten is not None:
            place = (use.part, use.scope, rewritten.new_node, rewritten.new_slot)
        serving = result.served.get(use.weight, Serving(use.weight, AS_STORED, AS_STORED))
        expected = _copy_id(after, copies[_place(use)]) if _place(use) in copies else serving.id
        readers = now.get((place, expected), [])
        found = _like(readers, use)
        where = f"{use.op} @ {use.node} (input {use.slot})"
        if found is None:
            result.problems.append(f"{where}: expected it to read {expected}, which it does not")
        elif not _sees_the_same(use, found, serving, before, after, rewritten is not None):
            result.problems.append(f"{where}: reads {expected} through another view ({found.view}) than planned")
    result.problems.extend(_strangers(before, after, (use for readers in now.values() for use in readers)))


def _like(readers: list[Use], use: Use) -> Use | None:
    """Take out the use by the same call of a function; any other of the same place if calls were not written down."""
    if not readers:
        return None
    return readers.pop(next((index for index, one in enumerate(readers) if one.calls == use.calls), 0))


def _copy_id(after: Model, name: str) -> str:
    return next((weight.id for weight in after.weights if name in (weight.id, weight.name)), name)


def _sees_the_same(use: Use, found: Use, serving: Serving, before: Model, after: Model, rewritten: bool) -> bool:
    """The equation of a tie: common value → member → consumer equals common value → stored → new consumer."""
    if found.op != use.op and not (rewritten and {found.op, use.op} <= _PRODUCTS):
        return False
    weight = before.by_id[use.weight]
    inverse = serving.original.inverse(_common_shape(weight.shape, serving.original))
    stored = serving.stored if inverse is None else inverse.compose(serving.stored)  # from the member to what is stored
    planned, seen = use.view, stored.compose(found.view)
    if same_view(weight.shape, planned, seen):
        return True
    if rewritten and use.op == _IN_BLOCKS and not planned.steps and seen.steps:
        # the same codes in the other packing, with a block to a row of its own: the regional proof looks at the numbers
        if use.slot == 0:
            return len(seen.steps) == 1 and isinstance(seen.steps[0], Repack)
        cut = Reshape((*weight.shape, 1))
        return seen.steps in ((cut,), (Cast("uint8"), cut))
    # a lookup along the other axis of the transposed table reads the same rows: the regional proof looks at the axis
    return rewritten and use.op in _NAMES_AXES and same_view(weight.shape, planned, seen.compose(TRANSPOSED))


def _common_shape(member_shape: tuple[int, ...], view: View) -> tuple[int, ...]:
    """The shape of the common value of which a member of `member_shape` is `view`."""
    if view.transposes:
        return member_shape[::-1]
    return member_shape


def _strangers(before: Model, after: Model, uses: Iterable[Use]) -> Iterator[str]:
    """Uses that did not exist: allowed for weights that are new themselves (shapes of a rewritten pattern)."""
    counts = Counter(use.weight for use in uses if use.weight in before.by_id)
    for id, count in counts.items():
        yield f"{id}: has {count} uses afterwards that it did not have"
