"""The commands on every fixture, against the truth beside it: scan tells it, apply keeps its promise, verify holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tieaudit.cli import main

Truths = dict[str, dict[str, Any]]

ONNX = tuple(
    f"{name}/{variant}.onnx"
    for name in "albert_shared bart_seq2seq bert_encoder gpt_decoder gru_seq2seq lstm_lm tied_autoencoder".split()
    for variant in ("tied", "lost", "untied")
)
OTHER = (
    "sentiment/untied.onnx",
    "gpt_decoder/foldable.onnx",
    "gpt_decoder/lost_external/model.onnx",
    "gpt_decoder/one_range/model.onnx",
    "bart_seq2seq/parts_lost",
    "bart_seq2seq/parts_untied",
)
FOLDERS = tuple(
    f"{name}/hf_{variant}"
    for name in ("albert_shared", "bart_seq2seq", "bert_encoder", "gpt_decoder")
    for variant in ("tied", "lost", "untied")
)
LOST = tuple(name for name in (*ONNX, *OTHER, *FOLDERS) if "lost" in name)


def tieaudit(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def scanned(path: Path) -> dict[str, Any]:
    """The one model of a scan in JSON."""
    result = tieaudit("scan", path, "--format", "json")
    assert result.exit_code == 0, result.output
    models = json.loads(result.stdout)["models"]
    assert len(models) == 1, [model["path"] for model in models]
    assert models[0]["crashed"] == []
    return dict(models[0])


def tie(members: list[dict[str, str]]) -> frozenset[tuple[str, bool]]:
    """Members with whether each is transposed against the one whose id comes first in the alphabet."""
    views = {member["id"]: member["view"] == "transposed" for member in members}
    return frozenset((id, view != views[min(views)]) for id, view in views.items())


def ties(groups: list[dict[str, Any]], origin: str) -> set[frozenset[tuple[str, bool]]]:
    """The groups of one origin that join different names."""
    found = {tie(group["members"]) for group in groups if group["origin"] == origin}
    return {members for members in found if len(members) > 1}


def test_the_lists_above_name_every_fixture(truths: Truths) -> None:
    assert sorted(truths) == sorted((*ONNX, *OTHER, *FOLDERS))


@pytest.mark.parametrize("name", [*ONNX, *OTHER, *FOLDERS])
def test_scan_tells_the_truth(fixtures_dir: Path, truths: Truths, name: str) -> None:
    if name in FOLDERS:
        pytest.importorskip("transformers")
    truth, model = truths[name], scanned(fixtures_dir / name)
    for origin in ("measured", "aliased", "absent"):
        assert ties(model["groups"], origin) == ties(truth["groups"], origin), origin
    for key in ("n_parameters", "n_parameters_named", "n_bytes_duplicate"):
        assert model["summary"][key] == truth[key], key
    if "shared" in truth:  # ONNX: one stored tensor that serves several operations
        served = [{m["id"] for m in group["members"]} for group in model["groups"] if group["origin"] == "aliased"]
        assert sorted(id for ids in served if len(ids) == 1 for id in ids) == truth["shared"]
        assert model["summary"]["n_weights"] == truth["n_weights"]
        assert {w["id"] for w in model["weights"] if w["constant"]} >= set(truth["constants"])


@pytest.mark.parametrize("name", [name for name in ONNX if "untied" in name])
def test_scan_of_an_untied_language_model_proposes_the_tie_that_could_be(fixtures_dir: Path, name: str) -> None:
    proposed = [candidate["scheme"] for candidate in scanned(fixtures_dir / name)["candidates"]]
    assert ("io" in proposed) == ("autoencoder" not in name)


@pytest.mark.parametrize("name", LOST)
def test_apply_frees_what_it_promised_and_proves_the_rest_unchanged(
    fixtures_dir: Path, truths: Truths, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("onnxruntime")
    if name in FOLDERS:
        pytest.importorskip("transformers")
    before, after, truth = fixtures_dir / name, tmp_path / Path(name).name, truths[name]
    result = tieaudit("apply", before, "--scheme", "dedup", "--to", after, "--format", "json")
    assert result.exit_code == 0, result.output
    applied = json.loads(result.stdout)
    held = {level["name"] for level in applied["proof"]["levels"] if level["outcome"] == "held"}
    assert {"structural", "end to end"} <= held
    promised = applied["plan"]["n_bytes_saved"]
    assert promised >= sum(group["n_bytes_saved"] for group in truth["groups"] if group["parameter"]) > 0
    old, new = (scanned(path)["summary"] for path in (before, after))
    n_parts = len(list(before.glob("*.onnx"))) if before.is_dir() else 1
    # A head that reads the table needs shape constants of its own: two vectors and a scalar of int64, 24 bytes or so.
    assert abs(old["n_bytes"] - new["n_bytes"] - promised) <= 64 * n_parts
    assert new["n_bytes_duplicate"] <= old["n_bytes_duplicate"] - promised + 64 * n_parts
    assert new["n_parameters"] == truth["n_parameters"]


@pytest.mark.parametrize("name", ["albert_shared/lost.onnx", "bart_seq2seq/parts_lost", "gpt_decoder/hf_lost"])
def test_verify_finds_what_apply_wrote_equal(
    fixtures_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("onnxruntime")
    if name in FOLDERS:
        pytest.importorskip("transformers")
    monkeypatch.chdir(fixtures_dir)  # paths as people type them: relative
    after = tmp_path / Path(name).name
    applied = tieaudit("apply", name, "--to", after)
    assert applied.exit_code == 0, applied.output
    verified = tieaudit("verify", name, after)
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("name", ["gpt_decoder/tied.onnx", "sentiment/untied.onnx", "gpt_decoder/hf_tied"])
def test_apply_has_nothing_to_do_where_nothing_is_stored_twice(fixtures_dir: Path, tmp_path: Path, name: str) -> None:
    result = tieaudit("apply", fixtures_dir / name, "--scheme", "dedup", "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()


def test_apply_mends_a_tie_that_the_runtime_would_fold_apart(fixtures_dir: Path, tmp_path: Path) -> None:
    import onnx

    after = tmp_path / "mended.onnx"
    result = tieaudit("apply", fixtures_dir / "gpt_decoder/foldable.onnx", "--scheme", "dedup", "--to", after)
    assert result.exit_code == 0, result.output
    model = onnx.load(after)
    assert [n.op_type for n in model.graph.node if "transformer.wte.weight" in n.input] != ["Gather", "Transpose"]
    assert "TIE301" not in {finding["code"] for finding in scanned(after)["findings"]}


def test_untied_weights_are_not_made_one_without_being_told(fixtures_dir: Path, tmp_path: Path) -> None:
    before = fixtures_dir / "gpt_decoder/untied.onnx"
    result = tieaudit("apply", before, "--scheme", "io", "--to", tmp_path / "out.onnx")
    assert result.exit_code == 2, result.output
    assert list(tmp_path.iterdir()) == []


def test_verify_notices_that_untied_is_another_model(fixtures_dir: Path) -> None:
    pytest.importorskip("onnxruntime")
    home = fixtures_dir / "gpt_decoder"
    assert tieaudit("verify", home / "tied.onnx", home / "untied.onnx").exit_code == 1


def test_the_input_is_only_read(fixtures_dir: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.onnx"
    shutil.copy(fixtures_dir / "gpt_decoder/lost.onnx", before)
    before.chmod(0o444)
    data, stamp = before.read_bytes(), before.stat().st_mtime_ns
    assert tieaudit("apply", before, "--to", tmp_path / "after.onnx").exit_code == 0
    assert (before.read_bytes(), before.stat().st_mtime_ns) == (data, stamp)
