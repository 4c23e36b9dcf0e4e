"""Folders whose weights are elsewhere: what the index and the class say, and that nothing is missing or clean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from tieaudit import scan as scan_in_python
from tieaudit.cli import main
from tieaudit.errors import CorruptFile, WeightsNotHere
from tieaudit.formats.huggingface import huggingface, read, unfetched
from tieaudit.load import load_one, locate
from tieaudit.model import Model
from tieaudit.pointers import Elsewhere, dvc_targets, elsewhere
from tieaudit.scan import scan
from tieaudit.storage import NotHere, no_values
from tieaudit.verdict import Report

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 16,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TABLE = np.arange(1200, dtype=np.float32).reshape(300, 4)


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (read, unfetched):
        monkeypatch.setattr(module, "ask_class", lambda *_: {"error": "transformers is not installed"})


def folder_of(folder: Path, files: dict[str, str | dict[str, np.ndarray]], **changed: Any) -> Path:
    """A folder of pointers (texts) and real shards (tensors), without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changed}))
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            save_file(content, folder / name)
    return folder


def indexed(folder: Path, weight_map: dict[str, str], **changed: Any) -> Path:
    """A folder of pointers beside a real index."""
    folder_of(folder, dict.fromkeys(weight_map.values(), LFS), **changed)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def loaded(folder: Path) -> Model:
    ((path, files),) = huggingface.group([folder])
    return huggingface.load(path, files)


def report(folder: Path) -> Report:
    return scan(loaded(folder))


def codes(found: Report) -> tuple[list[str], list[str]]:
    return [one.code for one in found.findings], [one.code for one in found.cannot_tell]


@pytest.mark.usefixtures("no_transformers")
def test_without_an_index_the_data_file_names_table_and_head_and_neither_is_called_missing(tmp_path: Path) -> None:
    model = loaded(folder_of(tmp_path, {"model.safetensors": LFS}))
    assert {weight.name for weight in model.weights} == {EMBED, HEAD}
    assert all(no_values(weight.storage) for weight in model.weights if weight.storage)
    assert not any(weight.absent for weight in model.weights)
    assert {(weight.shape, weight.dtype, weight.parameter) for weight in model.weights} == {((0,), "bfloat16", None)}
    found = scan(model)
    assert codes(found) == ([], ["TIE101", "TIE902"])
    assert (found.summary.n_parameters, found.summary.n_bytes) == (None, 0)
    assert found.candidates == () and not found.subject.found.unreadable
    # tied or not: whether the head is stored is in the file that is not here
    assert codes(report(folder_of(tmp_path, {}, tie_word_embeddings=False))) == ([], ["TIE104", "TIE902"])


def test_the_installed_class_names_every_parameter_with_its_shape_and_their_number(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = loaded(folder_of(tmp_path, {"model.safetensors": LFS}))
    shapes = {weight.name: weight.shape for weight in model.weights}
    assert shapes[UP] == (8, 4) and shapes[EMBED] == shapes[HEAD] == (16, 4)
    # table 16·4, four projections 4·4, three of the MLP 8·4, three norms of 4: 64 + 64 + 96 + 12 = 236; the head, 64
    # more, is the table
    summary = scan(model).summary
    assert (summary.n_parameters, summary.n_parameters_named) == (236, None)  # what the files name is not known
    assert summary.n_parameters_because == "as the class counts them: the weights are not here"
    assert scan(loaded(folder_of(tmp_path, {}, tie_word_embeddings=False))).summary.n_parameters == 236 + 64


@pytest.mark.usefixtures("no_transformers")
def test_a_real_index_says_what_is_realised_by_absence_and_what_is_missing(tmp_path: Path) -> None:
    shards = {EMBED: "model-00001-of-00002.safetensors", UP: "model-00002-of-00002.safetensors"}
    model = loaded(indexed(tmp_path / "tied", shards))
    assert model.metadata["weights"].startswith("not here: 2 of 2 files, the first: model-00001-of-00002.safetensors (")
    assert {weight.name: weight.absent for weight in model.weights} == {EMBED: False, UP: False, HEAD: True}
    found = scan(model)
    assert codes(found) == ([], ["TIE902"])
    assert "absent" in {tie.origin for tie in found.subject.found.ties}
    findings, unsure = codes(report(indexed(tmp_path / "untied", shards, tie_word_embeddings=False)))
    assert (findings, unsure) == (["TIE105"], ["TIE902"])


@pytest.mark.usefixtures("no_transformers")
def test_shards_that_are_here_are_judged_beside_one_that_is_not(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    folder = indexed(tmp_path, {EMBED: first, HEAD: first, UP: second})
    save_file({EMBED: TABLE, HEAD: TABLE.copy()}, folder / first)
    model = loaded(folder)
    assert not model.weights_here
    assert {weight.name: isinstance(weight.storage, NotHere) for weight in model.weights} == {
        EMBED: False,
        HEAD: False,
        UP: True,
    }
    assert codes(scan(model)) == (["TIE102"], ["TIE902"])
    save_file({EMBED: TABLE}, folder / first)
    with pytest.raises(CorruptFile, match=r"expected tensor 'lm_head\.weight' in model-00001-of-00002"):
        loaded(folder)


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors.dvc", "only model.safetensors.dvc"),
        ("pytorch_model.bin.dvc", "only pytorch_model.bin.dvc"),
        ("pytorch_model.bin", "a git-LFS pointer to 9 bytes"),
        ("model.safetensors.index.json", "a git-LFS pointer to 9 bytes"),
        ("pytorch_model.bin.index.json", "a git-LFS pointer to 9 bytes"),
    ],
)
def test_every_kind_of_weight_file_may_be_elsewhere(tmp_path: Path, name: str, said: str) -> None:
    folder = folder_of(tmp_path, {name: LFS if not name.endswith(".dvc") else "outs:\n- path: x\n"})
    assert huggingface.owns(folder)
    model = loaded(folder)
    assert model.metadata["weights"] == f"not here: {name.removesuffix('.dvc')} ({said})"
    assert codes(scan(model)) == ([], ["TIE101", "TIE902"])


@pytest.mark.usefixtures("no_transformers")
def test_a_class_that_nobody_knows_is_a_model_of_no_known_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"model.safetensors": LFS}, architectures=["Nobody"], model_type="nobody")
    model = loaded(folder)
    assert model.weights == ()
    assert codes(scan(model)) == ([], ["TIE902", "TIE902"])


@pytest.mark.usefixtures("no_transformers")
def test_a_flag_that_is_no_boolean_is_found_though_the_weights_are_elsewhere(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, {"model.safetensors": LFS}, tie_word_embeddings="true", text_config={"tie_word_embeddings": [[1]]}
    )
    findings = report(folder).findings
    assert [finding.code for finding in findings] == ["TIE111", "TIE111"]
    assert 'config.json:tie_word_embeddings is "true"' in findings[0].message
    assert "config.json:text_config.tie_word_embeddings is a list" in findings[1].message


@pytest.mark.usefixtures("no_transformers")
def test_a_config_that_is_a_pointer_itself_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"model.safetensors": LFS})
    (folder / "config.json").write_text(LFS)
    with pytest.raises(WeightsNotHere, match=r"config\.json: a git-LFS pointer"):
        loaded(folder)


def test_scan_looks_and_cannot_tell_and_what_needs_the_weights_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"model.safetensors": LFS})
    done = CliRunner().invoke(main, ["scan", str(folder)])
    assert done.exit_code == 0
    assert "the weights are not here" in done.output and "cannot tell" in done.output
    assert [one.code for one in scan_in_python(folder).cannot_tell][-1] == "TIE902"
    for words in (
        ["plan", str(folder)],
        ["apply", str(folder), "--to", str(tmp_path / "out")],
        ["verify", str(folder), str(folder)],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 2
        assert "the weights are not here" in done.output and len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    lone = tmp_path / "lone.safetensors"
    lone.write_text(LFS)
    done = CliRunner().invoke(main, ["scan", str(lone)])
    assert done.exit_code == 2 and "git-LFS pointer" in done.output
    with pytest.raises(WeightsNotHere):
        load_one(lone)


def test_a_scan_of_a_cache_finds_the_snapshot_whose_blob_is_missing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "models--x" / "snapshots" / "1", {})
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    (source,), errors = locate([str(tmp_path)])
    assert errors == [] and source.path == folder
    assert not source.load().weights_here


# ---- pointers ----


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (LFS, Elsewhere("a git-LFS pointer to 9 bytes", "run `git lfs pull`")),
        ("version https://git-lfs.github.com/spec/v1\n", Elsewhere("a git-LFS pointer", "run `git lfs pull`")),
        ("/annex/objects/MD5-s1--0\n", Elsewhere("a git-annex pointer", "run `git annex get`")),
        ("# xet version 0\nfilesize = 5\n", Elsewhere("a Git-Xet pointer to 5 bytes", "run `git xet checkout`")),
        (LFS + " " * 1024, None),
        ("", None),
        ("a model", None),
    ],
)
def test_a_pointer_is_small_and_begins_as_its_tool_says(tmp_path: Path, content: str, found: Elsewhere | None) -> None:
    (tmp_path / "m").write_text(content)
    assert elsewhere(tmp_path / "m") == found


def test_what_is_not_there_is_elsewhere_only_if_somebody_says_so(tmp_path: Path) -> None:
    assert elsewhere(tmp_path / "m") is None
    (tmp_path / "m.dvc").write_text("")
    assert elsewhere(tmp_path / "m") == Elsewhere("only m.dvc", "run `dvc pull`")
    (tmp_path / "link").symlink_to(".git/annex/objects/x")
    assert elsewhere(tmp_path / "link") == Elsewhere("a link to a file that is not there", "run `git annex get`")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "pipe", "n" * 300, "nul\0", "link/inside"):
        assert elsewhere(tmp_path / name) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("outs:\n- md5: 1\n  size: 2\n  path: a.onnx\n", ["a.onnx"]),
        ("deps:\n- path: source.onnx\nouts:\n- path: 'b c.onnx'\n- path: \"d.onnx\"\n", ["b c.onnx", "d.onnx"]),
        ("wdir: sub\nouts:\n- path: a.onnx\n", ["sub/a.onnx"]),
        ("md5: 1\n", ["m.onnx"]),
        ("", ["m.onnx"]),
        ("outs:\n- path: ../../etc/passwd\n", []),
        ("outs:\n- path: /etc/passwd\n", []),
        ("\xff\xfe\0", ["m.onnx"]),
    ],
)
def test_a_note_of_dvc_names_what_it_keeps_below_its_folder(tmp_path: Path, text: str, kept: list[str]) -> None:
    (tmp_path / "m.onnx.dvc").write_text(text, encoding="latin-1")
    assert dvc_targets(tmp_path / "m.onnx.dvc") == [tmp_path / name for name in kept]
