"""The parametrizations behind corrected ties of a live module. Imported only where torch is already there.

A corrected name reads the common value C through one of these: C·diag(right), C·right, or C + left·right. The factors
are parameters of the module, in its state dict, and the gradient reaches them and C.
"""

from __future__ import annotations

import torch


class Scaled(torch.nn.Module):  # type: ignore[misc]
    """A scale of each column."""

    def __init__(self, right: torch.Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.right = torch.nn.Parameter(right, requires_grad)

    def forward(self, common: torch.Tensor) -> torch.Tensor:
        """[rows, columns] → [rows, columns]."""
        return common * self.right

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """What must be kept so that `value` is seen, with which an assignment to the corrected name works."""
        return value / self.right


class Mapped(torch.nn.Module):  # type: ignore[misc]
    """A square map of the columns. It may have no inverse, so the corrected name cannot be assigned to."""

    def __init__(self, right: torch.Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.right = torch.nn.Parameter(right, requires_grad)

    def forward(self, common: torch.Tensor) -> torch.Tensor:
        """[rows, columns] → [rows, columns]. Cost: rows · columns² for each reading of the weight."""
        return common @ self.right


class Residual(torch.nn.Module):  # type: ignore[misc]
    """A residual of low rank."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.left = torch.nn.Parameter(left, requires_grad)
        self.right = torch.nn.Parameter(right, requires_grad)

    def forward(self, common: torch.Tensor) -> torch.Tensor:
        """[rows, columns] → [rows, columns]. Cost: rows · rank · columns for each reading of the weight."""
        return torch.addmm(common, self.left, self.right)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """What must be kept so that `value` is seen, with which an assignment to the corrected name works."""
        return torch.addmm(value, self.left, self.right, alpha=-1)
