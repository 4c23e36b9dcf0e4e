"""Steps through bytes: reading, views between two of them, and who meets whom, against brute force over every index."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tieaudit.compare import same_through
from tieaudit.model import Weight
from tieaudit.regions import aliases, overlaps
from tieaudit.storage import BLOCK_BYTES, MemoryStorage
from tieaudit.strided import Strided, footprint, is_row_major, row_major, runs, span, view_between
from tieaudit.view import TRANSPOSED

N = 240
FLAT = np.arange(N, dtype=np.int32)
SOURCE = MemoryStorage(FLAT.tobytes(), "flat")


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """An offset, a shape and strides inside N elements: anything that `as_strided` takes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    strides: list[int] = []
    for size in shape:
        room = (N - 1 - sum((s - 1) * t for s, t in zip(shape, strides, strict=False))) // max(size - 1, 1)
        strides.append(draw(st.integers(0, min(room, 40))))
    reach = span(shape, strides)
    return draw(st.integers(0, N - reach)), shape, tuple(strides)


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a reshaped and permuted row-major tensor of 24 elements."""
    shape = draw(st.sampled_from([(24,), (2, 12), (4, 6), (2, 3, 4), (3, 8), (1, 24), (2, 2, 6), (6, 4), (1, 4, 1, 6)]))
    perm = draw(st.permutations(range(len(shape))))
    strides = row_major(shape)
    return tuple(shape[axis] for axis in perm), tuple(strides[axis] for axis in perm)


def seen(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """The same by numpy, whose strides are in bytes."""
    return np.lib.stride_tricks.as_strided(FLAT[offset:], shape, tuple(4 * stride for stride in strides))


@given(steps(), st.data())
def test_any_range_of_any_steps_is_what_numpy_reads(
    one: tuple[int, tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    offset, shape, strides = one
    storage = Strided(SOURCE, offset, shape, strides, 4)
    expected = seen(offset, shape, strides).tobytes()
    assert storage.n_bytes == len(expected)
    assert storage.read_ranges([(0, len(expected))]) == [expected]
    begin = data.draw(st.integers(0, len(expected)))
    length = data.draw(st.integers(0, len(expected) - begin))
    assert storage.read_ranges([(begin, length)]) == [expected[begin : begin + length]]
    visited = seen(offset, shape, strides)
    assert storage.region == ("flat", int(visited.min()) * 4, int(visited.max()) * 4 + 4)


@given(cuttings(), cuttings())
def test_the_view_between_two_ways_of_cutting_one_storage_is_right(
    one: tuple[tuple[int, ...], tuple[int, ...]], other: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    view = view_between(*one, *other)
    assert footprint(*one) == footprint(*other) == ((24, 1),)
    assert view is not None
    assert np.array_equal(view.apply(seen(0, *one)), seen(0, *other))


def test_tables_of_4_by_6_and_6_by_4_on_one_storage_both_turned_are_one_value() -> None:
    """Neither is a permutation nor a reshape of the other: it takes a transpose, a reshape and a transpose."""
    view = view_between((6, 4), (1, 6), (4, 6), (1, 4))
    assert str(view) == "transposed, reshaped to [6, 4], transposed"


@given(steps(), steps())
def test_no_view_is_claimed_between_steps_that_differ(
    one: tuple[int, tuple[int, ...], tuple[int, ...]], other: tuple[int, tuple[int, ...], tuple[int, ...]]
) -> None:
    view = view_between(*one[1:], *other[1:])
    if view is not None:
        assert np.array_equal(view.apply(seen(0, *one[1:])), seen(0, *other[1:]))


@settings(max_examples=300)
@given(st.lists(steps(), min_size=2, max_size=5))
def test_slices_are_exactly_the_views_that_meet_without_being_one(
    these: list[tuple[int, tuple[int, ...], tuple[int, ...]]],
) -> None:
    weights = [
        Weight(str(n), str(n), shape, "int32", Strided(SOURCE, offset, shape, strides, 4))
        for n, (offset, shape, strides) in enumerate(these)
    ]
    names = aliases(weights)
    home = {weight.id: number for number, group in enumerate(names) for weight, _ in group}
    cells = [set(seen(*one).reshape(-1).tolist()) for one in these]
    for group in names:
        assert len({frozenset(cells[int(weight.id)]) for weight, _ in group}) == 1
        for weight, view in group:
            assert np.array_equal(view.apply(seen(*these[int(group[0][0].id)])), seen(*these[int(weight.id)]))
    met = {frozenset((a, b)) for one in overlaps(names) for a, b in itertools.combinations(one.ids, 2)}
    direct = {
        frozenset((str(a), str(b)))
        for a, b in itertools.combinations(range(len(these)), 2)
        if cells[a] & cells[b] and home[str(a)] != home[str(b)]
    }
    assert direct <= met
    assert {id for pair in met for id in pair} == {id for pair in direct for id in pair}


def test_runs_are_the_stretches_that_are_visited() -> None:
    # rows 0 and 2 of a [4, 6] of 4 bytes each: 24 bytes a row
    assert runs(100, (2, 6), (12, 1), 4, 10) == [(100, 124), (148, 172)]
    assert runs(0, (6, 4), (1, 6), 4, 10) == [(0, 96)]
    assert runs(0, (100, 2), (3, 1), 4, 99) is None


def test_a_transpose_is_read_in_pieces_and_not_as_a_whole() -> None:
    """What a block of a transpose needs is read, not the whole of a storage that is larger than the block."""
    rows, columns = 2048, 4096
    table = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    asked: list[int] = []

    class Counting(MemoryStorage):
        def read_ranges(self, ranges):  # type: ignore[no-untyped-def]
            ranges = list(ranges)
            asked.append(sum(length for _, length in ranges))
            return super().read_ranges(ranges)

    storage = Strided(Counting(table.tobytes(), "t"), 0, (columns, rows), (1, columns), 4)
    begin = 1000 * rows * 4
    (block,) = storage.read_ranges([(begin, BLOCK_BYTES)])
    assert block == table.T.tobytes()[begin : begin + BLOCK_BYTES]
    assert sum(asked) <= 2 * BLOCK_BYTES
    assert max(asked) < table.nbytes // 4


@pytest.mark.parametrize(("item", "swap"), [(2, 2), (8, 8), (16, 8), (1, 0)])
def test_big_endian_numbers_are_turned_and_halves_of_complex_ones_alone(item: int, swap: int) -> None:
    data = bytes(range(6 * item))
    width = swap or 1
    expected = b"".join(data[at : at + width][::-1] for at in range(0, len(data), width))
    storage = Strided(MemoryStorage(data, "b"), 0, (2, 3), (3, 1), item, swap)
    assert storage.read_ranges([(0, len(data))]) == [expected]
    assert storage.read_ranges([(item + 1, item)]) == [expected[item + 1 : 2 * item + 1]]


def test_the_stride_of_an_axis_of_one_does_not_matter() -> None:
    assert is_row_major((3, 1, 2), (2, 99, 1))
    assert not is_row_major((3, 2), (1, 3))


@dataclass
class _Counted:
    """Bytes in memory, and how many ranges were asked for."""

    data: bytes
    n_ranges: int = 0

    @property
    def n_bytes(self) -> int:
        return len(self.data)

    @property
    def region(self) -> tuple[str, int, int]:
        return ("counted", 0, len(self.data))

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        asked = list(ranges)
        self.n_ranges += len(asked)
        return [self.data[begin : begin + length] for begin, length in asked]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_a_transpose_of_a_stored_transpose_is_compared_as_it_lies(swapped: bool, changed: bool) -> None:
    """As in a checkpoint whose transposed names share one storage: element by element that took a minute for 65 MB."""
    table = np.arange(300 * 200, dtype=np.float32).reshape(300, 200)
    other = table.copy()
    other[-1, -1] += changed
    one, two = _Counted(table.tobytes()), _Counted(other.tobytes())
    a = Weight("a", "a", (300, 200), "float32", one)
    b = Weight("b", "b", (200, 300), "float32", Strided(two, 0, (200, 300), (1, 200), 4))
    pair = (b, a) if swapped else (a, b)
    assert same_through(*pair, TRANSPOSED) is not changed
    assert one.n_ranges + two.n_ranges < 10
