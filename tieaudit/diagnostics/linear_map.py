"""How much of one table the best linear map of the other explains."""

from __future__ import annotations

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair

_MOST_BY_CHANCE = 0.95
"""Explained by chance, above which what is left tells nothing."""


def _measure(pair: Pair) -> Measured | None:
    total = float(np.sum(pair.squares_b))
    if not total > 0.0:
        return None
    held = float(np.trace(pair.held)) / total
    if held > _MOST_BY_CHANCE:
        return None
    explained = float(np.sum(np.square(pair.basis.T @ pair.cross))) / total  # ‖QᵀB‖², Q orthonormal
    # given the lengths, the products ⟨bᵢ, bⱼ⟩ of different rows are left to chance, with variance α·‖bᵢ‖²‖bⱼ‖²; they
    # enter with 2·(QQᵀ)ᵢⱼ for each pair, and Σᵢⱼ (QQᵀ)ᵢⱼ²‖bᵢ‖²‖bⱼ‖² is ‖Qᵀdiag(‖b‖²)Q‖²
    own = float(np.sum(np.square(pair.leverages * pair.squares_b)))
    between = max(float(np.sum(np.square(pair.held))) - own, 0.0)
    spread = (2.0 * _alike(pair) * between) ** 0.5 / total
    return Measured(min(max(explained, 0.0), 1.0), held, spread)


def _alike(pair: Pair) -> float:
    """α, the mean of ⟨bᵢ, bⱼ⟩² / ‖bᵢ‖²‖bⱼ‖² over pairs of different rows: 1/columns if no direction dominates."""
    own = float(np.sum(np.square(pair.squares_b)))  # ‖BᵀB‖² is the sum over all pairs
    rest = float(np.sum(pair.squares_b)) ** 2 - own
    found = (float(np.sum(np.square(pair.gram_b))) - own) / rest if rest > 0.0 else 1.0
    return min(max(found, 1.0 / pair.n_columns_seen), 1.0)


linear_map = Diagnostic(
    name="linear-map",
    source="R² = 1 − ‖B − AM‖² / ‖B‖² with the best M = (AᵀA)⁻¹AᵀB, columns about their means: what an adapter of "
    "columns × columns could restore. The best M does not depend on the activations (gradient −2Aᵀ(B − AM)C = 0 for "
    "every invertible C). Null: Σ hᵢ‖bᵢ‖² / ‖B‖² with hᵢ the leverage of row i of A (Hoaglin & Welsch 1978, The hat "
    "matrix in regression and ANOVA), which is rank / (rows − 1) where all rows are of one length: rows that are long "
    "in both tables are explained by themselves",
    measure=_measure,
)
