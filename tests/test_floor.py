"""How differences are measured: the cases in which a naive comparison says *equal*."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from tieaudit import matching
from tieaudit.floor import difference, limit_of, rounding_bound, says_something, unstable_elements
from tieaudit.inputs import Feed
from tieaudit.runners import Port, Signature


def test_differences_are_relative_to_the_size_of_the_output_but_never_to_less_than_one() -> None:
    found = difference({"y": np.array([100.0, -100.0])}, {"y": np.array([101.0, -100.0])})
    assert (found.relative, found.absolute) == (pytest.approx(0.01), 1.0)  # rms 100
    found = difference({"y": np.array([1e-3, 0.0])}, {"y": np.array([0.0, 0.0])})
    assert found.relative == found.absolute == pytest.approx(1e-3)  # not 1.4, which rms 7e-4 would give


def test_nan_must_be_at_the_same_positions() -> None:
    nan = math.nan
    assert difference({"y": np.array([nan, 1.0])}, {"y": np.array([nan, 1.0])}).equal
    assert "NaN" in difference({"y": np.array([nan, 1.0])}, {"y": np.array([1.0, nan])}).problem
    assert (
        "NaN" in difference({"y": np.array([1.0])}, {"y": np.array([nan])}).problem
    )  # max(|a−b|) > x is False for NaN


def test_infinities_must_agree_in_place_and_sign() -> None:
    inf = math.inf
    assert difference({"y": np.array([inf, 1.0])}, {"y": np.array([inf, 1.0])}).equal
    assert difference({"y": np.array([inf])}, {"y": np.array([-inf])}).problem


def test_integers_and_booleans_are_exact_even_beyond_two_to_the_53() -> None:
    one, other = np.array([2**60]), np.array([2**60 + 1])  # equal once converted to float64
    assert "1 of 1 int64 elements differ" in difference({"y": one}, {"y": other}).problem
    assert difference({"y": np.array([True])}, {"y": np.array([False])}).problem


def test_integers_that_the_original_does_not_reproduce_do_not_count() -> None:
    usual, variant = {"y": np.array([1, 2, 3])}, {"y": np.array([1, 9, 3])}
    mask = unstable_elements(usual, [variant])
    assert mask["y"].tolist() == [False, True, False]
    assert not difference(usual, {"y": np.array([1, 5, 3])}, mask).problem
    assert difference(usual, {"y": np.array([7, 2, 3])}, mask).problem


def test_shapes_and_names_must_agree() -> None:
    assert difference({"y": np.zeros(2)}, {"y": np.zeros((2, 1))}).problem
    assert difference({"y": np.zeros(2)}, {"z": np.zeros(2)}).problem


def test_outputs_that_cannot_disagree_prove_nothing() -> None:
    assert not says_something({"y": np.full(4, np.nan)})
    assert not says_something({"y": np.zeros(4)})
    assert not says_something({"y": np.zeros((0, 3))})
    assert says_something({"y": np.array([0.0, 1.0])})
    assert says_something({"n": np.full(4, np.nan), "y": np.array([0.0, 1.0], ml_dtypes.bfloat16)})


def test_the_bound_grows_with_the_root_of_the_sum_and_with_the_coarseness_of_the_type() -> None:
    outputs = {"y": np.ones(4, np.float32)}
    assert rounding_bound(outputs, 400) == pytest.approx(2 * rounding_bound(outputs, 100))
    assert rounding_bound(outputs, 512) == pytest.approx(8 * 2**-23 * 512**0.5)  # 2.2e-5; measured 1.7e-6
    assert rounding_bound({"y": np.ones(4, np.float16)}, 1) > 2**-10
    assert limit_of(1e-3, 1e-6) == 2e-3
    assert rounding_bound({"y": np.arange(3)}, 512) == 0.0


def test_outputs_are_paired_by_name_or_by_order_and_shape() -> None:
    a, b = {"logits": np.zeros((2, 3)), "h": np.zeros(2)}, {"out": np.zeros(2), "scores": np.zeros((2, 3))}
    assert list(matching.outputs(a, b).before) == ["logits / scores", "h / out"]
    named = matching.outputs(a, {"logits": np.zeros((2, 3)), "extra": np.zeros(2)})
    assert list(named.before) == ["logits"] and named.alone == ("h", "extra")
    assert not matching.outputs({"a": np.zeros(2)}, {"b": np.zeros(3)}).before


def test_an_input_without_a_neutral_value_is_not_made_up() -> None:
    source = Signature((Port("input_ids", "int64", ("b", "s")),), ())
    feed = Feed({"input_ids": np.ones((2, 3), np.int64)}, "x")
    more = Signature((*source.inputs, Port("attention_mask", "int32", ("b", "s"))), ())
    made = matching.feed_for(feed, source, more)
    assert not isinstance(made, str) and made.arrays["attention_mask"].tolist() == [[1, 1, 1]] * 2
    pictured = Signature((*source.inputs, Port("pixel_values", "float32", (1, 3, 8, 8))), ())
    assert matching.feed_for(feed, source, pictured) == (
        "the input pixel_values exists only on one side, and has no neutral value"
    )
