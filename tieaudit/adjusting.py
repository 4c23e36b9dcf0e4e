"""What a member of a share sees of the common value, computed from the factors as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tieaudit.change import Adjusted, Adjustment, Share, Written
from tieaudit.dtypes import dtype
from tieaudit.model import Model
from tieaudit.storage import blocks

_N_BLOCK = 4096
"""Rows that are computed at a time."""


def factor(adjustment: Adjustment, side: str) -> NDArray[Any]:
    """One stored factor, `left` or `right`, in its own element type and shape. ValueError if there is none."""
    storage, shape = (
        (adjustment.right, adjustment.right_shape) if side == "right" else (adjustment.left, adjustment.left_shape)
    )
    if storage is None:
        raise ValueError(f"a {adjustment.kind} adjustment has no {side} factor")
    raw = storage.read_ranges([(0, storage.n_bytes)])[0]
    return np.frombuffer(raw, dtype(adjustment.dtype).numpy()).reshape(shape)


def adjusted(common: NDArray[Any], adjustment: Adjustment) -> NDArray[Any]:
    """The matrix [rows, columns] as the member sees it: computed in float64, rounded once to the stored type."""
    right = factor(adjustment, "right").astype(np.float64)
    left = factor(adjustment, "left") if adjustment.left is not None else None
    result = np.empty(common.shape, common.dtype)
    for begin in range(0, len(common), _N_BLOCK):
        rows = common[begin : begin + _N_BLOCK].astype(np.float64)
        if adjustment.kind == "scale":
            rows = rows * right
        elif adjustment.kind == "linear":
            rows = rows @ right
        else:
            assert left is not None
            rows = rows + left[begin : begin + _N_BLOCK].astype(np.float64) @ right
        result[begin : begin + _N_BLOCK] = rows.astype(common.dtype)
    return result


def problems(before: Model, after: Model, edit: Share, written: Written) -> Iterator[str]:
    """Uses of adjusted members that are not adjusted by factors with exactly the planned bytes, in sentences.

    What the operations around the factors compute is the regional proof's business.
    """
    known = {(one.weight, (one.part, one.scope, one.node, one.slot)): one for one in written.adjusted}
    for id, adjustment in edit.adjustments.items():
        sides = {"right", "left"} if adjustment.left is not None else {"right"}
        for use in before.uses_of.get(id, ()):
            if use.op in ("Shape", "Size"):
                continue
            found = known.get((id, (use.part, use.scope, use.node, use.slot)))
            if found is None or {one.side for one in found.factors} != sides:
                yield f"{use.op} @ {use.node} (input {use.slot}): expected {id} corrected, it is not"
            else:
                yield from _factors(after, found, adjustment)
    for one in written.adjusted:
        if one.weight in {member.id for member in edit.members} - edit.adjustments.keys():
            yield f"{one.weight}: corrected at {one.node}, which the plan does not say"


def _factors(after: Model, found: Adjusted, adjustment: Adjustment) -> Iterator[str]:
    for one in found.factors:
        planned = factor(adjustment, one.side)
        planned = np.ascontiguousarray(planned.T) if one.transposed else planned
        stored = after.by_id.get(one.id)
        if stored is None or stored.storage is None:
            yield f"{one.id}: expected the {one.side} factor of {found.weight}, found nothing"
        elif (stored.dtype, stored.shape) != (adjustment.dtype, planned.shape) or b"".join(
            blocks(stored.storage)
        ) != planned.tobytes():
            yield f"{one.id}: its bytes are not those of the {one.side} factor of {found.weight}"
