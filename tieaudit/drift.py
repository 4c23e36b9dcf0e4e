"""How far outputs moved: absolute differences, and for scores of a vocabulary what that means for its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
MIN_CLASSES = 3
"""An output of fewer numbers in a row is no distribution over anything."""
_YARDSTICKS = (
    ("Q8_0", 0.000238, 99.218),
    ("Q5_K_M", 0.004726, 96.547),
    ("Q3_K_M", 0.051126, 89.569),
    ("IQ3_M", 0.066422, 88.690),
)
"""Quantisations of an 8-billion-parameter model: mean KL divergence in nats, percentage of equal top-1 tokens."""


@dataclass(frozen=True)
class Drift:
    """Outputs after against outputs before."""

    max_abs: float
    mean_abs: float
    n_numbers: int
    n_tokens: int = 0
    """Rows that were compared as distributions; 0 where no output is one."""
    kl_mean: float = 0.0
    """KL(before ‖ after) in nats per token."""
    kl_999: float = 0.0
    """99.9 % of the tokens diverge by less."""
    kl_max: float = 0.0
    top1: float = 1.0
    """Share of tokens whose most likely next token is the same."""

    @property
    def yardstick(self) -> str:
        """A comparison that a person knows; empty where there is no distribution, or nothing moved."""
        if not self.n_tokens or self.kl_mean <= 0.0:
            return ""
        if self.kl_mean < _YARDSTICKS[0][1] / 2:
            return "less than what Q8_0 costs an 8B model"
        if self.kl_mean > 2 * _YARDSTICKS[-1][1]:
            return f"{self.kl_mean / _YARDSTICKS[-1][1]:,.0f} times what IQ3_M costs an 8B model"
        near = min(_YARDSTICKS, key=lambda one: abs(math.log(one[1] / self.kl_mean)))
        return f"about what {near[0]} costs an 8B model"


def drift(before: Sequence[Array], after: Sequence[Array], scores: Sequence[bool]) -> Drift:
    """All outputs of some runs, in pairs of one shape; `scores`: which of them score a vocabulary in their last axis.

    Sums in float64. NaN in both at one place is no difference, in one of them an infinite one. The yardstick is
    llama.cpp's `--kl-divergence`, logs of an 8B model published with its quantisations.
    """
    largest = total = 0.0
    n_numbers = 0
    divergences, same = [], []
    for one, other, scored in zip(before, after, scores, strict=True):
        a, b = one.astype(np.float64), other.astype(np.float64)
        with np.errstate(invalid="ignore"):
            distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        distance = np.nan_to_num(distance, nan=np.inf, posinf=np.inf)
        largest = max(largest, float(distance.max(initial=0.0)))
        total += float(distance.sum())
        n_numbers += distance.size
        if scored and a.ndim and a.shape[-1] >= MIN_CLASSES and a.size:
            rows = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
            divergences.append(_divergence(*rows))
            same.append(rows[0].argmax(axis=1) == rows[1].argmax(axis=1))
    mean = total / n_numbers if n_numbers else 0.0
    if not divergences:
        return Drift(largest, mean, n_numbers)
    kl, top = np.concatenate(divergences), np.concatenate(same)
    ordered = np.sort(kl)  # not np.quantile: infinite divergences have no interpolation between them
    below = float(ordered[math.ceil(0.999 * (len(kl) - 1))])
    return Drift(largest, mean, n_numbers, len(kl), float(kl.mean()), below, float(kl.max()), float(top.mean()))


def _divergence(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(before ‖ after) of each row of scores, in nats; infinite where one side holds NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = (one - one.max(axis=1, keepdims=True) for one in (before, after))
        p = p - np.log(np.exp(p).sum(axis=1, keepdims=True))
        q = q - np.log(np.exp(q).sum(axis=1, keepdims=True))
        terms = np.where(p == -np.inf, 0.0, np.exp(p) * (p - q))  # 0·log 0 = 0: masked tokens
        found: NDArray[np.float64] = terms.sum(axis=1)
    return np.where(np.isnan(found), np.inf, np.maximum(found, 0.0))
