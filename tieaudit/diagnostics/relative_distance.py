"""Relative Frobenius distance."""

from __future__ import annotations

import math

from tieaudit.diagnostics import Diagnostic, Measured, Pair


def _measure(pair: Pair) -> Measured | None:
    scale = math.sqrt(pair.squared_a * pair.squared_b)
    if not scale > 0.0:
        return None
    squared = max(pair.squared_a + pair.squared_b - 2.0 * pair.dot, 0.0)
    null = math.sqrt((pair.squared_a + pair.squared_b) / scale)
    return Measured(math.sqrt(squared / scale), null, 1.0 / math.sqrt(2.0 * pair.n_rows_seen * pair.n_columns))


relative_distance = Diagnostic(
    name="relative-distance",
    source="‖A − B‖ / √(‖A‖·‖B‖) (Frobenius). Null: ⟨A, B⟩ = 0 on average, so √((‖A‖² + ‖B‖²) / (‖A‖·‖B‖)), which "
    "is √2 for tables of equal norm; spread 1/√(2·rows·columns)",
    measure=_measure,
)
