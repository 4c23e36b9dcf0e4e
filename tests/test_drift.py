"""Drift in numbers a person can use, against direct formulas."""

from __future__ import annotations

import numpy as np
import pytest

from tieaudit.drift import Drift, drift

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((4, 50, 100)).astype(np.float32)
MOVED = (SCORES + 0.1 * RNG.standard_normal(SCORES.shape)).astype(np.float32)


def softmax(values: np.ndarray) -> np.ndarray:
    held = np.exp(values.astype(np.float64))
    return held / held.sum(-1, keepdims=True)


def test_divergence_and_agreement_are_those_of_the_distributions() -> None:
    found = drift([SCORES], [MOVED], [True])
    p, q = softmax(SCORES).reshape(-1, 100), softmax(MOVED).reshape(-1, 100)
    kl = (p * np.log(p / q)).sum(1)
    assert (found.n_tokens, found.n_numbers) == (200, 20_000)
    assert found.kl_mean == pytest.approx(kl.mean())
    assert found.kl_max == pytest.approx(kl.max())
    assert found.kl_999 == pytest.approx(np.quantile(kl, 0.999, method="higher"))
    assert found.top1 == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert 0.8 < found.top1 < 1.0
    assert found.max_abs == pytest.approx(np.abs(MOVED.astype(np.float64) - SCORES).max())


def test_adding_one_number_to_all_scores_moves_no_prediction() -> None:
    found = drift([SCORES.astype(np.float64)], [SCORES.astype(np.float64) + 3.0], [True])
    assert found.max_abs == pytest.approx(3.0)
    assert found.kl_max == pytest.approx(0.0, abs=1e-12)
    assert found.top1 == 1.0


def test_masked_tokens_on_both_sides_are_no_difference_and_on_one_side_an_infinite_one() -> None:
    masked = SCORES.copy()
    masked[:, :, 0] = -np.inf
    same = drift([masked], [masked.copy()], [True])
    assert (same.max_abs, same.kl_max) == (0.0, 0.0)
    assert drift([SCORES], [masked], [True]).kl_max == np.inf
    broken = SCORES.copy()
    broken[0, 0, 0] = np.nan
    assert drift([SCORES], [broken], [True]).max_abs == np.inf
    assert drift([broken], [broken.copy()], [False]).max_abs == 0.0


def test_outputs_that_are_no_scores_are_measured_by_distance_alone() -> None:
    found = drift([SCORES], [MOVED], [False])
    assert (found.n_tokens, found.yardstick) == (0, "")
    assert drift([], [], []) == Drift(0.0, 0.0, 0)
    assert drift([np.zeros((0, 5), np.float32)], [np.zeros((0, 5), np.float32)], [True]).n_tokens == 0


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        (0.0, ""),
        (1e-6, "less than what Q8_0 costs"),
        (0.0003, "about what Q8_0 costs"),
        (0.006, "about what Q5_K_M costs"),
        (0.05, "about what Q3_K_M costs"),
        (0.08, "about what IQ3_M costs"),
        (1.7, "26 times what IQ3_M costs"),
    ],
)
def test_the_yardstick_is_one_that_people_know(kl: float, said: str) -> None:
    found = Drift(1.0, 1.0, 1, n_tokens=1, kl_mean=kl).yardstick
    assert found.startswith(said) and bool(found) == bool(said)
