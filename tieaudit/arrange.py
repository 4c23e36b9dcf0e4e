"""A model as a plan wants it: which names will be one memory and which will lie apart, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tieaudit.change import Equalise, Plan, Pool, Share, Unshare
from tieaudit.dtypes import dtype
from tieaudit.errors import RewriteRefused
from tieaudit.model import Model, Weight
from tieaudit.pooling import pooled_weight
from tieaudit.storage import Region, Storage
from tieaudit.strided import Strided, row_major
from tieaudit.view import AS_STORED, Shape, Transpose, View


@dataclass(frozen=True)
class Apart:
    """The bytes of another storage, row by row, in a place that nothing else is in."""

    source: Storage
    name: str
    """Unique among the places of one model."""

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes

    @property
    def region(self) -> Region:
        return (self.name, 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return self.source.read_ranges(ranges)


def plain_source(storage: Storage) -> Storage:
    """The storage whose bytes are read: of one that was only put apart, the one behind it."""
    while isinstance(storage, Apart):
        storage = storage.source
    return storage


def arranged(model: Model, plan: Plan) -> Model:
    """The model with the storages and shapes that the plan's edits give it; nothing is read.

    RewriteRefused for a view that is no step through the common bytes.
    """
    storages: dict[str, Storage | None] = {weight.id: weight.storage for weight in model.weights}
    shapes = {weight.id: weight.shape for weight in model.weights}
    by_name = {weight.name: weight for weight in model.weights}
    for number, edit in enumerate(plan.edits):
        if isinstance(edit, Share) and not _is_one_already(model, edit):
            first = next(model.by_id[one.id] for one in edit.members if edit.values or not model.by_id[one.id].absent)
            whole = edit.values if edit.values is not None else first.storage
            if whole is not None:
                common = Apart(whole, f"planned {number}")
                storages.update({one.id: _seen(common, first, one.view) for one in edit.members})
        elif isinstance(edit, Equalise):
            storages.update({by_name[name].id: one for name, one in equal_values(model, edit).items()})
        elif isinstance(edit, Pool):
            for how in edit.weights:
                shapes[how.id], storages[how.id] = pooled_weight(model.by_id[how.id], how, edit)
        elif isinstance(edit, Unshare):
            # a name that is stored already may see the common bytes in another order, and keeps what it sees
            source = by_name[edit.name].storage or model.by_id[edit.source].storage
            storages[by_name[edit.name].id] = Apart(source, f"planned {number}") if source is not None else None
    changed = (replace(one, storage=storages[one.id], shape=shapes[one.id]) for one in model.weights)
    return replace(model, weights=tuple(changed))


def equal_values(model: Model, edit: Equalise) -> dict[str, Storage]:
    """Name of each member → the common value as the member sees it, in a place of its own; nothing is read.

    RewriteRefused for a view that is no step through the common bytes.
    """
    first = model.by_id[edit.members[0].id]
    whole = edit.values if edit.values is not None else first.storage
    if whole is None:
        raise RewriteRefused(f"{first.id} is not stored")
    names = {one.id: model.by_id[one.id].name for one in edit.members}
    return {names[one.id]: _seen(Apart(whole, f"planned {one.id}"), first, one.view) for one in edit.members}


def aliases_of(model: Model, edit: Equalise) -> dict[str, str]:
    """Name → the name that it has one value with, as the alias map of safetensors notes it. Views cannot be noted."""
    first = model.by_id[edit.members[0].id].name
    names = (model.by_id[one.id].name for one in edit.members[1:] if one.view == AS_STORED)
    return {name: first for name in names if name not in (first, "format")}


def _is_one_already(model: Model, share: Share) -> bool:
    storages = [model.by_id[one.id].storage for one in share.members]
    return share.values is None and len({one.region if one is not None else None for one in storages}) == 1


def _seen(common: Apart, first: Weight, view: View) -> Storage:
    if view == AS_STORED:
        return common
    strides = strides_through(first.shape, view)
    item = dtype(first.dtype).item_bytes
    if strides is None or item is None:
        raise RewriteRefused(f"{first.id}: a tensor that is {view} cannot share its bytes")
    return Strided(common, 0, view.shape(first.shape), strides, item)


def strides_through(shape: Shape, view: View) -> tuple[int, ...] | None:
    """Strides, in elements, at which a view of a row-major tensor steps through it; None for other views than
    permutations of axes.

    >>> from tieaudit.view import TRANSPOSED
    >>> strides_through((2, 3), TRANSPOSED)
    (1, 3)
    """
    strides = row_major(shape)
    for step in view.steps:
        if not isinstance(step, Transpose):
            return None
        strides = tuple(strides[axis] for axis in step.perm)
    return strides
