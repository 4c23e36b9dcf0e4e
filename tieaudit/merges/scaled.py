"""One table for both, with a scale of each column at the head."""

from __future__ import annotations

from functools import partial

import numpy as np

from tieaudit.errors import RewriteRefused
from tieaudit.merges import Block, Correction, Merge, Merged, Sites, Table, finite


def _rows(table: Table, head: Table, scale: Block, begin: int, end: int) -> Block:
    """(E + U/g)/2: for a given scale, both sites are equally far off in relation to their size."""
    found: Block = (table.rows(begin, end) + head.rows(begin, end) / scale) / 2.0
    return found


def _merge(sites: Sites, argument: str) -> Merged:
    embedding, head = sites.index_of("token_embedding"), sites.index_of("output_head")
    if len(sites.ids) != 2 or embedding is None or head is None:
        raise RewriteRefused(
            f"--merge scaled: expected a token embedding and an output head, found {', '.join(sites.kinds)}"
        )
    tables = (sites.tables[embedding], sites.tables[head])
    square_e, square_u, dot = (np.zeros(sites.n_columns) for _ in range(3))
    for at in sites.blocks():
        e, u = (table.rows(*at) for table in tables)
        square_e, square_u, dot = square_e + (e * e).sum(0), square_u + (u * u).sum(0), dot + (e * u).sum(0)
    # minimises ‖W − E‖²/‖E‖² + ‖gW − U‖²/‖U‖² of each column: of two unit vectors the bisector is closest to both
    finite(sites, "scaled", square_e, square_u, dot)
    known = (square_e > 0.0) & (square_u > 0.0)  # a column of nothing but zeros has no size to be scaled to
    ratio = np.sqrt(np.where(known, square_u, 1.0) / np.where(known, square_e, 1.0))
    scale = np.where(dot < 0.0, -ratio, ratio)
    return Merged(partial(_rows, *tables, scale), corrections={head: Correction("scale", scale)})


scaled = Merge(
    name="scaled",
    summary="one table for both, with a scale of each column at the head, folded into the final norm where that is "
    "free",
    source="per-column least squares, min ‖W − E‖²/‖E‖² + ‖W·diag(g) − U‖²/‖U‖²: of all maps between embedding and "
    "head, a diagonal one "
    "alone is free, since a final norm's gain can hold it",
    merge=_merge,
    corrects=True,
    page="""scaled: U ≈ W·diag(g), E ≈ W, with g_j = ±‖u_j‖/‖e_j‖ of each column

The scale costs nothing where the gain (and bias) of the norm before the head can take it: in an ONNX model where the
head alone reads that norm; in a Hugging Face folder of a language model whose class is known to give that norm's
result to the head alone, and to apply the gain as w, or as 1 + w (Gemma). What a program takes from behind that norm,
hidden states, is then scaled as well. Elsewhere it is a multiplication of its own, in ONNX models and live modules,
and refused with the reason in formats that hold weights only.""",
)
