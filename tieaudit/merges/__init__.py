"""Merge policies: which common value unequal weights get. One file each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.float64]


@dataclass(frozen=True)
class Merge:
    """A policy: either one member's bytes survive, or aligned blocks of all members are combined."""

    name: str
    summary: str
    source: str
    keeps: str | None = None
    """Role kind of the member whose bytes survive exactly."""
    combine: Callable[[Sequence[Block]], Block] | None = None
    """Aligned blocks of all members in float64 → the common block, rounded to the stored type by the engine."""
