"""Writing the planned model: in bounded memory, only where there is room, never from a file that changes meanwhile."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_onnx
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from tieaudit import evidence
from tieaudit.cli import main
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.load import load_one
from tieaudit.plan import Choices, plan
from tieaudit.rewrite import rewrite, stamps, workspace
from tieaudit.scan import look
from tieaudit.storage import MemoryStorage

pytest.importorskip("onnxruntime")
MIB = 1024 * 1024
N_LARGE = 160 * MIB
"""Bytes of the tensor that no edit touches."""
N_MOST_GROWN = 48 * MIB
"""A few blocks, and the code that is imported on the way; far less than the tensor."""

WRITE = """
import sys
from pathlib import Path
from tieaudit import copying
from tieaudit.load import load_one
from tieaudit.plan import Choices, plan
from tieaudit.proving import peak_bytes
from tieaudit.rewrite import rewrite
from tieaudit.scan import look
if sys.argv[3] == "blocks":
    copying._by_kernel = lambda *args: 0
subject = look(load_one(sys.argv[1]))
made = plan(subject, Choices())
import onnx  # its size is nobody's model
before = peak_bytes()
written, _ = rewrite(subject.model, made, Path(sys.argv[2]))
print(len(made.edits), peak_bytes() - before)
"""


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def onnx_with_a_large_tensor(path: Path, *, external: bool) -> Path:
    """Two equal small tables, and a large one of its own."""
    large = np.arange(N_LARGE // 4, dtype=np.float32).reshape(-1, 1024)
    tables = {"a": tiny_onnx.table(), "large": large, "b": tiny_onnx.table()}
    nodes = [helper.make_node("Gather", [name, "ids"], [f"{name}_out"]) for name in tables]
    outputs = [helper.make_tensor_value_info(f"{name}_out", 1, None) for name in tables]
    ids = helper.make_tensor_value_info("ids", 7, ["n"])
    graph = helper.make_graph(nodes, "g", [ids], outputs, [numpy_helper.from_array(v, k) for k, v in tables.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options: dict[str, Any] = {"save_as_external_data": True, "location": "m.data"} if external else {}
    onnx.save(model, str(path), **options)
    return path


def llama(folder: Path, n_large: int) -> Path:
    """A folder whose head is a stored copy of its embedding, with one large tensor beside them."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    table = MemoryStorage(tiny_onnx.table().tobytes(), "t")
    large = MemoryStorage(np.arange(n_large // 4, dtype=np.float32).tobytes(), "l")
    names = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": large}
    entries = [NewEntry(name, "float32", (one.n_bytes // 4,), one) for name, one in names.items()]
    entries = [NewEntry(e.name, e.dtype, (60, 8) if e.storage is table else e.shape, e.storage) for e in entries]
    write_safetensors(entries, {"format": "pt"}, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of another process is read from /proc")
@pytest.mark.parametrize("way", ["kernel", "blocks"])
@pytest.mark.parametrize("kind", ["inline", "external", "folder"])
def test_writing_takes_no_more_memory_than_some_blocks(kind: str, way: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if kind == "folder":
        source = llama(tmp_path / "in", N_LARGE)
    else:
        source = onnx_with_a_large_tensor(tmp_path / "m.onnx", external=kind == "external")
    words = [sys.executable, "-c", WRITE, str(source), str(tmp_path / "out"), way]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_edits, n_grown = map(int, done.stdout.split())
    assert n_edits == 1
    assert n_grown < N_MOST_GROWN
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert N_LARGE < written < N_LARGE + MIB


def rewritten(path: Path, to: Path) -> Iterator[Path]:
    subject = look(load_one(path))
    with workspace(to) as folder:
        rewrite(subject.model, plan(subject, Choices()), folder)
        yield folder


@pytest.mark.parametrize("external", [False, True])
def test_a_source_that_changes_while_it_is_written_is_refused(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx", external=external)
    target = tmp_path / "m.onnx.data" if external else source

    def touched(*args: Any) -> Any:
        found = rewrite(*args)
        os.utime(target, ns=(1, 1))
        return found

    monkeypatch.setattr(importlib.import_module("tieaudit.apply"), "rewrite", touched)
    result = run("apply", source, "--to", tmp_path / "out" / "m.onnx")
    assert result.exit_code == 2
    assert f"{target}: expected a file that stays as it is while it is read, found it changed" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_between_looking_and_writing_is_refused(tmp_path: Path) -> None:
    from tieaudit.apply import apply
    from tieaudit.errors import RewriteRefused

    source = tiny_onnx.lost(tmp_path / "m.onnx")
    model = load_one(source)
    seen = stamps(model)
    made = plan(look(model), Choices())
    with source.open("ab") as file:
        file.write(b"\x1a\x00")  # an empty producer_version: still a model
    with pytest.raises(RewriteRefused, match="found it changed meanwhile"):
        apply(model, made, tmp_path / "out.onnx", seen=seen)
    assert not (tmp_path / "out.onnx").exists()
    source.unlink()
    with pytest.raises(RewriteRefused, match="found it changed meanwhile"):
        seen.check()


def test_beside_its_source_the_result_has_a_data_file_of_its_own(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("apply", source, "--to", tmp_path / "tied.onnx", "--require", "end-to-end")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} - set(before) == {
        "tied.onnx", "tied.onnx.data", "tied.onnx.receipt.json"
    }  # fmt: skip
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    stored = {item.name: item for item in onnx.load(tmp_path / "tied.onnx", load_external_data=False).graph.initializer}
    places = [entry.value for item in stored.values() for entry in item.external_data if entry.key == "location"]
    assert set(places) == {"tied.onnx.data"}
    assert run("verify", source, tmp_path / "tied.onnx").exit_code == 0
    assert run("apply", "--undo", tmp_path / "tied.onnx.receipt.json").exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_data_file_whose_second_name_is_taken_too_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx", external=True)
    (tmp_path / "tied.onnx.data").write_text("somebody else's")
    monkeypatch.setattr(
        importlib.import_module("tieaudit.apply"), "rewrite", lambda *args: pytest.fail("it was written")
    )
    result = run("apply", source, "--to", tmp_path / "tied.onnx")
    assert result.exit_code == 2
    assert "tied.onnx.data: exists already, and the result needs a data file of this name" in result.stderr
    assert f"{tmp_path / 'tied' / 'tied.onnx'}" in result.stderr


@pytest.mark.parametrize("kind", ["inline", "external", "folder", "parts"])
def test_the_room_that_is_needed_is_the_files_less_what_is_saved(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "folder":
        source, n_saved = llama(tmp_path / "in", 4000), 60 * 8 * 4
        (source / "notes.bin").write_bytes(bytes(5000))  # comes along
        (source / ".git").mkdir()
        (source / ".git" / "pack").write_bytes(bytes(7000))  # does not
        n_source = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    elif kind == "parts":
        source, n_saved = tmp_path / "in", 3 * 60 * 8 * 4
        source.mkdir()
        for name in ("encoder_model", "decoder_model"):
            tiny_onnx.lost(source / f"{name}.onnx")
        n_source = sum(path.stat().st_size for path in source.iterdir())
    else:
        source, n_saved = tiny_onnx.lost(tmp_path / "m.onnx", external=kind == "external"), 60 * 8 * 4
        n_source = sum(path.stat().st_size for path in tmp_path.iterdir())
    # 16 MiB for headers and the receipt, and a sixteenth of each table for alignment
    n_tables = {"folder": 2, "parts": 4}.get(kind, 2)
    n_padding = n_tables * (60 * 8 * 4 // 16) + (4000 // 16 if kind == "folder" else 0)
    needed = n_source - n_saved + n_padding + 16 * MIB
    free = [needed - 1]
    monkeypatch.setattr("tieaudit.rewrite.shutil.disk_usage", lambda path: type("usage", (), {"free": free[0]})())
    out = rewritten(source, tmp_path / "out.onnx")
    with pytest.raises(Exception, match=f"expected {needed:,} free bytes for the copy, found {needed - 1:,}"):
        next(out)
    free[0] = needed
    assert any(next(rewritten(source, tmp_path / "out.onnx")).iterdir())


def test_what_tools_leave_in_a_folder_neither_comes_along_nor_fails_the_proof(tmp_path: Path) -> None:
    source, to = llama(tmp_path / "in", 4000), tmp_path / "out"
    for name in (".git/HEAD", ".cache/huggingface/download/x.metadata", "sub/__pycache__/m.pyc", "sub/keep.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    result = run("apply", source, "--require", "structural", "--to", to)
    assert result.exit_code == 0, result.output
    assert sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()) == [
        "config.json", "model.safetensors", "sub/keep.txt", "tieaudit.receipt.json"]  # fmt: skip


def test_a_destination_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    (tmp_path / "file").write_text("x")
    result = run("apply", source, "--to", tmp_path / "file" / "out.onnx")
    assert (result.exit_code, result.stderr.count("\n") <= 2) == (2, True)
    assert "expected a folder, found a file" in result.stderr
    assert (tmp_path / "file").read_text() == "x"


def test_untouched_tensors_have_the_same_bytes_at_the_end_of_it(tmp_path: Path) -> None:
    source = onnx_with_a_large_tensor(tmp_path / "m.onnx", external=False)
    folder = next(out := rewritten(source, tmp_path / "out.onnx"))
    graphs = [onnx.load(str(path)).graph for path in (source, folder / "m.onnx")]
    (one,), (other,) = ([t.raw_data for t in graph.initializer if t.name == "large"] for graph in graphs)
    assert one == other
    assert [t.name for t in graphs[1].initializer] == ["a", "large"]
    out.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out.ONNX.bin"])
def test_a_destination_that_is_called_like_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    result = run("apply", source, "--to", tmp_path / name)
    assert result.exit_code == 2
    assert "expected a name that ends in .onnx, or that of a folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_scheme_that_finds_nothing_beside_another_one_says_so(tmp_path: Path) -> None:
    result = run("plan", tiny_onnx.lost(tmp_path / "m.onnx"), "--scheme", "dedup", "--scheme", "untie")
    assert "untie: nothing to do in the model as it is" in " ".join(result.output.split())


def test_prepacking_is_named_only_where_a_matrix_became_one() -> None:
    facts = {"n_bytes_resident_before": 100, "n_bytes_resident_after": 200}
    assert "prepacking" in "".join(evidence.fact_lines(facts, packs=True))
    assert "prepacking" not in "".join(evidence.fact_lines(facts, packs=False))
