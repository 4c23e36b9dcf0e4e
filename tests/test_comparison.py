"""The table of schemes and policies: savings in closed form, damage as measured on whole tensors, and the front."""

from __future__ import annotations

import numpy as np
import pytest

from tieaudit.comparison import Choice, compare, frontier
from tieaudit.merges import Statistics
from tieaudit.model import Model, Part, Role, Weight
from tieaudit.storage import MemoryStorage
from tieaudit.verdict import Found, Subject

V, D, L = 200, 16, 4


def subject(n_rows: int = V, *, equal: bool = False) -> Subject:
    """An embedding and a head, and four layers of one matrix each."""
    rng = np.random.default_rng(0)
    arrays = {"embed": rng.standard_normal((n_rows, D)), "head": 2 * rng.standard_normal((n_rows, D))}
    if equal:
        arrays["head"] = arrays["embed"]
    arrays |= {f"layers.{layer}.up": rng.standard_normal((D, 4 * D)) for layer in range(L)}
    weights, roles = [], {}
    for name, array in arrays.items():
        data = array.astype(np.float32).tobytes()
        weights.append(Weight(name, name, array.shape, "float32", MemoryStorage(data, name)))
        layer = int(name.split(".")[1]) if "." in name else None
        kind = {"embed": "token_embedding", "head": "output_head"}.get(name, "ffn_up")
        roles[name] = Role(kind, "by hand", layer)
    model = Model(path="m", format="onnx", parts=(Part("", ("m",)),), weights=tuple(weights))
    return Subject(model, Found(()), roles)


def by_name(choices: tuple[Choice, ...]) -> dict[tuple[str, str], Choice]:
    return {(one.scheme, one.policy): one for one in choices}


def test_savings_are_the_closed_forms_and_corrections_are_taken_off() -> None:
    found = by_name(compare(subject()))
    assert found["io", "keep:head"].n_parameters_saved == V * D
    assert found["io", "keep:head"].n_bytes_saved == 4 * V * D
    assert found["io", "low-rank:8"].n_parameters_saved == V * D - 8 * (V + D)
    assert found["io", "linear"].n_parameters_saved == V * D - D * D
    assert found["io", "scaled"].n_parameters_saved == V * D - D
    up = 4 * D * D
    assert found["albert", "mean"].n_parameters_saved == (L - 1) * up
    assert found["cycle:2", "mean"].n_parameters_saved == (L - 2) * up
    assert found["ffn", "mean"].n_classes == 1


def test_damage_is_the_share_of_the_energy_that_changes() -> None:
    one = subject()
    found = by_name(compare(one))
    held = {w.id: np.frombuffer(w.storage.read_ranges([(0, w.n_bytes)])[0], np.float32) for w in one.model.weights}
    e, u = (held[name].astype(np.float64) for name in ("embed", "head"))
    energy = (e @ e) + (u @ u)
    assert found["io", "keep:head"].changed == pytest.approx(np.square(u - e).sum() / energy)
    mean = (e + u) / 2
    expected = (np.square(mean - e).sum() + np.square(mean - u).sum()) / energy
    assert found["io", "mean"].changed == pytest.approx(expected)
    assert found["io", "low-rank:8"].changed < found["io", "keep:head"].changed


def test_policies_that_need_calibration_are_compared_where_there_is_some() -> None:
    rng = np.random.default_rng(1)
    root = rng.standard_normal((D, D))
    lookup = Statistics(1000, row_weights=rng.dirichlet(np.ones(V)), gradients=root @ root.T)
    head = Statistics(1000, row_weights=rng.dirichlet(np.ones(V)), inputs=np.eye(D))
    assert ("io", "gauss-newton") not in by_name(compare(subject()))
    found = by_name(compare(subject(), statistics={"embed": lookup, "head": head}))
    best, mean = found["io", "gauss-newton"].nats, found["io", "mean"].nats
    assert best is not None and mean is not None and best < mean
    assert found["albert", "mean"].nats is None  # its sites were not calibrated


def test_a_sample_of_a_large_table_is_said_to_be_one_and_agrees_with_the_whole() -> None:
    large = subject(70_000)
    sampled, whole = by_name(compare(large)), by_name(compare(large, deep=True))
    for key in (("io", "keep:head"), ("io", "mean"), ("io", "low-rank:8")):
        assert (sampled[key].exact, whole[key].exact) == (False, True)
        assert sampled[key].n_bytes_saved == whole[key].n_bytes_saved
        assert sampled[key].changed == pytest.approx(whole[key].changed, rel=0.02)


def test_what_is_lossless_needs_no_policy() -> None:
    equal = subject(equal=True)
    from tieaudit.find import find

    found = compare(Subject(equal.model, find(equal.model), equal.roles))
    io = [one for one in found if one.scheme in ("io", "dedup")]
    assert {(one.scheme, one.policy, one.changed) for one in io} == {("io", "", 0.0), ("dedup", "", 0.0)}


def test_the_front_holds_what_nothing_beats_in_both_size_and_damage() -> None:
    choices = compare(subject())
    front = frontier(choices)
    for one in front:
        assert not any(other.n_bytes_saved >= one.n_bytes_saved and other.damage < one.damage for other in choices), one
    assert [one.n_bytes_saved for one in front] == sorted({one.n_bytes_saved for one in front})
    assert len(front) > 2
