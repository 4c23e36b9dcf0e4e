"""The arithmetic mean of all members."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tieaudit.merges import Block, Merge


def _mean(blocks: Sequence[Block]) -> Block:
    mean: Block = np.mean(np.stack(blocks), axis=0)
    return mean


mean = Merge(
    name="mean",
    summary="the arithmetic mean of all members, in float64, rounded once to the stored type",
    source="Wortsman et al. 2022, Model soups (ICML), equation 1, with equal coefficients",
    combine=_mean,
)
