"""Median cosine between the same rows of both tables, about the middle of all rows."""

from __future__ import annotations

import math

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair

_SIGMAS = 5.0
_LEAST_RANKED = 25
"""Rows from which five standard deviations of a rank, 5·√n/2, are within the rows."""


def _measure(pair: Pair) -> Measured | None:
    n = len(pair.cosines)
    if not n or pair.n_columns < 2:
        return None
    value = float(np.median(pair.cosines))
    # of a median of n values with standard deviation s, for large n: 1.2533·s/√n
    spread = 1.2533 * _of_one_row(pair) / math.sqrt(n)
    if n >= _LEAST_RANKED:
        # where one direction dominates, cosines are near ±1 and their median is one of both: whatever their
        # distribution, it is five standard deviations above zero only if so many more of them are positive than half
        low = float(np.quantile(pair.cosines, 0.5 - _SIGMAS / (2.0 * math.sqrt(n))))
        spread = max(spread, (value - low) / _SIGMAS)
    return Measured(value, 0.0, spread)


def _of_one_row(pair: Pair) -> float:
    """Standard deviation for directions at random: √(tr(ΣₐΣ_b) / (tr Σₐ · tr Σ_b)), 1/√columns if all are alike."""
    scale = float(np.trace(pair.gram_a) * np.trace(pair.gram_b))
    d, k = pair.n_columns, pair.n_columns_seen
    if pair.n_rows_seen < 2 or not scale > 0.0:
        return 1.0 / math.sqrt(d)
    # a sketch has fewer directions than the table: of columns that are all alike 1/k, where the table has 1/d
    seen = float(np.sum(pair.gram_a * pair.gram_b)) / scale - (1.0 / k - 1.0 / d)
    return math.sqrt(min(max(seen, 1.0 / d), 1.0))


row_cosine = Diagnostic(
    name="row-cosine",
    source="median over rows of ⟨a, b⟩ / (‖a‖·‖b‖), rows about their middle: trained tables have a common direction "
    "that makes every pair of rows look alike (Gao et al. 2019, Representation degeneration, ICLR). Null: 0, with a "
    "standard deviation of √(tr(ΣₐΣ_b) / (tr Σₐ · tr Σ_b)) for one row, 1/√columns where no direction dominates; no "
    "less than ranks of the cosines themselves say",
    measure=_measure,
)
