"""The parametrization behind a transposed tie of a live module. Imported only where torch is already there."""

from __future__ import annotations

import torch


class Transposition(torch.nn.Module):  # type: ignore[misc]
    """A matrix seen transposed: the tied name reads the kept parameter through it, and its gradient flows back."""

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        """[m, n] → [n, m], a view: nothing is copied."""
        return kept.mT

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """What must be kept so that `value` is seen, with which an assignment to the tied name works."""
        return value.mT
