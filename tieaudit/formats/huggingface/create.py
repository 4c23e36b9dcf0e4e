"""A Hugging Face folder with its weights in the other container: safetensors from pytorch_model.bin, and back.

Shards stay as they are cut; config.json and every other file come along byte for byte. A name that the class restores
is left out of safetensors, as `save_pretrained` does, and is one storage with its partner in a .bin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tieaudit.arrange import aliases_of, arranged
from tieaudit.change import Container, Edit, Equalise, Kind, Plan, SetConfig, Share, Unshare, Written
from tieaudit.copying import copy_file
from tieaudit.errors import CorruptFile, RewriteRefused
from tieaudit.formats import carried
from tieaudit.formats.huggingface.folder import CONFIG, weight_set
from tieaudit.formats.huggingface.pickled import WHAT as PICKLED
from tieaudit.formats.huggingface.pickled import read_weights
from tieaudit.formats.huggingface.realise import of_class
from tieaudit.formats.huggingface.write import configured
from tieaudit.formats.safetensors import create as safetensors
from tieaudit.formats.safetensors.sharded import read_index_json
from tieaudit.formats.torch_checkpoint import create as torch_checkpoint
from tieaudit.model import Model, Weight, storage_of

_STEMS: Mapping[Kind, str] = {"safetensors": "model", "torch": "pytorch_model"}
_ENDINGS: Mapping[Kind, str] = {"safetensors": ".safetensors", "torch": ".bin"}
_DIFFUSERS = "diffusion_pytorch_model"


def can_create(model: Model, edit: Edit, kind: Kind, target: str) -> str | None:
    """Why the folder cannot hold this edit once its weights are of the other container; as `can_realise`."""
    if isinstance(edit, SetConfig):
        return None if edit.file == CONFIG else f"only {CONFIG} can be changed, not {edit.file}"
    if isinstance(edit, Unshare):
        return torch_checkpoint.can_create(model, edit, kind, target)
    weights = {"weights": PICKLED if kind == "torch" else ""}  # what it will be counts, not what it is
    return of_class(replace(model, metadata={**model.metadata, **weights}), edit, target)


def left_out(folder: Path, kind: Kind) -> tuple[str, ...]:
    """Files beside the weights that would be read in place of the result."""
    if kind == "safetensors":
        return ()
    mine = (_STEMS[kind], _DIFFUSERS)
    return tuple(
        name for name in weight_set(folder).others if ".safetensors" in name or name.startswith(mine) and ".bin" in name
    )


@dataclass(frozen=True)
class _Files:
    """The new files: which names lie where."""

    names: dict[str, list[Weight]]
    """File name → what it holds, in order."""
    index: str
    """Name of the index; empty for a lone file."""


def create(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned folder into `dest`, which exists and is empty.

    RewriteRefused for a type that the container lacks, and where an edit would leave a tensor random. Cost: one copy
    of the folder, in blocks.
    """
    assert plan.into is not None  # who calls has chosen this container
    folder, chosen = Path(model.path), weight_set(Path(model.path))
    stored = _stored(model, plan, plan.into)
    _check_nothing_random(model, plan, {weight.name for weight in stored})
    files = _files(model, plan, stored)
    written = _carry(folder, dest, {path.name for path in chosen.files} - {CONFIG} | {*plan.into.left_out}, plan)
    aliases = {**safetensors.dropped_names(model, plan), **plan.into.doubled}
    for edit in plan.edits:
        if isinstance(edit, Equalise):
            aliases.update(aliases_of(model, edit))
    for file, weights in files.names.items():
        if plan.into.form == "torch":
            versions = None if files.index else torch_checkpoint.versions_of(model)
            torch_checkpoint.write_state_dict(weights, dest / file, versions)
        else:
            here = {weight.name for weight in weights}
            noted = {gone: kept for gone, kept in aliases.items() if kept in here}
            safetensors.write(weights, {**noted, **safetensors.FORMAT}, dest / file)
        written.append(file)
    if files.index:
        noted = aliases if plan.into.form == "safetensors" else {}
        (dest / files.index).write_text(_index(chosen.main, files, noted), encoding="utf-8", newline="")
        written.append(files.index)
    renamed = {}
    if plan.into.form == "safetensors":
        by_name = {weight.name: weight.id for weight in model.weights}
        renamed = {by_name[gone]: by_name[kept] for gone, kept in safetensors.dropped_names(model, plan).items()}
    return Written(tuple(written), renamed)


def _stored(model: Model, plan: Plan, into: Container) -> list[Weight]:
    dropped = safetensors.dropped_names(model, plan) if into.form == "safetensors" else {}
    return [one for one in arranged(model, plan).weights if not one.absent and one.name not in dropped]


def _check_nothing_random(model: Model, plan: Plan, stored: set[str]) -> None:
    """No tie that restores an absent name may be switched off, unless the name is stored from now on."""
    off = {f"{one.file}:{'.'.join(one.key)}" for one in plan.edits if isinstance(one, SetConfig) and one.value is False}
    for declaration in model.declarations:
        if not declaration.active or declaration.condition not in off:
            continue
        for id in declaration.members:
            name = model.by_id[id].name
            others = [one for one in model.declarations if id in one.members and one.active and one.restores]
            if name not in stored and all(one.condition in off for one in others):
                raise RewriteRefused(
                    f"without {declaration.condition} transformers would initialise {name} randomly, "
                    "which would not be stored"
                )


def _files(model: Model, plan: Plan, stored: list[Weight]) -> _Files:
    """Every name in the file that takes the place of its own; names of one tensor together."""
    main = weight_set(Path(model.path)).main
    checkpoint, _, _ = read_weights(main)
    homes = {name: file for name, (file, _) in checkpoint.entries.items()}
    for edit in plan.edits:
        if isinstance(edit, Share):
            first = next(model.by_id[one.id].name for one in edit.members if model.by_id[one.id].name in homes)
            homes.update({model.by_id[one.id].name: homes[first] for one in edit.members})
        elif isinstance(edit, Unshare):
            homes.setdefault(edit.name, homes[model.by_id[edit.source].name])
    by_file: dict[str, list[Weight]] = {file: [] for file in checkpoint.headers}
    for weight in stored:
        if weight.name not in homes:
            raise CorruptFile(f"{main}: tensor {weight.name!r} moved since it was read; nothing was written")
        by_file[homes[weight.name]].append(weight)
    assert plan.into is not None
    stem = _DIFFUSERS if main.name.startswith(_DIFFUSERS) else _STEMS[plan.into.form]
    ending = _ENDINGS[plan.into.form]
    if not main.name.endswith(".index.json"):
        return _Files({stem + ending: stored}, "")
    filled = [weights for weights in by_file.values() if weights]
    names = [f"{stem}-{number:05d}-of-{len(filled):05d}{ending}" for number in range(1, len(filled) + 1)]
    return _Files(dict(zip(names, filled, strict=True)), f"{stem}{ending}.index.json")


def _carry(folder: Path, dest: Path, not_carried: set[str], plan: Plan) -> list[str]:
    """Copy every file but the weights; config.json with the planned settings."""
    written = []
    settings = [edit for edit in plan.edits if isinstance(edit, SetConfig)]
    for source in carried(folder):
        relative = source.relative_to(folder)
        if relative.parent == Path() and relative.name in not_carried:
            continue
        target = dest / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(relative) == CONFIG and settings:
            target.write_text(configured(source, settings), encoding="utf-8", newline="")
        else:
            copy_file(source, target)
        written.append(str(relative))
    return written


def _index(main: Path, files: _Files, aliases: Mapping[str, str]) -> str:
    """The index of the new shards. Numbers that count the live model stay; alias notes go where huggingface_hub
    writes them (serialization/_torch.py, `save_torch_state_dict`)."""
    metadata = read_index_json(main).get("metadata")
    kept = (
        {key: value for key, value in metadata.items() if key.startswith("total_")}
        if isinstance(metadata, dict)
        else {}
    )
    sizes = {storage_of(one).region: one.n_bytes for weights in files.names.values() for one in weights}
    kept["total_size"] = sum(sizes.values())
    weight_map = {weight.name: file for file, weights in files.names.items() for weight in weights}
    index = {"metadata": {**kept, **aliases}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"
