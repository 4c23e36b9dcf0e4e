"""The table of schemes and policies: savings in closed form, damage as measured on whole tensors, and the front."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tieaudit import outcome
from tieaudit.cli import main
from tieaudit.comparison import Choice, compare, frontier
from tieaudit.drawing import draw
from tieaudit.merges import Calibrated, Statistics
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
    found = by_name(compare(subject(), calibrated=Calibrated({"embed": lookup, "head": head})))
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


def plan_of(*words: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, words)])


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lookup and a head of its own, as ONNX."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    tables = {"embed": rng.standard_normal((300, 16)), "head": rng.standard_normal((16, 300))}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embed", "ids"], ["h"]),
            helper.make_node("MatMul", ["h", "head"], ["logits"]),
        ],
        "lm",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 300])],
        [numpy_helper.from_array(table.astype(np.float32), name) for name, table in tables.items()],
    )
    path = tmp_path_factory.mktemp("untied") / "lm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_plan_without_a_scheme_shows_what_could_be_shared_and_at_what_damage(untied: Path) -> None:
    said = plan_of(untied)
    assert said.exit_code == 0
    rows = [line.split() for line in said.output.splitlines() if line.startswith("  io ")]
    assert ["io", "keep:head", "-4,800", "19.2", "kB"] in [row[:5] for row in rows]
    assert ["io", "low-rank:8", "-2,272", "9.1", "kB"] in [row[:5] for row in rows]  # 8·(300 + 16) = 2,528 less
    front = plan_of(untied, "--frontier")
    assert "keep:embedding" not in front.output
    assert len(front.output.splitlines()) < len(said.output.splitlines())
    told = json.loads(plan_of(untied, "--format", "json").output)
    assert {one["policy"] for one in told["choices"]} >= {"keep:head", "mean", "low-rank:8"}


def test_the_command_that_a_plan_prints_does_what_the_plan_shows(untied: Path, tmp_path: Path) -> None:
    words = ("--scheme", "io", "--allow-lossy", "--merge", "keep:embedding", "--transposed-as", "gather")
    line = next(line for line in plan_of(untied, *words).output.splitlines() if line.startswith("write it with: "))
    command = line.removeprefix("write it with: tieaudit ").replace("OUT", str(tmp_path / "tied.onnx"))
    told = json.loads(CliRunner().invoke(main, [*command.split(), "--format", "json"]).output)
    (share,) = told["plan"]["edits"]
    assert told["plan"]["merge"] == "keep:embedding" and share["members"][0]["id"] == "embed"  # keep:head is the usual
    assert told["plan"]["transposed_as"] == "gather"


def test_a_refusal_says_what_to_do_about_it(untied: Path) -> None:
    said = plan_of(untied, "--scheme", "io", "--allow-lossy", "--merge", "regmean")
    assert said.exit_code == 2 and "found none of embed, head; give --calibrate DATA.npz or a text" in said.output
    said = plan_of(untied, "--scheme", "io", "--allow-lossy", "--merge", "keep")
    assert said.exit_code == 2 and "--merge keep: expected a member behind a colon, found none" in said.output
    said = plan_of(untied, "--scheme", "io", "--allow-lossy", "--merge", "keep:haed")
    assert said.exit_code == 2 and "did you mean head?; keep:head, keep:embedding, keep:first" in said.output


def test_shares_of_energy_are_not_drawn_on_an_axis_of_nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn: list[list[float]] = []
    monkeypatch.setattr(Axes, "scatter", lambda self, x, y, **given: drawn.append(list(y)))
    nats = Choice("io", "mean", 1, 10, 0.5, 0.02, 1, True)
    measured = Choice("albert", "mean", 2, 30, 0.9, None, 1, True, measured=0.07)
    share = Choice("ffn", "mean", 2, 20, 0.8, None, 1, True)
    every = (nats, measured, share)
    draw(every, frontier(every), tmp_path / "front.svg")
    assert drawn == [[0.02, 0.07]]


def test_the_table_is_not_shown_for_a_scheme_that_was_asked_for(untied: Path) -> None:
    assert "what could be shared" not in plan_of(untied, "--scheme", "io").output
    refused = plan_of(untied, "--scheme", "io", "--frontier")
    assert refused.exit_code == 2 and "without --scheme" in refused.output


def test_a_picture_is_drawn_where_nothing_is_yet(untied: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("front.svg", "front.png"):
        assert plan_of(untied, "--plot", tmp_path / name).exit_code == 0
        assert (tmp_path / name).stat().st_size > 1000
    assert "low-rank:8" in (tmp_path / "front.svg").read_text() or "io" in (tmp_path / "front.svg").read_text()
    again = plan_of(untied, "--plot", tmp_path / "front.svg")
    assert again.exit_code == 2 and "exists already" in again.output
    wrong = plan_of(untied, "--plot", tmp_path / "front.pdf")
    assert wrong.exit_code == 2 and ".png or .svg" in wrong.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.png", "front.svg"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_scheme_with_a_number_that_is_none_is_left_out_by_name_and_the_others_are_compared(
    bad: float, tmp_path: Path
) -> None:
    one = subject()
    head = one.model.by_id["head"]
    assert head.storage is not None
    values = np.frombuffer(head.storage.read_ranges([(0, head.n_bytes)])[0], np.float32).reshape(V, D).copy()
    values[3, 4] = bad
    weights = tuple(
        replace(w, storage=MemoryStorage(values.tobytes(), "head")) if w.id == "head" else w for w in one.model.weights
    )
    broken = Subject(replace(one.model, weights=weights), Found(()), one.roles)
    found = compare(broken)
    refused = [choice for choice in found if choice.refused]
    assert {choice.scheme for choice in refused} == {"io"}
    assert "head: expected finite numbers, found inf or NaN at [3, 4]" in refused[0].refused
    assert not any(choice.scheme == "io" and not choice.refused for choice in found)
    assert by_name(found)["albert", "mean"] == by_name(compare(one))["albert", "mean"]
    assert all(not choice.refused and np.isfinite(choice.damage) for choice in frontier(found))
    assert "left out: io, every policy: head: expected finite numbers" in "\n".join(outcome._table(found))
