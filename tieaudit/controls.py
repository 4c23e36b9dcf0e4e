"""Controls: proof that the comparison can fail. Each touched use is perturbed in the original; the outputs must move.

For a lookup a row that was really looked up is changed, because any other row moves nothing; for other uses some rows,
then the whole matrix. Where one stored tensor is looked up and multiplied with, the two are told apart: a row that was
not looked up can only act through the product, and a row that was acts through the lookup where outputs other than
its own column move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tieaudit.floor import difference
from tieaudit.formats.onnx.slots import LEARNED
from tieaudit.inputs import Feed
from tieaudit.model import Model, Use, Weight
from tieaudit.overlay import CannotChange, Overlay
from tieaudit.runners import Array
from tieaudit.running import Opened, opened, path_of
from tieaudit.sandbox import ChildFailed, Sandbox

N_MOST_USES = 24
"""Uses that are perturbed; the rest is listed as not exercised."""
_N_ROWS = 8
_N_BLOCK = 4096
Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Baseline:
    """What the original gave, and how much of a difference is noise."""

    feeds: Sequence[Feed]
    outputs: Sequence[Outputs]
    limits: Sequence[float]


@dataclass(frozen=True)
class _Shot:
    """One perturbation of one weight."""

    rows: tuple[int, ...] | None
    """Indices along `axis`; None for everything."""
    axis: int
    own_column: int | None = None
    """Last-axis index of the outputs that does not count, because another use of the same row moves it."""


def label(use: Use) -> str:
    """How a use is listed."""
    return f"{use.weight} @ {use.node}"


def of_onnx(model: Model, part: str, uses: Sequence[Use], baseline: Baseline, sandbox: Sandbox) -> list[str]:
    """Labels of the uses of one part that never moved an output, with the reason where it is another one."""
    silent: list[str] = []
    with Overlay(model) as overlay:
        for number, use in enumerate(uses):
            if number >= N_MOST_USES:
                silent.append(f"{label(use)} (one of many: not tried)")
                continue
            try:
                if not _moves(model, part, use, baseline, sandbox, overlay):
                    silent.append(label(use))
            except (CannotChange, ChildFailed) as error:
                silent.append(f"{label(use)} ({error})")
    return silent


def _moves(model: Model, part: str, use: Use, baseline: Baseline, sandbox: Sandbox, overlay: Overlay) -> bool:
    weight = model.by_id[use.weight]
    for shot in shots(weight, use, model.uses_of[use.weight], baseline.feeds):
        overlay.reset()
        overlay.change(weight, lambda array, shot=shot: perturb(array, shot.rows, shot.axis))  # type: ignore[misc]
        with opened(sandbox, str(overlay.file(path_of(model, part)))) as changed:
            if moved(changed.run, baseline, shot.own_column):
                return True
    return False


def moved(run: Callable[[Outputs], Outputs], baseline: Baseline, own_column: int | None = None) -> bool:
    """Whether a perturbed model's outputs leave the noise floor for any input."""
    for feed, outputs, limit in zip(baseline.feeds, baseline.outputs, baseline.limits, strict=True):
        now = run(feed.arrays)
        found = difference(_without(outputs, own_column), _without(now, own_column))
        if found.problem or found.relative > limit:
            return True
    return False


def _without(outputs: Outputs, column: int | None) -> Outputs:
    if column is None:
        return outputs
    return {n: np.delete(a, column, axis=-1) if a.ndim and a.shape[-1] > column else a for n, a in outputs.items()}


def shots(weight: Weight, use: Use, siblings: Sequence[Use], feeds: Sequence[Feed]) -> Iterator[_Shot]:
    """Perturbations to try for one use, gentle ones first."""
    looked_up = _ids_in(feeds, max(weight.shape, default=0))
    axis = vocabulary_axis(use, weight)
    tables = [one for one in siblings if is_lookup(one)]
    shared = bool(tables) and len(tables) < len(siblings)
    n_rows = weight.shape[axis] if weight.shape else 0
    if is_lookup(use):
        inside = tuple(id for id in looked_up if id < n_rows)
        if shared:
            yield from (_Shot((id,), axis, id) for id in inside[:_N_ROWS])
            return
        if inside:
            yield _Shot(inside[:_N_ROWS], axis)
    elif shared:
        unread = [row for row in range(n_rows) if row not in set(looked_up)]
        if unread:
            yield _Shot(tuple(unread[:_N_ROWS]), axis)
            yield _Shot(tuple(unread), axis)
        return
    yield _Shot(tuple(range(min(_N_ROWS, n_rows))), axis)
    yield _Shot(None, axis)


def is_lookup(use: Use) -> bool:
    """Whether only chosen rows of the weight are read."""
    return "Gather" in use.op or (use.op.endswith("EmbedLayerNormalization") and use.slot in (2, 3, 4))


def vocabulary_axis(use: Use, weight: Weight) -> int:
    """The axis of the stored weight that a lookup indexes, or whose entries a head scores."""
    turned = use.view.transposes
    if is_lookup(use):
        return 1 if turned and len(weight.shape) == 2 else 0
    product = use.op in LEARNED and use.slot == 1 and len(weight.shape) == 2
    # a right factor [d, V] has its scores along axis 1, unless it is the view that turns it so
    return (0 if turned else 1) if product else 0


def perturb(array: Array, rows: tuple[int, ...] | None, axis: int) -> None:
    """Change some rows (all: None) in place, far beyond any rounding: by noise of four times their usual size."""
    if rows is None and array.ndim and len(array) > _N_BLOCK:  # bounded memory
        for begin in range(0, len(array), _N_BLOCK):
            perturb(array[begin : begin + _N_BLOCK], None, 0)
        return
    where: tuple[object, ...] = (slice(None),) if rows is None else (*(slice(None),) * axis, list(rows))
    if array.ndim == 0 or axis >= array.ndim:
        where = (...,)
    if array.dtype.kind == "f" or array.dtype.type.__module__ == "ml_dtypes" and "int" not in array.dtype.name:
        picked = array[where].astype(np.float64)  # type: ignore[index]
        size = float(np.sqrt(np.mean(picked[np.isfinite(picked)] ** 2))) if np.isfinite(picked).any() else 0.0
        noise = np.random.default_rng(0).standard_normal(picked.shape) * 4 * max(size, 0.25)
        array[where] = (picked + noise).astype(array.dtype)  # type: ignore[index]
    elif array.dtype.kind == "b":
        array[where] = ~array[where]  # type: ignore[index]
    else:
        array[where] = array[where] ^ np.array(0x55, array.dtype)  # type: ignore[index]


def _ids_in(feeds: Sequence[Feed], n_rows: int) -> list[int]:
    """Integers among the inputs that could be rows, in order of first appearance; large ones first are real ids."""
    found: dict[int, None] = {}
    for feed in feeds:
        for name, array in feed.arrays.items():
            if array.dtype.kind in "iu" and "mask" not in name:
                found.update(dict.fromkeys(int(value) for value in array.ravel() if 0 <= value < n_rows))
    return sorted(found, key=lambda id: id < 3)


def of_folder(
    opened_model: Opened, names: Sequence[tuple[str, str, bool]], baseline: Baseline, sandbox: Sandbox
) -> list[str]:
    """The same in memory: `names` are (id, parameter name, whether it is a lookup) of the touched weights."""
    silent = []
    ids = _ids_in(baseline.feeds, 1 << 62)
    for id, name, lookup in names[:N_MOST_USES]:
        tries: list[list[int] | None] = [ids[:_N_ROWS]] if lookup and ids else [list(range(_N_ROWS))]
        if not lookup:
            tries.append(None)
        try:
            if not any(_moves_in_memory(opened_model, name, rows, baseline, sandbox) for rows in tries):
                silent.append(f"{id} @ {name}")
        except ChildFailed as error:
            silent.append(f"{id} @ {name} ({error})")
    silent += [f"{id} @ {name} (one of many: not tried)" for id, name, _ in names[N_MOST_USES:]]
    return silent


def _moves_in_memory(model: Opened, name: str, rows: list[int] | None, baseline: Baseline, sandbox: Sandbox) -> bool:
    sandbox.ask("perturb", {"handle": model.handle, "name": name, "rows": rows})
    try:
        return moved(model.run, baseline)
    finally:
        sandbox.ask("restore", {"handle": model.handle})
