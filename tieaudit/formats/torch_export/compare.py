"""What differs between two archives of exported programs besides what a plan says: members, tables, and the graph.

Written without a look at the writer: which input an operation reads is compared by the structural proof through the
model; here every other byte is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tieaudit.change import Plan, Share, Unshare
from tieaudit.formats.torch_export.fields import read_json
from tieaudit.formats.torch_export.layout import CONSTANTS, WEIGHTS, Layout, layout_of
from tieaudit.formats.torch_export.program import read_program
from tieaudit.model import Model
from tieaudit.storage import same_bytes


def differences(before: Model, after: Model, plan: Plan) -> list[str]:
    """In sentences. Cost: both archives are read once, in blocks."""
    one, other = layout_of(Path(before.path)), layout_of(Path(after.path))
    names = _planned(before, plan)
    found = list(_members(one, other))
    if not one.name:
        return found
    for folder in (WEIGHTS, CONSTANTS):
        rows = [dict(read_json(layout.archive, layout.table(folder)).object("config").value) for layout in (one, other)]
        if list(rows[0]) != list(rows[1]):
            found.append(f"{one.table(folder)}: expected the same names in the same order, found others")
        found += [
            f"{name}: not named by the plan, but its row in the archive changed"
            for name, row in rows[0].items()
            if name not in names and rows[1].get(name) != row
        ]
    changes = _changes(_neutral(one, names), _neutral(other, names), "")
    found += [f"{one.program}: {where} changed" for where in changes][:4]
    return found


def _planned(before: Model, plan: Plan) -> frozenset[str]:
    """Names of the weights that the plan names."""
    ids = {member.id for edit in plan.edits if isinstance(edit, Share) for member in edit.members}
    ids |= {edit.source for edit in plan.edits if isinstance(edit, Unshare)}
    names = {before.by_id[id].name for id in ids}
    return frozenset(names | {edit.name for edit in plan.edits if isinstance(edit, Unshare)})


def _members(one: Layout, other: Layout) -> Iterator[str]:
    """Everything but blobs, which are compared weight by weight, and what is compared as JSON."""
    known = {one.program, *(one.table(folder) for folder in (WEIGHTS, CONSTANTS))}
    for member in one.archive.all:
        name = member.name.removeprefix(one.archive.top)
        if name in known:
            continue
        now = other.archive.members.get(name)
        if now is None:
            if not name.startswith((WEIGHTS, CONSTANTS)):
                yield f"{name}: missing from the archive"
        elif not same_bytes(one.archive.storage(name), other.archive.storage(name)):
            yield f"{name}: not named by the plan, but its content changed"


def _neutral(layout: Layout, names: frozenset[str]) -> Any:
    """The graph with one name for all planned inputs where they are read, and without their strides."""
    program = read_program(read_json(layout.archive, layout.program))
    values = {value for name, value in program.weights.items() if name in names}
    document: Any = copy.deepcopy(dict(program.json.value))
    graph = document["graph_module"]["graph"]
    for value in values:
        graph["tensor_values"].get(value, {}).pop("strides", None)
    for node in graph["nodes"]:
        for argument in node["inputs"]:
            _blank(argument["arg"], values)
    return document


def _blank(argument: Any, values: set[str]) -> None:
    pending = [argument]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending.extend(one)
        elif isinstance(one, dict):
            if one.get("name") in values and len(one) == 1:
                one["name"] = "a planned weight"
            pending.extend(value for tag, value in one.items() if tag != "as_graph")


def _changes(one: Any, other: Any, where: str) -> Iterator[str]:
    """Paths of the places where two JSON values differ."""
    pending = [(one, other, where)]
    while pending:
        a, b, path = pending.pop()
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            pending.extend((a[key], b[key], f"{path}.{key}".lstrip(".")) for key in reversed(list(a)))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            pending.extend((x, y, f"{path}[{n}]") for n, (x, y) in reversed(list(enumerate(zip(a, b, strict=True)))))
        elif a != b or type(a) is not type(b):
            yield path
