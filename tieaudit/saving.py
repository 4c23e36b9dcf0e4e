"""What edits and candidates free: stored bytes, as a file listing shows them before and after, and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tieaudit.change import Edit, Pool, Share, Unshare
from tieaudit.model import Model, classes
from tieaudit.verdict import Candidate


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


def n_parameters_saved(model: Model, candidates: Iterable[Candidate]) -> int:
    """Parameters that the candidates would free together: of each class of different stored tensors, all but one."""
    saved, shared = 0, []
    for one in candidates:
        if one.action == "share":
            shared.append([member.id for member in one.members])
        else:
            first = model.by_id[one.members[0].id]
            saved += one.n_bytes_saved * first.n_elements // max(first.n_bytes, 1)
    for ids in classes(shared):
        sizes = {}
        for id in ids:
            weight = model.by_id[id]
            if weight.storage is not None:
                sizes[weight.storage.region] = weight.n_elements
        saved += sum(sizes.values()) - max(sizes.values(), default=0)
    return saved
