"""Stage: candidates that pool heads → what they would save and change. Read from a sample unless `deep`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tieaudit.change import Pool, Pooled
from tieaudit.dtypes import dtype
from tieaudit.formats import Format
from tieaudit.model import Model, storage_of
from tieaudit.registry import choose, discover
from tieaudit.verdict import Candidate


@dataclass(frozen=True)
class FewerHeads:
    """All projections that a scheme would pool."""

    n_parameters_saved: int
    n_bytes_saved: int
    changed: float
    """‖change‖²/‖W‖² over all of them, each head compared with the mean of its group."""
    n_projections: int
    exact: bool
    """Whether everything was read."""


def fewer_heads(model: Model, candidates: Sequence[Candidate], n_numbers: int | None) -> FewerHeads | None:
    """What pooling these would do; None where the format cannot pool them, or there are no more heads than groups.

    `n_numbers`: how many numbers of each weight are read, spread over its heads alike; None: all. Cost: those numbers.
    """
    format_ = choose(discover("formats", Format), model.format, "format")
    if format_.pool is None:
        return None
    pools: dict[tuple[str, ...], Pool] = {}
    for one in candidates:
        edits = format_.pool(model, one.members[0].id, one.n_groups)
        if isinstance(edits, str):
            return None
        pools.update({tuple(part.id for part in edit.weights): edit for edit in edits if isinstance(edit, Pool)})
    changed = total = 0.0
    n_parameters = n_bytes = 0
    exact = True
    for pool in pools.values():
        for part in pool.weights:
            weight, kept = model.by_id[part.id], pool.n_groups / pool.n_heads
            n_parameters += round(weight.n_elements * (1 - kept))
            n_bytes += round(weight.n_bytes * (1 - kept))
            heads = _heads(model, part, pool.n_heads, n_numbers)
            groups = heads.reshape(pool.n_groups, -1, heads[0].size)
            changed += float(np.square(groups - groups.mean(axis=1, keepdims=True)).sum())
            total += float(np.square(groups).sum())
            exact = exact and heads.size == weight.n_elements
    if not n_bytes:
        return None
    return FewerHeads(n_parameters, n_bytes, changed / total if total else 0.0, len(pools), exact)


def _heads(model: Model, part: Pooled, n_heads: int, n_numbers: int | None) -> NDArray[np.float64]:
    """The same places of every head: [heads, places, …]. Heads lie in rows (axis 0) or along each row (axis 1)."""
    weight, storage = model.by_id[part.id], storage_of(model.by_id[part.id])
    n_rows = weight.shape[0]
    n_in_row = weight.n_elements // n_rows
    n_places = n_rows if part.axis else n_rows // n_heads
    n_each = n_in_row if part.axis else n_in_row * n_heads
    n_read = n_places if n_numbers is None else max(1, min(n_places, n_numbers // max(n_each, 1)))
    places = np.unique(np.linspace(0, n_places - 1, n_read).astype(int))
    rows = places if part.axis else (np.arange(n_heads)[:, None] * n_places + places).ravel()
    n_bytes_row = storage.n_bytes // n_rows
    raw = b"".join(storage.read_ranges([(int(row) * n_bytes_row, n_bytes_row) for row in rows]))
    values = np.frombuffer(raw, dtype(weight.dtype).numpy()).astype(np.float64)
    if not part.axis:
        return values.reshape(n_heads, len(places), n_in_row)
    return np.moveaxis(values.reshape(len(places), n_heads, -1), 1, 0)
