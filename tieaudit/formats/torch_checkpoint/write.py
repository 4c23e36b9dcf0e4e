"""Writing a checkpoint anew in the layout that it has: the pickle with some pieces replaced, and its storages.

What no plan names stays as it is, byte for byte: other values of the pickle, classes that only somebody else knows,
other members of the archive. Nothing is executed, nothing is loaded; storages are copied in blocks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from tieaudit.arrange import equal_values
from tieaudit.change import Edit, Equalise, Plan, Share, Unshare, Written
from tieaudit.copying import NewFile, copy_file
from tieaudit.errors import CorruptFile, RewriteRefused, TieAuditError
from tieaudit.formats import KEY_GIVEN
from tieaudit.formats.safetensors.sharded import read_index_json
from tieaudit.formats.torch_checkpoint.adjustment import Adjustment, Decision, decide
from tieaudit.formats.torch_checkpoint.archive import Archive
from tieaudit.formats.torch_checkpoint.beside import PROMISE
from tieaudit.formats.torch_checkpoint.discover import INDEX_SUFFIX
from tieaudit.formats.torch_checkpoint.legacy import LegacyFile
from tieaudit.formats.torch_checkpoint.opened import open_file
from tieaudit.formats.torch_checkpoint.optimizer_states import states_in
from tieaudit.formats.torch_checkpoint.orders import Made, Orders, Subject, carry_out, reason_against
from tieaudit.formats.torch_checkpoint.read import collect, read
from tieaudit.formats.torch_checkpoint.zipped import ZipWriter
from tieaudit.model import Model, Weight
from tieaudit.storage import FileStorage, Storage

_PICKLE, _DATA, _ID = "data.pkl", "data/", ".data/serialization_id"


def can_realise(model: Model, edit: Edit, target: str) -> str | None:
    """Why this edit cannot be made in a checkpoint, in one sentence, or None. Cost: once, the pickle of its file."""
    if not isinstance(edit, (Share, Equalise, Unshare)):
        return "a checkpoint holds neither a graph nor settings, so there is nothing to express differently"
    orders = ordered(model, [edit])
    if isinstance(orders, str):
        return orders
    for file, one in orders.items():
        try:
            subject = subject_of(file, model.metadata.get(KEY_GIVEN, ""))
        except TieAuditError as error:
            return error.message
        if reason := reason_against(subject, one):
            return reason
    return None


def ordered(model: Model, edits: Iterable[Edit], lossless: bool = True) -> dict[Path, Orders] | str:
    """What edits mean for each file; a reason where one concerns two files, which share nothing."""
    found: dict[Path, Orders] = {}
    for edit in edits:
        if isinstance(edit, Share):
            weights = [model.by_id[member.id] for member in edit.members]
            files = {file_of(model, weight) for weight in weights}
            if len(files) > 1 or None in files:
                names = ", ".join(sorted(file.name for file in files if file))
                return f"{weights[0].name} and {weights[-1].name} lie in {names}: files cannot share a storage"
            orders = found.setdefault(next(file for file in files if file), Orders(lossless=lossless))
            if edit.values is not None:
                orders.values[weights[0].name] = edit.values
            for weight, member in zip(weights[1:], edit.members[1:], strict=True):
                orders.same[weight.name] = (weights[0].name, member.view)
        elif isinstance(edit, Equalise):
            for name, value in equal_values(model, edit).items():
                file = file_of(model, next(one for one in model.weights if one.name == name))
                if file is None:
                    return f"{name} is not stored"
                found.setdefault(file, Orders(lossless=lossless)).values[name] = value
        elif isinstance(edit, Unshare):
            named = next((one for one in model.weights if one.name == edit.name), None)
            file = file_of(model, named) if named is not None else None
            if file is None:
                return f"{edit.name}: expected a tensor that shares the storage of {edit.source}, found none stored"
            found.setdefault(file, Orders(lossless=lossless)).own.append(edit.name)
    return found


def decisions(model: Model, edits: Iterable[Edit], adjust: bool = True) -> dict[Path, tuple[Decision, ...]]:
    """What becomes of the optimizer states in each file. Cost: a run over each pickle, once, and its splicing."""
    changing = [edit for edit in edits if isinstance(edit, (Share, Unshare))]
    files = {file_of(model, weight) for weight in model.weights} if changing else set()
    found = {}
    for file in sorted(filter(None, files)):
        try:
            subject = subject_of(file, model.metadata.get(KEY_GIVEN, ""))
        except TieAuditError:
            continue
        if made := _decisions(subject, file, model, changing, adjust):
            found[file] = made
    return found


def adjustments(model: Model, plan: Plan) -> dict[Path, tuple[Adjustment, ...]]:
    """The optimizer states of each file that a plan changes."""
    found = {}
    for path, decided in decisions(model, plan.edits, plan.optimizer == "adjust").items():
        if adjusted := tuple(one for one in decided if isinstance(one, Adjustment)):
            found[path] = adjusted
    return found


def _decisions(
    subject: Subject, file: Path, model: Model, edits: list[Share | Unshare], adjust: bool
) -> tuple[Decision, ...]:
    """An adjustment that the pickle cannot take is none, so that it never stands in the way of the tie."""
    states = list(states_in(subject.found.opened.value))
    made = [decide(subject.found, state, model, edits, adjust) for state in states]
    adjusted = tuple(one for one in made if isinstance(one, Adjustment))
    if not adjusted:
        return tuple(made)
    orders = ordered(model, edits)
    mine = orders.get(file, Orders()) if isinstance(orders, dict) else Orders()
    twice = len({state.where for state in states}) < len(states)
    because = reason_against(subject, replace(mine, states=adjusted), whole=True)
    if twice or because:
        said = because or "two states have one name"
        return tuple(one.kept(said) if isinstance(one, Adjustment) else one for one in made)
    return tuple(made)


def file_of(model: Model, weight: Weight) -> Path | None:
    """The file that holds a weight; None if it is not stored."""
    if weight.storage is None:
        return None
    home = weight.storage.region[0].partition("!")[0]
    for part in model.parts:
        for path in part.paths:
            if home in (path, os.path.realpath(path)):
                return Path(path)
    return None


def subject_of(path: Path, key: str) -> Subject:
    """A file, read once for all questions about it. RewriteRefused if files of its kind are not written."""
    stamp = path.stat()
    return _subject(path, key, (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns))


@lru_cache(maxsize=2)
def _subject(path: Path, key: str, stamp: tuple[int, int, int]) -> Subject:
    opened = open_file(path, traced=True)
    if opened.layout == "torchscript":
        raise RewriteRefused(
            "a TorchScript archive is a program that names its tensors: tie the module and save it again with torch.jit"
        )
    return Subject(collect(opened, key))


def edit(model: Model, plan: Plan, dest: Path) -> Written:
    """Write the planned checkpoint into the folder `dest`, under its own name; shards beside their index.

    Raises: RewriteRefused where the file is spelled in a way that cannot be changed; CorruptFile if the source changed
    since it was read. Cost: one copy of the file, storages in blocks; memory: what reading its pickle takes.
    """
    orders = ordered(model, plan.edits, plan.lossless)
    if isinstance(orders, str):
        raise RewriteRefused(orders)
    for path, adjusted in adjustments(model, plan).items():
        orders.setdefault(path, Orders(lossless=plan.lossless)).states = adjusted
    key, main = model.metadata.get(KEY_GIVEN, ""), Path(model.path)
    written = []
    for path in map(Path, model.parts[0].paths):
        if path.name.endswith(INDEX_SUFFIX):
            continue
        name = plan.data_names.get(path.name, path.name)
        if path in orders:
            write_file(path, key, orders[path], dest / name, model.weights)
        else:
            copy_file(path, dest / name)
        written.append(name)
    if main.name.endswith(INDEX_SUFFIX):
        (dest / main.name).write_text(_index(main, plan, dest, written), encoding="utf-8", newline="")
        written.insert(0, main.name)
    return Written(tuple(written), placed=dict(plan.data_names))


def write_file(path: Path, key: str, orders: Orders, target: Path, weights: Iterable[Weight]) -> None:
    """Write one file anew as the new file `target`. RewriteRefused, CorruptFile."""
    subject = subject_of(path, key)
    _check_unchanged(path, subject, weights)
    made = carry_out(subject, orders)
    container = subject.found.opened.container
    if isinstance(container, LegacyFile):
        _write_legacy(container, subject, made, target)
    else:
        _write_zip(container, subject, made, target)


def _check_unchanged(path: Path, subject: Subject, weights: Iterable[Weight]) -> None:
    for weight in weights:
        now = subject.found.weights.get(weight.name)
        if now is not None and now.storage is not None and weight.storage is not None:
            mine = weight.storage.region[0].partition("!")[0] == now.storage.region[0].partition("!")[0]
            if mine and now.storage.region != weight.storage.region:
                raise CorruptFile(f"{path}: tensor {weight.name!r} moved since it was read; nothing was written")


def _write_zip(archive: Archive, subject: Subject, made: Made, target: Path) -> None:
    """The members in their order; storages as the pickle mentions them, those that nobody mentions any more go.

    `.format_version` promises `torch.load` that storages follow one another in that order, from key 0: it computes
    where they lie and looks no more (source: torch/serialization.py 2.13, `_get_offset`; with `map_location="meta"`,
    in fake tensors, and where `calculate_storage_offsets` is on). Where key 0 comes no more first, the promise goes.
    """
    gone = {one.key for one in subject.trace.ids} - made.used.keys()
    inside = {
        name: member for member in archive.all if (name := member.name.removeprefix(archive.top)).startswith(_DATA)
    }
    kept = {name: member for name, member in inside.items() if name.removeprefix(_DATA) not in gone}
    first = next(iter(inside.values()), archive.members[_PICKLE])
    has_id = False
    with ZipWriter(target, archive.top) as writer:
        for member in archive.all:
            name = member.name.removeprefix(archive.top)
            if name == _ID:
                has_id = True
            elif name == _PICKLE:
                writer.add_full(member.name, made.pickle)
            elif name not in inside and (name != PROMISE or next(iter(made.used), "0") == "0"):
                writer.add_full(member.name, archive.content(member))
            if member is first:
                for key in dict.fromkeys((*made.used, *made.new, *(name.removeprefix(_DATA) for name in kept))):
                    content = made.new.get(key)
                    held = kept.get(_DATA + key)
                    if content is not None:
                        writer.add(_DATA + key, content)
                    elif held is not None:
                        writer.add_full(held.name, archive.content(held))
        if has_id:
            writer.add_serialization_id()


def _write_legacy(file: LegacyFile, subject: Subject, made: Made, target: Path) -> None:
    """Three small pickles as they are, the pickle of the value, that of the keys, and the storages."""
    keys = [key for key in (*file.keys, *made.new) if key in made.used]
    with NewFile(target) as new:
        new.copy(FileStorage(file.path, 0, subject.trace.begin))
        for piece in made.pickle:
            if isinstance(piece, bytes):
                new.write(piece)
            else:
                new.copy(piece)
        spelled = b"".join(b"X" + len(text).to_bytes(4, "little") + text for text in map(str.encode, keys))
        new.write(b"\x80\x02](" + spelled + b"e.")
        for key in keys:
            content: Storage = made.new.get(key) or file.storage(key)
            new.write(made.used[key].n_elements.to_bytes(8, "little"))
            new.copy(content)


def _index(main: Path, plan: Plan, dest: Path, shards: Iterable[str]) -> str:
    """The index with new file names and the new total, everything else and the layout of the text kept."""
    text = main.read_text(encoding="utf-8")
    index = read_index_json(main)
    old = index["weight_map"]
    assert isinstance(old, dict)  # read_index checked it
    index["weight_map"] = {name: plan.data_names.get(file, file) for name, file in old.items()}
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(total_size(read(dest / name).weights) for name in shards)
    return like(text, index)


def total_size(weights: Iterable[Weight]) -> int:
    """Bytes of tensors as the Hub's library counts them: a storage that several tensors share counts once.

    Source: huggingface_hub, serialization/_base.py, `split_state_dict_into_shards_factory`.
    """
    regions = {one.storage.region: one.n_bytes for one in weights if one.storage is not None}
    return sum(regions.values())


def like(text: str, index: dict[str, object]) -> str:
    """JSON with the indent and the ending of the text that it replaces."""
    indent = re.search(r"\n( +)\"", text)
    ending = "\n" if text.endswith("\n") else ""
    return json.dumps(index, indent=len(indent.group(1)) if indent else None, ensure_ascii=False) + ending
