"""Every merge policy against a brute-force oracle on whole tables."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.merge import policy_of
from tieaudit.merges import Block, Merge, Merged, Sites, Statistics
from tieaudit.registry import discover

V, D = 60, 8
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Whole:
    """A table in memory that is read in small blocks."""

    values: Array
    rows_per_block: int = 7

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def n_rows(self) -> int:
        return len(self.values)

    @property
    def n_columns(self) -> int:
        return int(self.values.shape[1])

    def rows(self, begin: int, end: int) -> Block:
        return self.values[begin:end]


def normal(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


E, U = normal(V, D, seed=1), 2.0 * normal(V, D, seed=2)


def sites(*tables: Array, statistics: tuple[Statistics | None, ...] = (), io: bool = True) -> Sites:
    kinds = ("token_embedding", "output_head") if io else ("ffn_up",) * len(tables)
    given = statistics or (None,) * len(tables)
    return Sites(tuple(f"w{i}" for i in range(len(tables))), tuple(Whole(one) for one in tables), kinds, given)


def merged(text: str, one: Sites) -> Merged:
    policy, argument = policy_of(text)
    # it travels to another process as it is
    found: Merged = pickle.loads(pickle.dumps(policy.merge(one, argument)))
    return found


def common(found: Merged) -> Array:
    """All rows, read in blocks that fit nothing else."""
    return np.concatenate([found.rows(begin, min(begin + 11, V)) for begin in range(0, V, 11)])


def seen(found: Merged, member: int) -> Array:
    rows = found.seen_by(member)
    return np.concatenate([rows(begin, min(begin + 11, V)) for begin in range(0, V, 11)])


def spd(seed: int, n: int = D) -> Array:
    root = normal(n, n, seed=seed)
    found: Array = root @ root.T + 0.1 * np.eye(n)
    return found


@pytest.mark.parametrize(
    ("text", "index"),
    [("keep:embedding", 0), ("keep:head", 1), ("keep:first", 0), ("keep:last", 1), ("keep:w1", 1)],
)
def test_keep_keeps_one_member_bit_for_bit(text: str, index: int) -> None:
    found = merged(text, sites(E, U))
    assert found.keeps == index
    assert (common(found) == (E, U)[index]).all()


@pytest.mark.parametrize("text", ["keep:head", "keep:embedding", "keep:w9", "keep"])
def test_keep_needs_the_member_it_names(text: str) -> None:
    with pytest.raises(RewriteRefused, match="none of w0, w1"):
        merged(text, sites(E, U, io=False))


def test_the_mean_of_three_is_numpys() -> None:
    third = normal(V, D, seed=3)
    assert np.allclose(common(merged("mean", sites(E, U, third, io=False))), (E + U + third) / 3)


def test_norm_matched_has_the_mean_direction_and_the_geometric_mean_of_the_lengths() -> None:
    found = common(merged("norm-matched", sites(E, U)))
    direction = E / np.linalg.norm(E) + U / np.linalg.norm(U)
    assert np.linalg.norm(found) == pytest.approx(np.sqrt(np.linalg.norm(E) * np.linalg.norm(U)))
    assert np.allclose(found / np.linalg.norm(found), direction / np.linalg.norm(direction))


def test_norm_matched_refuses_what_has_no_direction() -> None:
    for one, other in ((E, -E), (E, np.zeros_like(E)), (E, np.full_like(E, np.nan))):
        with pytest.raises(RewriteRefused, match="norm-matched"):
            merged("norm-matched", sites(one, other))


def test_frequency_gives_rows_that_the_lookup_never_reads_to_the_head() -> None:
    p = np.zeros(V)
    p[:10] = 0.1
    found = common(merged("frequency", sites(E, U, statistics=(Statistics(100, row_weights=p), None))))
    assert np.allclose(found[10:], U[10:], atol=1e-6)
    # 0.1 of the tokens against a row of a uniform head, 1/60: six to one
    assert np.allclose(found[:10], (6 * E[:10] + U[:10]) / 7)


def test_regmean_minimises_the_weighted_error_of_all_sites() -> None:
    moments = [spd(4), spd(5)]
    given = tuple(Statistics(100, inputs=one) for one in moments)
    found = common(merged("regmean", sites(E, U, statistics=given, io=False)))
    damped = [0.9 * one + 0.1 * np.diag(np.diag(one)) for one in moments]

    def error(w: Array) -> float:
        return float(sum(np.trace((w - t) @ c @ (w - t).T) for t, c in zip((E, U), damped, strict=True)))

    best = error(found)
    for seed in range(20):
        assert error(found + 1e-3 * normal(V, D, seed=seed)) > best
    assert error((E + U) / 2) > best * 1.01


def gauss_newton_oracle(p: Array, q: Array, s: Array, c: Array) -> Array:
    """Row by row, the normal equations as they stand."""
    rows = [np.linalg.solve(p[v] * s + q[v] * c, p[v] * s @ E[v] + q[v] * c @ U[v]) for v in range(V)]
    return np.array(rows)


def test_gauss_newton_solves_every_row_s_normal_equations() -> None:
    rng = np.random.default_rng(6)
    p, q, s, c = rng.uniform(0.1, 1, V), rng.uniform(0.1, 1, V), spd(7), spd(8)
    given = (Statistics(100, row_weights=p, gradients=s), Statistics(100, row_weights=q, inputs=c))
    found = common(merged("gauss-newton", sites(E, U, statistics=given)))

    def damped(one: Array) -> Array:
        held: Array = one + np.eye(D) * 1e-3 * np.trace(one) / D
        return held

    assert np.allclose(found, gauss_newton_oracle(p, q, damped(s), damped(c)))


def test_gauss_newton_without_gradients_takes_every_direction_of_the_lookup_alike() -> None:
    p, c = np.full(V, 1 / V), 3.0 * np.eye(D)
    given = (Statistics(100, row_weights=p), Statistics(100, inputs=c))
    # equal weights and equal curvature on both sides: the plain mean
    assert np.allclose(common(merged("gauss-newton", sites(E, U, statistics=given))), (E + U) / 2)


@pytest.mark.parametrize("text", ["gauss-newton", "regmean", "frequency"])
def test_policies_that_need_calibration_refuse_without_it(text: str) -> None:
    with pytest.raises(RewriteRefused, match="found none"):
        merged(text, sites(E, U))


def test_scaled_is_no_worse_than_any_other_table_and_scale() -> None:
    found = merged("scaled", sites(E, U))
    assert found.n_parameters_added == D

    def error(w: Array, g: Array) -> Array:
        off_e, off_u = np.square(w - E).sum(0), np.square(w * g - U).sum(0)
        total: Array = off_e / np.square(E).sum(0) + off_u / np.square(U).sum(0)
        return total

    w, g = common(found), found.corrections[1].right
    best = error(w, g)
    for seed in range(20):
        assert (error(w + 1e-2 * normal(V, D, seed=seed), g) > best).all()
        assert (error(w, g * np.exp(1e-1 * normal(D, seed=seed))) >= best - 1e-12).all()


def test_scaled_restores_a_head_that_is_the_embedding_with_scaled_columns() -> None:
    g = np.linspace(-2, 3, D) + 0.1
    found = merged("scaled", sites(E, E * g))
    assert np.allclose(seen(found, 0), E)
    assert np.allclose(seen(found, 1), E * g)


def test_linear_is_least_squares_weighted_by_the_tokens() -> None:
    p = np.random.default_rng(9).uniform(0, 1, V)
    root = np.sqrt(p)[:, None]
    found = merged("linear", sites(E, U, statistics=(Statistics(100, row_weights=p), None)))
    assert found.keeps == 1
    assert np.allclose(found.corrections[0].right, np.linalg.lstsq(root * U, root * E, rcond=None)[0], atol=1e-5)
    exact = merged("linear", sites(U @ spd(10), U))
    assert np.allclose(seen(exact, 0), U @ spd(10), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_low_rank_residual_is_the_truncated_svd_of_the_difference(rank: int) -> None:
    found = merged(f"low-rank:{rank}", sites(E, U))
    left, values, right = np.linalg.svd(E - U, full_matrices=False)
    expected = U + (left[:, :rank] * values[:rank]) @ right[:rank]
    assert np.allclose(seen(found, 0), expected)
    assert (seen(found, 1) == U).all()
    assert found.n_parameters_added == rank * (V + D)
    assert f"{np.square(values[:rank]).sum() / np.square(values).sum():.1%}" in found.because


def test_a_residual_that_saves_nothing_is_refused() -> None:
    # 60·8/(60 + 8) = 7.06: rank 8 would store more than the second table
    with pytest.raises(RewriteRefused, match="the largest that saves anything has rank 7"):
        merged("low-rank:8", sites(E, U))


@pytest.mark.parametrize("text", ["low-rank", "low-rank:0", "low-rank:x", "mean:3", "geometric"])
def test_a_policy_or_argument_that_is_none_is_one_clear_line(text: str) -> None:
    with pytest.raises(UsageError):
        merged(text, sites(E, U))


def test_equal_members_stay_what_they_are_under_every_policy() -> None:
    given = (
        Statistics(100, row_weights=np.full(V, 1 / V), inputs=spd(11), gradients=spd(12)),
        Statistics(100, row_weights=np.full(V, 1 / V), inputs=spd(11)),
    )
    arguments = {"keep": ":head", "low-rank": ":2"}
    for name, policy in discover("merges", Merge).items():
        found = merged(name + arguments.get(name, ""), sites(E, E, statistics=given))
        assert isinstance(policy, Merge)
        for member in (0, 1):
            assert np.allclose(seen(found, member), E, atol=1e-4), name


def calibrated(seed: int) -> tuple[Statistics, Statistics]:
    rng = np.random.default_rng(seed)
    lookup = Statistics(1000, row_weights=rng.dirichlet(np.full(V, 0.3)), gradients=spd(seed))
    head = Statistics(1000, row_weights=rng.dirichlet(np.ones(V)), inputs=spd(seed + 1))
    return lookup, head


def test_the_prediction_is_the_quadratic_form_row_by_row() -> None:
    lookup, head = calibrated(20)
    one = sites(E, U, statistics=(lookup, head))
    found = merged("mean", one)
    change = (U - E) / 2  # of the embedding; the head's is the opposite
    assert lookup.row_weights is not None and head.row_weights is not None
    expected = 0.5 * sum(lookup.row_weights[v] * change[v] @ lookup.gradients @ change[v] for v in range(V))
    expected += 0.5 * sum(head.row_weights[v] * change[v] @ head.inputs @ change[v] for v in range(V))
    assert one.predicted_nats(found) == pytest.approx(float(expected))
    assert sites(E, U).predicted_nats(found) is None


def test_gauss_newton_is_predicted_to_cost_least_of_all_that_add_nothing() -> None:
    one = sites(E, U, statistics=calibrated(30))
    rivals = ("keep:head", "keep:embedding", "mean", "frequency")
    costs = {text: one.predicted_nats(merged(text, one)) for text in rivals}
    best = one.predicted_nats(merged("gauss-newton", one))
    assert best is not None
    assert all(cost is not None and best < cost for cost in costs.values())
    found = merged("auto", one)
    assert found.because.startswith("gauss-newton is best (nats per token predicted: gauss-newton ")


def test_what_was_fitted_is_judged_by_other_tokens() -> None:
    fitted, other = calibrated(40), calibrated(50)
    one = sites(E, U, statistics=fitted)
    judged = Sites(one.ids, one.tables, one.kinds, fitted, other)
    found = merged("gauss-newton", one)
    assert judged.predicted_nats(found) == sites(E, U, statistics=other).predicted_nats(found)


def test_auto_keeps_the_head_where_nothing_was_measured_and_says_so() -> None:
    found = merged("auto", sites(E, U))
    assert found.keeps == 1
    assert found.because.startswith("without calibration the head is kept")
    layers = merged("auto", sites(E, U, io=False))
    assert "is best (of the worst site is changed" in layers.because


def test_relative_change_is_the_share_of_each_site_s_energy() -> None:
    one = sites(E, U)
    assert one.relative_change(merged("keep:head", one))[1] == 0.0
    expected = np.square(U - E).sum() / np.square(E).sum()
    assert one.relative_change(merged("keep:head", one))[0] == pytest.approx(float(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("text", ["linear", "low-rank:2", "scaled", "norm-matched"])
def test_a_number_that_is_none_is_refused_by_name_and_place_and_not_spread(text: str, bad: float) -> None:
    one = U.copy()
    one[13, 5] = bad
    with pytest.raises(RewriteRefused) as refused:
        merged(text, sites(E, one))
    assert text == "norm-matched" or "w1: expected finite numbers, found inf or NaN at [13, 5]" in str(refused.value)


@pytest.mark.parametrize("text", ["gauss-newton", "regmean"])
def test_calibration_that_overflowed_is_refused(text: str) -> None:
    broken = np.eye(D)
    broken[2, 2] = np.inf
    weights = np.full(V, 1.0 / V)
    given = (Statistics(9, weights, broken, np.eye(D)), Statistics(9, weights, broken))
    with pytest.raises(RewriteRefused, match="expected finite sums"):
        merged(text, sites(E, U, statistics=given, io=text == "gauss-newton"))


def test_auto_chooses_among_what_is_finite() -> None:
    one = E.copy()
    one[0, 0] = np.nan
    # every policy that mixes spreads the NaN of w0; keeping w0 keeps it: what is left is one of the kept tables
    assert merged("auto", sites(one, U)).keeps is not None


def test_regmean_gives_the_mean_to_inputs_that_no_site_ever_got() -> None:
    moments = []
    for seed, size in ((4, 1.0), (5, 30.0)):
        x = size * normal(500, D, seed=seed)
        x[:, 5] = 0.0
        moments.append(x.T @ x / 500)
    given = tuple(Statistics(500, inputs=one) for one in moments)
    found = common(merged("regmean", sites(E, U, statistics=given, io=False)))
    # the tempting pseudo-inverse makes this column 0, and damping each site by its own size makes it nearly U's
    assert np.allclose(found[:, 5], (E[:, 5] + U[:, 5]) / 2)
    seen = [c for c in range(D) if c != 5]
    exact = [0.9 * one + 0.1 * np.diag(np.diag(one)) for one in (m[np.ix_(seen, seen)] for m in moments)]
    plain = (E[:, seen] @ exact[0] + U[:, seen] @ exact[1]) @ np.linalg.inv(exact[0] + exact[1])
    assert np.allclose(found[:, seen], plain, atol=0.02)


def test_scaled_leaves_columns_of_zeros_unscaled() -> None:
    one, other = E.copy(), U.copy()
    one[:, 2], other[:, 3], one[:, 4], other[:, 4] = 0.0, 0.0, 0.0, 0.0
    found = merged("scaled", sites(one, other))
    # ‖u‖/‖e‖ of these columns is infinite, 0 and 0/0
    assert found.corrections[1].right[2:5].tolist() == [1.0, 1.0, 1.0]
    assert np.allclose(common(found)[:, 2:5], ((one + other) / 2)[:, 2:5])


@pytest.mark.parametrize("panel", [1, 50, 10**6])
def test_a_residual_of_a_matrix_wider_than_high_is_the_truncated_svd_in_bounded_memory(
    panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tieaudit.merges.low_rank._PANEL_NUMBERS", panel)
    one, other = normal(20, 150, seed=1), normal(20, 150, seed=2)
    other[7:] = one[7:]  # the difference has rank 7: of ten directions three are any
    for rank in (3, 10):
        found = merged(f"low-rank:{rank}", sites(one, other, io=False))
        left, values, right = np.linalg.svd(other - one, full_matrices=False)
        best = one + (left[:, :rank] * values[:rank]) @ right[:rank]
        seen = np.concatenate([found.seen_by(1)(begin, min(begin + 6, 20)) for begin in range(0, 20, 6)])
        assert np.allclose(seen, best)


def test_auto_works_out_no_correction_that_it_would_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    found = discover("merges", Merge)
    arguments = {"low-rank": ":2", "keep": ":head"}
    made = {name: merged(name + arguments.get(name, ""), sites(E, U)) for name in found if not found[name].needs}
    assert {name for name, one in made.items() if one.corrections} == {n for n, one in found.items() if one.corrects}

    def never(sites: Sites, argument: str) -> Merged:
        raise AssertionError("worked out, to be dropped")

    marked = {n: replace(one, merge=never) if one.corrects else one for n, one in found.items()}
    monkeypatch.setattr("tieaudit.merges.auto.discover", lambda *kind: marked)
    assert merged("auto", sites(E, U)).keeps == 1
