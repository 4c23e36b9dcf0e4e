"""Mending findings: the given ones and no others, safe fixes unless told otherwise, and shown before they are made."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_onnx
from exchange_under_fire import listing, without_receipt
from test_exchange import KINDS, configured, every_level, scene, sharded, structural_alone

from tieaudit.errors import UsageError
from tieaudit.load import load_one
from tieaudit.mend import UNSAFE, Mended, Mending, mend, mending, place_in
from tieaudit.plain import plain
from tieaudit.preview import preview, shown
from tieaudit.scan import scan
from tieaudit.verdict import Finding, Fix, Report

pytest.importorskip("onnxruntime")

__all__ = ["every_level", "structural_alone"]  # fixtures


def looked_at(path: Path) -> Report:
    return scan(load_one(path))


def mended(what: Mending, to: Path | None = None) -> Mended:
    return mend(what, to, require="structural")


def codes(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.code for finding in findings]


FIXABLE = (
    ("gpt_decoder/lost.onnx", "TIE202"),
    ("gpt_decoder/foldable.onnx", "TIE301"),
    ("gpt_decoder/one_range/model.onnx", "TIE204"),
    ("gpt_decoder/hf_lost", "TIE102"),
    ("bart_seq2seq/hf_lost", "TIE102"),
    ("bart_seq2seq/parts_lost", "TIE203"),
    ("albert_shared/lost.onnx", "TIE201"),
    ("lstm_lm/lost.onnx", "TIE202"),
)


def copied(fixtures: Path, name: str, home: Path) -> Path:
    """A fixture with all that lies beside it, where it may be changed."""
    source = fixtures / name
    if source.is_dir():
        return Path(shutil.copytree(source, home / source.name))
    if source.parent.name in ("one_range", "lost_external"):
        return Path(shutil.copytree(source.parent, home / source.parent.name)) / source.name
    home.mkdir(exist_ok=True)
    return Path(shutil.copy(source, home))


@pytest.mark.parametrize(("name", "code"), FIXABLE)
def test_what_was_fixed_is_gone_nothing_new_came_and_a_second_run_writes_nothing(
    name: str, code: str, fixtures_dir: Path, tmp_path: Path
) -> None:
    path = copied(fixtures_dir, name, tmp_path / "home")
    report = looked_at(path)
    assert code in codes(report.findings)
    what = mending(report)
    foreseen = preview(what)
    before = listing(tmp_path / "home")
    result = mended(what)
    assert result.fixed == report.findings
    assert result.remaining == result.new == ()
    assert looked_at(path).findings == ()
    after = listing(tmp_path / "home")
    home = path if path.is_dir() else path.parent
    written = {str((home / file).relative_to(tmp_path / "home")) for file in foreseen.files}
    changed = {file for file in without_receipt(after) if after[file] != before.get(file)}
    assert changed <= written
    # of one_range no byte of the data file goes: two names of one range become one name
    assert written - changed == ({"one_range/model.onnx.data"} if "one_range" in name else set())
    again = mended(mending(looked_at(path)))
    assert again.done is None
    assert listing(tmp_path / "home") == after


@pytest.mark.parametrize("name", ["gpt_decoder/lost.onnx", "gpt_decoder/hf_lost"])
def test_a_mended_copy_goes_to_its_own_place_and_the_source_is_only_read(
    name: str, fixtures_dir: Path, tmp_path: Path
) -> None:
    path = copied(fixtures_dir, name, tmp_path / "home")
    before = listing(tmp_path / "home")
    result = mended(mending(looked_at(path)), tmp_path / "out" / f"other{path.suffix}")
    assert len(result.fixed) == 1
    assert result.remaining == ()
    assert listing(tmp_path / "home") == before
    assert looked_at(tmp_path / "out" / f"other{path.suffix}").findings == ()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_mended_in_place(kind: str, fixtures_dir: Path, tmp_path: Path) -> None:
    name, _ = scene(kind, fixtures_dir, tmp_path / "home")
    report = looked_at(tmp_path / "home" / name)
    result = mended(mending(report, unsafe=kind == "settings"))
    assert [codes(result.fixed), codes(result.remaining)] == [codes(report.findings), []]


def test_a_fix_is_proved_by_running_both_models(every_level: None, tmp_path: Path) -> None:
    result = mend(mending(looked_at(tiny_onnx.lost(tmp_path / "m.onnx", external=True))), None)
    assert result.done is not None
    levels = {level.name: level.outcome for level in result.done.proof.levels}
    assert levels == {"structural": "held", "regional": "held", "end to end": "held"}


def three_copies(path: Path) -> Path:
    """Two tables that have nothing to do with each other, each stored twice."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    one, two = tiny_onnx.table(0), tiny_onnx.table(1)
    names = {"a.weight": one, "a.copy": one, "b.weight": two, "b.copy": two}
    nodes = [helper.make_node("Gather", [name, "ids"], [f"x{n}"]) for n, name in enumerate(names)]
    nodes.append(helper.make_node("Sum", [f"x{n}" for n in range(4)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", tiny_onnx.D])],
        [numpy_helper.from_array(value, name) for name, value in names.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def test_a_suppressed_finding_is_left_alone(tmp_path: Path) -> None:
    """Of two classes one is given: the other one stays stored twice."""
    path = three_copies(tmp_path / "m.onnx")
    report = looked_at(path)
    assert [set(finding.ids) for finding in report.findings] == [{"a.weight", "a.copy"}, {"b.weight", "b.copy"}]
    result = mended(mending(report, report.findings[:1]))
    assert result.fixed == report.findings[:1]
    assert result.remaining == report.findings[1:]
    weights = load_one(path).by_id.keys()
    assert {"b.weight", "b.copy"} <= weights
    assert len({"a.weight", "a.copy"} & weights) == 1


def test_of_a_class_only_the_given_members_become_one(fixtures_dir: Path, tmp_path: Path) -> None:
    """A third equal tensor that no class ties would come back random: it stays, and the declared pair is mended."""
    from safetensors.numpy import load_file, save_file

    folder = copied(fixtures_dir, "gpt_decoder/hf_lost", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    wpe = tensors["transformer.wpe.weight"]
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name][: len(wpe)] = wpe
    tensors["stranger.weight"] = tensors["lm_head.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = looked_at(folder)
    declared = [finding for finding in report.findings if finding.code == "TIE102"]
    result = mended(mending(report, declared))
    assert result.fixed == tuple(declared)
    kept = load_file(folder / "model.safetensors")
    assert tensors.keys() - kept.keys() == {"lm_head.weight"}
    np.testing.assert_array_equal(kept["stranger.weight"], tensors["stranger.weight"])


def broken(fixtures: Path, home: Path) -> Path:
    """Two different tensors under a flag that says they are one."""
    return configured(copied(fixtures, "gpt_decoder/hf_untied", home), tie_word_embeddings=True)


def test_an_unsafe_fix_is_made_only_on_demand_and_changes_no_value(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = broken(fixtures_dir, tmp_path)
    report, before = looked_at(folder), listing(folder)
    text = (folder / "config.json").read_text()
    assert codes(report.findings) == ["TIE101"]
    safe = mending(report)
    assert [one.because for one in safe.left] == [UNSAFE]
    assert mended(safe).done is None
    assert listing(folder) == before
    result = mended(mending(report, unsafe=True))
    assert codes(result.fixed) == ["TIE101"]
    assert result.remaining == ()
    after = without_receipt(listing(folder))
    assert {name for name in before if after[name] != before[name]} == {"config.json"}
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    lines = zip(text.splitlines(), (folder / "config.json").read_text().splitlines(), strict=True)
    assert [(old.strip(" ,"), new.strip(" ,")) for old, new in lines if old != new] == [
        ('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    ]


def test_what_is_mended_by_hand_is_said_and_not_done(tmp_path: Path) -> None:
    path = tiny_onnx.lost(tmp_path / "m.onnx")
    report = looked_at(path)
    by_hand = replace(report.findings[0], fix=Fix("manual", "look at it yourself"))
    without = replace(report.findings[0], fix=None)
    what = mending(replace(report, findings=(by_hand, without)))
    assert [one.because for one in what.left] == ["by hand: look at it yourself", "no fix is known"]
    before = listing(tmp_path)
    assert mended(what).done is None
    assert listing(tmp_path) == before


def test_no_fix_makes_one_of_unequal_weights(tmp_path: Path) -> None:
    """A rule of somebody else that calls a lossy scheme safe: it is refused with the difference."""
    path = tiny_onnx.untied(tmp_path / "m.onnx")
    report = looked_at(path)
    finding = Finding(("wte.weight", "lm_head.weight_T"), "tie them", Fix("safe", "…", "io"), code="XYZ1")
    for unsafe in (False, True):
        what = mending(replace(report, findings=(finding,)), unsafe=unsafe)
        assert what.mends == ()
        assert "480 of 480 values differ" in what.left[0].because
        assert mended(what).done is None


def test_a_scheme_that_proposes_nothing_for_a_finding_is_said(tmp_path: Path) -> None:
    report = looked_at(tiny_onnx.untied(tmp_path / "m.onnx"))
    finding = Finding(("wte.weight",), "odd", Fix("safe", "…", "dedup"), code="XYZ1")
    what = mending(replace(report, findings=(finding,)))
    assert [one.because for one in what.left] == ["the scheme dedup proposes nothing for it"]


def test_findings_of_another_model_are_refused(tmp_path: Path) -> None:
    one = looked_at(tiny_onnx.lost(tmp_path / "m.onnx"))
    other = looked_at(three_copies(tmp_path / "n.onnx"))
    with pytest.raises(UsageError, match="expected findings of this report"):
        mending(one, other.findings)


def test_a_file_that_changed_since_it_was_looked_at_is_not_mended(tmp_path: Path) -> None:
    from tieaudit.errors import RewriteRefused

    path = tiny_onnx.lost(tmp_path / "m.onnx")
    what = mending(looked_at(path))
    os.utime(path, ns=(0, 0))
    before = listing(tmp_path)
    with pytest.raises(RewriteRefused, match="changed meanwhile"):
        mended(what)
    assert listing(tmp_path) == before


def test_the_preview_of_settings_is_a_diff_that_patch_takes(fixtures_dir: Path, tmp_path: Path) -> None:
    import subprocess

    folder = broken(fixtures_dir, tmp_path)
    what = mending(looked_at(folder), unsafe=True)
    before = listing(folder)
    found = preview(what)
    assert listing(folder) == before
    assert found.tensors == ()
    assert found.files == ("config.json",)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    diff = found.settings[0] + "\n"
    subprocess.run(["git", "apply", "-p1", "-"], cwd=copy, input=diff, text=True, check=True)
    mended(what)
    assert (copy / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_the_preview_says_which_tensors_become_one_and_is_json_too(fixtures_dir: Path, tmp_path: Path) -> None:
    folder = configured(sharded(fixtures_dir / "gpt_decoder" / "hf_lost", tmp_path / "f"), tie_word_embeddings=False)
    found = preview(mending(looked_at(folder)))
    lines = shown(found).splitlines()
    assert '-  "tie_word_embeddings": false' in "\n".join(lines)
    assert '+  "tie_word_embeddings": true' in "\n".join(lines)
    assert lines[-3:] == [
        "- lm_head.weight  float32 [1500, 64]",
        "  transformer.wte.weight  stored once, saves 384.0 kB",
        "writes config.json, model-00003-of-00003.safetensors and model.safetensors.index.json: 384.0 kB less; every "
        "other file stays as it is",
    ]
    again = json.loads(json.dumps(plain(found)))
    assert again["n_bytes_saved"] == 1500 * 64 * 4  # of one of the two tables, in float32
    assert again["tensors"][0]["dropped"] == ["lm_head.weight"]


def test_names_in_a_preview_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    import onnx

    path = tiny_onnx.lost(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].name = evil = "wte\x1b[31m.weight"
    model.graph.node[0].input[0] = evil
    onnx.save(model, str(path))
    text = shown(preview(mending(looked_at(path))))
    assert "\x1b" not in text
    assert "wte\\x1b[31m.weight" in text


@pytest.mark.parametrize(
    ("model", "named", "expected"),
    [
        ("m/a.onnx", "m", "out/a.onnx"),
        ("m/deep/a.onnx", "m", "out/deep/a.onnx"),
        ("m/a.onnx", "m/a.onnx", "out/a.onnx"),
        ("m", "m", "out"),
        ("m", "m/config.json", "out/m"),
    ],
)
def test_where_a_mended_model_goes(model: str, named: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "m" / "deep").mkdir(parents=True)
    for name in ("a.onnx", "deep/a.onnx", "config.json"):
        (tmp_path / "m" / name).touch()
    assert place_in(tmp_path / "out", tmp_path / model, tmp_path / named) == tmp_path / expected
