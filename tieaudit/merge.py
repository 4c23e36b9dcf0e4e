"""The common value of unequal weights: how far apart they are, and the merged tensor, computed block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tieaudit.compare import transposed_block
from tieaudit.dtypes import dtype
from tieaudit.errors import RewriteRefused
from tieaudit.merges import Block, Merge
from tieaudit.model import Member, Weight, storage_of
from tieaudit.registry import discover
from tieaudit.storage import BLOCK_BYTES, Region, Storage
from tieaudit.view import View


@dataclass(frozen=True)
class Aligned:
    """A stored matrix or tensor seen in the common layout: rows can be read wherever they are stored."""

    storage: Storage
    shape: tuple[int, ...]
    """Shape in the common layout."""
    dtype: str
    transposed: bool
    """Stored with its two axes swapped."""

    def rows(self, begin: int, end: int) -> Block:
        """Rows begin..end of the common layout in float64; a tensor of other rank counts as one element per row."""
        item = dtype(self.dtype).n_bits // 8
        n_columns = self.shape[1] if len(self.shape) == 2 else 1
        if self.transposed:
            stored_shape = (self.shape[1], self.shape[0])
            raw = np.ascontiguousarray(transposed_block(self.storage, stored_shape, item, begin, end)).tobytes()
        else:
            raw = self.storage.read_ranges([(begin * n_columns * item, (end - begin) * n_columns * item)])[0]
        block: Block = np.frombuffer(raw, dtype(self.dtype).numpy()).astype(np.float64).reshape(end - begin, n_columns)
        return block

    @property
    def n_rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else int(np.prod(self.shape, dtype=np.int64))

    @property
    def rows_per_block(self) -> int:
        n_columns = self.shape[1] if len(self.shape) == 2 else 1
        return max(BLOCK_BYTES // (8 * n_columns), 1)


def aligned(weight: Weight, view: View, shape: tuple[int, ...]) -> Aligned:
    """A member of a class in the layout of the class's common value. RewriteRefused for views it cannot undo."""
    if dtype(weight.dtype).family != "float" or dtype(weight.dtype).item_bytes is None:
        raise RewriteRefused(f"{weight.id} holds {weight.dtype}: expected a floating-point tensor to compare or merge")
    if view.steps and not view.transposes:
        raise RewriteRefused(f"{weight.id} is seen {view}: expected the same or the transposed layout")
    return Aligned(storage_of(weight), shape, weight.dtype, view.transposes)


def difference(one: Aligned, other: Aligned) -> str:
    """How two tensors differ, in one sentence a person understands.

    Relative distance is ‖A − B‖ / ‖A‖ (Frobenius, float64); independent tables of equal norm come out near √2.
    Cost: reads both once, in blocks.
    """
    squared_difference = squared_norm = largest = 0.0
    n_different = n_elements = 0
    for begin in range(0, one.n_rows, one.rows_per_block):
        end = min(begin + one.rows_per_block, one.n_rows)
        a, b = one.rows(begin, end), other.rows(begin, end)
        with np.errstate(invalid="ignore", over="ignore"):
            delta = a - b
            finite = np.nan_to_num(np.abs(delta), nan=np.inf, posinf=np.inf)
            largest = max(largest, float(finite.max(initial=0.0)))
            squared_difference += float(np.square(delta).sum())
            squared_norm += float(np.square(a).sum())
        n_different += int((~((a == b) & (np.signbit(a) == np.signbit(b)))).sum())
        n_elements += delta.size
    relative = float(np.sqrt(squared_difference / squared_norm)) if squared_norm else float("inf")
    verdict = "no more alike than independent tables" if relative > 1.2 else "related, but not the same"
    return (
        f"{n_different:,} of {n_elements:,} values differ, by {largest:.3g} at most; "
        f"relative distance {relative:.3g} ({verdict})"
    )


@dataclass(frozen=True)
class MergedStorage:
    """The bytes of a merged tensor, computed when they are read: never held whole."""

    members: tuple[Aligned, ...]
    policy: str

    @property
    def n_bytes(self) -> int:
        shape = self.members[0].shape
        return int(np.prod(shape, dtype=np.int64)) * (dtype(self.members[0].dtype).n_bits // 8)

    @property
    def region(self) -> Region:
        return (f"merged:{self.policy}:{self.members[0].storage.region}", 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._read(begin, length) for begin, length in ranges]

    def _read(self, begin: int, length: int) -> bytes:
        first = self.members[0]
        row_bytes = self.n_bytes // max(first.n_rows, 1)
        if length == 0 or row_bytes == 0:
            return b""
        first_row, last_row = begin // row_bytes, -(-(begin + length) // row_bytes)
        pieces = []
        for row in range(first_row, last_row, first.rows_per_block):
            pieces.append(self._rows(row, min(row + first.rows_per_block, last_row)))
        skip = begin - first_row * row_bytes
        return b"".join(pieces)[skip : skip + length]

    def _rows(self, begin: int, end: int) -> bytes:
        combine = discover("merges", Merge)[self.policy].combine
        assert combine is not None, "keep policies copy bytes and never come here"
        merged = combine([member.rows(begin, end) for member in self.members])
        kept: NDArray[np.generic] = merged.astype(dtype(self.members[0].dtype).numpy())
        return kept.tobytes()


def common_value(
    weights: list[tuple[Weight, Member]], roles: dict[str, str], policy: Merge
) -> tuple[str | None, Storage | None]:
    """What a policy makes of a class: (id whose bytes survive, None) or (None, the merged bytes).

    Merged bytes come in the layout of the first member. RewriteRefused if no member has the role that the policy
    keeps, or if the members have different element types.
    """
    first = weights[0][0]
    if policy.keeps is not None:
        kept = [weight.id for weight, _ in weights if roles.get(weight.id) == policy.keeps]
        if not kept:
            raise RewriteRefused(
                f"--merge {policy.name}: none of {', '.join(w.id for w, _ in weights)} is a {policy.keeps}"
            )
        return kept[0], None
    members = tuple(aligned(weight, member.view, first.shape) for weight, member in weights)
    return None, MergedStorage(members, policy.name)
