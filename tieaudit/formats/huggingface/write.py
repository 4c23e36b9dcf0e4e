"""Writing the planned folder: changed shards tensor by tensor, every other file byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tieaudit.arrange import aliases_of, equal_values
from tieaudit.change import Equalise, Plan, Pool, SetConfig, Share, Unshare, Written
from tieaudit.copying import copy_file
from tieaudit.errors import CorruptFile, RewriteRefused
from tieaudit.formats import carried
from tieaudit.formats.huggingface import write_pickled
from tieaudit.formats.huggingface.folder import CONFIG, weight_set
from tieaudit.formats.huggingface.pickled import WHAT as PICKLED
from tieaudit.formats.huggingface.realise import can_realise
from tieaudit.formats.huggingface.spell import with_value
from tieaudit.formats.safetensors.sharded import Checkpoint, read_checkpoint, read_index_json
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.model import Model, Weight, make_id
from tieaudit.pooling import pooled_weight
from tieaudit.storage import Storage


@dataclass
class _Changes:
    """What happens to which name; the noun between plan and files."""

    dropped: dict[str, str] = field(default_factory=dict)
    """Name that goes → name that serves it from now on."""
    values: dict[str, Storage] = field(default_factory=dict)
    """Name → the bytes that it gets."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name → the shape that it gets, where that is another one."""
    copies: dict[str, list[tuple[str, Weight]]] = field(default_factory=dict)
    """Name that stays → (new name, weight whose shape and type it gets), written right behind it."""
    settings: list[SetConfig] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    """Name of an equal value → the name that it is one with, for the alias map."""


def edit(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned model into the folder `dest`, which exists and is empty.

    Raises: RewriteRefused if an edit cannot be made for the plan's target or would leave a tensor random; CorruptFile
    if the source changed since it was read. Cost: one copy of the folder, in blocks.
    """
    folder = Path(model.path)
    main = weight_set(folder).main
    if model.metadata.get("weights") == PICKLED:
        return _edit_pickled(model, plan, folder, main, dest)
    checkpoint = read_checkpoint(main)
    _check_unchanged(model, checkpoint)
    changes = _changes(model, plan)
    copied = {name for copies in changes.copies.values() for name, _ in copies}
    _check_nothing_random(model, changes.settings, set(changes.dropped), copied)
    shards = {name: _entries(checkpoint, name, changes) for name in checkpoint.headers}
    written, beside = [], []
    for source in carried(folder):
        relative = source.relative_to(folder)
        name = relative.name if relative.parent == Path() else ""
        target = dest / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in shards and shards[name] is not None:
            entries = shards[name] or []
            if not entries:
                continue  # nothing is left in this shard
            noted = changes.aliases if checkpoint.main.name == name else {}
            write_safetensors(entries, {**noted, **checkpoint.headers[name].metadata}, target)
        elif name == CONFIG and changes.settings:
            target.write_text(configured(source, changes.settings), encoding="utf-8", newline="")
        elif source == checkpoint.main and name not in shards and any(e is not None for e in shards.values()):
            target.write_text(_index(checkpoint, shards, changes.aliases), encoding="utf-8", newline="")
        else:
            copy_file(source, target)
            beside += [str(relative)] if name not in shards else []
        written.append(str(relative))
    renamed = {make_id(gone): make_id(kept) for gone, kept in changes.dropped.items()}
    return Written(tuple(written), renamed, copied=tuple(beside))


def _edit_pickled(model: Model, plan: Plan, folder: Path, main: Path, dest: Path) -> Written:
    """As `edit`, for a folder of `pytorch_model.bin`."""
    settings, _ = _accepted(model, plan)
    pickled = write_pickled.changes(model, plan.edits, plan.lossless)
    _check_nothing_random(model, settings, set(pickled.dropped), pickled.copied)
    shards = {Path(path) for path in model.parts[0].paths if path.endswith(".bin")}
    written, beside, index = [], [], None
    for source in carried(folder):
        relative = source.relative_to(folder)
        target = dest / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in shards:
            if not write_pickled.write_shard(model, source, pickled.orders.get(source), target):
                continue  # nothing is left in this shard
        elif str(relative) == CONFIG and settings:
            target.write_text(configured(source, settings), encoding="utf-8", newline="")
        elif source == main and pickled.orders:
            index = target
        else:
            copy_file(source, target)
            beside.append(str(relative))
        written.append(str(relative))
    if index is not None:
        index.write_text(write_pickled.new_index(main, dest, pickled), encoding="utf-8", newline="")
    renamed = {make_id(gone): make_id(kept) for gone, kept in pickled.dropped.items()}
    return Written(tuple(written), renamed, copied=tuple(beside))


def _check_unchanged(model: Model, checkpoint: Checkpoint) -> None:
    for name, (_, entry) in checkpoint.entries.items():
        weight = model.by_id.get(make_id(name))
        if weight is not None and weight.storage is not None and weight.storage.region != entry.storage.region:
            raise CorruptFile(f"{checkpoint.main}: tensor {name!r} moved since it was read; nothing was written")


def _accepted(model: Model, plan: Plan) -> tuple[list[SetConfig], list[Share | Equalise | Unshare | Pool]]:
    """The settings of a plan, and its other edits. RewriteRefused if the folder cannot hold one of these."""
    settings = [edit for edit in plan.edits if isinstance(edit, SetConfig)]
    switched_on = {f"{edit.file}:{'.'.join(edit.key)}" for edit in settings if edit.value is True}
    found: list[Share | Equalise | Unshare | Pool] = []
    for one in plan.edits:
        if isinstance(one, SetConfig) and one.file == CONFIG:
            continue
        reason = can_realise(model, one, plan.target)
        lifted = reason is not None and any(reason.endswith(condition) for condition in switched_on)
        if reason is not None and not lifted:
            raise RewriteRefused(reason)
        if isinstance(one, (Share, Equalise, Unshare, Pool)):
            found.append(one)
    return settings, found


def _changes(model: Model, plan: Plan) -> _Changes:
    settings, edits = _accepted(model, plan)
    changes = _Changes(settings=settings)
    for one in edits:
        if isinstance(one, Share):
            _plan_share(model, one, changes)
        elif isinstance(one, Equalise):
            changes.values.update(equal_values(model, one))
            changes.aliases.update(aliases_of(model, one))
        elif isinstance(one, Pool):
            for how in one.weights:
                weight = model.by_id[how.id]
                changes.shapes[weight.name], changes.values[weight.name] = pooled_weight(weight, how, one)
        else:
            weight = next(w for w in model.weights if w.name == one.name)
            changes.copies.setdefault(model.by_id[one.source].name, []).append((one.name, weight))
    return changes


def _plan_share(model: Model, share: Share, changes: _Changes) -> None:
    """The canonical name stays if it is stored; its bytes are the planned value, else the first member's own."""
    ids = [member.id for member in share.members]
    stored = [model.by_id[id] for id in dict.fromkeys(ids) if not model.by_id[id].absent]
    order = [id for one in model.declarations if set(ids) <= set(one.members) for id in one.members]
    kept = min(stored, key=lambda weight: order.index(weight.id) if weight.id in order else len(order))
    value = share.values if share.values is not None else stored[0].storage
    if value is not None and value != kept.storage:
        if value.n_bytes != kept.n_bytes:
            raise RewriteRefused(f"{kept.id}: expected a value of {kept.n_bytes} bytes, found {value.n_bytes}")
        changes.values[kept.name] = value
    for weight in stored:
        if weight is not kept:
            changes.dropped[weight.name] = kept.name


def _check_nothing_random(model: Model, settings: list[SetConfig], dropped: set[str], copied: set[str]) -> None:
    """No absent member may lose the tie that restores it, unless a copy of it is being written."""
    off = {f"{edit.file}:{'.'.join(edit.key)}" for edit in settings if edit.value is False}
    for declaration in model.declarations:
        if not declaration.active or declaration.condition not in off:
            continue
        for id in declaration.members:
            weight = model.by_id[id]
            gone = weight.absent or weight.name in dropped
            if gone and weight.name not in copied and not _restored_otherwise(model, id, off):
                raise RewriteRefused(
                    f"without {declaration.condition} transformers would initialise {weight.name} randomly, "
                    "which would not be stored"
                )


def _restored_otherwise(model: Model, id: str, off: set[str]) -> bool:
    return any(
        one.active and one.restores and id in one.members and one.condition not in off for one in model.declarations
    )


def _entries(checkpoint: Checkpoint, shard: str, changes: _Changes) -> list[NewEntry] | None:
    """The new content of a shard in the order of its data; None if it stays as it is."""
    header = checkpoint.headers[shard]
    names = {entry.name for entry in header.entries}
    if not names & (changes.dropped.keys() | changes.values.keys() | changes.copies.keys()):
        return None
    found = []
    for entry in sorted(header.entries, key=lambda one: one.storage.region[1]):
        if entry.name in changes.dropped:
            continue
        storage = changes.values.get(entry.name, entry.storage)
        found.append(NewEntry(entry.name, entry.dtype, changes.shapes.get(entry.name, entry.shape), storage))
        for name, _ in changes.copies.get(entry.name, ()):
            found.append(NewEntry(name, entry.dtype, entry.shape, storage))
    return found


def _index(checkpoint: Checkpoint, shards: Mapping[str, list[NewEntry] | None], aliases: Mapping[str, str]) -> str:
    """The index with the new weight_map, total_size and alias map, everything else and the layout of the text kept.

    The map is where huggingface_hub writes it, in the index's own metadata (serialization/_torch.py).
    """
    text = checkpoint.main.read_text(encoding="utf-8")
    index = read_index_json(checkpoint.main)
    old_map = {tensor: file for tensor, (file, _) in checkpoint.entries.items()}
    new_map: dict[str, str] = {}
    contents = {file: {e.name for e in entries} for file, entries in shards.items() if entries is not None}
    for tensor, file in old_map.items():
        if file not in contents or tensor in contents[file]:
            new_map[tensor] = file
    for file, names in contents.items():
        new_map.update((name, file) for name in sorted(names - new_map.keys()))
    index["weight_map"] = new_map
    metadata = index.get("metadata")
    if isinstance(metadata, dict) or aliases:
        metadata = index["metadata"] = {**aliases, **(metadata if isinstance(metadata, dict) else {})}
        n_bytes, n_elements = _totals(checkpoint, shards)
        old_elements = sum(_n_elements(entry.shape) for _, entry in checkpoint.entries.values())
        if "total_size" in metadata:
            metadata["total_size"] = n_bytes
        if metadata.get("total_parameters") == old_elements:  # of the live model otherwise, which does not change
            metadata["total_parameters"] = n_elements
    indent = re.search(r"\n( +)\"", text)
    ending = "\n" if text.endswith("\n") else ""
    return json.dumps(index, indent=len(indent.group(1)) if indent else None, ensure_ascii=False) + ending


def _totals(checkpoint: Checkpoint, shards: Mapping[str, list[NewEntry] | None]) -> tuple[int, int]:
    n_bytes = n_elements = 0
    for file, header in checkpoint.headers.items():
        changed = shards[file]
        for entry in header.entries if changed is None else changed:
            n_bytes += entry.storage.n_bytes
            n_elements += _n_elements(entry.shape)
    return n_bytes, n_elements


def _n_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def configured(path: Path, settings: list[SetConfig]) -> str:
    """The text of a JSON file with these settings; everything else as it is. CorruptFile."""
    text = path.read_bytes().decode("utf-8")
    try:
        for setting in settings:
            text = with_value(text, setting.key, setting.value)
    except (ValueError, IndexError) as error:
        raise CorruptFile(f"{path}: expected a JSON object: {error}") from None
    return text
