"""Writing a folder whose weights are `pytorch_model.bin`, alone or in shards: names of one file share a storage.

Where a tie lies within one file, both names stay and are one storage, as `torch.save` writes a tied module; where it
spans two files, one name is dropped, which the class restores, as in safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tieaudit.arrange import equal_values
from tieaudit.change import Edit, Equalise, Share, Unshare
from tieaudit.copying import copy_file
from tieaudit.errors import RewriteRefused
from tieaudit.formats.safetensors.sharded import read_index_json
from tieaudit.formats.torch_checkpoint.orders import Orders, reason_against
from tieaudit.formats.torch_checkpoint.read import read
from tieaudit.formats.torch_checkpoint.write import file_of, like, subject_of, total_size, write_file
from tieaudit.model import Model, Weight
from tieaudit.view import AS_STORED


@dataclass
class PickledChanges:
    """What happens in which file; the noun between plan and files."""

    orders: dict[Path, Orders] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    """Name that goes → name that serves it from now on."""
    copied: set[str] = field(default_factory=set)
    """Names that were absent and are written."""

    def of(self, file: Path, lossless: bool = True) -> Orders:
        """The orders for one file."""
        return self.orders.setdefault(file, Orders(lossless=lossless))


def changes(model: Model, edits: Iterable[Edit], lossless: bool) -> PickledChanges:
    """What edits mean for the files. RewriteRefused where a weight is not stored."""
    found = PickledChanges()
    for edit in edits:
        if isinstance(edit, Share):
            _share(model, edit, lossless, found)
        elif isinstance(edit, Equalise):
            for name, value in equal_values(model, edit).items():
                weight = next(one for one in model.weights if one.name == name)
                found.of(_file(model, weight), lossless).values[name] = value
        elif isinstance(edit, Unshare):
            source = model.by_id[edit.source]
            named = next(weight for weight in model.weights if weight.name == edit.name)
            if named.absent:
                found.of(_file(model, source), lossless).copies[named.name] = source.name
                found.copied.add(named.name)
            else:
                found.of(_file(model, named), lossless).own.append(named.name)
    return found


def _share(model: Model, share: Share, lossless: bool, found: PickledChanges) -> None:
    """The canonical name's file keeps the tensor; its bytes are the planned value, else the first member's own."""
    ids = tuple(dict.fromkeys(member.id for member in share.members))
    stored = [model.by_id[id] for id in ids if not model.by_id[id].absent]
    order = [id for one in model.declarations if set(ids) <= set(one.members) for id in one.members]
    kept = min(stored, key=lambda weight: order.index(weight.id) if weight.id in order else len(order))
    file = _file(model, kept)
    orders = found.of(file, lossless)
    anchor = stored[0] if _file(model, stored[0]) == file else kept
    value = share.values if share.values is not None else stored[0].storage
    if value is not None and value != anchor.storage:
        orders.values[anchor.name] = value
    for weight in stored:
        if weight is not anchor and _file(model, weight) == file:
            orders.same[weight.name] = (anchor.name, AS_STORED)
        elif weight is not anchor:
            found.of(_file(model, weight), lossless).dropped.append(weight.name)
            found.dropped[weight.name] = kept.name


def _file(model: Model, weight: Weight) -> Path:
    found = file_of(model, weight)
    if found is None:
        raise RewriteRefused(f"{weight.id} is not stored")
    return found


def reason(model: Model, edit: Share | Equalise | Unshare) -> str | None:
    """Why the pickles cannot take this edit, in one sentence, or None."""
    try:
        found = changes(model, (edit,), True)
        for file, orders in found.orders.items():
            if because := reason_against(subject_of(file, ""), orders):
                return because
    except RewriteRefused as refused:
        return refused.message
    return None


def write_shard(model: Model, source: Path, orders: Orders | None, target: Path) -> bool:
    """One file of the weights; whether anything is left to write."""
    if not orders:
        copy_file(source, target)
        return True
    if set(orders.dropped) >= {one.name for one in model.weights if one.storage and file_of(model, one) == source}:
        return False
    write_file(source, "", orders, target, model.weights)
    return True


def new_index(main: Path, dest: Path, found: PickledChanges) -> str:
    """The index with the new weight_map and total_size, everything else and the layout of the text kept."""
    index = read_index_json(main)
    old = index["weight_map"]
    assert isinstance(old, dict)  # read_index checked it
    names: dict[str, str] = {name: file for name, file in old.items() if name not in found.dropped}
    for file, orders in found.orders.items():
        names.update(dict.fromkeys(orders.copies, file.name))
    index["weight_map"] = names
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        before = _totals(main.parent, old.values())
        after = _totals(dest, names.values())
        for key, n in (("total_size", 0), ("total_parameters", 1)):
            if key == "total_size" and key in metadata or metadata.get(key) == before[n]:
                metadata[key] = after[n]
    return like(main.read_text(encoding="utf-8"), index)


def _totals(folder: Path, shards: Iterable[str]) -> tuple[int, int]:
    """Bytes and elements, a shared storage once."""
    weights = [one for name in dict.fromkeys(shards) for one in read(folder / name).weights]
    regions = {one.storage.region: one.n_elements for one in weights if one.storage is not None}
    return total_size(weights), sum(regions.values())
