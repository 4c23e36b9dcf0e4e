"""Which names share bytes: the one interval algorithm of the tool, and the aliases and slices that it decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tieaudit.dtypes import dtype
from tieaudit.model import Weight, classes, storage_of
from tieaudit.storage import Region
from tieaudit.strided import footprint, own_strides, runs, strides_of, view_between
from tieaudit.verdict import Overlap
from tieaudit.view import AS_STORED, View

Names = list[tuple[Weight, View]]
"""Weights that are the very same bytes, each with the view through which the first one becomes it."""
_N_MOST_RUNS = 200_000
"""Stretches of bytes that are looked at to tell whether interleaved views meet."""


def overlapping(regions: Sequence[Region]) -> list[list[int]]:
    """Indices of regions that overlap, directly or through others; empty regions overlap nothing.

    The one interval algorithm of the tool: a sweep that keeps the *largest* end seen so far, not the last one.
    Cost: O(n log n).
    """
    order = sorted((i for i, (_, begin, end) in enumerate(regions) if begin < end), key=lambda i: regions[i])
    groups: list[list[int]] = []
    container, reach = None, -1
    for index in order:
        where, begin, end = regions[index]
        if where == container and begin < reach:
            groups[-1].append(index)
            reach = max(reach, end)
        else:
            groups.append([index])
            container, reach = where, end
    return [group for group in groups if len(group) > 1]


def aliases(stored: Iterable[Weight]) -> list[Names]:
    """Weights by what they are made of: one entry per distinct set of bytes and element type.

    In the order of their first names. Same region and steps: as stored. Same elements in another order: transposed,
    permuted or reshaped. Nothing is read.
    """
    found: dict[object, Names] = {}
    for weight in stored:
        storage = storage_of(weight)
        strides = strides_of(storage, weight.shape)
        names = found.setdefault((storage.region, weight.dtype, footprint(weight.shape, strides)), [])
        first = names[0][0] if names else weight
        view = view_between(first.shape, strides_of(storage_of(first), first.shape), weight.shape, strides)
        names.append((weight, view if view is not None else AS_STORED))  # None: not with equal footprints
    return list(found.values())


def overlaps(shared: Sequence[Names]) -> tuple[Overlap, ...]:
    """Names that share some of their bytes, but not all: slices of one tensor. Views that lie between each other
    without meeting (the columns of a split matrix) are none.

    Cost: O(n log n) in the number of stretches of bytes that those views visit whose spans overlap.
    """
    regions = [storage_of(names[0][0]).region for names in shared]
    found = []
    for group in overlapping(regions):
        pieces: list[Region] = []
        owner: list[int] = []
        told = True
        for index in group:
            visited = _visited(shared[index][0][0])
            told = told and visited is not None and len(pieces) + len(visited) <= _N_MOST_RUNS
            if not told or visited is None:
                break
            pieces += [(regions[index][0], begin, end) for begin, end in visited]
            owner += [index] * len(visited)
        met = overlapping(pieces) if told else [list(range(len(group)))]
        owner = owner if told else group
        for indices in classes([str(owner[piece]) for piece in one] for one in met):
            found.append(_overlap(shared, [int(index) for index in indices], regions, told))
    return tuple(found)


def _visited(weight: Weight) -> list[tuple[int, int]] | None:
    storage = storage_of(weight)
    _, begin, end = storage.region
    strides = own_strides(storage)
    if strides is None:
        return [(begin, end)]
    item = dtype(weight.dtype).item_bytes or 1
    return runs(begin, weight.shape, strides, item, _N_MOST_RUNS)


def _overlap(shared: Sequence[Names], indices: Sequence[int], regions: Sequence[Region], told: bool) -> Overlap:
    reach = {index: regions[index][2] - regions[index][1] for index in indices}
    covers = {index: min(shared[index][0][0].n_bytes, reach[index]) for index in indices}
    order = sorted(indices, key=lambda index: (-reach[index], -covers[index], index))
    ids = tuple(weight.id for index in order for weight, _ in shared[index])
    whole, parts = regions[order[0]], [regions[index] for index in order[1:]]
    dense = covers[order[0]] == reach[order[0]]  # every other row reaches as far as the whole, and is none
    inside = dense and all(whole[1] <= begin and end <= whole[2] for _, begin, end in parts)
    where = f"bytes {whole[1]}–{whole[2]} of {whole[0].rsplit('/', 1)[-1]}"
    if not told:
        because = f"views of {where} that lie between each other; too many pieces to say whether they meet"
    elif inside:
        because = f"views of parts of {ids[0]}, {where}"
    else:
        because = f"views that begin or end inside each other, from {where} on"
    return Overlap(ids, because)
