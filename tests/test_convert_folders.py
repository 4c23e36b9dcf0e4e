"""Hugging Face folders from pytorch_model.bin to safetensors and back: same names, tensors, aliases and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tieaudit.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from torch_files import loaded, one_value, row_major_bytes  # noqa: E402  torch is optional

import tieaudit  # noqa: E402
from tieaudit.arrange import arranged  # noqa: E402
from tieaudit.convert import container_for, convert  # noqa: E402
from tieaudit.errors import RewriteRefused  # noqa: E402
from tieaudit.load import load_one  # noqa: E402
from tieaudit.plan import Choices  # noqa: E402
from tieaudit.rewrite import rewrite  # noqa: E402
from tieaudit.scan import look  # noqa: E402
from tieaudit.structural import check  # noqa: E402
from tieaudit.untouched import differences  # noqa: E402


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def llama(**changes: Any) -> Any:
    settings = dict(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()


def folder(path: Path, module: Any, state: dict[str, Any] | None = None, n_shards: int = 1) -> Path:
    """A folder as transformers 4 saved it with safe_serialization=False: every name, aliases in one storage."""
    path.mkdir()
    module.config.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "more").mkdir()
    (path / "more" / "notes.txt").write_text("notes")
    state = dict(module.state_dict()) if state is None else state
    if n_shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return path
    names = sorted(
        state, key=lambda name: "layers.1" in name
    )  # names of one tensor in one shard, as the Hub's splitter
    half = next(n for n, name in enumerate(names) if "layers.1" in name)
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, path / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0, "total_parameters": 5}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def written(source: Path, to: Path, kind: Any, schemes: tuple[str, ...] = ()) -> Any:
    """Convert by the stages themselves, with the structural proof, which runs no model; the plan."""
    model = load_one(source)
    into = container_for(model, to, kind)
    assert into is not None
    plan = convert(look(model), into, Choices(schemes=schemes) if schemes else None)
    to.mkdir()
    found, after = rewrite(model, plan, to)
    proof = check(model, after, plan, found)
    assert not proof.problems, proof.problems
    assert not differences(model, after, plan, found, proof)
    assert {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()} == set(found.files)
    return plan


def tensors(path: Path) -> dict[str, Any]:
    """Everything that the .bin files of a folder hold; aliases are within one file."""
    found: dict[str, Any] = {}
    for file in sorted(path.glob("*.bin")):
        found.update(loaded(file))
    return found


def stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(safetensors.load_file(file))
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        assert row_major_bytes(tensor) == row_major_bytes(other[name]), name


TIED = {frozenset({"model.embed_tokens.weight", "lm_head.weight"})}


@pytest.mark.parametrize("n_shards", [1, 2])
def test_there_and_back_gives_the_same_names_tensors_and_aliases(tmp_path: Path, n_shards: int) -> None:
    module = llama()
    state = dict(module.state_dict())
    # a tie that the class does not know: written twice, noted, and one tensor again on the way back
    state["model.layers.1.input_layernorm.weight"] = state["model.layers.1.post_attention_layernorm.weight"]
    source = folder(tmp_path / "a", module, state, n_shards)
    there, back = tmp_path / "b", tmp_path / "c"
    plan = written(source, there, "safetensors")
    found = stored(there)
    assert "lm_head.weight" not in found  # the class restores it
    assert_same(found, {name: one for name, one in state.items() if name != "lm_head.weight"})
    said = " ".join(plan.notes)
    assert "written as two equal ones: transformers would initialise model.layers.1" in said
    assert plan.n_bytes_saved == -8 * 4  # one norm of 8 floats more; the head was no bytes before either
    written(there, back, "torch")
    assert_same(tensors(back), tensors(source))
    assert (
        one_value(tensors(back))
        == one_value(tensors(source))
        == {
            *TIED,
            frozenset({"model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"}),
        }
    )
    weights = {path.name for path in source.iterdir()}
    assert {path.name for path in back.iterdir()} == weights
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (back / "more" / "notes.txt").read_text() == "notes"


def test_sharded_weights_stay_cut_as_they_are_and_the_index_says_what_is_where(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", llama(), n_shards=2)
    written(source, tmp_path / "b", "safetensors")
    names = {f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)}
    assert {path.name for path in (tmp_path / "b").glob("*.safetensors")} == names
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    old = json.loads((source / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert {name: file[-14:-4] for name, file in old.items() if name != "lm_head.weight"} == {
        name: file[-22:-12] for name, file in index["weight_map"].items()
    }
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in stored(tmp_path / "b").values())
    assert index["metadata"]["total_parameters"] == 5  # of the live model, whatever is stored
    assert index["metadata"]["lm_head.weight"] == "model.embed_tokens.weight"
    written(tmp_path / "b", tmp_path / "c", "torch")
    back = json.loads((tmp_path / "c" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert back == old


def test_a_class_that_does_not_tie_keeps_both_copies(tmp_path: Path) -> None:
    module = llama(tie_word_embeddings=False)
    state = dict(module.state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    plan = written(folder(tmp_path / "a", module, state), tmp_path / "b", "safetensors")
    assert_same(stored(tmp_path / "b"), state)
    assert "lm_head.weight and model.embed_tokens.weight are one tensor" in plan.notes[0]
    assert not plan.edits
    written(tmp_path / "b", tmp_path / "c", "torch")
    assert one_value(tensors(tmp_path / "c")) == TIED


def test_what_is_left_out_of_safetensors_is_what_the_class_restores_of_four_names(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=40, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
        architectures=["BartForConditionalGeneration"],
    )  # fmt: skip
    module = transformers.BartForConditionalGeneration(config).eval()
    source = folder(tmp_path / "a", module)
    assert max(len(names) for names in one_value(tensors(source))) == 4
    written(source, tmp_path / "b", "safetensors")
    four = {"model.shared.weight", "lm_head.weight", "model.encoder.embed_tokens.weight"}
    assert len((four | {"model.decoder.embed_tokens.weight"}) & stored(tmp_path / "b").keys()) == 1
    written(tmp_path / "b", tmp_path / "c", "torch")
    assert_same(tensors(tmp_path / "c"), tensors(source))
    assert one_value(tensors(tmp_path / "c")) == one_value(tensors(source))


def test_equal_copies_are_tied_on_the_way_when_a_scheme_says_so(tmp_path: Path) -> None:
    module = llama()
    state = {name: one.clone() for name, one in module.state_dict().items()}
    source = folder(tmp_path / "a", module, state)
    written(source, tmp_path / "b", "safetensors")
    assert "lm_head.weight" in stored(tmp_path / "b")  # two tensors stay two without a scheme
    plan = written(source, tmp_path / "c", "safetensors", ("dedup",))
    assert "lm_head.weight" not in stored(tmp_path / "c")
    assert plan.n_bytes_saved == 40 * 8 * 4
    written(tmp_path / "b", tmp_path / "d", "torch", ("dedup",))
    assert one_value(tensors(tmp_path / "d")) >= TIED


def test_untying_on_the_way_stores_every_name_and_switches_the_class(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", llama())
    written(source, tmp_path / "b", "safetensors", ("untie",))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in stored(tmp_path / "b")
    written(source, tmp_path / "c", "safetensors")
    written(tmp_path / "c", tmp_path / "d", "torch", ("untie",))
    assert one_value(tensors(tmp_path / "d")) == set()
    assert "lm_head.weight" in tensors(tmp_path / "d")


def test_weights_that_would_be_read_in_place_of_the_result_stay_behind_and_are_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", llama())
    written(source, tmp_path / "b", "safetensors")
    (tmp_path / "b" / "model.fp16.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(b"another")
    plan = written(tmp_path / "b", tmp_path / "c", "torch")
    assert "left behind" in " ".join(plan.notes) and "model.fp16.safetensors" in " ".join(plan.notes)
    assert_same(tensors(tmp_path / "c"), tensors(source))


def test_a_tie_across_shards_lies_in_one_file(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", llama(), n_shards=2)
    state = dict(llama().state_dict())
    first = {"model.embed_tokens.weight": state.pop("model.embed_tokens.weight")}
    second = {name: one.clone() for name, one in state.items()}
    weight_map = {}
    for number, part in enumerate((first, second), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(part, source / file)
        weight_map.update(dict.fromkeys(part, file))
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    written(source, tmp_path / "b", "safetensors", ("dedup",))
    assert "lm_head.weight" not in stored(tmp_path / "b")
    written(tmp_path / "b", tmp_path / "c", "torch")
    index = json.loads((tmp_path / "c" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] == index["model.embed_tokens.weight"]
    assert one_value(tensors(tmp_path / "c")) == TIED


def test_a_quantised_tensor_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    module = llama()
    state = dict(module.state_dict())
    state["model.norm.weight"] = state["model.norm.weight"].to_sparse()
    source = folder(tmp_path / "a", module, state)
    with pytest.raises(RewriteRefused, match=r"tensor 'model\.norm\.weight' cannot be written to a safetensors file"):
        tieaudit.apply(source, to=tmp_path / "b", container="safetensors")
    assert sorted(tmp_path.iterdir()) == [source]


def test_the_arranged_model_reads_nothing_and_leaves_the_original_alone(tmp_path: Path) -> None:
    model = load_one(folder(tmp_path / "a", llama()))
    into = container_for(model, None, "safetensors")
    assert into is not None
    plan = convert(look(model), into)
    (tmp_path / "a" / "pytorch_model.bin").unlink()
    assert {one.id for one in arranged(model, plan).weights} == {one.id for one in model.weights}


def test_transformers_runs_both_and_the_receipt_of_a_second_conversion_is_its_own(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", llama())
    for before, after, kind in (("a", "b", "safetensors"), ("b", "c", "torch")):
        result = run("apply", tmp_path / before, "--container", kind, "--to", tmp_path / after, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "end to end  held on CPU" in result.output
        assert run("verify", "--receipt", tmp_path / after / "tieaudit.receipt.json").exit_code == 0
    ids = torch.arange(12)[None]
    modules = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in "abc"]
    assert all(one.lm_head.weight is one.model.embed_tokens.weight for one in modules)
    with torch.no_grad():
        first, *others = [one(ids).logits for one in modules]
    assert all(torch.equal(first, one) for one in others)
    assert run("apply", "--undo", tmp_path / "c" / "tieaudit.receipt.json").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"} and source.is_dir()
