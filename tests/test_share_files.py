"""Several ONNX files that name one data file: written as regular files, read by everybody, found again as one."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main

ort = pytest.importorskip("onnxruntime")
IDS = np.array([[0, 5, 59], [7, 7, 1]], np.int64)
N_TABLE_BYTES = tiny_onnx.V * tiny_onnx.D * 4


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def logits(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"ids": IDS})[0]
    return found


def folder(path: Path, *names: str, external: tuple[str, ...] = ()) -> Path:
    """Models with one table, each with a transposed copy of it as its head."""
    path.mkdir()
    for name in names:
        tiny_onnx.lost(path / f"{name}.onnx", external=name in external)
    return path


def data_of(path: Path) -> dict[str, str]:
    """Where the table of a model lies."""
    graph = onnx.load(str(path), load_external_data=False).graph
    (tensor,) = [one for one in graph.initializer if one.name == "wte.weight"]
    return {entry.key: entry.value for entry in tensor.external_data}


def test_models_that_are_strangers_to_each_other_share_one_data_file_when_asked_to(tmp_path: Path) -> None:
    source, to = folder(tmp_path / "in", "alpha", "beta", "gamma", external=("beta",)), tmp_path / "out"
    assert run("apply", source, "--to", to).exit_code == 2  # which of the three is meant?
    result = run("apply", source, "--share-files", "--to", to)
    assert result.exit_code == 0, result.output
    # one table, not three or six
    assert (to / "shared_weights.data").stat().st_size == N_TABLE_BYTES
    places = [data_of(to / f"{name}.onnx") for name in ("alpha", "beta", "gamma")]
    assert places[0] == places[1] == places[2]
    assert places[0]["location"] == "shared_weights.data"  # relative: the folder can be moved
    moved = to.rename(tmp_path / "moved")
    for name in ("alpha", "beta", "gamma"):
        onnx.checker.check_model(str(moved / f"{name}.onnx"))
        onnx.load(str(moved / f"{name}.onnx"))
        np.testing.assert_allclose(logits(moved / f"{name}.onnx"), logits(source / f"{name}.onnx"), atol=1e-5)


def test_what_is_shared_is_regular_files_with_one_name_each(tmp_path: Path) -> None:
    source, to = folder(tmp_path / "in", "encoder_model", "decoder_model"), tmp_path / "out"
    (source / "vocab.txt").write_text("a\n")
    (source / "link.txt").symlink_to(source / "vocab.txt")
    assert run("apply", source, "--share-files", "--to", to).exit_code == 0
    names = sorted(path.name for path in to.iterdir())
    assert names == ["decoder_model.onnx", "encoder_model.onnx", "link.txt", "shared_weights.data",
                     "tieaudit.receipt.json", "vocab.txt"]  # fmt: skip
    for path in to.iterdir():
        assert stat.S_ISREG(path.lstat().st_mode), path  # onnx's checker refuses links to data
        assert path.lstat().st_nlink == 1, path


def test_what_was_shared_is_read_as_one_tensor_and_a_second_run_finds_nothing(tmp_path: Path) -> None:
    source, to = folder(tmp_path / "in", "alpha", "beta"), tmp_path / "out"
    assert run("apply", source, "--share-files", "--to", to).exit_code == 0
    (model,) = json.loads(run("scan", to, "--format", "json").output)["models"]
    assert model["parts"] == ["alpha", "beta"]
    aliased = [{one["id"] for one in group["members"]} for group in model["groups"] if group["origin"] == "aliased"]
    assert {"alpha||wte.weight", "beta||wte.weight"} in aliased
    for words in (("--share-files",), ()):
        again = run("apply", to, *words, "--to", tmp_path / "again")
        assert again.exit_code == 0
        assert "nothing to do" in again.output
        assert not (tmp_path / "again").exists()


def test_parts_of_one_export_share_a_data_file_unless_told_not_to(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "encoder_model", "decoder_model")
    assert run("apply", source, "--to", tmp_path / "shared").exit_code == 0
    assert (tmp_path / "shared" / "shared_weights.data").exists()
    apart = run("apply", source, "--no-share-files", "--to", tmp_path / "apart")
    assert apart.exit_code == 0, apart.output
    assert "--share-files would store them in a common file" in apart.output
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == [
        "decoder_model.onnx", "encoder_model.onnx", "tieaudit.receipt.json"]  # fmt: skip
    for name in ("encoder_model.onnx", "decoder_model.onnx"):  # what can be tied inside a file still is
        assert (source / name).stat().st_size - (tmp_path / "apart" / name).stat().st_size > N_TABLE_BYTES // 2
        np.testing.assert_allclose(logits(tmp_path / "apart" / name), logits(source / name), atol=1e-5)
    again = run("apply", tmp_path / "apart", "--no-share-files", "--to", tmp_path / "again")
    assert (again.exit_code, "nothing to do" in again.output) == (0, True)


def test_the_command_that_a_plan_names_says_how_files_are_shared(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "alpha", "beta")
    planned = run("plan", source, "--share-files")
    assert planned.exit_code == 0
    assert "--share-files --to OUT" in planned.output


@pytest.mark.parametrize("what", ["one file", "a folder of one", "no ONNX"])
def test_sharing_needs_several_onnx_files(what: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "alpha")
    path = {"one file": source / "alpha.onnx", "a folder of one": source, "no ONNX": tmp_path / "hf"}[what]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    result = run("apply", path, "--share-files", "--to", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected a folder of several ONNX files" in result.stderr


def test_large_shared_tensors_begin_where_they_can_be_mapped(tmp_path: Path) -> None:
    source, to = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    large, small = tiny_onnx.table(0, (65537, 4)), tiny_onnx.table(1)  # 1 MiB and 16 B: the next offset is not a page's
    for name in ("alpha", "beta"):
        made = [onnx.helper.make_node("Gather", [key, "ids"], [f"{key}_out"]) for key in ("one", "two", "three")]
        outputs = [onnx.helper.make_tensor_value_info(f"{key}_out", 1, None) for key in ("one", "two", "three")]
        tensors = [onnx.numpy_helper.from_array(value, key)
                   for key, value in (("one", large), ("two", small), ("three", large + 1))]  # fmt: skip
        ids = onnx.helper.make_tensor_value_info("ids", 7, ["n", "s"])
        graph = onnx.helper.make_graph(made, "g", [ids], outputs, tensors)
        opset = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(source / f"{name}.onnx"))
    assert run("apply", source, "--share-files", "--to", to).exit_code == 0
    graph = onnx.load(str(to / "alpha.onnx"), load_external_data=False).graph
    offsets = {one.name: {entry.key: entry.value for entry in one.external_data}["offset"] for one in graph.initializer}
    # multiples of 64 KiB, which is what Windows maps at; 4096 would be enough on Linux
    assert {name: int(offset) % 65536 for name, offset in offsets.items() if name != "two"} == {"one": 0, "three": 0}
    assert int(offsets["two"]) % 64 == 0
    assert int(offsets["three"]) > int(offsets["one"])
