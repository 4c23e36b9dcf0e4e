"""Finding measured and aliased ties: planted ones are found, near ones are not, whatever the order and the names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tieaudit.compare import constant_value, head, same_through
from tieaudit.find import find
from tieaudit.model import Member, Model, Part, Tie, Weight
from tieaudit.storage import FileStorage, MemoryStorage, overlapping
from tieaudit.view import AS_STORED, TRANSPOSED, Reshape, View

Names = list[set[str]]


def weight(name: str, array: np.ndarray, *, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Weight:
    data = np.ascontiguousarray(array).tobytes()
    return Weight(
        name, name, shape or array.shape, dtype or str(array.dtype), MemoryStorage(data, name), parameter=True
    )


def model(*weights: Weight) -> Model:
    return Model("toy", "safetensors", (Part("", ()),), weights)


def measured(*weights: Weight) -> list[Tie]:
    return [tie for tie in find(model(*weights)).ties if tie.origin == "measured"]


def groups(*weights: Weight) -> Names:
    return [set(tie.ids) for tie in measured(*weights)]


def random(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- what is one value ---------------------------------------------------------------------------------------------


def test_an_equal_copy_is_found_and_its_bytes_are_counted_once() -> None:
    table = random((100, 8))
    (tie,) = measured(weight("a", table), weight("b", random((100, 8), 1)), weight("c", table))
    assert tie.members == (Member("a"), Member("c"))
    assert tie.n_bytes_saved == 100 * 8 * 4  # one copy, not both


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (33, 33)])
def test_a_transposed_copy_is_found_in_either_orientation(shape: tuple[int, int]) -> None:
    table = random(shape)
    (tie,) = measured(weight("a", table), weight("b", table.T))
    assert tie.members == (Member("a"), Member("b", TRANSPOSED))


def test_large_matrices_are_compared_over_several_blocks() -> None:
    table = random((3000, 1100))  # 13 MB: more than three blocks of 4 MiB
    changed = table.copy()
    changed[2999, 1099] = np.nextafter(changed[2999, 1099], np.float32(9))
    found = groups(weight("a", table), weight("t", table.T), weight("x", changed), weight("xt", changed.T))
    assert found == [{"a", "t"}, {"x", "xt"}]


def test_a_class_holds_copies_in_both_orientations_once() -> None:
    table = random((30, 6))
    (tie,) = measured(weight("a", table.T), weight("b", table), weight("c", table.T), weight("d", table))
    assert tie.members == (Member("a"), Member("b", TRANSPOSED), Member("c"), Member("d", TRANSPOSED))
    assert tie.n_bytes_saved == 3 * 30 * 6 * 4


# --- what is not: each of these is a tie to a naive reader


def test_zero_and_minus_zero_are_different_values() -> None:
    table = random((20, 5))
    table[3, 3] = 0.0
    negative = table.copy()
    negative[3, 3] = -0.0
    assert np.array_equal(table, negative)  # the naive answer
    assert groups(weight("a", table), weight("b", negative)) == []


def test_nan_payloads_count_and_equal_payloads_are_equal() -> None:
    table = random((20, 5))
    bits = table.view(np.uint32).copy()
    bits[1, 1] = 0x7FC00001
    other = bits.copy()
    other[1, 1] = 0x7FC00002
    one, same, different = (b.view(np.float32) for b in (bits, bits.copy(), other))
    assert not np.array_equal(one, same)  # the naive answer: NaN differs from itself
    assert groups(weight("a", one), weight("b", same), weight("c", different)) == [{"a", "b"}]


def test_integers_beyond_two_to_the_53_are_exact() -> None:
    table = np.arange(100, dtype=np.int64) + 2**53
    other = table.copy()
    other[50] = 2**53 + 51
    table[50] = 2**53 + 50
    assert float(2**53 + 1) == float(2**53)  # the naive answer goes through float64
    assert groups(weight("a", table), weight("b", other), weight("c", table)) == [{"a", "c"}]


def test_equal_bytes_under_another_dtype_are_not_equal() -> None:
    table = random((8, 8))
    assert groups(weight("a", table), weight("b", table.view(np.int32))) == []


def test_equal_bytes_under_another_shape_are_not_equal() -> None:
    table = random((6, 4))
    assert groups(weight("a", table), weight("b", table.reshape(4, 6)), weight("c", table.reshape(24))) == []


def test_zero_size_tensors_are_never_tied() -> None:
    empty = np.zeros((0, 8), np.float32)
    assert groups(weight("a", empty), weight("b", empty)) == []


def test_scalars_are_constants_not_ties() -> None:
    found = find(model(weight("a", np.float32(2).reshape(())), weight("b", np.float32(2).reshape(()))))
    assert found.ties == ()
    assert found.constants == {"a", "b"}
    assert found.constant_classes == (("a", "b"),)


def test_equal_constants_are_reported_apart_from_ties() -> None:
    ones = np.ones((64, 64), np.float32)
    found = find(model(weight("a", ones), weight("b", ones), weight("c", ones * 2)))
    assert found.ties == ()
    assert found.constants == {"a", "b", "c"}
    assert found.constant_classes == (("a", "b"),)


def test_one_different_element_at_the_very_end_makes_a_tensor_no_constant() -> None:
    ones = np.ones(3_000_000, np.float32)
    ones[-1] = 2
    assert constant_value(weight("a", ones), head(weight("a", ones))) is None


def test_a_symmetric_matrix_is_no_tie_with_itself_and_its_copy_is_equal_not_transposed() -> None:
    half = random((12, 12))
    symmetric = half + half.T
    assert groups(weight("a", symmetric)) == []
    (tie,) = measured(weight("a", symmetric), weight("b", symmetric))
    assert tie.members == (Member("a"), Member("b"))


def test_square_matrices_that_agree_only_on_the_diagonal_are_different() -> None:
    one, other = random((50, 50), 1), random((50, 50), 2)
    np.fill_diagonal(other, np.diag(one))
    assert groups(weight("a", one), weight("b", other)) == []


def test_strings_are_compared_by_their_items() -> None:
    def text(name: str, *items: bytes) -> Weight:
        data = b"".join(len(item).to_bytes(8, "little") + item for item in items)
        return Weight(name, name, (len(items),), "string", MemoryStorage(data, name))

    found = groups(text("a", b"ab", b"c"), text("b", b"a", b"bc"), text("c", b"ab", b"c"))
    assert found == [{"a", "c"}]  # a and b join to the same letters: the naive answer


def test_packed_four_bit_tensors_are_constant_by_value_and_equal_by_bytes() -> None:
    def packed(name: str, data: bytes) -> Weight:
        return Weight(name, name, (2 * len(data) - 1,), "int4", MemoryStorage(data, name))

    assert constant_value(packed("a", b"\x33\x03"), b"\x33\x03") is not None
    assert constant_value(packed("a", b"\x33\x02"), b"\x33\x02") is None
    assert groups(packed("a", b"\x12\x03"), packed("b", b"\x12\x03"), packed("c", b"\x13\x03")) == [{"a", "b"}]


def test_a_sparse_tensor_is_never_equal_to_a_dense_one() -> None:
    from dataclasses import replace

    dense = weight("a", random((8, 8)))
    sparse = replace(weight("b", random((8, 8))), held_as="sparse_initializer")
    assert groups(dense, sparse) == []


# --- laws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_classes_are_those_of_a_brute_force_comparison(data: st.DataObject) -> None:
    """Few distinct small matrices, drawn often: every answer is compared with all pairs, in any order."""
    shapes = st.sampled_from([(2, 3), (3, 2), (3, 3), (6,)])
    values = st.integers(0, 2)
    weights = []
    for index in range(data.draw(st.integers(2, 8))):
        shape = data.draw(shapes)
        array = np.array(data.draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
        weights.append(weight(f"w{index}", array.astype(np.float32).reshape(shape)))
    arrays = {w.id: np.frombuffer(w.storage.data, np.float32).reshape(w.shape) for w in weights}  # type: ignore[union-attr]
    expected: list[set[str]] = []
    for id, array in arrays.items():
        if len(np.unique(array)) == 1:
            continue
        home = next((g for g in expected if any(_one(array, arrays[other]) for other in g)), None)
        if home is None:
            expected.append({id})
        else:
            home.add(id)
    expected = _closure(expected, arrays)
    assert sorted(map(sorted, groups(*weights))) == sorted(sorted(g) for g in expected if len(g) > 1)


def _one(a: np.ndarray, b: np.ndarray) -> bool:
    return (
        a.tobytes() == b.tobytes()
        and a.shape == b.shape
        or (a.ndim == 2 and a.T.shape == b.shape and np.ascontiguousarray(a.T).tobytes() == b.tobytes())
    )


def _closure(found: list[set[str]], arrays: dict[str, np.ndarray]) -> list[set[str]]:
    for first in found:
        for second in found:
            if first is not second and any(_one(arrays[a], arrays[b]) for a in first for b in second):
                return _closure([first | second, *(g for g in found if g not in (first, second))], arrays)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.permutations(range(5)))
def test_one_changed_bit_anywhere_is_not_found(seed: int, transpose: bool, order: list[int]) -> None:
    table = random((37, 11), seed)
    changed = table.copy()
    flat = changed.reshape(-1).view(np.uint32)
    flat[seed % flat.size] ^= 1
    other = changed.T if transpose else changed
    weights = [weight("a", table), weight("b", other), weight("c", random((37, 11), -seed % 7 + 20_000))]
    weights += [weight("d", table), weight("e", random((11, 37), seed + 1))]
    assert groups(*(weights[i] for i in order)) == [{"a", "d"}]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12), st.integers(0, 12)), max_size=9))
def test_overlaps_are_those_of_the_quadratic_oracle(spans: list[tuple[str, int, int]]) -> None:
    regions = [(where, min(b, e), max(b, e)) for where, b, e in spans]
    touching = [
        {i, j}
        for i, (c, b, e) in enumerate(regions)
        for j, (c2, b2, e2) in enumerate(regions)
        if i < j and c == c2 and max(b, b2) < min(e, e2)
    ]
    expected: list[set[int]] = []
    for pair in touching:
        joined = [g for g in expected if g & pair]
        expected = [g for g in expected if not g & pair] + [pair.union(*joined)]
    assert sorted(map(sorted, overlapping(regions))) == sorted(map(sorted, expected))


def test_a_region_inside_another_does_not_hide_a_later_one() -> None:
    # whole = (0,100), head = (10,20), tail = (50,60): keeping the last end instead of the largest loses the tail
    assert overlapping([("f", 0, 100), ("f", 10, 20), ("f", 50, 60)]) == [[0, 1, 2]]


# --- regions ----------------------------------------------------------------------------------------------------------


def _file(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "data"
    path.write_bytes(data)
    return str(path)


def test_two_names_of_one_region_are_aliased_and_waste_nothing(tmp_path: Path) -> None:
    path = _file(tmp_path, random((10, 4)).tobytes() * 2)
    one = Weight("a", "a", (10, 4), "float32", FileStorage(path, 0, 160), parameter=True)
    two = Weight("b", "b", (10, 4), "float32", FileStorage(path, 0, 160), parameter=True)
    flat = Weight("c", "c", (40,), "float32", FileStorage(path, 0, 160), parameter=True)
    copy = Weight("d", "d", (10, 4), "float32", FileStorage(path, 160, 160), parameter=True)
    ties = {tie.origin: tie for tie in find(model(one, two, flat, copy)).ties}
    assert ties["aliased"].members == (Member("a"), Member("b"), Member("c", View((Reshape((40,)),))))
    assert set(ties["measured"].ids) == {"a", "b", "d"}
    assert ties["measured"].n_bytes_saved == 160  # one copy more, not two


def test_overlapping_but_different_regions_are_no_tie(tmp_path: Path) -> None:
    path = _file(tmp_path, random((12,)).tobytes())
    halves = [Weight(n, n, (8,), "float32", FileStorage(path, o, 32), parameter=True) for n, o in (("a", 0), ("b", 16))]
    assert find(model(*halves)).ties == ()


def test_a_weight_that_cannot_be_read_is_said_to_be_unreadable(tmp_path: Path) -> None:
    path = _file(tmp_path, bytes(10))
    lost = Weight("a", "a", (10, 4), "float32", FileStorage(path, 0, 160), parameter=True)
    found = find(model(lost, weight("b", random((10, 4)))))
    assert "truncated" in found.unreadable["a"]
    assert found.ties == ()


def test_equal_tensors_with_a_hostile_common_beginning_are_told_apart() -> None:
    # equal length and equal first 32 kB, different tails: a fingerprint of the head would merge them
    head = random((8192,))
    one, other = np.append(head, np.float32(1)), np.append(head, np.float32(2))
    assert groups(weight("a", one), weight("b", other), weight("c", one)) == [{"a", "c"}]


def test_same_through_refuses_what_cannot_be_the_same() -> None:
    table = random((4, 6))
    assert not same_through(weight("a", table), weight("b", table), TRANSPOSED)
    assert same_through(weight("a", table), weight("b", table.T), TRANSPOSED)
    assert same_through(weight("a", table), weight("b", table), AS_STORED)
