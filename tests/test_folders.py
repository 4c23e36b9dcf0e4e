"""Hugging Face folders through the whole tool: what the library ties, what it would lose, what a flag claims.

The oracle is transformers itself: its own tied groups, its own count, its own logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tieaudit.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import tiny_exports  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def scan(path: Path) -> dict[str, Any]:
    result = run("scan", path, "--format", "json")
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.output)["models"][0]
    return answer


def codes(answer: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in answer["findings"]}


def lost(model: Any, folder: Path) -> Path:
    """The model with every tied name written out as a copy of its own."""
    model.config.save_pretrained(folder)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit(folder: Path, **changed: Any) -> None:
    """Replace tensors of a folder's only weight file."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **changed}, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}, indent=2))


def groups(model: Any) -> list[list[str]]:
    by: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in by.values() if len(names) > 1)


def logits(arch: str, folder: Path) -> Any:
    torch.manual_seed(0)
    inputs = tiny_exports.inputs(arch)
    model = getattr(transformers, tiny_exports.CLASSES[arch]).from_pretrained(folder).eval()
    with torch.no_grad():
        return model, model(**inputs).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lost(tiny_exports.live("llama"), tmp_path_factory.mktemp("llama"))


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.mark.parametrize("arch", ["bert", "t5", "bart"])
def test_a_lost_tie_is_found_counted_repaired_and_loads_tied_with_the_same_logits(arch: str, tmp_path: Path) -> None:
    live = tiny_exports.live(arch)
    source = lost(live, tmp_path / "lost")
    before = scan(source)
    parameters = {name for name, _ in live.named_parameters(remove_duplicate=False)}
    found = [
        [m["id"] for m in g["members"] if m["id"] in parameters] for g in before["groups"] if g["origin"] == "measured"
    ]
    assert sorted(sorted(ids) for ids in found if len(ids) > 1) == groups(live)
    assert before["summary"]["n_parameters"] == sum(p.numel() for p in live.parameters())
    assert "TIE102" in codes(before)

    plan = json.loads(run("plan", source, "--format", "json").output)["plan"]
    result = run("apply", source, "--scheme", "dedup", "--to", tmp_path / "out")
    assert result.exit_code == 0, result.output
    one, two = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    saved = sum(t.numel() * t.element_size() for t in one.values()) - sum(
        t.numel() * t.element_size() for t in two.values()
    )
    assert saved == plan["n_bytes_saved"] > 0
    _, expected = logits(arch, source)
    model, actual = logits(arch, tmp_path / "out")
    assert groups(model) == groups(live)
    assert torch.equal(actual, expected)
    assert not codes(scan(tmp_path / "out"))


def test_two_equal_layers_that_no_class_ties_are_reported_and_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "twins")
    name = "model.layers.{}.mlp.up_proj.weight"
    edit(folder, **{name.format(1): load_file(folder / "model.safetensors")[name.format(0)].clone()})
    answer = scan(folder)
    assert "TIE103" in codes(answer)
    result = run("plan", folder, "--format", "json")
    refusals = json.loads(result.output)["plan"]["refusals"]
    assert [sorted(r["ids"]) for r in refusals] == [[name.format(0), name.format(1)]]
    assert "randomly" in refusals[0]["because"]
    # the declared tie of the same folder is repaired all the same, and with --strict nothing is
    assert run("apply", folder, "--to", tmp_path / "strict", "--strict").exit_code == 2
    assert not (tmp_path / "strict").exists()


def test_a_flag_over_two_different_tensors_is_an_error_and_declare_tells_the_truth(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "broken")
    head = load_file(folder / "model.safetensors")["lm_head.weight"] + 0.5
    edit(folder, **{"lm_head.weight": head})
    configure(folder, tie_word_embeddings=True)
    answer = scan(folder)
    (finding,) = [f for f in answer["findings"] if f["code"] == "TIE101"]
    assert finding["severity"] == "error"
    assert "4.57" in finding["message"] or "4" in finding["message"]
    # 5.x keeps both tensors, so the live model has two tables
    result = run("apply", folder, "--scheme", "declare", "--to", tmp_path / "true")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "true" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (tmp_path / "true" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not codes(scan(tmp_path / "true"))


def test_io_on_an_untied_model_is_refused_with_the_difference_and_done_knowingly(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "untied")
    configure(folder, tie_word_embeddings=False)
    head = torch.randn(300, 32) * 0.02
    edit(folder, **{"lm_head.weight": head})
    refused = run("apply", folder, "--scheme", "io", "--to", tmp_path / "no")
    assert refused.exit_code == 2
    assert "9,600 of 9,600 values differ" in refused.output
    done = run("apply", folder, "--scheme", "io", "--allow-lossy", "--merge", "keep:head", "--to", tmp_path / "out")
    assert done.exit_code == 0, done.output
    model, _ = logits("llama", tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, head)


def test_untie_writes_a_copy_and_switches_the_flag_off_where_this_class_reads_it(llama: Path, tmp_path: Path) -> None:
    assert run("apply", llama, "--to", tmp_path / "tied").exit_code == 0
    result = run("apply", tmp_path / "tied", "--scheme", "untie", "--to", tmp_path / "untied")
    assert result.exit_code == 0, result.output
    model, actual = logits("llama", tmp_path / "untied")
    assert groups(model) == []
    _, expected = logits("llama", llama)
    assert torch.equal(actual, expected)


def test_other_files_come_along_and_the_input_is_untouched(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "whole")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("keep")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert run("apply", folder, "--to", tmp_path / "out").exit_code == 0
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    for name in ("tokenizer.json", "sub/notes.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_equal_zero_biases_that_the_class_ties_are_stored_once(tmp_path: Path) -> None:
    model = tiny_exports.live("bert")
    with torch.no_grad():
        model.cls.predictions.bias.zero_()
    folder = lost(model, tmp_path / "zero")
    answer = scan(folder)
    assert answer["summary"]["n_parameters"] == sum(p.numel() for p in model.parameters())
    assert run("apply", folder, "--to", tmp_path / "out").exit_code == 0
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert len({"cls.predictions.bias", "cls.predictions.decoder.bias"} & set(kept)) == 1


def test_a_sharded_folder_keeps_its_layout_and_its_index_right(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: file for file, inside in shards.items() for name in inside},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert scan(folder / "model-00002-of-00002.safetensors")["path"] == str(folder)  # a shard means its model
    assert run("apply", folder, "--to", tmp_path / "out").exit_code == 0
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {name: file for file in shards for name in load_file(tmp_path / "out" / file)}
    assert written["weight_map"] == stored
    assert written["metadata"]["total_size"] == index["metadata"]["total_size"] - 300 * 32 * 4
    model, _ = logits("llama", tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_same_model_as_folder_and_as_onnx_export_verifies_as_equal(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    live = tiny_exports.live("gpt2")
    live.save_pretrained(tmp_path / "folder")
    file = tiny_exports.export("gpt2", tmp_path / "model.onnx", dynamo=False)
    result = run("verify", tmp_path / "folder", file)
    assert result.exit_code == 0, result.output
    state = load_file(tmp_path / "folder" / "model.safetensors")
    name = next(name for name in state if name.endswith("h.0.mlp.c_fc.weight"))
    edit(tmp_path / "folder", **{name: state[name] + 0.01})
    assert run("verify", tmp_path / "folder", file).exit_code == 1


def test_what_no_file_and_no_tie_fills_is_one_finding_and_what_the_class_computes_is_none(tmp_path: Path) -> None:
    live = tiny_exports.live("bert")
    base = transformers.BertModel(live.config)  # with a pooler, which a masked language model's checkpoint lacks
    lost(base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path / "base", architectures=["BertModel"])
    answer = scan(tmp_path / "base")
    (finding,) = answer["findings"]
    assert (finding["code"], sorted(finding["ids"])) == ("TIE105", ["pooler.dense.bias", "pooler.dense.weight"])
    assert answer["cannot_tell"] == []

    tiny_exports.live("marian").save_pretrained(tmp_path / "marian")  # its sinusoids are never stored
    answer = scan(tmp_path / "marian")
    assert answer["findings"] == answer["cannot_tell"] == []


def test_nothing_to_do_is_not_said_without_what_stays_wrong(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "broken")
    edit(folder, **{"lm_head.weight": load_file(folder / "model.safetensors")["lm_head.weight"] + 0.5})
    result = run("apply", folder, "--to", tmp_path / "out")
    assert result.exit_code == 0
    assert "nothing to do for dedup" in result.output
    assert "error TIE101 broken-tie stays" in result.output
