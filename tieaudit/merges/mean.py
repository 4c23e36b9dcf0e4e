"""The arithmetic mean of all members."""

from __future__ import annotations

from functools import partial

import numpy as np

from tieaudit.merges import Block, Merge, Merged, Sites, Table


def _rows(tables: tuple[Table, ...], begin: int, end: int) -> Block:
    mean: Block = np.mean(np.stack([table.rows(begin, end) for table in tables]), axis=0)
    return mean


def _merge(sites: Sites, argument: str) -> Merged:
    return Merged(partial(_rows, sites.tables))


mean = Merge(
    name="mean",
    summary="the arithmetic mean of all members, in float64, rounded once to the stored type",
    source="Wortsman et al. 2022, Model soups (ICML), equation 1, with equal coefficients; Ainslie et al. 2023, GQA "
    "(EMNLP), "
    "section 2.1, pools key and value heads so",
    merge=_merge,
    page="""mean: (W₁ + … + W_n) / n

Of unrelated members the norm shrinks to 1/√n: see norm-matched.""",
)
