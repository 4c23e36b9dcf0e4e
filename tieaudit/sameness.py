"""Whether two stored tensors are one value, and two chains of views one view: what the structural proof compares by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tieaudit.compare import same_through
from tieaudit.model import Weight
from tieaudit.storage import blocks
from tieaudit.view import AS_STORED, Repack, Transpose, View

_N_MOST_SMALL = 1 << 22
"""Elements up to which two different chains of steps are compared by what they do to an index."""


def same_value(a: Weight, b: Weight, view: View = AS_STORED) -> bool:
    """Whether `view` of `a` is `b`, bit for bit, whatever invertible view it is."""
    if view == AS_STORED or view.transposes:
        return same_through(a, b, view)
    if len(view.steps) == 1 and isinstance(view.steps[0], Repack):
        return _same_packed(a, b, view.steps[0])
    if a.storage is None or b.storage is None or a.dtype != b.dtype or view.shape(a.shape) != b.shape:
        return False
    if a.n_elements == 0 or not any(isinstance(step, Transpose) for step in view.steps):
        return same_through(replace(a, shape=b.shape), b, AS_STORED)  # a reshape moves no bytes
    item = max(a.n_bytes // a.n_elements, 1)
    one, other = (
        np.frombuffer(w.storage.read_ranges([(0, w.n_bytes)])[0], np.dtype((np.void, item)))
        for w in (a, b)
        if w.storage is not None
    )
    return bool(np.array_equal(view.apply(one.reshape(a.shape)).ravel(), other))


def _same_packed(a: Weight, b: Weight, step: Repack) -> bool:
    """Whether the bytes of `b` are those of `a`, with the bits that another packing flips."""
    if a.storage is None or b.storage is None or a.n_bytes != b.n_bytes:
        return False
    if step.before != (a.dtype, a.shape) or step.after != (b.dtype, b.shape):
        return False
    return all(
        np.array_equal(np.frombuffer(one, np.uint8) ^ np.uint8(step.flip), np.frombuffer(other, np.uint8))
        for one, other in zip(blocks(a.storage), blocks(b.storage), strict=True)
    )


def same_view(shape: tuple[int, ...], a: View, b: View) -> bool:
    """Whether two chains of steps do the same to a tensor of `shape`."""
    if a == b:
        return True
    parts = [view.values_first() for view in (a, b)]
    if parts[0] is None or parts[1] is None or parts[0][0] != parts[1][0]:
        return False
    moves = (parts[0][1], parts[1][1])
    if moves[0] == moves[1]:
        return True
    if np.prod(shape) > _N_MOST_SMALL:
        return False
    try:
        one, other = (view.apply(np.arange(int(np.prod(shape))).reshape(shape)) for view in moves)
    except ValueError:
        return False
    return one.shape == other.shape and bool(np.array_equal(one, other))
