"""Merged values are computed block by block and agree with numpy on the whole tensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieaudit.errors import RewriteRefused
from tieaudit.merge import Common, MergedStorage, aligned, common_value, difference
from tieaudit.merges import Sites
from tieaudit.merges.mean import mean
from tieaudit.model import Member, Weight
from tieaudit.storage import MemoryStorage
from tieaudit.view import AS_STORED, TRANSPOSED


def weight(name: str, array: np.ndarray) -> Weight:
    return Weight(name, name, array.shape, array.dtype.name, MemoryStorage(np.ascontiguousarray(array).tobytes(), name))


def random(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_the_mean_of_a_table_and_a_transposed_head_is_numpys_rounded_once(dtype: str) -> None:
    one, other = random((700, 33), 1, dtype), random((33, 700), 2, dtype)
    pairs = [(weight("e", one), Member("e")), (weight("h", other), Member("h", TRANSPOSED))]
    common = common_value(pairs, {}, "mean")
    values = common.values
    assert common.kept is None and values is not None
    # rounded once from float64: rounding each halved operand first would differ in the last place
    expected = ((one.astype(np.float64) + other.T.astype(np.float64)) / 2).astype(one.dtype)
    assert values.read_ranges([(0, values.n_bytes)])[0] == expected.tobytes()


@given(st.integers(0, 5 * 7 * 4), st.integers(0, 5 * 7 * 4))
def test_any_range_of_a_merged_tensor_is_that_range_of_the_whole(begin: int, length: int) -> None:
    members = tuple(aligned(weight("w", random((5, 7), seed)), AS_STORED, (5, 7)) for seed in (1, 2))
    rows = mean.merge(Sites(("a", "b"), members, ("", ""), (None, None)), "").rows
    merged = MergedStorage(rows, members[0], "mean")
    whole = merged.read_ranges([(0, merged.n_bytes)])[0]
    length = min(length, merged.n_bytes - begin)
    assert merged.read_ranges([(begin, length)])[0] == whole[begin : begin + length]


def test_the_difference_of_independent_tables_is_said_to_be_that_of_strangers() -> None:
    one, other = random((400, 20), 1), random((400, 20), 2)
    sentence = difference(
        aligned(weight("a", one), AS_STORED, one.shape), aligned(weight("b", other), AS_STORED, one.shape)
    )
    # ‖A−B‖/‖A‖ of two independent tables of equal norm is √2 = 1.41
    assert "8,000 of 8,000 values differ" in sentence
    assert "relative distance 1.4" in sentence
    assert "no more alike than independent tables" in sentence


def test_one_changed_value_and_one_changed_sign_of_zero_are_both_counted() -> None:
    one = random((10, 4), 1)
    one[0, 0] = 0.0
    other = one.copy()
    other[0, 0], other[5, 2] = -0.0, other[5, 2] + 1
    sentence = difference(
        aligned(weight("a", one), AS_STORED, one.shape), aligned(weight("b", other), AS_STORED, one.shape)
    )
    assert sentence.startswith("2 of 40 values differ, by 1 at most")


def test_keeping_the_head_needs_a_head() -> None:
    pairs = [(weight("a", random((4, 3), 1)), Member("a")), (weight("b", random((4, 3), 2)), Member("b"))]
    assert common_value(pairs, {"b": "output_head"}, "keep:head") == Common("b", None, {})
    with pytest.raises(RewriteRefused, match="none of a, b is a output_head"):
        common_value(pairs, {}, "keep:head")


def test_integers_are_not_averaged() -> None:
    with pytest.raises(RewriteRefused, match="expected a floating-point tensor"):
        aligned(weight("a", np.arange(6).reshape(2, 3)), AS_STORED, (2, 3))


@pytest.mark.parametrize(("dtype", "size", "limit"), [("float16", 6e4, "float16"), ("bfloat16", 3e38, "bfloat16")])
def test_finite_members_whose_common_value_does_not_fit_are_refused_and_not_delivered_as_infinite(
    dtype: str, size: float, limit: str
) -> None:
    small = np.zeros((8, 8))
    small[0, 0] = size
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    pairs = [(weight(name, one.astype(kind)), Member(name)) for name, one in
             (("a", small), ("b", np.full((8, 8), size)), ("c", np.full((8, 8), size)))]  # fmt: skip
    # lengths 1 : 8 : 8 of one size: s·Σ Wᵢ/‖Wᵢ‖ is nowhere more than (1 + 2/8)·s, and s is 4 sizes at [0, 0]
    with pytest.raises(
        RewriteRefused, match=rf"a, b and c: expected values that {limit} can hold, found .* at \[0, 0\]"
    ):
        common_value(pairs, {}, "norm-matched")
    assert common_value(pairs, {}, "keep:a").kept == "a"


@pytest.mark.parametrize("text", ["mean", "scaled"])
@pytest.mark.parametrize("turned", [False, True], ids=["as stored", "transposed"])
def test_a_number_that_is_none_in_one_member_does_not_spread_into_the_other(text: str, turned: bool) -> None:
    one, other = random((70, 9), 1), random((70, 9), 2)
    other[33, 4] = np.nan
    stored = np.ascontiguousarray(other.T) if turned else other
    pairs = [(weight("e", one), Member("e")), (weight("h", stored), Member("h", TRANSPOSED if turned else AS_STORED))]
    roles = {"e": "token_embedding", "h": "output_head"}
    with pytest.raises(RewriteRefused, match=r"h: expected finite numbers, found inf or NaN at \[33, 4\]"):
        common_value(pairs, roles, text)
    assert common_value(pairs, roles, "keep:e").kept == "e"
    assert common_value(pairs, roles, "keep:h").kept == "h"
