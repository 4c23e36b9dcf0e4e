"""Writing equal values into safetensors files that no class goes with: each name stored, and an alias map beside it.

A name that is left out of such a file is gone for `load_file`, and an error for `load_model` into a module that does
not tie it itself; so nothing is left out, and `__metadata__` (of shards with an index: its `metadata`, as
huggingface_hub writes it) notes which names have one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tieaudit.arrange import aliases_of, equal_values
from tieaudit.change import Edit, Equalise, Plan, Written
from tieaudit.copying import copy_file
from tieaudit.errors import CorruptFile, RewriteRefused
from tieaudit.formats.safetensors.sharded import INDEX_SUFFIX, Checkpoint, read_checkpoint, read_index_json, read_shards
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.model import Model, make_id
from tieaudit.storage import Storage

HELD_BY = (
    "load_file gives every name with its value, and load_model a parameter for each, which training moves apart (for a "
    "module that ties the names itself it refuses the file: Unexpected key); the alias map in the metadata notes which "
    "names are one, for tieaudit and for people, and no loader reads it; for one parameter, tie the live module "
    "(tieaudit.tie(model, scheme=…)) and save it as a checkpoint"
)


def held_by(model: Model) -> str:
    """Who makes what of equal values."""
    return HELD_BY


def can_realise(model: Model, edit: Edit, target: str) -> str | None:
    """Why an edit cannot be made in files without a class; None for equal values of one shape and type."""
    if not isinstance(edit, Equalise):
        return (
            "a safetensors file without a config.json has no class that would restore a dropped tensor "
            "(the folder with its config.json may)"
        )
    first = model.by_id[edit.members[0].id]
    for member in edit.members:
        weight = model.by_id[member.id]
        if weight.storage is None:
            return f"{weight.name} is not stored"
        if weight.dtype != first.dtype or member.view.shape(first.shape) != weight.shape:
            return f"{weight.id} cannot hold the value of {first.id}: their types or shapes differ"
    return None


def edit(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned file, or shards and their index, into the folder `dest`, which exists and is empty.

    RewriteRefused for any edit but equal values; CorruptFile if the source changed since it was read. Cost: one copy
    of the files, in blocks, and the merged value once for each name.
    """
    main, files = Path(model.path), [Path(path) for path in model.parts[0].paths]
    alone = len(files) < 2 or main.name.endswith(INDEX_SUFFIX)
    checkpoint = read_checkpoint(main) if alone else read_shards(files)
    values: dict[str, Storage] = {}
    aliases: dict[str, str] = {}
    for one in plan.edits:
        because = can_realise(model, one, plan.target)
        if because is not None or not isinstance(one, Equalise):
            raise RewriteRefused(because or f"{model.path}: only equal values can be written")
        values.update(equal_values(model, one))
        aliases.update(aliases_of(model, one))
    _check_unchanged(model, checkpoint)
    written = []
    for file in checkpoint.files:
        name = plan.data_names.get(file.name, file.name)
        if file == main and file.name.endswith(INDEX_SUFFIX):
            (dest / name).write_text(_index(main, aliases), encoding="utf-8", newline="")
        else:
            noted = {} if main.name.endswith(INDEX_SUFFIX) else aliases
            _write_shard(checkpoint, file, values, noted, dest / name)
        written.append(name)
    return Written(tuple(written), placed=dict(plan.data_names))


def _write_shard(
    checkpoint: Checkpoint, file: Path, values: Mapping[str, Storage], aliases: Mapping[str, str], target: Path
) -> None:
    header = checkpoint.headers[file.name]
    noted = {entry.name: aliases[entry.name] for entry in header.entries if entry.name in aliases}
    if not noted and not any(entry.name in values for entry in header.entries):
        copy_file(file, target)
        return
    entries = [
        NewEntry(entry.name, entry.dtype, entry.shape, values.get(entry.name, entry.storage))
        for entry in sorted(header.entries, key=lambda one: one.storage.region[1])
    ]
    write_safetensors(entries, {**noted, **header.metadata}, target)


def _check_unchanged(model: Model, checkpoint: Checkpoint) -> None:
    for name, (_, entry) in checkpoint.entries.items():
        weight = model.by_id.get(make_id(name))
        if weight is not None and weight.storage is not None and weight.storage.region != entry.storage.region:
            raise CorruptFile(f"{checkpoint.main}: tensor {name!r} moved since it was read; nothing was written")


def _index(main: Path, aliases: Mapping[str, str]) -> str:
    """The index with the alias map, everything else and the layout of the text kept."""
    from tieaudit.formats.torch_checkpoint.write import like

    index = read_index_json(main)
    metadata = index.get("metadata")
    index["metadata"] = {**aliases, **(metadata if isinstance(metadata, dict) else {})}
    return like(main.read_text(encoding="utf-8"), index)
