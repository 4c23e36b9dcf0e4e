"""Diagnostics: how alike two tables are, each beside its null, the value that unrelated tables have. One file each.

A number without its null misleads: two independent tables of 1,000 rows and 256 columns are "25 % explained" by the
best linear map between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two tables A and B of one layout, as far as they were looked at: sums over rows, and nothing of their size.

    Rows are the longer axis. `centred` sums are about the mean row; where columns were sketched, both tables were
    projected onto the same `n_columns_seen` orthonormal directions before the Gram matrices were formed.
    """

    n_rows: int
    n_columns: int
    n_rows_seen: int
    n_columns_seen: int
    """Directions in the Gram matrices; `n_columns` if nothing was sketched."""
    squared_a: float
    """‖A‖² (Frobenius) over the rows that were seen, all columns, not centred."""
    squared_b: float
    dot: float
    """⟨A, B⟩ over the same."""
    cosines: Array
    """Of each row that was seen and is nowhere nothing but zeros, centred: rows of A with the same rows of B."""
    gram_a: Array
    """Centred AᵀA, [n_columns_seen, n_columns_seen]."""
    gram_b: Array
    cross: Array
    """Centred AᵀB."""
    basis: Array
    """[n_columns_seen, rank of A]: centred A times it, Q, has orthonormal columns that span those of A."""
    leverages: Array
    """Of each row that was seen: its squared length in Q, 0 … 1, together the rank. Empty where all would be 1."""
    squares_b: Array
    """Squared length of each of these rows of centred B, as it was seen."""
    held: Array
    """Qᵀ·diag(squares_b)·Q, [rank, rank]."""

    @property
    def exact(self) -> bool:
        """Whether everything was read and nothing sketched."""
        return self.n_rows_seen == self.n_rows and self.n_columns_seen == self.n_columns

    @property
    def degrees(self) -> int:
        """Rows that carry information once the mean row is taken away."""
        return max(self.n_rows_seen - 1, 1)


@dataclass(frozen=True)
class Measured:
    """One diagnostic of one pair."""

    value: float
    null: float
    """What independent tables of these sizes have, on average."""
    spread: float
    """Standard deviation of that, from one pair of independent tables to the next; 0.0 where it is negligible."""


@dataclass(frozen=True)
class Diagnostic:
    """A way to tell how alike two tables are."""

    name: str
    source: str
    """Formula and null, with where they come from."""
    measure: Callable[[Pair], Measured | None]
    """None where the sizes leave nothing to measure (a linear map between square tables explains everything)."""
