"""The common value of unequal weights: how far apart they are, and the merged tensor, computed block by block."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tieaudit.change import Adjustment, Prediction
from tieaudit.compare import transposed_block
from tieaudit.dtypes import dtype
from tieaudit.errors import NotFinite, RewriteRefused, UsageError
from tieaudit.merges import (
    KEEP_ONE,
    Block,
    Calibrated,
    Correction,
    Merge,
    Merged,
    Rows,
    Sites,
    expect_finite_tables,
)
from tieaudit.model import Member, Weight, storage_of
from tieaudit.printable import listed
from tieaudit.registry import choose, discover
from tieaudit.storage import BLOCK_BYTES, MemoryStorage, Region, Storage
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
    def n_columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

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
    """The bytes of a merged tensor in the layout of the class, computed when they are read: never held whole."""

    rows: Rows
    first: Aligned
    """Shape, element type and size of a block are those of the first member."""
    name: str

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.first.shape, dtype=np.int64)) * (dtype(self.first.dtype).n_bits // 8)

    @property
    def region(self) -> Region:
        return (f"merged:{self.name}:{self.first.storage.region}", 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._read(begin, length) for begin, length in ranges]

    def _read(self, begin: int, length: int) -> bytes:
        row_bytes = self.n_bytes // max(self.first.n_rows, 1)
        if length == 0 or row_bytes == 0:
            return b""
        first_row, last_row = begin // row_bytes, -(-(begin + length) // row_bytes)
        pieces = []
        for row in range(first_row, last_row, self.first.rows_per_block):
            values = self.rows(row, min(row + self.first.rows_per_block, last_row))
            pieces.append(_rounded(values, self.first.dtype).tobytes())
        skip = begin - first_row * row_bytes
        return b"".join(pieces)[skip : skip + length]


def _rounded(values: Block, kind: str) -> NDArray[np.generic]:
    """In the stored type, rounded once; what does not fit becomes infinite, or NaN where the type has no infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[np.generic] = values.astype(dtype(kind).numpy())
    return found


def sites_of(
    weights: list[tuple[Weight, Member]], roles: Mapping[str, str], calibrated: Calibrated | None = None
) -> Sites:
    """The members of a class in the layout of the first. RewriteRefused for what is no floating-point tensor.

    `calibrated`: then in the layout whose columns are what the members are multiplied with, where they agree in that;
    members that do not are taken as not calibrated.
    """
    shape = weights[0][0].shape
    tables = tuple(aligned(weight, member.view, shape) for weight, member in weights)
    ids = tuple(weight.id for weight, _ in weights)
    kinds = tuple(roles.get(id, "other") for id in ids)
    if calibrated is None or len(shape) not in (1, 2):
        return Sites(ids, tables, kinds, (None,) * len(ids))
    fitted, held = (tuple(one.get(id) for id in ids) for one in (calibrated.fitted, calibrated.held_out))
    turns = [None if one is None else one.turned != member.view.transposes
             for one, (_, member) in zip(fitted, weights, strict=True)]  # fmt: skip
    turned = next((turn for turn in turns if turn is not None), False)
    if turned:
        tables = tuple(replace(one, shape=shape[::-1], transposed=not one.transposed) for one in tables)
    agreed = [turn is turned for turn in turns]
    fitted, held = (
        tuple(one if fits else None for one, fits in zip(each, agreed, strict=True)) for each in (fitted, held)
    )
    return Sites(ids, tables, kinds, fitted, held if calibrated.held_out else (), turned)


def policy_of(text: str, ids: Collection[str] | None = None) -> tuple[Merge, str]:
    """`low-rank:32` → the policy and its argument. UsageError for an unknown one, or an argument it does not take.

    `ids`: of the model's weights, one of which the argument may have to be; None: the argument is not looked at.
    """
    name, colon, argument = text.partition(":")
    policy = choose(discover("merges", Merge), name, "merge policy")
    if colon and not policy.argument:
        raise UsageError(f"--merge {text}: expected {name} alone, which takes nothing behind a colon")
    if ids is not None and policy.check is not None:
        policy.check(argument, ids)
    return policy, argument


@dataclass(frozen=True)
class Common:
    """What a policy makes of a class."""

    kept: str | None
    """The id whose bytes survive exactly; None where the value is computed."""
    values: Storage | None
    """The computed bytes, in the layout of the first member."""
    adjustments: Mapping[str, Adjustment]
    """Id of a member → what it applies to the common value."""
    because: str = ""
    prediction: Prediction | None = None
    """Where there is calibration."""
    scales: Mapping[str, Block] = field(default_factory=dict)
    """Of the adjustments those that are a scale of each column, before rounding."""


def common_value(
    weights: list[tuple[Weight, Member]], roles: Mapping[str, str], text: str, calibrated: Calibrated | None = None
) -> Common:
    """What a policy makes of a class.

    RewriteRefused if the policy cannot merge these members, if they have different element types, or if a number that
    is computed from them is not finite in the stored type. Cost: what the policy reads, one reading more of what is
    computed, and with calibration two; factors of adjustments are computed once, rounded to the stored type, and held
    in memory, and so is the value of a matrix that is kept as [inputs, outputs].
    """
    policy, argument = policy_of(text)
    sites = sites_of(weights, roles, calibrated)
    merged = policy.merge(sites, argument)
    if sites.turned and merged.corrections:  # they are stored in the layout of the first member
        sites = sites_of(weights, roles)
        merged = policy.merge(sites, argument)
    first = sites.tables[0]
    assert isinstance(first, Aligned)
    if merged.keeps is None:
        _expect_finite(sites, merged, first.dtype, text)
    prediction = _prediction(sites, merged, text) if calibrated is not None else None
    if merged.corrections:
        found = {sites.ids[at]: _adjustment(sites, at, merged, first.dtype) for at in merged.corrections}
        scales = {sites.ids[at]: one.right for at, one in merged.corrections.items() if one.kind == "scale"}
        return Common(None, MergedStorage(merged.rows, first, text), found, merged.because, prediction, scales)
    if merged.keeps is not None:
        return Common(sites.ids[merged.keeps], None, {}, merged.because, prediction)
    values = _turned_back(sites, merged, first, text) if sites.turned else MergedStorage(merged.rows, first, text)
    return Common(None, values, {}, merged.because, prediction)


def _expect_finite(sites: Sites, merged: Merged, kind: str, text: str) -> None:
    """NotFinite where what is computed cannot be stored: it would be delivered as infinite, or as no number."""
    for begin, end in sites.blocks():
        values = merged.rows(begin, end)
        wrong = ~np.isfinite(_rounded(values, kind).astype(np.float64))
        if not wrong.any():
            continue
        expect_finite_tables(sites, text, (begin, end))
        row, column = (int(one[0]) for one in np.nonzero(wrong))
        at = [begin + row] if len(sites.tables[0].shape) != 2 else [begin + row, column]
        raise NotFinite(
            f"--merge {text}: {listed(sites.ids)}: expected values that {kind} can hold, found "
            f"{values[row, column]:.3g} at {at} of what is computed; {KEEP_ONE}, or convert the model to float32 first"
        )


def _turned_back(sites: Sites, merged: Merged, first: Aligned, text: str) -> Storage:
    """The bytes in the layout of the first member. Held in memory: a row of one is in all of the other."""
    rows = np.concatenate([_rounded(merged.rows(*at), first.dtype) for at in sites.blocks()])
    return MemoryStorage(np.ascontiguousarray(rows.T).tobytes(), f"merged:{text}:{first.storage.region}")


def _prediction(sites: Sites, merged: Merged, text: str) -> Prediction:
    known = [one for one in sites.held_out or sites.statistics if one is not None]
    return Prediction(
        ids=sites.ids,
        policy=text,
        changed=sites.relative_change(merged),
        errors=sites.weighted_errors(merged),
        nats=sites.predicted_nats(merged),
        n_tokens=max((one.n_tokens for one in known), default=0),
    )


def _adjustment(sites: Sites, at: int, merged: Merged, kind: str) -> Adjustment:
    """A correction as it will be stored. RewriteRefused for what the element type cannot hold."""
    correction: Correction = merged.corrections[at]
    name, left = sites.ids[at], None
    right = _rounded(correction.right, kind)
    if correction.left is not None:
        left = np.concatenate([_rounded(correction.left(*block), kind) for block in sites.blocks()])
    for factor in (right, left):
        if factor is not None and not np.isfinite(factor.astype(np.float64)).all():
            raise RewriteRefused(f"{name}: its correction has numbers that {kind} cannot hold")
    return Adjustment(
        correction.kind,
        kind,
        MemoryStorage(right.tobytes(), f"right factor of {name}"),
        right.shape,
        MemoryStorage(left.tobytes(), f"left factor of {name}") if left is not None else None,
        left.shape if left is not None else (),
    )
