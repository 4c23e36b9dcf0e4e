"""Relations: how one tensor can be another seen through a view. One file each; the engine reads and compares."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from tieaudit.view import Shape, View


@dataclass(frozen=True)
class Relation:
    """A relation proposes by shape; `find.py` reads the bytes and decides."""

    name: str
    summary: str
    source: str
    """Where this relation occurs in the wild: exporter, optimiser, paper."""
    precedence: int
    """Simple relations are tried first: a symmetric matrix's copy is equal, not transposed."""
    key: Callable[[Shape], Hashable]
    """Shapes with different keys can never be related."""
    fits: Callable[[Shape, Shape], View | None]
    """(shape a, shape b) → the invertible view through which a tensor of shape a becomes one of shape b, or None."""
