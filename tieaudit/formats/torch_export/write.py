"""Writing a planned change: two names become one blob and one input of the graph, or get a blob each.

That is what `torch.export.save` writes for a module whose parameters are one: every name stays, in the signature and
in the table of weights, all rows of a tie name the same bytes, and the graph reads all of them through one input.
A transposed name needs no change of the graph: its row swaps the strides. Every other member of the archive is copied
as it is, in blocks.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tieaudit.change import Plan, Share, Unshare, Written
from tieaudit.errors import RewriteRefused
from tieaudit.formats.torch_checkpoint.zipped import ZipWriter
from tieaudit.formats.torch_export.layout import CONSTANTS, WEIGHTS, Layout
from tieaudit.formats.torch_export.payload import Entry, Payload, entries_of
from tieaudit.formats.torch_export.program import Program, shape_and_strides
from tieaudit.formats.torch_export.realise import equal_members, heads_of, opened
from tieaudit.model import Model, storage_of
from tieaudit.storage import Storage
from tieaudit.strided import row_major
from tieaudit.view import Transpose, View

_FOLDERS = (WEIGHTS, CONSTANTS)
_PREFIX = {WEIGHTS: "weight_", CONSTANTS: "tensor_"}
_LISTS = ("as_tensors", "as_optional_tensors", "as_nested_tensors")


@dataclass
class _Draft:
    """The archive in the making."""

    model: Model
    layout: Layout
    program: Program
    payload: Payload
    tables: dict[str, Any]
    document: Any
    blobs: dict[str, Storage] = field(default_factory=dict)
    """Member → bytes of new blobs."""
    changed: set[str] = field(default_factory=set)
    """Folders whose table changed."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Value of the graph → the one that is read instead, everywhere."""
    renamed: dict[str, str] = field(default_factory=dict)

    def entry(self, id: str) -> Entry:
        return self.payload.entries[self.model.by_id[id].name]

    def value(self, id: str) -> str | None:
        """The input of the graph that is this weight."""
        return self.program.weights.get(self.model.by_id[id].name)


def edit(model: Model, plan: Plan, folder: Path) -> Written:
    """Write the planned archive into `folder`, under the name of the source.

    RewriteRefused for what cannot be held. Cost: one copy of the archive; memory: the graph and a block.
    """
    path = Path(model.path)
    layout, program, payload = opened(path)
    tables = {one: copy.deepcopy(dict(_table(layout, one))) for one in _FOLDERS}
    draft = _Draft(model, layout, program, payload, tables, copy.deepcopy(dict(program.json.value)))
    for change in plan.edits:
        if isinstance(change, Share):
            _share(draft, change)
        elif isinstance(change, Unshare):
            _unshare(draft, change)
        else:
            raise RewriteRefused(f"{model.path}: expected a tie to make or to undo, found {type(change).__name__}")
    _rewire(draft.document, draft.inputs, None)
    _write(draft, folder / path.name)
    return Written((path.name,), draft.renamed)


def _table(layout: Layout, folder: str) -> Mapping[str, Any]:
    from tieaudit.formats.torch_export.fields import read_json

    return read_json(layout.archive, layout.table(folder)).value


def _share(draft: _Draft, change: Share) -> None:
    """All members step through the bytes of the first one."""
    first, *others = change.members
    entry = draft.entry(first.id)
    blob = entry.blob
    assert entry.meta is not None  # what is pickled is no weight
    shape, strides, offset = shape_and_strides(entry.meta)
    if change.values is not None:
        blob, strides, offset = _new_blob(draft, entry.folder, change.values), row_major(shape), 0
        _step(draft, entry, blob, strides, offset)
    for member in others:
        seen, steps = _through(shape, strides, member.view)
        if seen != draft.model.by_id[member.id].shape:
            raise RewriteRefused(f"{member.id}: expected the shape {list(seen)} of the tie, found another one")
        _step(draft, draft.entry(member.id), blob, steps, offset)
    for id, serving in equal_members(change.members).items():
        value, instead = draft.value(id), draft.value(serving)
        if id != serving and value is not None and instead is not None:
            draft.inputs[value] = instead
            draft.renamed[id] = serving


def _unshare(draft: _Draft, change: Unshare) -> None:
    """The name gets its own bytes, and the operations of its own module read it."""
    weight = next(one for one in draft.model.weights if change.name in (one.id, one.name))
    entry = draft.payload.entries[weight.name]
    blob = _new_blob(draft, entry.folder, storage_of(weight))
    _step(draft, entry, blob, row_major(weight.shape), 0)
    heads = heads_of(draft.model, change)
    if isinstance(heads, str):
        raise RewriteRefused(heads)
    value, own = draft.value(change.source), draft.value(weight.id)
    if heads and value is not None and own is not None:
        _rewire(draft.document, {value: own}, frozenset(heads))


def _through(shape: tuple[int, ...], strides: tuple[int, ...], view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for step in view.steps:
        if not isinstance(step, Transpose):
            raise RewriteRefused(f"a view that is {step} cannot be held by strides")
        shape, strides = (tuple(one[axis] for axis in step.perm) for one in (shape, strides))
    return shape, strides


def _new_blob(draft: _Draft, folder: str, content: Storage) -> str:
    """A name for new bytes; the archive's programs have one row of numbers together."""
    prefix = folder + _PREFIX[folder]
    taken = [*draft.layout.archive.members, *draft.blobs]
    numbers = [int(found[1]) for name in taken if (found := re.fullmatch(re.escape(prefix) + r"(\d{1,9})", name))]
    name = f"{prefix}{max(numbers, default=-1) + 1}"
    draft.blobs[name] = content
    return name.removeprefix(folder)


def _step(draft: _Draft, entry: Entry, blob: str, strides: tuple[int, ...], offset: int) -> None:
    """Let a row of a table step through a blob."""
    row = draft.tables[entry.folder]["config"][entry.name]
    row["path_name"] = blob
    meta = row["tensor_meta"]
    before = meta["strides"]
    meta["strides"] = [{"as_int": stride} for stride in strides]
    meta["storage_offset"] = {"as_int": offset}
    draft.changed.add(entry.folder)
    value = draft.program.weights.get(entry.name)
    known = draft.document["graph_module"]["graph"]["tensor_values"].get(value)
    if known is not None and known.get("strides") == before:  # the type of the graph's own input
        known["strides"] = copy.deepcopy(meta["strides"])


def _rewire(document: Any, inputs: Mapping[str, str], heads: frozenset[str] | None) -> None:
    """Let nodes of the main graph (None: all) read other inputs."""
    if not inputs:
        return
    for node in document["graph_module"]["graph"]["nodes"]:
        outputs = [one["as_tensor"]["name"] for one in node["outputs"] if one.get("as_tensor")]
        if heads is None or heads & {node.get("name"), *outputs[:1]}:
            for one in node["inputs"]:
                _rename(one["arg"], inputs)


def _rename(argument: Any, inputs: Mapping[str, str]) -> None:
    """Replace names of tensors in one argument; nested graphs have names of their own."""
    for tag, value in argument.items():
        if tag in ("as_tensor",) and value is not None:
            value["name"] = inputs.get(value["name"], value["name"])
        elif tag == "as_optional_tensor" and value is not None:
            _rename(value, inputs)
        elif tag in _LISTS and value is not None:
            for one in _leaves(value):
                if tag == "as_optional_tensors":
                    _rename(one, inputs)
                else:
                    one["name"] = inputs.get(one["name"], one["name"])


def _leaves(value: Any) -> list[Any]:
    return [leaf for one in value for leaf in (_leaves(one) if isinstance(one, list) else [one])]


def _write(draft: _Draft, path: Path) -> None:
    archive, top = draft.layout.archive, draft.layout.archive.top
    new = {top + draft.layout.table(folder): _text(draft.tables[folder]) for folder in draft.changed}
    if draft.document != draft.program.json.value:
        new[top + draft.layout.program] = _text(draft.document)
    dropped = {top + name for name in _unread(draft)}
    tables = {top + draft.layout.table(folder): folder for folder in draft.changed}
    with ZipWriter(path, top) as writer:
        for member in archive.all:
            for name, content in draft.blobs.items():
                if name.startswith(tables.get(member.name, "\0")) and top + name not in dropped:
                    writer.add(name, content)
            if member.name not in dropped:
                writer.add_full(member.name, new.get(member.name) or archive.content(member))


def _unread(draft: _Draft) -> set[str]:
    """Blobs that no row of any program's table names any more."""
    before, after = set[str](), set[str]()
    for name in draft.layout.names:
        layout = Layout(draft.layout.archive, name, draft.layout.names)
        for folder in _FOLDERS:
            if layout.table(folder) not in layout.archive:
                continue
            rows = [folder + entry.blob for entry in entries_of(layout, folder)]
            before.update(rows)
            if name == draft.layout.name:
                rows = [folder + row["path_name"] for row in draft.tables[folder]["config"].values()]
            after.update(rows)
    return before - after


def _text(value: Any) -> bytes:
    """JSON as torch writes it."""
    return json.dumps(value).encode()
