"""Correlation after the best rotation."""

from __future__ import annotations

import math

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair


def _measure(pair: Pair) -> Measured | None:
    scale = math.sqrt(max(float(np.trace(pair.gram_a) * np.trace(pair.gram_b)), 0.0))
    n, k = pair.degrees, pair.n_columns_seen
    if not scale > 0.0 or n < 2 * k or k < 2:
        return None
    value = float(np.linalg.svd(pair.cross, compute_uv=False).sum()) / scale
    return Measured(value, _null(pair, scale), 0.25 / math.sqrt(n) / k**0.5)


def _null(pair: Pair, scale: float) -> float:
    """Expected nuclear norm of AᵀB for rows without relation: that of Gₐ½ Z G_b½ / √n with Z normal; by simulation.

    For isotropic tables it is 8/(3π)·√(columns/rows); spectra that fall off have another one.
    """
    roots = []
    for gram in (pair.gram_a, pair.gram_b):
        values, vectors = np.linalg.eigh(gram)
        roots.append(vectors * np.sqrt(np.maximum(values, 0.0)))
    noise = np.random.default_rng(0).standard_normal(pair.cross.shape) / math.sqrt(pair.degrees)
    return float(np.linalg.svd(roots[0] @ noise @ roots[1].T, compute_uv=False).sum()) / scale


procrustes = Diagnostic(
    name="procrustes",
    source="tr Σ / (‖A‖·‖B‖) with AᵀB = UΣVᵀ, the correlation after the best rotation (Schönemann 1966). Null: the "
    "nuclear norm of Gₐ½·Z·G_b½/√rows for a normal Z, which is 8/(3π)·√(columns/rows) for isotropic tables",
    measure=_measure,
)
