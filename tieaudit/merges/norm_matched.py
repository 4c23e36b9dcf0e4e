"""The mean direction, at the members' mean length."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from tieaudit.errors import RewriteRefused
from tieaudit.merges import Block, Merge, Merged, Sites, Table


def _rows(tables: tuple[Table, ...], factors: tuple[float, ...], begin: int, end: int) -> Block:
    found: Block = sum(
        (factor * table.rows(begin, end) for factor, table in zip(factors, tables, strict=True)),
        start=np.zeros((end - begin, tables[0].n_columns)),
    )
    return found


def _merge(sites: Sites, argument: str) -> Merged:
    norms = [math.sqrt(sum(float(np.square(one.rows(*at)).sum()) for at in sites.blocks())) for one in sites.tables]
    if not all(math.isfinite(norm) and norm > 0.0 for norm in norms):
        raise RewriteRefused(f"--merge norm-matched: one of {', '.join(sites.ids)} has no finite length above zero")
    unit = partial(_rows, sites.tables, tuple(1.0 / norm for norm in norms))
    length = math.sqrt(sum(float(np.square(unit(*at)).sum()) for at in sites.blocks()))
    if not length > 0.0:
        raise RewriteRefused("--merge norm-matched: the members cancel each other exactly")
    target = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return Merged(partial(_rows, sites.tables, tuple(target / (length * norm) for norm in norms)))


norm_matched = Merge(
    name="norm-matched",
    summary="the mean direction of all members, as long as they are in the (geometric) mean",
    source="Jin et al. 2023, RegMean (ICLR), and Matena & Raffel 2022 average as they are; the mean of n unrelated "
    "members is "
    "1/√n as long as each, which this undoes",
    merge=_merge,
    page="""norm-matched: s·Σ Wᵢ/‖Wᵢ‖, with s such that ‖W‖ is the geometric mean of the ‖Wᵢ‖ (Frobenius)""",
)
