"""The value that best reproduces what every site gave, for the inputs it had."""

from __future__ import annotations

from functools import partial

import numpy as np

from tieaudit.errors import RewriteRefused
from tieaudit.merges import NO_CALIBRATION, Block, Merge, Merged, Sites, Table, finite

_DAMPING = 1e-3
"""Share of the mean energy of an input that is added to each: of directions nobody saw, the mean of all members."""
_OFF_DIAGONAL = 0.9
"""λ of C̃ = λ·C + (1 − λ)·diag(C): few tokens leave the off-diagonal uncertain."""


def _rows(tables: tuple[Table, ...], maps: tuple[Block, ...], begin: int, end: int) -> Block:
    found: Block = sum(
        (table.rows(begin, end) @ map_ for table, map_ in zip(tables, maps, strict=True)),
        start=np.zeros((end - begin, tables[0].n_columns)),
    )
    return found


def _merge(sites: Sites, argument: str) -> Merged:
    if len(sites.tables[0].shape) != 2:  # a bias is a product with 1 at every site, and other vectors are averaged, too
        n = len(sites.tables)
        return Merged(partial(_rows, sites.tables, (np.full((1, 1), 1.0 / n),) * n))
    moments = [one.inputs if one is not None else None for one in sites.statistics]
    missing = [id for id, moment in zip(sites.ids, moments, strict=True) if moment is None]
    if missing:
        raise RewriteRefused(
            f"--merge regmean: expected the inputs of every site, found none of {', '.join(missing)}",
            hint=NO_CALIBRATION,
        )
    seen = [one for one in moments if one is not None]
    finite(sites, "regmean", *seen)
    # the same for each site: what none of them saw is then their plain mean, however large their other inputs are
    energy = float(np.mean([np.trace(one) for one in seen])) / sites.n_columns
    ridge = np.eye(sites.n_columns) * max(_DAMPING * energy, 1e-30)
    damped = [_OFF_DIAGONAL * one + (1.0 - _OFF_DIAGONAL) * np.diag(np.diag(one)) + ridge for one in seen]
    inverse = np.linalg.inv(np.sum(damped, axis=0))
    return Merged(partial(_rows, sites.tables, tuple(one @ inverse for one in damped)))


regmean = Merge(
    name="regmean",
    summary="the value that best reproduces what every site gave for its own inputs",
    source="Jin, Ren, Preotiuc-Pietro & Cheng 2023, Dataless Knowledge Fusion by Merging Weights of Language Models "
    "(ICLR), "
    "equation 2, off-diagonal entries of the Gram matrices scaled by 0.9",
    merge=_merge,
    needs=("inputs",),
    page="""regmean: W = (Σ Wᵢ C̃ᵢ)(Σ C̃ᵢ)⁻¹ with C̃ᵢ = 0.9·Cᵢ + 0.1·diag(Cᵢ) + ε·1, Cᵢ = E[x xᵀ] of the inputs of site i

Minimises Σ tr((W − Wᵢ) C̃ᵢ (W − Wᵢ)ᵀ). ε is a thousandth of the mean energy of an input, so that what no site ever got
is the mean of all. Rows are outputs, columns inputs. Biases
and norms get their mean.""",
)
