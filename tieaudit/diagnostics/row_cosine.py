"""Median cosine between the same rows of both tables, about the mean row; rows that are all but empty count little."""

from __future__ import annotations

import math

import numpy as np

from tieaudit.diagnostics import Array, Diagnostic, Measured, Pair


def _measure(pair: Pair) -> Measured | None:
    if not len(pair.cosines) or pair.n_columns < 2:
        return None
    weights = np.ones(len(pair.cosines)) if pair.weights is None else pair.weights
    if not float(weights.sum()) > 0.0:
        return None
    n = float(np.square(weights.sum()) / np.square(weights).sum())
    # of a median of n values with standard deviation s, for large n: 1.2533·s/√n; s² = 1/d for directions at random
    variance = max(pair.variance_by_chance or 0.0, 1.0 / pair.n_columns)
    return Measured(_median(pair.cosines, weights), 0.0, 1.2533 * math.sqrt(variance / n))


def _median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    at = int(np.searchsorted(below, below[-1] / 2.0))
    return float(values[order[at]])


row_cosine = Diagnostic(
    name="row-cosine",
    source="median over rows of ⟨a, b⟩ / (‖a‖·‖b‖), rows about the mean row: trained tables have a common direction "
    "that makes every pair of rows look alike (Gao et al. 2019, Representation degeneration, ICLR); weighted by "
    "‖a‖·‖b‖ up to its median, so that rows which nothing was ever written to do not outvote the others. Null: 0, with "
    "the standard deviation of the cosines of rows with other rows, 1/√columns where all directions are alike",
    measure=_measure,
)
