"""How much of one table the best linear map of the other explains."""

from __future__ import annotations

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair

_LEAST_ROWS = 1.5
"""Rows for each column below which nearly everything is explained by chance."""


def _measure(pair: Pair) -> Measured | None:
    k, n = pair.n_columns_seen, pair.degrees
    total = float(np.trace(pair.gram_b))
    if n < _LEAST_ROWS * k or not total > 0.0:
        return None
    best = np.linalg.lstsq(pair.gram_a, pair.cross, rcond=None)[0]  # M = (AᵀA)⁻¹AᵀB, also where A lacks rank
    explained = float(np.sum(best * pair.cross)) / total  # ‖AM‖² = tr(Mᵀ AᵀB)
    null = min(max(k / n, pair.chance or 0.0), 1.0)
    n_worth = n if pair.n_rows_worth is None else min(pair.n_rows_worth, n)
    k_worth = total**2 / float(np.square(pair.gram_b).sum())  # columns of one size that would spread as little
    spread = (2.0 * null * (1.0 - null) / max(n_worth * k_worth, 1.0)) ** 0.5
    return Measured(min(max(explained, 0.0), 1.0), null, spread)


linear_map = Diagnostic(
    name="linear-map",
    source="R² = 1 − ‖B − AM‖² / ‖B‖² with the best M = (AᵀA)⁻¹AᵀB, columns about their means: what an adapter of "
    "columns × columns could restore. The best M does not depend on the activations (gradient −2Aᵀ(B − AM)C = 0 for "
    "every invertible C). Null: a random subspace of `columns` dimensions holds columns / (rows − 1) of any table, "
    "and Σ h‖b‖² / Σ‖b‖² of one whose rows differ in length, h = aᵀ(AᵀA)⁻¹a the leverage of a row",
    measure=_measure,
)
