"""Heads that become fewer: what the pooled weight holds, and what its readers see of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tieaudit.change import Pool, Pooled, Written
from tieaudit.dtypes import dtype
from tieaudit.model import Model, Weight, storage_of
from tieaudit.storage import BLOCK_BYTES, Region, Storage, blocks


def pooled(values: NDArray[Any], axis: int, n_heads: int, n_groups: int) -> NDArray[Any]:
    """Each group of neighbouring heads becomes their mean, computed in float64 and rounded once.

    Where all heads of a group agree, the number is theirs, bit for bit. `values`: any shape, with
    n_heads · head size along `axis`.
    """
    shape = (*values.shape[:axis], n_groups, n_heads // n_groups, -1, *values.shape[axis + 1 :])
    heads = np.moveaxis(values.reshape(shape), axis + 1, 0)
    total = heads[0].astype(np.float64)
    for head in heads[1:]:  # one after the other: the sum is the same whatever the blocks it is computed in
        total = total + head.astype(np.float64)
    mean = (total / len(heads)).astype(values.dtype)
    found: NDArray[Any] = np.where((heads == heads[0]).all(axis=0), heads[0], mean)
    return found.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])


def repeated(values: NDArray[Any], axis: int, n_heads: int, n_groups: int) -> NDArray[Any]:
    """Each head n_heads / n_groups times, one after the other: head h is that of group ⌊h · n_groups / n_heads⌋."""
    heads = values.reshape(*values.shape[:axis], n_groups, -1, *values.shape[axis + 1 :])
    wide: NDArray[Any] = np.repeat(heads, n_heads // n_groups, axis=axis)
    return wide.reshape(*values.shape[:axis], -1, *values.shape[axis + 1 :])


@dataclass(frozen=True)
class PooledStorage:
    """The bytes of a weight with fewer heads, computed while they are read: blocks of rows, or of one group's heads."""

    source: Storage
    shape: tuple[int, ...]
    """Of the source."""
    kind: str
    axis: int
    n_heads: int
    n_groups: int

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes * self.n_groups // self.n_heads

    @property
    def region(self) -> Region:
        return (f"pooled:{self.n_heads}:{self.n_groups}:{self.source.region}", 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._range(begin, length) for begin, length in ranges]

    def _range(self, begin: int, length: int) -> bytes:
        if length <= 0:
            return b""
        step = self._n_bytes_of_a_step()
        first, last = begin // step, -(-(begin + length) // step)
        n_each = max(BLOCK_BYTES // (step * self.n_heads // self.n_groups), 1)
        pieces = [self._steps(at, min(at + n_each, last)) for at in range(first, last, n_each)]
        return b"".join(pieces)[begin - first * step :][:length]

    def _n_bytes_of_a_step(self) -> int:
        """What can be computed by itself: a row where heads lie in a row, else one group of heads."""
        whole = self.n_bytes
        return whole // self.shape[0] if self.axis else whole // self.n_groups

    def _steps(self, first: int, last: int) -> bytes:
        step = self._n_bytes_of_a_step() * self.n_heads // self.n_groups
        raw = self.source.read_ranges([(first * step, (last - first) * step)])[0]
        values = np.frombuffer(raw, dtype(self.kind).numpy())
        if self.axis:
            rows = values.reshape(last - first, *self.shape[1:])
            return pooled(rows, self.axis, self.n_heads, self.n_groups).tobytes()
        n_heads = self.n_heads // self.n_groups * (last - first)
        heads = values.reshape(-1, *self.shape[1:])
        return pooled(heads, 0, n_heads, last - first).tobytes()


def pooled_weight(weight: Weight, how: Pooled, edit: Pool) -> tuple[tuple[int, ...], PooledStorage]:
    """Shape and bytes of a weight after the edit."""
    shape = list(weight.shape)
    shape[how.axis] = shape[how.axis] * edit.n_groups // edit.n_heads
    storage = PooledStorage(storage_of(weight), weight.shape, weight.dtype, how.axis, edit.n_heads, edit.n_groups)
    return tuple(shape), storage


def planned_values(before: Model, edit: Pool) -> Iterator[tuple[Weight, NDArray[Any]]]:
    """Each weight with what its readers are to see of it, in its original shape. Cost: held in memory."""
    for one in edit.weights:
        weight = before.by_id[one.id]
        shape, storage = pooled_weight(weight, one, edit)
        values = np.frombuffer(b"".join(blocks(storage)), dtype(weight.dtype).numpy()).reshape(shape)
        yield weight, repeated(values, one.axis, edit.n_heads, edit.n_groups)


def problems(before: Model, after: Model, edit: Pool, written: Written) -> Iterator[str]:
    """What is stored otherwise than planned, in sentences. Cost: the weights are read once, in blocks."""
    for one in edit.weights:
        weight, now = before.by_id[one.id], after.by_id.get(one.id)
        shape, storage = pooled_weight(weight, one, edit)
        if now is None or now.storage is None:
            yield f"{one.id}: expected {edit.n_groups} heads of it, found nothing"
        elif (now.dtype, now.shape) != (weight.dtype, shape):
            yield f"{one.id}: expected {weight.dtype}{list(shape)}, found {now.dtype}{list(now.shape)}"
        elif any(a != b for a, b in zip(blocks(storage), blocks(now.storage), strict=True)):
            yield f"{one.id}: its bytes are not the means of its heads"
    done = {(one.weight, one.part, one.scope, one.node, one.slot) for one in written.repeated}
    for use in before.uses_of.get(edit.weights[0].id, ()):
        if (use.weight, use.part, use.scope, use.node, use.slot) not in done:
            yield f"{use.op} @ {use.node} (input {use.slot}): expected its heads repeated, they are not"
