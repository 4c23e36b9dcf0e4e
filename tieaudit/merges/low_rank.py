"""The head's table for both, and the leading part of the difference beside the lookup."""

from __future__ import annotations

from functools import partial

import numpy as np

from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.merges import Block, Correction, Merge, Merged, Sites, Table, finite

_PANEL_NUMBERS = 1 << 23
"""Of a matrix wider than high that are held at once: 64 MiB."""


def _left(kept: Table, other: Table, directions: Block, begin: int, end: int) -> Block:
    """Rows of B = D·Vᵣ, [rows, rank]."""
    found: Block = (other.rows(begin, end) - kept.rows(begin, end)) @ directions
    return found


def _merge(sites: Sites, argument: str) -> Merged:
    rank = _rank(argument)
    kept = sites.index_of("output_head")
    kept = kept if kept is not None else 0
    largest = sites.n_rows * sites.n_columns // (sites.n_rows + sites.n_columns)
    if rank > largest:
        raise RewriteRefused(
            f"--merge low-rank:{rank}: a residual of rank {rank} is larger than what the tie saves; of "
            f"{sites.n_rows:,} × {sites.n_columns:,} the largest that saves anything has rank {largest}"
        )
    corrections, shares = {}, []
    for other in range(len(sites.ids)):
        if other != kept:
            corrections[other], share = _residual(sites, kept, other, rank)
            shares.append(share)
    because = f"rank {rank} holds {', '.join(f'{share:.1%}' for share in shares)} of the difference"
    return Merged(sites.tables[kept].rows, kept, corrections, because)


def _residual(sites: Sites, kept: int, other: int, rank: int) -> tuple[Correction, float]:
    """The truncated SVD of the difference D, through the smaller of DᵀD and DDᵀ. Vᵣ: its leading right directions."""
    one, two = sites.tables[kept], sites.tables[other]
    wide = sites.n_rows < sites.n_columns  # or a sample of rows
    gram = _gram_of_rows(sites, one, two) if wide else np.zeros((sites.n_columns, sites.n_columns))
    for at in () if wide else sites.blocks():
        difference = two.rows(*at) - one.rows(*at)
        gram += difference.T @ difference
    finite(sites, f"low-rank:{rank}", gram)
    ascending, vectors = np.linalg.eigh(gram)
    values, directions = ascending[::-1], np.ascontiguousarray(vectors[:, ::-1][:, :rank])
    if wide:  # DᵀUᵣ = VᵣΣᵣ; a basis of what these span is as good as Vᵣ, also where a singular value is nought
        spanned = np.zeros((sites.n_columns, rank))
        for at in sites.blocks():
            spanned += (two.rows(*at) - one.rows(*at)).T @ directions[slice(*at)]
        directions = np.ascontiguousarray(np.linalg.qr(spanned)[0])
    share = float(values[:rank].sum() / max(float(values.sum()), 1e-300))
    left = partial(_left, sites.tables[kept], sites.tables[other], directions)
    return Correction("low-rank", np.ascontiguousarray(directions.T), left, sites.n_rows), share


def _gram_of_rows(sites: Sites, one: Table, two: Table) -> Block:
    """DDᵀ, [rows, rows]: a panel of rows is held, and all rows after it pass by. Reads half the tables once a panel."""
    gram: Block = np.zeros((sites.n_rows, sites.n_rows))
    n_held = max(_PANEL_NUMBERS // sites.n_columns, 1)
    for begin in range(0, sites.n_rows, n_held):
        end = min(begin + n_held, sites.n_rows)
        panel = two.rows(begin, end) - one.rows(begin, end)
        gram[begin:end, begin:end] = panel @ panel.T
        for first in range(end, sites.n_rows, one.rows_per_block):
            last = min(first + one.rows_per_block, sites.n_rows)
            gram[begin:end, first:last] = panel @ (two.rows(first, last) - one.rows(first, last)).T
            gram[first:last, begin:end] = gram[begin:end, first:last].T
    return gram


def _rank(argument: str) -> int:
    if not argument.isascii() or not argument.isdigit() or int(argument[:9]) < 1:
        given = f"found {argument!r}" if argument else "found none"
        raise UsageError(f"--merge low-rank: expected a rank behind a colon, {given}", hint="low-rank:32, for example")
    return int(argument[:9])


low_rank = Merge(
    name="low-rank",
    argument="R",
    summary="the head's (or the first member's) table for all, with a residual of rank R beside each other site",
    source="Bae et al. 2025, Relaxed Recursive Transformers (ICLR), section 3.2: shared weights and the truncated "
    "SVD of what "
    "is left; Eckart–Young: no residual of that rank leaves less",
    merge=_merge,
    check=lambda argument, ids: _rank(argument),
    corrects=True,
    page="""low-rank:R: Wᵢ ≈ W + BᵢAᵢ, the dial between size and damage

Costs R·(rows + columns) parameters for each other site, and saves as long as R < rows·columns/(rows + columns). On two
small language models with 128 columns rank 32 costs 0.1 and 0.3 nats per token and keeps three quarters of the saving
(docs/merging.md).""",
)
