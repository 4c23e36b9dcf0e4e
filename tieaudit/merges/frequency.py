"""Rows weighted by how often they matter at each site."""

from __future__ import annotations

from functools import partial

import numpy as np

from tieaudit.errors import RewriteRefused
from tieaudit.merges import NO_CALIBRATION, Block, Merge, Merged, Sites, Table


def _rows(tables: tuple[Table, ...], weights: Block, begin: int, end: int) -> Block:
    """`weights`: [members, rows], adding up to 1 over the members."""
    found: Block = sum(
        (weights[index, begin:end, None] * table.rows(begin, end) for index, table in enumerate(tables)),
        start=np.zeros((end - begin, tables[0].n_columns)),
    )
    return found


def _merge(sites: Sites, argument: str) -> Merged:
    known = [one.row_weights if one is not None else None for one in sites.statistics]
    if all(one is None for one in known):
        raise RewriteRefused("--merge frequency: expected token counts, found none", hint=NO_CALIBRATION)
    uniform = np.full(sites.n_rows, 1.0 / sites.n_rows)  # of a site without counts every row matters alike
    raw = np.stack([uniform if one is None else one / max(float(one.sum()), 1e-300) for one in known])
    raw = raw + 1e-12  # rows that nobody saw fall back to the mean
    return Merged(partial(_rows, sites.tables, raw / raw.sum(axis=0)))


frequency = Merge(
    name="frequency",
    summary="each row is the mean of the members' rows, weighted by how often the row matters at each site",
    source="usage-weighted merging of experts (Li et al. 2024, MC-SMoE, ICLR, equation 2), by row of the vocabulary",
    merge=_merge,
    needs=("row_weights",),
    page="""frequency: w_v = Σᵢ aᵢᵥ wᵢᵥ / Σᵢ aᵢᵥ

aᵢᵥ is the token's share of all tokens for an embedding, E[p(1 − p)] for a head, and E[g²] of the gradient at each
result for another product, each normalised over the rows. Rows of rare
tokens keep what the head has, which scores every token at every step.""",
)
