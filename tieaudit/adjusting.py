"""What a member of a share sees of the common value, computed from the factors as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tieaudit.change import Adjustment
from tieaudit.dtypes import dtype

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
