"""Two weights of one layout → a `Pair`: the sums that all diagnostics need, in bounded memory.

By default a sample of rows is read, and wide rows are seen through a sketch of their columns; `deep` reads everything.
The sums are float64 on every device; a GPU adds in another order, so that they agree to about 1e-12 of their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tieaudit.diagnostics import Array, Pair
from tieaudit.merge import Aligned, aligned
from tieaudit.model import Member, Weight
from tieaudit.placing import Place, fetched

N_SAMPLED = 1 << 21
"""Numbers of each table that are read by default: 8 MiB in float32."""
ROWS_PER_COLUMN = 4
"""Rows for each direction of a sketch: with fewer, chance explains too much."""
MOST_COLUMNS = 512
"""Directions of a sketch."""
_RUN = 32
"""Neighbouring rows read at once: one read for each, and neighbours in a vocabulary are no more alike than others."""
_DEEP_BLOCK = 1 << 21


@dataclass(frozen=True)
class _Layout:
    """Both tables with the longer axis as rows."""

    one: Aligned
    other: Aligned
    turned: bool = False
    """Rows are the columns of the tables as they are."""

    @property
    def n_rows(self) -> int:
        return self.one.shape[0]

    @property
    def n_columns(self) -> int:
        return self.one.shape[1]

    def about_own_mean(self, rows: Any) -> Any:
        """Rows about their own means where they are columns: these tables have in common, as they have a mean row."""
        return rows - rows.mean(axis=1)[:, None] if self.turned else rows

    def blocks(self, runs: Sequence[tuple[int, int]], place: Place) -> Iterator[tuple[Any, Any]]:
        for begin, end in runs:
            yield place(self.one.rows(begin, end)), place(self.other.rows(begin, end))


def pair(weights: Sequence[tuple[Weight, Member]], *, deep: bool = False, place: Place = np.asarray) -> Pair:
    """Two members of a class, compared in the layout of the first.

    `place`: where the sums are formed (`placing.place_on`), by default numpy. RewriteRefused if one is no dense
    floating-point tensor. Numbers that are not finite make every sum useless: the squares are then NaN, which callers
    show as such. Cost: reads up to `N_SAMPLED` numbers of each, or with `deep` each table, twice, with five products of
    rows × columns² and the eigenvalues of one matrix of columns × columns; memory a few blocks and a few such matrices.
    """
    layout = _laid_out(weights)
    runs = _runs(layout, deep)
    n_seen = sum(end - begin for begin, end in runs)
    few = max(min(MOST_COLUMNS, n_seen // ROWS_PER_COLUMN), 1)  # directions that this many rows can tell something of
    sampled = n_seen < layout.n_rows or layout.n_columns > MOST_COLUMNS or n_seen < 2 * layout.n_columns
    n_directions = min(layout.n_columns, few) if sampled and not deep else layout.n_columns
    sketch = _sketch(layout.n_columns, n_directions)
    with np.errstate(invalid="ignore", over="ignore"):
        return _sums(layout, runs, n_seen, sketch, place)


def _laid_out(weights: Sequence[tuple[Weight, Member]]) -> _Layout:
    first = weights[0][0]
    one, other = (aligned(weight, member.view, first.shape) for weight, member in weights)
    if len(first.shape) != 2 or min(first.shape) == 1:
        n_elements = first.n_elements
        rows = first.shape[0] if len(first.shape) > 2 and first.shape[0] else 1
        shape = (rows, n_elements // rows)
        one, other = (replace(each, shape=shape, transposed=False) for each in (one, other))
        return _Layout(one, other)
    if first.shape[0] >= first.shape[1]:
        return _Layout(one, other)
    swapped = first.shape[::-1]
    one, other = (replace(each, shape=swapped, transposed=not each.transposed) for each in (one, other))
    return _Layout(one, other, turned=True)


def _runs(layout: _Layout, deep: bool) -> list[tuple[int, int]]:
    """Rows to read, as (begin, end): all of them in blocks, or runs spread evenly at random places."""
    n, d = layout.n_rows, max(layout.n_columns, 1)
    runs = None if deep else sampled_runs(n, d, N_SAMPLED)
    if runs is not None:
        return runs
    step = max(_DEEP_BLOCK // d, 1)
    return [(begin, min(begin + step, n)) for begin in range(0, n, step)]


def sampled_runs(n_rows: int, n_columns: int, n_numbers: int) -> list[tuple[int, int]] | None:
    """Runs of rows, as (begin, end), one at a random place in each of equal strata; None if all rows fit the sample."""
    d = max(n_columns, 1)
    if n_rows * d <= n_numbers:
        return None
    run = min(_RUN, max(n_numbers // d, 1), n_rows)
    n_runs = max(min(n_numbers // d // run, n_rows // run), 1)
    strata = np.linspace(0, n_rows, n_runs + 1).astype(np.int64)
    rng = np.random.default_rng(n_rows)
    found = []
    for begin, end in zip(strata[:-1].tolist(), strata[1:].tolist(), strict=True):
        at = begin + int(rng.integers(0, max(end - begin - run, 0) + 1))
        found.append((at, min(at + run, end)))
    return found


def _sketch(n_columns: int, n_directions: int) -> Array | None:
    """Orthonormal directions, [columns, directions], the same for both tables; None where all columns are seen."""
    if n_directions >= n_columns:
        return None
    drawn = np.random.default_rng(n_columns).standard_normal((n_columns, n_directions))
    directions: Array = np.linalg.qr(drawn)[0]
    return directions


def _sums(layout: _Layout, runs: list[tuple[int, int]], n_seen: int, sketch: Array | None, place: Place) -> Pair:
    d = layout.n_columns
    k = d if sketch is None else sketch.shape[1]
    onto = None if sketch is None else place(sketch)
    mean_a, mean_b = place(np.zeros(d)), place(np.zeros(d))
    middles = (_Middle(place(np.zeros(d))), _Middle(place(np.zeros(d))))
    gram_a, gram_b, cross = (place(np.zeros((k, k))) for _ in range(3))
    squared_a = squared_b = dot = 0.0
    for a, b in layout.blocks(runs, place):
        squared_a, squared_b = squared_a + float((a * a).sum()), squared_b + float((b * b).sum())
        dot += float((a * b).sum())
        a, b = layout.about_own_mean(a), layout.about_own_mean(b)
        mean_a, mean_b = mean_a + a.sum(axis=0), mean_b + b.sum(axis=0)
        middles = (middles[0].joined_by(a), middles[1].joined_by(b))
        seen_a, seen_b = (a, b) if onto is None else (a @ onto, b @ onto)
        gram_a, gram_b, cross = gram_a + seen_a.T @ seen_a, gram_b + seen_b.T @ seen_b, cross + seen_a.T @ seen_b
    mean_a, mean_b = mean_a / max(n_seen, 1), mean_b / max(n_seen, 1)
    centre_a, centre_b = (fetched(mean if onto is None else mean @ onto) for mean in (mean_a, mean_b))
    raw = float(fetched(gram_a).trace())
    centred_a = fetched(gram_a) - n_seen * np.outer(centre_a, centre_a)
    basis = _basis(centred_a, raw)
    wanted = place(basis) if 0 < basis.shape[1] < n_seen else None  # else every row is explained, whatever it is
    held = place(np.zeros((basis.shape[1],) * 2))
    cosines, leverages, squares = [], [], []
    probe = place(np.random.default_rng(1).standard_normal(d))
    for a, b in layout.blocks(runs, place):
        a, b = layout.about_own_mean(a), layout.about_own_mean(b)
        cosines.append(_cosines(a, b, middles, layout.n_rows, probe))
        if wanted is not None:
            seen_a, seen_b = (a - mean_a, b - mean_b) if onto is None else ((a - mean_a) @ onto, (b - mean_b) @ onto)
            inside, square = seen_a @ wanted, (seen_b * seen_b).sum(axis=1)
            held = held + inside.T @ (inside * square[:, None])
            leverages.append(fetched((inside * inside).sum(axis=1)))
            squares.append(fetched(square))
    return Pair(
        n_rows=layout.n_rows,
        n_columns=d,
        n_rows_seen=n_seen,
        n_columns_seen=k,
        squared_a=squared_a,
        squared_b=squared_b,
        dot=dot,
        cosines=_of_different_rows(cosines),
        gram_a=centred_a,
        gram_b=fetched(gram_b) - n_seen * np.outer(centre_b, centre_b),
        cross=fetched(cross) - n_seen * np.outer(centre_a, centre_b),
        basis=basis,
        leverages=_joined(leverages),
        squares_b=_joined(squares),
        held=fetched(held),
    )


def _joined(pieces: list[Array]) -> Array:
    return np.concatenate(pieces) if pieces else np.zeros(0)


def _basis(gram: Array, raw: float) -> Array:
    """G^-½ over the directions that the centred rows have; `raw`: the trace before centring, whose rounding remains."""
    if not np.isfinite(gram).all():
        return np.zeros((len(gram), 0))
    values, vectors = np.linalg.eigh(gram)
    kept = values > 4.0 * len(gram) * np.finfo(np.float64).eps * max(raw, float(values[-1]))
    found: Array = vectors[:, kept] / np.sqrt(values[kept])
    return found


@dataclass(frozen=True)
class _Middle:
    """The mean row, each row weighted by 1/length: one step from zero towards the spatial median (Weiszfeld 1937).

    The plain mean of rows some of which are much longer than most is one of the long ones, about which all the short
    rows of a table are one row."""

    rows: Any
    weights: float = 0.0

    def joined_by(self, block: Any) -> _Middle:
        length = (block * block).sum(axis=1) ** 0.5
        weights = (length > 0.0) / (length + (length == 0.0))
        return _Middle(self.rows + weights @ block, self.weights + float(weights.sum()))

    @property
    def row(self) -> Any:
        return self.rows / (self.weights or 1.0)


def _of_different_rows(pieces: list[tuple[Array, NDArray[np.complex128]]]) -> Array:
    """Cosines of rows, of those that are one row many times, as unused tokens are, only one."""
    if not pieces:
        return np.zeros(0)
    cosines, prints = (np.concatenate(one) for one in zip(*pieces, strict=True))
    found: Array = cosines[np.sort(np.unique(prints, return_index=True)[1])]
    return found


def _cosines(
    a: Any, b: Any, middles: tuple[_Middle, _Middle], n_rows: int, probe: Any
) -> tuple[Array, NDArray[np.complex128]]:
    """Of each row about the middle, and a number for both rows that is the same where they are.

    A single row, the middle itself, is seen about zero: norms are alike in being near one. Rows of nothing but zeros
    are left out: about the middle they would all be one row, however many they are.
    """
    live = np.logical_and(fetched((a != 0).any(axis=1)), fetched((b != 0).any(axis=1)))
    if n_rows > 1:
        a, b = a - middles[0].row, b - middles[1].row
    scale = fetched((a * a).sum(axis=1)) ** 0.5 * fetched((b * b).sum(axis=1)) ** 0.5
    kept = np.logical_and(scale > 0.0, live)
    prints: NDArray[np.complex128] = fetched(a @ probe) + 1j * fetched(b @ probe)
    return fetched((a * b).sum(axis=1))[kept] / scale[kept], prints[kept]
