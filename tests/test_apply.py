"""From a plan to a delivered model: atomic, with a receipt, undone on request, never in place."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main
from tieaudit.errors import RewriteRefused

pytest.importorskip("onnxruntime")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with its digest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outputs(path: Path, ids: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"ids": ids})[0]
    return result


IDS = np.array([[0, 5, 59], [7, 7, 1]], np.int64)


def test_dedup_of_a_lost_tie_delivers_a_smaller_model_with_the_same_outputs(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    result = run("apply", source, "--scheme", "dedup", "--to", to)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(outputs(to, IDS), outputs(source, IDS), rtol=0, atol=1e-5)
    # the head's 60 × 8 × 4 = 1,920 bytes are gone; a few nodes came
    assert source.stat().st_size - to.stat().st_size > 1000
    scan = json.loads(run("scan", to, "--format", "json").output)
    assert scan["models"][0]["summary"]["n_bytes_duplicate"] == 0
    assert scan["models"][0]["summary"]["n_parameters"] == tiny_onnx.V * tiny_onnx.D


def test_external_data_is_compacted_and_lies_beside_the_output(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)
    result = run("apply", source, "--to", tmp_path / "out" / "m.onnx")
    assert result.exit_code == 0, result.output
    assert sorted(listing(tmp_path / "out")) == ["m.onnx", "m.onnx.data", "m.onnx.receipt.json"]
    assert (tmp_path / "out" / "m.onnx.data").stat().st_size < (tmp_path / "m.onnx.data").stat().st_size
    np.testing.assert_allclose(outputs(tmp_path / "out" / "m.onnx", IDS), outputs(source, IDS), rtol=0, atol=1e-5)


def test_io_on_unequal_weights_is_refused_in_one_sentence_with_the_difference(tmp_path: Path) -> None:
    source = tiny_onnx.untied(tmp_path / "m.onnx")
    before = listing(tmp_path)
    result = run("apply", source, "--scheme", "io", "--to", tmp_path / "out.onnx")
    assert result.exit_code == 2
    assert "480 of 480 values differ" in result.output
    assert "relative distance 1." in result.output
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("policy", "expected"), [("keep:head", 1.0), ("keep:embedding", 0.0), ("mean", 0.5)])
def test_a_lossy_io_keeps_the_chosen_values(tmp_path: Path, policy: str, expected: float) -> None:
    source, to = tiny_onnx.untied(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    result = run("apply", source, "--scheme", "io", "--allow-lossy", "--merge", policy, "--to", to)
    assert result.exit_code == 0, result.output
    one = expected * tiny_onnx.table(1).astype(np.float64) + (1 - expected) * tiny_onnx.table(0).astype(np.float64)
    common = one.astype(np.float32)
    np.testing.assert_allclose(outputs(to, IDS), np.tanh(common[IDS]) @ common.T, rtol=0, atol=1e-5)
    assert "drift" in result.output


def test_drift_beyond_the_limit_delivers_nothing(tmp_path: Path) -> None:
    source = tiny_onnx.untied(tmp_path / "m.onnx")
    words = ("--scheme", "io", "--allow-lossy", "--max-drift", "0.001", "--to", tmp_path / "out.onnx")
    result = run("apply", source, *words)
    assert result.exit_code == 1, result.output
    assert not (tmp_path / "out.onnx").exists()


def test_a_foldable_tie_is_respelt_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    source, to = tiny_onnx.language_model(tmp_path / "m.onnx", tiny_onnx.table(), None), tmp_path / "out.onnx"
    assert run("apply", source, "--to", to).exit_code == 0
    again = run("apply", to, "--to", tmp_path / "again.onnx")
    assert again.exit_code == 0
    assert "nothing to do" in again.output
    assert not (tmp_path / "again.onnx").exists()


def test_untie_then_dedup_comes_back_to_the_same_bytes_stored(tmp_path: Path) -> None:
    source, tied, untied = (tmp_path / name for name in ("m.onnx", "tied.onnx", "untied.onnx"))
    tiny_onnx.lost(source)
    assert run("apply", source, "--to", tied).exit_code == 0
    result = run("apply", tied, "--scheme", "untie", "--to", untied)
    assert result.exit_code == 0, result.output
    summaries = [json.loads(run("scan", p, "--format", "json").output)["models"][0]["summary"] for p in (tied, untied)]
    assert [s["n_bytes_duplicate"] for s in summaries] == [0, 60 * 8 * 4]
    assert run("apply", untied, "--to", tmp_path / "back.onnx").exit_code == 0
    np.testing.assert_array_equal(outputs(tmp_path / "back.onnx", IDS), outputs(tied, IDS))


def test_without_a_destination_the_plan_is_printed_and_nothing_is_written(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    before = listing(tmp_path)
    result = run("apply", source)
    assert result.exit_code == 0
    assert "--to OUT" in result.output
    assert listing(tmp_path) == before


def test_an_existing_destination_is_never_overwritten(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    to.write_text("mine")
    result = run("apply", source, "--to", to)
    assert result.exit_code == 2
    assert "nothing is ever overwritten" in result.output
    assert to.read_text() == "mine"


def test_the_input_itself_is_never_a_destination(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    before = listing(tmp_path)
    assert run("apply", source, "--to", source).exit_code == 2
    assert listing(tmp_path) == before


def test_a_receipt_is_checked_and_undone(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    before = listing(tmp_path)
    assert run("apply", source, "--to", to).exit_code == 0
    receipt = tmp_path / "out.onnx.receipt.json"
    assert run("verify", "--receipt", receipt).exit_code == 0
    assert run("apply", "--undo", receipt).exit_code == 0
    assert listing(tmp_path) == before


def test_a_changed_output_fails_its_receipt_and_is_not_undone(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    assert run("apply", source, "--to", to).exit_code == 0
    to.write_bytes(to.read_bytes() + b"\0")
    receipt = tmp_path / "out.onnx.receipt.json"
    checked = run("verify", "--receipt", receipt)
    assert checked.exit_code == 1
    assert "changed since the receipt was written" in checked.output
    assert run("apply", "--undo", receipt).exit_code == 2
    assert to.exists()


def test_nothing_is_undone_when_the_input_has_gone(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    assert run("apply", source, "--to", to).exit_code == 0
    source.unlink()
    result = run("apply", "--undo", tmp_path / "out.onnx.receipt.json")
    assert result.exit_code == 2
    assert to.exists()


def test_a_receipt_that_names_files_outside_its_folder_touches_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    inner = tmp_path / "inner"
    inner.mkdir()
    receipt: dict[str, Any] = {
        "schema": "tieaudit/receipt/1",
        "input": {"path": "x", "files": {}},
        "output": {"path": "x", "files": {"../victim": hashlib.sha256(b"keep me").hexdigest()}},
    }
    (inner / "r.json").write_text(json.dumps(receipt))
    result = run("apply", "--undo", inner / "r.json")
    assert result.exit_code == 2
    assert "outside its own folder" in result.output
    assert victim.read_text() == "keep me"


KILL = """
import importlib, os, signal, sys
module = importlib.import_module('tieaudit.{module}')
real, left = module.{function}, [{nth}]
def kill(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
module.{function} = kill
from tieaudit.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("module", "function", "nth"),
    [("rewrite", "flush", 0), ("rewrite", "read_back", 0), ("apply", "prove_apart", 0), ("apply", "deliver", 0),
     ("deliver", "_rename_new", 0), ("deliver", "flush", 0)],
)  # fmt: skip
def test_a_kill_at_any_stage_leaves_no_output_and_the_input_intact(
    tmp_path: Path, external: bool, module: str, function: str, nth: int
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    source = tiny_onnx.lost(home / "m.onnx", external=external)
    before = listing(home)
    script = KILL.format(module=module, function=function, nth=nth)
    words = ["apply", str(source), "--to", str(home / "out" / "out.onnx"), "--require", "structural"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    visible = {name: digest for name, digest in listing(home).items() if not name.startswith(".")}
    assert visible == before


def test_a_failure_while_writing_removes_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    before = listing(tmp_path)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("tieaudit.rewrite.flush", full)
    result = run("apply", source, "--to", tmp_path / "out.onnx")
    assert result.exit_code == 2
    assert "No space left on device" in result.output
    assert listing(tmp_path) == before


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.parametrize(("given", "expected"), [(0o600, 0o600), (0o640, 0o640), (0o666, 0o644), (0o400, 0o600)])
def test_a_private_model_does_not_become_readable(tmp_path: Path, given: int, expected: int) -> None:
    """Not for the data beside it, nor the receipt, which names its weights. Its owner may always write what is new."""
    source, to = tiny_onnx.lost(tmp_path / "m.onnx", external=True), tmp_path / "out" / "m.onnx"
    for path in (source, tmp_path / "m.onnx.data"):
        path.chmod(given)
    assert run("apply", source, "--to", to).exit_code == 0
    assert {path.name: mode(path) for path in to.parent.iterdir()} == dict.fromkeys(
        ("m.onnx", "m.onnx.data", "m.onnx.receipt.json"), expected
    )
    assert mode(to.parent) == 0o755


@pytest.mark.usefixtures("usual_umask")
def test_a_private_data_file_makes_no_public_one_and_a_public_model_stays_public(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx", external=True), tmp_path / "m-tied.onnx"
    (tmp_path / "m.onnx.data").chmod(0o600)
    assert run("apply", source, "--to", to).exit_code == 0
    assert mode(tmp_path / "m-tied.onnx") == 0o644
    assert mode(tmp_path / "m-tied.onnx.data") == 0o600  # a name that the source has not: what all of its files allow


@pytest.mark.usefixtures("usual_umask")
def test_a_delivered_folder_is_no_more_open_than_its_source(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        tiny_onnx.lost(folder / name).chmod(0o600)
    folder.chmod(0o700)
    assert run("apply", folder, "--to", tmp_path / "out").exit_code == 0
    assert mode(tmp_path / "out") == 0o700
    assert {mode(path) for path in (tmp_path / "out").iterdir()} == {0o600}


def test_folders_that_were_made_for_a_delivery_go_with_it(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "a" / "b" / "out.onnx"
    before = sorted(tmp_path.rglob("*"))
    assert run("apply", source, "--to", to).exit_code == 0
    assert run("apply", "--undo", f"{to}.receipt.json").exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_hold_something_else_by_now_stay(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "a" / "b" / "out.onnx"
    assert run("apply", source, "--to", to).exit_code == 0
    (tmp_path / "a" / "mine").write_text("mine")
    assert run("apply", "--undo", f"{to}.receipt.json").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["mine"]


def test_an_empty_folder_that_was_there_before_stays_when_a_delivery_is_undone(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "a" / "b" / "out.onnx"
    (tmp_path / "a").mkdir()
    assert run("apply", source, "--to", to).exit_code == 0
    assert run("apply", "--undo", f"{to}.receipt.json").exit_code == 0
    assert list((tmp_path / "a").iterdir()) == []


def test_folders_that_were_made_for_a_delivery_that_failed_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    before = sorted(tmp_path.rglob("*"))

    def refused(source: Path, target: Path) -> None:
        raise RewriteRefused(f"{target}: cannot be moved into place")

    monkeypatch.setattr(importlib.import_module("tieaudit.deliver"), "_rename_new", refused)
    assert run("apply", source, "--to", tmp_path / "a" / "b" / "out.onnx").exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system does not tell which process ran")
def test_what_a_killed_run_left_is_removed_by_the_next_one_and_what_may_be_alive_is_named(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    here = importlib.import_module("tieaudit.rewrite").this_machine()
    dead, alive, elsewhere, not_ours = (
        tmp_path / f".out.onnx.tieaudit-{name}"
        for name in (
            f"{here}-{dead_process()}-0123456789ab",
            f"{here}-{os.getppid()}-0123456789ab",
            "00000000-1-0123456789ab",
            "of-a-friend",
        )
    )
    for folder in (dead, alive, elsewhere, not_ours):
        folder.mkdir()
        (folder / "m.onnx").write_bytes(b"x")
    result = run("apply", source, "--to", tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    assert not dead.exists()
    assert f"removed {dead}" in result.output
    for folder in (alive, elsewhere):
        assert (folder / "m.onnx").exists()
        assert f"{folder} belongs to another run" in result.output
    assert (not_ours / "m.onnx").exists()
    assert not_ours.name not in result.output


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="the system does not tell which process ran")
def test_a_run_that_is_killed_leaves_a_workspace_that_the_next_run_removes(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    code = (
        "import os, signal, sys, tieaudit.rewrite as stage\n"
        "stage.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from tieaudit.cli import main\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "apply", str(source), "--to", str(to)]
    killed = subprocess.run(command, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".out.onnx.tieaudit-*"))) == 1
    assert run("apply", source, "--to", to).exit_code == 0
    assert list(tmp_path.glob(".out.onnx.tieaudit-*")) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")

    def tiny(path: Path) -> Any:
        return type("usage", (), {"free": 1000})()

    monkeypatch.setattr("tieaudit.rewrite.shutil.disk_usage", tiny)
    result = run("apply", source, "--to", tmp_path / "out.onnx")
    assert result.exit_code == 2
    assert "free bytes" in result.output
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("command", ["plan", "apply", "verify", "receipt-check", "undo"])
def test_the_json_of_every_command_fits_its_published_schema(tmp_path: Path, command: str) -> None:
    import jsonschema

    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    receipt = tmp_path / "out.onnx.receipt.json"
    if command in ("receipt-check", "undo"):
        run("apply", source, "--to", to)
    words = {
        "plan": ("plan", source),
        "apply": ("apply", source, "--to", to),
        "verify": ("verify", source, source),
        "receipt-check": ("verify", "--receipt", receipt),
        "undo": ("apply", "--undo", receipt),
    }[command]
    result = run(*words, "--format", "json")
    assert result.exit_code == 0, result.output
    schema = Path(__file__).parent.parent / "docs" / "schema" / f"{command}-1.schema.json"
    wanted = json.loads(schema.read_text())
    jsonschema.Draft202012Validator.check_schema(wanted)
    jsonschema.validate(json.loads(result.output), wanted)
    broken = {**json.loads(result.output), "schema": "another"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, wanted)


def two_tables(path: Path, second: np.ndarray, *nodes: tuple[str, list[str], list[str]]) -> Path:
    """Gather of `a`, and whatever reads `b`, an equal or transposed copy."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = [helper.make_node("Gather", ["a", "ids"], ["h"])]
    made += [helper.make_node(op, inputs, outputs) for op, inputs, outputs in nodes]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "s"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(tiny_onnx.table(), "a"), numpy_helper.from_array(second, "b")]
    graph = helper.make_graph(made, "g", [ids], [out], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_that_is_read_through_a_transpose_is_shared_and_respelt_in_one_go(
    tmp_path: Path, transposed: bool
) -> None:
    if transposed:  # Transpose(b) is the table again, and is looked up
        second = np.ascontiguousarray(tiny_onnx.table().T)
        read = [("Transpose", ["b"], ["t"]), ("Gather", ["t", "ids"], ["g"]), ("Add", ["h", "g"], ["out"])]
    else:
        second, read = tiny_onnx.table(), [("Transpose", ["b"], ["t"]), ("MatMul", ["h", "t"], ["out"])]
    source, to = two_tables(tmp_path / "m.onnx", second, *read), tmp_path / "out.onnx"
    result = run("apply", source, "--to", to, "--format", "json")
    assert result.exit_code == 0, result.output
    proof = json.loads(result.output)["proof"]
    assert proof["facts"]["folded_apart_by_the_runtime"] == "no"
    np.testing.assert_allclose(outputs(to, IDS), outputs(source, IDS), rtol=0, atol=1e-5)
    assert "nothing to do" in run("plan", to).output  # a second run finds no Transpose left to fold


def test_weights_that_cannot_be_read_while_scanning_end_in_exit_code_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tieaudit.errors import CorruptFile
    from tieaudit.storage import FileStorage

    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)

    def gone(self: FileStorage, ranges: object) -> list[bytes]:
        raise CorruptFile(f"{self.path}: the file is truncated or changed while it was read")

    monkeypatch.setattr(FileStorage, "read_ranges", gone)
    result = run("scan", source)
    assert result.exit_code == 2
    assert "TIE902" in result.output


def test_files_that_share_a_range_are_as_good_as_files_can_be(fixtures_dir: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    assert run("apply", fixtures_dir / "bart_seq2seq" / "parts_lost", "--to", to).exit_code == 0
    assert "nothing to do" in run("plan", to).output


def test_two_names_of_one_range_in_one_file_become_one_initializer(fixtures_dir: Path, tmp_path: Path) -> None:
    source, to = fixtures_dir / "gpt_decoder" / "one_range", tmp_path / "out"
    before = json.loads(run("scan", source, "--format", "json").output)["models"][0]
    (finding,) = [finding for finding in before["findings"] if finding["code"] == "TIE204"]
    assert finding["fix"]["safety"] == "safe"
    result = run("apply", source, "--to", to)
    assert result.exit_code == 0, result.output
    after = json.loads(run("scan", to, "--format", "json").output)["models"][0]
    assert after["summary"]["n_weights"] == before["summary"]["n_weights"] - 1
    assert not [finding for finding in after["findings"] if finding["code"] == "TIE204"]
