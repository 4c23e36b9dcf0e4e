"""Overlap of the leading directions of both tables."""

from __future__ import annotations

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair

_OF_COLUMNS = 8
"""One of so many directions counts as leading: all of them would overlap completely, whatever the tables."""


def _measure(pair: Pair) -> Measured | None:
    d = pair.n_columns_seen
    k = d // _OF_COLUMNS
    if k < 1 or pair.degrees < 2 * d:
        return None
    leading_a, leading_b = (np.linalg.eigh(gram)[1][:, -k:] for gram in (pair.gram_a, pair.gram_b))
    overlap = float(np.square(leading_a.T @ leading_b).sum()) / k
    null = k / d
    spread = (2.0 * null * (1.0 - null) ** 2 / k) ** 0.5 / d**0.5 * 2.0**0.5
    return Measured(overlap, null, spread)


subspace = Diagnostic(
    name="subspace",
    source="‖QₐᵀQ_b‖² / k for the k = columns/8 leading right singular directions of both tables: the mean squared "
    "cosine of the principal angles (Björck & Golub 1973). Null: k / columns",
    measure=_measure,
)
