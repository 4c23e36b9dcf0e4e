"""What edits free: the stored bytes that a file listing shows before and after."""

from __future__ import annotations

from collections.abc import Sequence

from tieaudit.change import Edit, Pool, Share, Unshare
from tieaudit.model import Model, classes


def n_bytes_saved(model: Model, edits: Sequence[Edit]) -> int:
    """Stored bytes that the edits free: what a file listing shows before and after, headers aside."""
    saved = 0
    shares = [[member.id for member in edit.members] for edit in edits if isinstance(edit, Share)]
    for ids in classes(shares):
        regions = {}
        for id in ids:
            storage = model.by_id[id].storage
            if storage is not None:
                regions[storage.region] = storage.n_bytes
        saved += sum(regions.values()) - max(regions.values(), default=0)
    for edit in edits:
        if isinstance(edit, Unshare):
            saved -= model.by_id[edit.source].n_bytes
        elif isinstance(edit, Pool):
            kept = edit.n_groups / edit.n_heads
            saved += sum(round(model.by_id[one.id].n_bytes * (1 - kept)) for one in edit.weights)
        elif isinstance(edit, Share):
            saved -= sum(one.n_bytes for one in edit.adjustments.values())
    return saved
