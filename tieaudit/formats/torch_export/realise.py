"""What an archive of exported programs can hold: reasons against an edit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tieaudit.change import Edit, Share, Unshare
from tieaudit.formats.torch_export.fields import read_json
from tieaudit.formats.torch_export.layout import Layout, layout_of
from tieaudit.formats.torch_export.payload import Entry, Payload, read_payload
from tieaudit.formats.torch_export.program import Program, read_program
from tieaudit.model import Member, Model, Use
from tieaudit.storage import no_values
from tieaudit.view import Transpose


def can_realise(model: Model, edit: Edit, target: str) -> str | None:
    """Why this edit cannot be made, in one sentence, or None."""
    if model.metadata.get("pickled"):
        return (
            "its weights are a pickled state dict, as PyTorch before 2.9 wrote it, which is read only: load it with "
            "torch.export.load and save it again with a newer PyTorch"
        )
    if model.metadata.get("key", "") != "" and layout_of(Path(model.path)).name != model.metadata["key"]:
        return (
            "only the program that torch.export.load returns can be rewritten, and this is another one of the archive"
        )
    if isinstance(edit, Share):
        return _share(model, edit)
    if isinstance(edit, Unshare):
        return _unshare(model, edit)
    return "an exported program has no settings" if edit.__class__.__name__ == "SetConfig" else "nothing folds it apart"


def opened(path: Path, key: str = "") -> tuple[Layout, Program, Payload]:
    """An archive with its program and tables."""
    layout = layout_of(path, key)
    return layout, read_program(read_json(layout.archive, layout.program)), read_payload(path, layout)


def _share(model: Model, edit: Share) -> str | None:
    ids = [member.id for member in edit.members]
    if not all(isinstance(step, Transpose) for member in edit.members for step in member.view.steps):
        return "one of these is seen reshaped, and an exported program has one shape for each name"
    weights = [model.by_id[id] for id in ids]
    kinds = {weight.parameter for weight in weights}
    if len(kinds) > 1:
        return "some of these are parameters and some are buffers, which no optimizer moves: they cannot be one tensor"
    _, program, payload = opened(Path(model.path))
    names = [weight.name for weight in weights]
    for name in names:
        if name in program.mutated:
            return f"{name} is written by the program ({program.mutated[name]}), so another name must not share it"
    entries = [payload.entries[name] for name in names]
    if len({entry.folder for entry in entries}) > 1:
        return "some of these are weights and some are constants of the archive, which share nothing"
    if len({_device(entry) for entry in entries}) > 1:
        return "these lie on different devices"
    if any(weight.storage is None or no_values(weight.storage) for weight in weights):
        return "some of these have no values"
    return None


def _device(entry: Entry) -> str:
    return str(entry.meta.value.get("device")) if entry.meta is not None else ""


def _unshare(model: Model, edit: Unshare) -> str | None:
    named = next((weight for weight in model.weights if edit.name in (weight.id, weight.name)), None)
    if named is None:
        source = model.by_id[edit.source]
        count = len(model.uses_of.get(source.id, ()))
        return (
            f"{source.name} is one parameter that the program reads {count} times: a copy would be a parameter that "
            "its module does not have"
        )
    heads = heads_of(model, edit)
    return heads if isinstance(heads, str) else None


def heads_of(model: Model, edit: Unshare) -> tuple[str, ...] | str:
    """The nodes that read the source for the uses that move: a consumer, or the first view on the way to it.

    A reason where such a view serves a use that does not move, or lies in a nested graph.
    """
    moved = {place[1:] for place in edit.uses}
    by_head: dict[str, list[Use]] = {}
    for use in model.uses_of.get(edit.source, ()):
        if use.scope and (use.scope, use.node, use.slot) in moved:
            return f"{edit.source} is read inside the nested graph {use.scope}, whose operands stay as they are"
        by_head.setdefault(use.chain[0] if use.chain else use.node, []).append(use)
    found = []
    for head, uses in by_head.items():
        moving = [(use.scope, use.node, use.slot) in moved for use in uses]
        if any(moving) and not all(moving):
            return f"{head} serves operations of several modules, so they cannot be told apart there"
        if all(moving):
            found.append(head)
    return tuple(found)


def equal_members(members: Iterable[Member]) -> dict[str, str]:
    """Member → the first one that is seen the same way: one input of the graph serves both."""
    first: dict[object, str] = {}
    return {member.id: first.setdefault(member.view, member.id) for member in members}
