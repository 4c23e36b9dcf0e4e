"""Paths that are no plain files, folders that lead back to themselves, destinations that cannot be."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main


def run(*words: object) -> Result:
    """The command as a user runs it; nothing but its own exit may come out."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "a fault in tieaudit" not in result.output
    return result


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe that nobody writes to: whoever opens it waits for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "config.json", "plain"])
def test_a_pipe_or_a_device_as_the_model_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    result = run("scan", tmp_path / name)
    assert result.exit_code == 2
    assert "found" in result.output
    assert run("scan", "/dev/zero").exit_code == 2


def test_a_pipe_beside_models_with_data_files_is_not_opened(tmp_path: Path) -> None:
    tiny_onnx.lost(tmp_path / "good.onnx", external=True)
    os.mkfifo(tmp_path / "bad.onnx")
    result = run("scan", tmp_path)
    assert result.exit_code == 2
    assert "not a file" in result.output
    assert "good.onnx" in result.output


def test_a_pipe_as_receipt_or_as_inputs_is_refused_without_waiting(tmp_path: Path, pipe: Path) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    for path in (pipe, "/dev/zero", tmp_path, tmp_path / "none"):
        assert run("verify", "--receipt", path).exit_code == 2
        assert run("apply", "--undo", path).exit_code == 2
        assert run("verify", model, model, "--inputs", path).exit_code == 2


def test_folders_nested_beyond_the_stack_are_one_line_and_other_models_are_still_read(tmp_path: Path) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    deep, here = tmp_path / "deep", Path.cwd()
    deep.mkdir()
    os.chdir(deep)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    result = run("scan", deep, model)
    assert result.exit_code == 2
    assert f"{deep}: folders nested too deeply" in result.output
    assert "1 finding" in result.output
    _remove_deep(deep)


def _remove_deep(top: Path) -> None:
    """Python's own rmtree ends in a RecursionError here, and the test run's clean-up with it."""
    here = Path.cwd()
    os.chdir(top)
    while os.path.isdir("d"):
        os.chdir("d")
    try:
        while Path.cwd() != top:
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)


def test_a_recursive_glob_does_not_follow_links_that_lead_back(tmp_path: Path) -> None:
    # three links to the folder itself: 3^40 paths for whoever follows links until the system stops them
    for name in "abc":
        (tmp_path / name).symlink_to(".")
    (tmp_path / "sub").mkdir()
    tiny_onnx.lost(tmp_path / "sub" / "m.onnx")
    began = time.process_time()
    result = run("scan", f"{tmp_path}/**/*.onnx")
    assert result.exit_code == 0
    assert result.output.count("m.onnx ·") == 1
    assert time.process_time() - began < 10


def test_a_thousand_models_in_one_folder_cost_no_quadratic_time(tmp_path: Path) -> None:
    from tieaudit.formats.onnx.discover import alternative_of
    from tieaudit.load import locate

    for name in ("onnx_files", "tensors"):
        (tmp_path / name).mkdir()
    for index in range(1000):
        (tmp_path / "onnx_files" / f"m{index}_fp16.onnx").touch()
        (tmp_path / "tensors" / f"m{index}.safetensors").touch()
    began = time.process_time()
    sources, _ = locate([str(tmp_path)])
    assert len(sources) == 2000
    for source in sources:
        alternative_of([source.path])
    assert time.process_time() - began < 10  # 1000² looks at a folder took 15 s


def test_a_variant_made_while_the_tool_runs_is_seen(tmp_path: Path) -> None:
    from tieaudit.formats.onnx.discover import alternative_of

    variant = tmp_path / "m_fp16.onnx"
    variant.touch()
    assert alternative_of([variant]) is None
    os.utime(tmp_path, ns=(0, 0))
    (tmp_path / "m.onnx").touch()
    assert alternative_of([variant]) == "m"


def test_a_destination_that_no_system_takes_is_one_line_and_a_long_name_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    for to in ("x/" * 3000 + "o.onnx", "x" * 300 + ".onnx", "/dev/null/o.onnx", str(model / "o.onnx")):
        result = run("apply", model, "--to", tmp_path / to)
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) <= 2
    # 235 bytes and `.receipt.json` are within the 255 of a name; a temporary name around all of it would not be
    long = tmp_path / ("x" * 230 + ".onnx")
    assert run("apply", model, "--to", long, "--device", "cpu").exit_code == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["m.onnx", long.name, f"{long.name}.receipt.json"])


def test_a_destination_inside_the_models_own_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny_onnx.lost(tmp_path / "encoder_model.onnx")
    tiny_onnx.lost(tmp_path / "decoder_model.onnx")
    for to in (tmp_path / "out", tmp_path / "a" / "b"):
        result = run("apply", tmp_path, "--to", to)
        assert result.exit_code == 2
        assert "inside the model's own folder" in result.output
    assert sorted(one.name for one in tmp_path.iterdir()) == ["decoder_model.onnx", "encoder_model.onnx"]


def test_data_that_goes_away_between_reading_and_comparing_is_named_and_nothing_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tieaudit.load import Source

    broken, fine = tiny_onnx.lost(tmp_path / "a.onnx", external=True), tiny_onnx.lost(tmp_path / "b.onnx")
    real = Source.load

    def load_and_lose(source: Source, *chosen: object) -> object:
        model = real(source, *chosen)
        (tmp_path / "a.onnx.data").unlink(missing_ok=True)
        return model

    monkeypatch.setattr(Source, "load", load_and_lose)
    result = run("scan", broken, fine)
    assert "a.onnx.data" in result.output
    assert "cannot be read" in result.output
    assert "TIE202" in result.output  # the other one is still read
    plan = run("plan", broken)
    assert "write it with" not in plan.output  # nothing may be promised about bytes that nobody saw


@pytest.mark.parametrize("kind", [[], {}, [[]], [1], 1, None, True, "x" * 9999, "\ud800"], ids=repr)
def test_a_config_with_any_value_as_its_model_type_is_read_or_refused(tmp_path: Path, kind: object) -> None:
    header = json.dumps({"wte.weight": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["GPT2LMHeadModel"]}))
    assert run("scan", tmp_path, "--format", "json").exit_code in (0, 2)
