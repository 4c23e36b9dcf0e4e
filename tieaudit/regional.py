"""The regional proof: what was rewritten, run alone, before and after.

For ONNX the region is a rewritten operation with the nodes around it, cut out of both models. For a folder it is what
the loading class makes of the files: every parameter of the live model, bit for bit, and what is one tensor.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from tieaudit.change import Equalise, Level, Plan, Pool, Rewritten, SetConfig, Share, Written
from tieaudit.dtypes import dtype
from tieaudit.errors import CorruptFile
from tieaudit.floor import difference, limit_of, rounding_bound, says_something
from tieaudit.formats.onnx import pool
from tieaudit.formats.onnx.correct import PATTERNS
from tieaudit.formats.onnx.region import Cutter, Region
from tieaudit.inputs import N_MOST_ELEMENTS
from tieaudit.model import Model, Use, Weight, storage_of
from tieaudit.runners import Array
from tieaudit.running import USUAL, Setting, opened, path_of
from tieaudit.sandbox import ChildFailed, Sandbox
from tieaudit.storage import blocks
from tieaudit.structural import planned_value

N_MOST_REGIONS = 48
"""Rewritten operations that are run; models with more have hundreds of the same kind."""
_LEADING = (2, 5)
"""Sizes of free axes in front."""
_AS_WRITTEN = Setting("optimisation off", {"level": "disable"})
_LOOKUPS = {"Gather": "axis", "com.microsoft.GatherBlockQuantized": "gather_axis"}
"""Operations that look up by ids → the attribute that names the axis."""
_EXACT = frozenset(_LOOKUPS)
"""Operations that only move values: no rounding is excused."""


@dataclass(frozen=True)
class _Case:
    rewritten: Rewritten
    use: Use
    shape: tuple[int, int]
    """What the consumer sees: rows and columns of the matrix."""

    through: frozenset[str] = frozenset()
    """Values inside the region that no pattern made."""
    rounded: str = ""
    """Element type of a table that the original holds rounded, where the result adjusts it as it goes."""

    @property
    def n_summed(self) -> int:
        """Products in one sum: the axis that a product takes away; for what is adjusted, those of both sums."""
        return sum(self.shape) if self.rounded else self.shape[0] if self.use.slot == 1 else self.shape[1]


def of_onnx(before: Model, after: Model, written: Written, sandbox: Sandbox) -> Level:
    """Run every rewritten operation alone in both forms on random values."""
    cases = _cases(before, written)
    if not cases:
        return Level("regional", "held", "no operation had to be written differently: there is nothing to run")
    device = sandbox.device.upper()
    worst, limit, n_done, skipped = 0.0, 0.0, 0, []
    cutters: dict[tuple[str, str], Cutter] = {}
    for case in cases[:N_MOST_REGIONS]:
        part = case.rewritten.part
        pair = [cutters.setdefault((side, part), Cutter(model, part)) for side, model in (("b", before), ("a", after))]
        try:
            found, allowed = _run_case(case, pair[0], pair[1], sandbox)
        except _NotRun as error:
            skipped.append(f"{case.use.op} @ {case.use.node}: {error}")
            continue
        except (ChildFailed, CorruptFile, _Differs) as error:
            where = f"{case.use.op} @ {case.use.node} as {case.rewritten.pattern}"
            return Level("regional", "failed", f"{where}: {error}", device=device)
        n_done += 1
        if found > allowed:
            where = f"{case.use.op} @ {case.use.node} as {case.rewritten.pattern}"
            return Level("regional", "failed", f"{where}: the results differ", found, allowed, device)
        if found >= worst:
            worst, limit = found, max(limit, allowed)
    if not n_done:
        return Level("regional", "not run", f"no rewritten operation could be run alone: {skipped[0]}", device=device)
    said = f"{n_done} of {len(cases)} rewritten operations run alone, before and after"
    said += f"; not run: {skipped[0]}" if skipped else ""
    return Level("regional", "held", said, worst, limit, device)


class _NotRun(Exception):
    """The original form cannot be run alone."""


class _Differs(Exception):
    """The two forms are not comparable at all."""


def _cases(before: Model, written: Written) -> list[_Case]:
    uses = {(use.part, use.scope, use.node, use.slot): use for use in before.uses}
    found: dict[tuple[str, str, str], _Case] = {}
    for one in written.rewritten:
        use = uses.get((one.part, one.scope, one.node, one.slot))
        if use is None or one.scope.startswith("function:"):
            continue
        shape = use.view.shape(before.by_id[use.weight].shape)
        if len(shape) == 2:
            rounded = before.by_id[use.weight].dtype if one.pattern in PATTERNS else ""
            found.setdefault((one.part, one.scope, one.node), _Case(one, use, (shape[0], shape[1]), rounded=rounded))
    for pooled in written.repeated:
        use = uses.get((pooled.part, pooled.scope, pooled.node, pooled.slot))
        if use is not None:
            shape = use.view.shape(before.by_id[use.weight].shape)
            one = Rewritten(pooled.part, pooled.scope, pooled.result, use.slot, pooled.result, use.slot, pool.PATTERN)
            place = (pooled.part, pooled.scope, pooled.result)
            found[place] = _Case(one, use, (shape[0], shape[1]), frozenset({pooled.node}))
    return list(found.values())


def _run_case(case: _Case, before: Cutter, after: Cutter, sandbox: Sandbox) -> tuple[float, float]:
    """(largest difference, limit) of one rewritten operation."""
    scope, output = case.rewritten.scope, case.rewritten.node
    one, other = before.cut(scope, output, case.through), after.cut(scope, output, case.through)
    if set(one.inputs) != set(other.inputs):
        raise _Differs(f"it reads {', '.join(one.inputs)} before and {', '.join(other.inputs)} afterwards")
    kind = _result_type(case, one, before)
    feed = {name: _values(name, case, one, before, kind) for name in one.inputs}
    with tempfile.TemporaryDirectory(prefix="tieaudit-region-") as folder:
        ports = {name: (_plain(array), array.ndim) for name, array in feed.items()}
        paths = (
            before.write(one, output, ports, kind, Path(folder) / "before"),
            after.write(other, output, ports, kind, Path(folder) / "after"),
        )
        found, limit = _both(case, paths, feed, sandbox, USUAL)
        if (
            found > limit
        ):  # a runtime may fuse one form into an approximate kernel; as they are written, both must agree
            found, limit = _both(case, paths, feed, sandbox, _AS_WRITTEN)
    return found, limit


def _both(
    case: _Case, paths: tuple[Path, Path], feed: Mapping[str, Array], sandbox: Sandbox, setting: Setting
) -> tuple[float, float]:
    """(difference, limit) of the two forms under one setting."""
    results = []
    for path in paths:
        try:
            with opened(sandbox, str(path), setting) as model:
                results.append(model.run(feed))
        except ChildFailed as error:
            if not results:
                raise _NotRun(f"the original does not run alone either: {error}") from error
            raise
    if not says_something(results[0]):
        raise _NotRun("its result is empty or constant, which proves nothing")
    found = difference(results[0], results[1])
    if found.problem:
        raise _Differs(found.problem)
    exact = case.use.op in _EXACT and not case.rounded
    return found.relative, 0.0 if exact else limit_of(0.0, rounding_bound(results[0], case.n_summed, case.rounded))


def _result_type(case: _Case, region: Region, cutter: Cutter) -> str:
    known = cutter.type_of(case.rewritten.scope, case.rewritten.node)
    if known is not None:
        return known[0]
    cast = re.search(r"cast to (\w+)", str(case.use.view))
    if cast:
        return cast[1]
    dtypes = [weight.dtype for weight in region.weights.values() if len(weight.shape) == 2]
    dtypes.sort(key=lambda name: dtype(name).family != "float")  # beside codes, the scales say what comes out
    return dtypes[0] if dtypes else "float32"


def _plain(array: Array) -> str:
    return array.dtype.name


def _values(name: str, case: _Case, region: Region, cutter: Cutter, kind: str) -> Array:
    """Random values for what flows in: ids for a lookup, else factors whose inner size fits the matrix."""
    rng = np.random.default_rng(0)
    known = cutter.type_of(case.rewritten.scope, name)
    node = next(one for one in region.nodes if name in one.input)
    slot = list(node.input).index(name)
    if case.use.op in _LOOKUPS:
        axis = next((a.i for a in node.attribute if a.name == _LOOKUPS[case.use.op]), 0)
        free = known[1] if known is not None and known[1] is not None else (None, None)
        size = _bounded(tuple(n or _LEADING[i % 2] for i, n in enumerate(free)))
        ids = rng.integers(0, case.shape[axis], size=size)
        return ids.astype(known[0] if known is not None else "int64")
    sizes = known[1] if known is not None and known[1] is not None else None
    shape = _bounded(_fitting(case, slot, node.op_type, sizes, {a.name: a.i for a in node.attribute}))
    element = "float32" if kind == "bfloat16" else (known[0] if known is not None else kind)
    element = "float32" if element == "bfloat16" else element
    if np.dtype(element).kind in "iu":
        return rng.integers(0, 4, size=shape).astype(element)
    return rng.standard_normal(shape).astype(element)


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, if values of it can be made up: a file may declare any sizes."""
    if any(size < 0 for size in shape) or prod(shape) > N_MOST_ELEMENTS:
        raise _NotRun(f"the file declares an operand of the shape {list(shape)}, for which no values can be made up")
    return shape


def _fitting(
    case: _Case, slot: int, op: str, sizes: tuple[int | None, ...] | None, flags: Mapping[str, int]
) -> tuple[int, ...]:
    """The shape of the other factor (or the bias) of a product with a matrix of `case.shape`."""
    rows, columns = case.shape
    flipped = bool(flags.get("transA" if slot == 0 else "transB", 0))
    if op == "Einsum" and (sizes is None or None in sizes):
        raise _NotRun("the sizes of an Einsum's other factors are not known")
    if slot > 1:
        known = tuple(n or 1 for n in sizes or ())
        return known
    rank = len(sizes) if sizes is not None else (2 if op == "Gemm" else 3)
    shape = [n or _LEADING[i % 2] for i, n in enumerate(sizes or (None,) * rank)]
    if op == "Einsum":
        return tuple(shape)
    if case.use.slot == 1:  # the matrix is the right factor: the left one ends with its rows
        shape[-2 if flipped and rank > 1 else -1] = rows
    else:
        shape[-1 if flipped or rank == 1 else -2] = columns
    return tuple(shape)


def of_folder(before: Model, after: Model, plan: Plan, sandbox: Sandbox) -> Level:
    """Load both folders through their class and compare every parameter bit for bit."""
    states = []
    for model, side in ((before, "the original"), (after, "the result")):
        try:
            with opened(sandbox, path_of(model, "")) as one:
                states.append((one.facts, sandbox.ask("state", {"handle": one.handle})[0]))
        except ChildFailed as error:
            if model is before:
                return Level(
                    "regional", "not run", f"{side} does not load either: {error}", device=sandbox.device.upper()
                )
            return Level("regional", "failed", f"{side} does not load: {error}", device=sandbox.device.upper())
    problems = _loading_problems(states[0][0]["loading"], states[1][0]["loading"])
    changed = _changed(before, after, plan, states[0][1]["digests"], states[1][1]["digests"])
    problems += [f"{name}: loads with other values than before" for name in changed]
    problems += _apart(plan, states[1][1]["tied"], set(states[1][1]["digests"]))
    problems += not_as_stored(after, plan, states[1][1]["digests"])
    if problems:
        return Level("regional", "failed", "; ".join(problems[:4]), device=sandbox.device.upper())
    count = len(states[0][1]["digests"])
    which = f"{count} tensors" if plan.lossless else "all but the planned tensors"
    said = f"{states[0][0]['class']} loads both: {which} equal bit for bit, nothing missing, ties are one tensor"
    if n_equal := sum(len(edit.members) for edit in plan.edits if isinstance(edit, Equalise)):
        said += f", {n_equal} names that get one value with others load it from their own"
    if n_pooled := sum(len(edit.weights) for edit in plan.edits if isinstance(edit, Pool)):
        said += f", {n_pooled} with fewer heads in their new shape"
    return Level("regional", "held", said, device=sandbox.device.upper())


def _loading_problems(before: Mapping[str, list[str]], after: Mapping[str, list[str]]) -> list[str]:
    """What the loader could not place and could before: those names come back random."""
    found = []
    for key, what in (
        ("missing_keys", "missing, so it is initialised at random"),
        ("mismatched_keys", "of another shape"),
    ):
        found += [f"{name}: {what}" for name in after[key] if name not in before[key]]
    return found


def not_as_stored(after: Model, plan: Plan, digests: Mapping[str, str]) -> list[str]:
    """Names with a value in common, or fewer heads, that are loaded with another value than is stored under them."""
    found = []
    for edit in plan.edits:
        told = edit.members if isinstance(edit, Equalise) else edit.weights if isinstance(edit, Pool) else ()
        for one in told:
            weight = after.by_id[one.id]
            if weight.name in digests and loaded_digest(weight) != digests[weight.name]:
                found.append(f"{weight.name}: loads with other values than are stored under it")
    return found


def _changed(before: Model, after: Model, plan: Plan, one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names whose loaded values differ, except those that a lossy plan or a setting changes knowingly."""
    ids = [] if plan.lossless else list(_changed_knowingly(before, plan))
    planned = {before.by_id[id].name for id in ids}
    differ = [name for name in one.keys() & other.keys() if name not in planned and one[name] != other[name]]
    if differ and ids:  # a class may call a tensor otherwise than its file does: then the values say which one it is
        was, now = ({loaded_digest(m.by_id[id]) for id in ids if _is_stored(m, id)} for m in (before, after))
        differ = [name for name in differ if one[name] not in was or other[name] not in now]
    if any(isinstance(edit, SetConfig) for edit in plan.edits):
        # a setting may make a loader keep what it discarded: then what is loaded must be what is stored
        stored = {weight.name: weight for weight in after.weights if weight.storage is not None}
        differ = [name for name in differ if name not in stored or loaded_digest(stored[name]) != other[name]]
    gone = [name for name in one.keys() - other.keys() if name not in planned]
    return sorted([*differ, *gone])


def _changed_knowingly(before: Model, plan: Plan) -> Iterator[str]:
    """Ids of the weights that a lossy plan gives another value."""
    for edit in plan.edits:
        if isinstance(edit, (Share, Equalise)) and planned_value(before, edit) is not None:
            yield from (member.id for member in edit.members)
        elif isinstance(edit, Pool):
            yield from (one.id for one in edit.weights)


def _is_stored(model: Model, id: str) -> bool:
    return id in model.by_id and not model.by_id[id].absent


def loaded_digest(weight: Weight) -> str:
    """What the torch runner's verb `state` says about a parameter with exactly the stored bytes."""
    running = hashlib.sha256(f"torch.{weight.dtype} {list(weight.shape)} ".encode())
    for block in blocks(storage_of(weight)):
        running.update(block)
    return running.hexdigest()


def _apart(plan: Plan, tied: list[list[str]], names: set[str]) -> list[str]:
    """Shares that did not become one tensor in memory. Names that the class does not use are its own business."""
    found = []
    for edit in plan.edits:
        if isinstance(edit, Share):
            members = [member.id.rsplit("|", 1)[-1] for member in edit.members]
            live = [name for name in members if name in names]
            if len(live) > 1 and not any(set(live) <= set(group) for group in tied):
                found.append(f"{', '.join(live)}: planned as one tensor, loaded as several")
    return found
