"""A new safetensors file from any model, with ties as `safetensors.torch.save_model` writes them.

The format gives every byte one owner, so a tie is an absence: of names that are one tensor the first in order is
stored, the others are listed in `__metadata__` as {dropped: kept}. `safetensors.torch.load_model` loads that into a
module that shares these names itself, and refuses with *Missing key* for one that does not; `load_file` returns the
stored names only. Views (a transposed alias, overlapping slices) cannot be said and are written out in full.

Source: safetensors 0.8, bindings/python/py_src/safetensors/torch.py (`save_model`, `_remove_duplicate_names`,
`load_model`), where a transposed alias raises an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tieaudit.arrange import arranged, plain_source
from tieaudit.change import Edit, Kind, Plan, Share, Unshare, Written
from tieaudit.errors import RewriteRefused
from tieaudit.formats.safetensors.header import SPELLINGS
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.model import Model, Weight, storage_of
from tieaudit.storage import no_values, reading
from tieaudit.view import AS_STORED

METADATA = "__metadata__"
FORMAT = {"format": "pt"}
"""What PyTorch's loaders look for in `__metadata__`; transformers refuses a file without it."""


def can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    """Why a lone file cannot hold this edit, or None: equal names are dropped."""
    if isinstance(edit, Share):
        return cannot_drop([model.by_id[member.id] for member in edit.members], edit)
    if isinstance(edit, Unshare):
        return None if any(weight.name == edit.name for weight in model.weights) else f"no tensor is called {edit.name}"
    return "a safetensors file holds tensors and neither a graph nor settings"


def cannot_drop(weights: list[Weight], edit: Share) -> str | None:
    """Why the members cannot be one stored tensor, seen alike under every name."""
    first = weights[0]
    for weight, member in zip(weights, edit.members, strict=True):
        if member.view != AS_STORED:
            return f"{weight.id} is {first.id} {member.view}, and safetensors holds no views"
        if (weight.dtype, weight.shape) != (first.dtype, first.shape):
            return (
                f"{first.id} is {first.dtype} {list(first.shape)} and {weight.id} is {weight.dtype} "
                f"{list(weight.shape)}: one stored tensor cannot be both"
            )
    return None


def unwritable(weight: Weight) -> str | None:
    """Why safetensors cannot hold a weight, or None."""
    if weight.dtype not in SPELLINGS:
        return f"safetensors has no element type {weight.dtype}"
    if weight.name == METADATA or not weight.name.isprintable() and _is_no_text(weight.name):
        return "safetensors cannot spell this name"
    return None


def _is_no_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def create(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned tensors as the file that `plan.into` names, in the folder `dest`.

    RewriteRefused for an element type that the format lacks. Cost: one pass over the bytes; memory: a block.
    """
    assert plan.into is not None  # who calls has chosen this container
    dropped = dropped_names(model, plan)
    stored = [one for one in arranged(model, plan).weights if not one.absent and one.name not in dropped]
    write(stored, {**dropped, **plan.into.doubled, **FORMAT}, dest / plan.into.file)
    renamed = {id: edit.members[0].id for edit in plan.edits if isinstance(edit, Share) for id in _dropped(edit)}
    return Written((plan.into.file,), renamed)


def dropped_names(model: Model, plan: Plan) -> dict[str, str]:
    """Name that is not stored → the one that stands for it: the first member of its share."""
    found = {}
    for edit in plan.edits:
        if isinstance(edit, Share):
            kept = model.by_id[edit.members[0].id].name
            found.update({model.by_id[id].name: kept for id in _dropped(edit)})
    return found


def _dropped(edit: Share) -> list[str]:
    return [member.id for member in edit.members[1:] if member.id != edit.members[0].id]


def write(weights: Iterable[Weight], metadata: dict[str, str], path: Path) -> None:
    """Write stored weights, each row by row, into a new file. RewriteRefused for what the format cannot hold."""
    entries = []
    for weight in weights:
        storage = storage_of(weight)
        because = unwritable(weight) or no_values(storage)
        if because:
            raise RewriteRefused(f"{path.name}: tensor {weight.name!r} cannot be written: {because}")
        entries.append(NewEntry(weight.name, weight.dtype, weight.shape, plain_source(storage)))
    with reading():
        write_safetensors(entries, metadata, path)
