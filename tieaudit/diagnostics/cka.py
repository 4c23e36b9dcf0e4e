"""Linear centred kernel alignment."""

from __future__ import annotations

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair


def _measure(pair: Pair) -> Measured | None:
    scale = float(np.linalg.norm(pair.gram_a) * np.linalg.norm(pair.gram_b))
    n = pair.degrees
    if not scale > 0.0 or n < 2:
        return None
    # effective dimensions: a spectrum in which few directions dominate aligns by chance as fewer columns would
    effective = [float(np.trace(gram) ** 2 / np.sum(np.square(gram))) for gram in (pair.gram_a, pair.gram_b)]
    # E‖AᵀB‖² = tr(AᵀA)·tr(BᵀB)/n for rows without relation, and ‖AᵀA‖ is what was measured
    null = float(np.sqrt(effective[0] * effective[1])) / n
    spread = null * (2.0 / (effective[0] * effective[1])) ** 0.5
    return Measured(float(np.sum(np.square(pair.cross))) / scale, min(null, 1.0), spread)


cka = Diagnostic(
    name="cka",
    source="‖AᵀB‖² / (‖AᵀA‖·‖BᵀB‖), columns about their means (Kornblith et al. 2019, Similarity of neural network "
    "representations revisited, ICML). Null: √(pₐ·p_b) / rows with the participation ratios p = tr(G)²/‖G‖²; for "
    "isotropic tables with many more rows than columns that is columns / rows",
    measure=_measure,
)
