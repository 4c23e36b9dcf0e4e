"""Median cosine between the same rows of both tables, about the mean row."""

from __future__ import annotations

import math

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair


def _measure(pair: Pair) -> Measured | None:
    if not len(pair.cosines) or pair.n_columns < 2:
        return None
    # of a median of n values with standard deviation s, for large n: 1.2533·s/√n; s = 1/√d for directions at random
    spread = 1.2533 / math.sqrt(len(pair.cosines) * pair.n_columns)
    return Measured(float(np.median(pair.cosines)), 0.0, spread)


row_cosine = Diagnostic(
    name="row-cosine",
    source="median over rows of ⟨a, b⟩ / (‖a‖·‖b‖), rows about the mean row: trained tables have a common direction "
    "that makes every pair of rows look alike (Gao et al. 2019, Representation degeneration, ICLR). Null: 0, with a "
    "standard deviation of 1/√columns for one row",
    measure=_measure,
)
