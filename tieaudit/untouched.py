"""What the structural proof compares besides weights: the graph's nodes, and the files beside a folder's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.change import Plan, SetConfig, Unshare, Written
from tieaudit.formats import KEY_GIVEN, carried
from tieaudit.model import Model
from tieaudit.storage import BLOCK_BYTES
from tieaudit.structural import Check

if TYPE_CHECKING:
    from tieaudit.formats.torch_checkpoint.adjustment import Adjustment

_INDEX = ".index.json"


def differences(before: Model, after: Model, plan: Plan, written: Written, check: Check) -> list[str]:
    """What differs between the two besides what the plan says, in sentences. Cost: linear; files in blocks."""
    if before.format == "onnx" and after.format == "onnx":
        return _graphs(before, after, plan, written, check)
    if before.format == "torch_export" and after.format == "torch_export":
        from tieaudit.formats.torch_export import compare

        return compare.differences(before, after, plan)
    problems = []
    if Path(before.path).is_dir() and Path(after.path).is_dir():
        problems = list(_files(before, after, plan))
    if plan.into is not None:  # a container of its own, which holds the weights and nothing else
        return problems
    if not problems and before.format == after.format and before.format in ("torch_checkpoint", "huggingface"):
        problems = list(_pickled(before, after, plan, written))
    return problems


def _pickled(before: Model, after: Model, plan: Plan, written: Written) -> Iterator[str]:
    """Everything in checkpoint files besides the weights: optimizers, averages, what other classes left there."""
    from tieaudit.formats.torch_checkpoint import beside, discover

    names = [[path for part in model.parts for path in part.paths] for model in (before, after)]
    theirs = {Path(path).name: Path(path) for path in names[1]}
    held = [{weight.name for weight in model.weights if not weight.absent} for model in (before, after)]
    gone, new = frozenset(held[0] - held[1]), frozenset(held[1] - held[0])
    key = before.metadata.get(KEY_GIVEN, "")
    for one in map(Path, names[0]):
        other = theirs.get(written.placed.get(one.name, one.name))
        if len(names[0]) == len(names[1]) == 1:
            other = Path(names[1][0])
        if other is not None and not one.name.endswith((".json", ".safetensors")) and discover.what_is(one)[0]:
            adjusted = partial(_adjusted, before, plan, one)
            for problem in beside.differences(one, other, key, gone, new, adjusted):
                yield f"{one.name}: {problem}"


def _adjusted(before: Model, plan: Plan, path: Path) -> Sequence[Adjustment]:
    """What the plan makes of optimizer states in one file; beside a folder's weights they stay as they are."""
    from tieaudit.formats.torch_checkpoint.write import adjustments

    return adjustments(before, plan).get(path, ()) if before.format == "torch_checkpoint" else ()


def _graphs(before: Model, after: Model, plan: Plan, written: Written, check: Check) -> list[str]:
    from tieaudit.formats.onnx import compare, pool
    from tieaudit.formats.onnx.correct import PATTERNS
    from tieaudit.formats.onnx.patterns import ALLOWED

    known = (*ALLOWED, *PATTERNS, pool.PATTERN)
    strange = sorted({one.pattern for one in written.rewritten} - set(known))
    if strange:
        return [f"the graph edit {strange[0]!r} is not on the list of edits that are proved: {', '.join(known)}"]
    unshared = [edit for edit in plan.edits if isinstance(edit, Unshare)]
    copies = {w.name: w.id for w in after.weights} | {w.id: w.id for w in after.weights}
    chains = {(use.part, use.scope, use.node, use.slot): use.chain for use in before.uses}
    changed = [(one.part, one.scope, one.node, one.slot) for one in written.rewritten]
    changed += [place for edit in unshared for place in edit.uses]  # views on the way to them read the copy
    vanished = {
        (place[0], scope, name) for place in changed for name in chains.get(place, ()) for scope in _around(place[1])
    }
    allowed = compare.Allowed(
        serving={id: serving.id for id, serving in check.served.items()},
        replaced={(one.part, one.scope, one.node): one.pattern for one in written.rewritten},
        new_nodes=frozenset((one.part, one.scope, one.new_node) for one in written.rewritten),
        vanished=frozenset(vanished),
        new_weights=frozenset(copies.get(edit.name, edit.name) for edit in unshared),
        moved={place: copies.get(edit.name, edit.name) for edit in unshared for place in edit.uses},
    )
    return compare.differences(before, after, allowed)


def _around(scope: str) -> list[str]:
    """A scope and those that may enclose it: every prefix of its path, and the main graph."""
    pieces = scope.split("/")
    return ["", *("/".join(pieces[: n + 1]) for n in range(len(pieces)) if scope)]


def _files(before: Model, after: Model, plan: Plan) -> Iterator[str]:
    one, other = Path(before.path), Path(after.path)
    weights = {Path(path).name for model in (before, after) for part in model.parts for path in part.paths}
    if plan.into is not None:  # the weights of the other container, compared tensor by tensor
        left = {Path(path).name for part in before.parts for path in part.paths[1:]} | {*plan.into.left_out}
    else:
        left = set()
    planned: dict[str, list[SetConfig]] = {}
    for edit in plan.edits:
        if isinstance(edit, SetConfig):
            planned.setdefault(edit.file, []).append(edit)
    names = sorted(str(file.relative_to(one)) for file in carried(one))
    for name in names:
        if name in planned:
            yield from _planned_json(one / name, other / name, planned[name])
        elif name in left:
            continue
        elif name in weights and name.endswith((".safetensors", ".bin")) or name.endswith(_INDEX):
            continue  # compared tensor by tensor
        elif not (other / name).is_file():
            yield f"{name}: missing afterwards"
        elif not _same_file(one / name, other / name):
            yield f"{name}: not named by the plan, but its content changed"


def _same_file(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as one, b.open("rb") as other:
        while block := one.read(BLOCK_BYTES):
            if block != other.read(BLOCK_BYTES):
                return False
    return True


def _planned_json(a: Path, b: Path, edits: list[SetConfig]) -> Iterator[str]:
    """The file must be what it was, with exactly the planned keys set."""
    try:
        expected, found = (json.loads(path.read_text(encoding="utf-8")) for path in (a, b))
    except (OSError, ValueError) as error:
        yield f"{a.name}: cannot be compared: {error}"
        return
    for edit in edits:
        place: Any = expected
        for key in edit.key[:-1]:
            place = place.setdefault(key, {})
        place[edit.key[-1]] = edit.value
    if expected != found:
        keys = [k for k in {**expected, **found} if expected.get(k) != found.get(k)]
        yield f"{a.name}: expected only the planned keys to change, found a difference in {', '.join(keys[:4])}"
