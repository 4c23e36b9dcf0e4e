"""gqa and mqa on Hugging Face folders: what is pooled, what the class computes with it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

import tieaudit  # noqa: E402
from tieaudit.change import Pool, SetConfig  # noqa: E402
from tieaudit.errors import RewriteRefused  # noqa: E402
from tieaudit.formats.huggingface import pool  # noqa: E402
from tieaudit.load import load_one  # noqa: E402

N_LAYERS, N_HEADS, N_KV, SIZE, D, V = 2, 8, 4, 4, 32, 40
SMALL = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": N_LAYERS, "head_dim": SIZE,
    "num_attention_heads": N_HEADS, "num_key_value_heads": N_KV, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WORDS = torch.arange(1, 13).reshape(2, 6)


def saved(name: str, folder: Path, *, equal: bool = False, **settings: Any) -> Any:
    """A causal model with weights that matter; `equal`: each key and value head is that of its neighbour."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.add_(0.1 * torch.randn_like(value))
            if equal and any(one in key for one in ("k_proj", "v_proj", "k_norm")) and len(value) == N_KV * SIZE:
                heads = value.view(N_KV // 2, 2, SIZE, -1)
                heads[:, 1] = heads[:, 0]
    model.save_pretrained(folder)
    return model


def pooled_by_hand(tensor: torch.Tensor, n_groups: int) -> torch.Tensor:
    """The mean of each group of neighbouring heads, by plain loops."""
    heads = tensor.double().split(SIZE)
    each = len(heads) // n_groups
    means = [sum(heads[g * each + 1 : (g + 1) * each], heads[g * each]) / each for g in range(n_groups)]
    return torch.cat(means).to(tensor.dtype)


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        found: torch.Tensor = model(WORDS).logits
    return found


CASES = [
    # name, scheme, groups, rows of heads in each layer besides the two matrices: vectors of N_KV · SIZE numbers
    ("Llama", "gqa:2", 2, 0),
    ("Qwen2", "mqa", 1, 2),  # biases of key and value
    ("Olmo2", "gqa:2", 2, 1),  # a norm over all key heads
    ("Qwen3", "gqa:2", 2, 0),  # a norm within each head stays as it is
]


@pytest.mark.parametrize(("name", "scheme", "groups", "n_vectors"), CASES, ids=[one[0] for one in CASES])
def test_the_class_computes_with_fewer_heads_what_it_computes_with_each_repeated(
    name: str, scheme: str, groups: int, n_vectors: int, tmp_path: Path
) -> None:
    model = saved(name, tmp_path / "in")
    done = tieaudit.apply(tmp_path / "in", to=tmp_path / "out", scheme=scheme, allow_lossy=True)
    assert [level.outcome for level in done.proof.levels] == ["held"] * 3
    assert done.proof.not_exercised == ()
    assert done.proof.drift is not None and done.proof.drift > 1e-3
    # two matrices of D columns and some vectors, of whose N_KV · SIZE rows (N_KV − G) · SIZE go, in every layer
    n_gone = N_LAYERS * (2 * D + n_vectors) * (N_KV - groups) * SIZE
    assert done.plan.n_bytes_saved == 4 * n_gone
    result = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    count = {one: sum(p.numel() for p in one.parameters()) for one in (model, result)}
    assert count[result] == count[model] - n_gone
    assert load_one(tmp_path / "out").metadata["n_parameters_live"] == str(count[result])
    assert result.config.num_key_value_heads == groups

    now = dict(result.named_parameters())
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.shape == now[key].shape:
                assert torch.equal(value, now[key])
                continue
            assert torch.equal(now[key], pooled_by_hand(value, groups))
            wide = [one for head in now[key].split(SIZE) for one in [head] * (N_KV // groups)]
            value.copy_(torch.cat(wide))
        expected, found = model(WORDS).logits, result(WORDS).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_shards_are_pooled_where_they_lie_and_the_index_says_the_new_size(tmp_path: Path) -> None:
    saved("Llama", tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    before = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    assert len(set(before["weight_map"].values())) > 2
    done = tieaudit.apply(tmp_path / "in", to=tmp_path / "out", scheme="mqa", allow_lossy=True)
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert after["weight_map"] == before["weight_map"]
    n_gone = N_LAYERS * 2 * D * (N_KV - 1) * SIZE
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] - 4 * n_gone
    assert after["metadata"]["total_parameters"] == before["metadata"]["total_parameters"] - n_gone
    assert {level.outcome for level in done.proof.levels} == {"held"}


@pytest.mark.parametrize("name", ["Olmo2"])  # biases or none, norms of all heads: what pools with the heads
def test_heads_that_are_equal_already_cost_nothing(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "in", equal=True)
    done = tieaudit.apply(tmp_path / "in", to=tmp_path / "out", scheme="gqa:2", allow_lossy=True)
    assert done.plan.n_bytes_saved > 0
    assert done.proof.drift is not None
    assert done.proof.drift < 1e-6
    assert torch.allclose(logits(tmp_path / "out"), logits(tmp_path / "in"), atol=1e-6)
    kept = {
        key: value
        for file in (tmp_path / "out").glob("*.safetensors")
        for key, value in safetensors.load_file(file).items()
    }
    for file in (tmp_path / "in").glob("*.safetensors"):
        for key, value in safetensors.load_file(file).items():
            if kept[key].shape != value.shape:  # the numbers themselves, bit for bit
                assert torch.equal(torch.cat([one for head in kept[key].split(SIZE) for one in (head, head)]), value)


def test_the_setting_is_written_where_the_class_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = dict(SMALL)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    plan = tieaudit.plan(tmp_path / "in", scheme="gqa:2", allow_lossy=True)
    settings = [edit for edit in plan.edits if isinstance(edit, SetConfig)]
    assert [(one.file, one.key, one.value) for one in settings] == [
        ("config.json", ("text_config", "num_key_value_heads"), 2)
    ]
    assert all("language_model" in one.id for edit in plan.edits if isinstance(edit, Pool) for one in edit.weights)
    # the tower that looks at pictures has as many as query heads, and a pooling head that makes all three in one
    fused, left = plan.refusals
    assert fused.because.endswith("by 1 projection: their heads are not told apart")
    assert all("vision" in id for id in left.ids)
    assert len(left.ids) == 2
    assert "has no setting that counts the key and value heads of these" in left.because
    assert "text_config.num_key_value_heads counts those of others" in left.because
    done = tieaudit.apply(tmp_path / "in", to=tmp_path / "out", scheme="gqa:2", allow_lossy=True, require="regional")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["num_key_value_heads"] == 2
    assert "num_key_value_heads" not in written
    assert "failed" not in {level.outcome for level in done.proof.levels}


def test_a_folder_of_pickles_is_pooled_on_its_way_into_safetensors(tmp_path: Path) -> None:
    model = saved("Llama", tmp_path / "in")
    torch.save(model.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    (tmp_path / "in" / "model.safetensors").unlink()
    plan = tieaudit.plan(tmp_path / "in", scheme="gqa:2", allow_lossy=True)
    assert plan.edits == ()
    assert ["--container safetensors pools it" in one.because for one in plan.refusals] == [True]
    done = tieaudit.apply(
        tmp_path / "in", to=tmp_path / "out", scheme="gqa:2", allow_lossy=True, container="safetensors"
    )
    assert "failed" not in {level.outcome for level in done.proof.levels}
    found = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    for key, value in model.state_dict().items():
        wanted = pooled_by_hand(value, 2) if "k_proj" in key or "v_proj" in key else value
        assert torch.equal(found[key], wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2
    logits(tmp_path / "out")


def refusals(folder: Path, scheme: str = "gqa:2") -> list[str]:
    plan = tieaudit.plan(folder, scheme=scheme, allow_lossy=True)
    assert plan.edits == ()
    return [one.because for one in plan.refusals]


def test_what_the_class_cannot_be_told_is_refused_once_for_all_projections(tmp_path: Path) -> None:
    saved("OPT", tmp_path / "opt", ffn_dim=48, word_embed_proj_dim=D)
    (said,) = refusals(tmp_path / "opt")
    assert said.endswith("has no setting that counts the key and value heads, so config.json cannot say it")
    assert said.startswith("OPTForCausalLM of transformers")
    saved("Llama", tmp_path / "llama")
    said = "there are 4 key and value heads (num_key_value_heads)"
    assert refusals(tmp_path / "llama", "gqa:3") == [f"{said}, which 3 groups do not divide"]
    assert refusals(tmp_path / "llama", "gqa:4") == [f"{said}, no more than the 4 asked for"]
    plan = tieaudit.plan(tmp_path / "llama", scheme="gqa:2")
    assert ["4 heads would become 2, each the mean of 2" in one.because for one in plan.refusals] == [True]
    saved("Phi3", tmp_path / "phi3")
    assert ["their heads are not told apart" in one for one in refusals(tmp_path / "phi3")] == [True]


def test_heads_that_another_scheme_took_are_not_pooled_as_well(tmp_path: Path) -> None:
    saved("Llama", tmp_path / "in")
    plan = tieaudit.plan(tmp_path / "in", scheme=("shared-kv", "gqa:2"), allow_lossy=True)
    assert not any(isinstance(edit, (Pool, SetConfig)) for edit in plan.edits)
    assert {one.scheme for one in plan.refusals} == {"gqa"}
    assert all("conflicts with what shared-kv already does" in one.because for one in plan.refusals)


def test_codes_are_not_averaged(tmp_path: Path) -> None:
    saved("Llama", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    assert ["quantization_config" in one for one in refusals(tmp_path / "in")] == [True]


def test_without_transformers_the_data_file_knows_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Llama", "Qwen2", "Olmo2"):
        saved(name, tmp_path / name)
    asked = {
        name: tieaudit.plan(tmp_path / name, scheme="gqa:2", allow_lossy=True).edits
        for name in ("Llama", "Qwen2", "Olmo2")
    }
    pool._answer.cache_clear()
    monkeypatch.setattr(pool, "ask_class", lambda *_: {"error": "transformers is not installed"})
    for name, edits in asked.items():
        found = tieaudit.plan(tmp_path / name, scheme="gqa:2", allow_lossy=True)
        assert [type(edit) for edit in found.edits] == [type(edit) for edit in edits]
        weights = [
            {one.id for edit in some if isinstance(edit, Pool) for one in edit.weights} for some in (found.edits, edits)
        ]
        assert weights[0] == weights[1]
        assert len(weights[0]) >= 2 * N_LAYERS
        assert found.edits[-1] == edits[-1]
    saved("Phi3", tmp_path / "phi3")
    saved("OPT", tmp_path / "opt", ffn_dim=48, word_embed_proj_dim=D)
    (said,) = refusals(tmp_path / "opt")
    assert said.startswith("OPTForCausalLM of transformers 5")
    config = json.loads((tmp_path / "Llama" / "config.json").read_text())
    del config["num_key_value_heads"]
    (tmp_path / "Llama" / "config.json").write_text(json.dumps(config))
    assert ["config.json does not say how many heads there are" in one for one in refusals(tmp_path / "Llama")] == [
        True
    ]
    config["architectures"] = ["SomethingNew"]
    (tmp_path / "Llama" / "config.json").write_text(json.dumps(config))
    assert ["the data file does not know it" in one for one in refusals(tmp_path / "Llama")] == [True]
    pool._answer.cache_clear()


@pytest.mark.parametrize(
    ("name", "before", "after", "fits"),
    [
        ("l.k_proj.weight", [16, 8], [4, 8], True),
        ("l.v_proj.bias", [16], [4], True),
        ("attention.self.key.weight", [16, 8], [4, 8], True),
        ("l.kv_proj.weight", [32, 8], [8, 8], False),  # keys and values in one: neighbours are no group
        ("l.qkv_proj.weight", [48, 8], [24, 8], False),
        ("l.o_proj.weight", [8, 16], [8, 4], False),
        ("l.k_proj.weight", [16, 8], None, False),
        ("l.k_proj.weight", [16, 8], [5, 8], False),
    ],
)
def test_only_rows_that_are_heads_of_keys_or_of_values_are_pooled(
    name: str, before: list[int], after: list[int] | None, fits: bool
) -> None:
    assert pool.rows_are_heads(name, before, after, 4) == fits


@pytest.mark.parametrize("what", ["safetensors", "torch", "module", "program"])
def test_what_holds_no_setting_says_where_heads_can_be_pooled(what: str, tmp_path: Path) -> None:
    model = saved("Llama", tmp_path / "in")
    if what == "module":
        with pytest.raises(
            RewriteRefused, match="the code of a live module cuts keys and values into the heads"
        ) as told:
            tieaudit.tie(model, scheme="mqa", allow_lossy=True)
        assert "pool the Hugging Face folder or the ONNX model" in str(told.value)
        return
    path = tmp_path / {"safetensors": "m.safetensors", "torch": "m.pt", "program": "m.pt2"}[what]
    if what == "safetensors":
        safetensors.save_file(dict(model.state_dict()), path)
    elif what == "torch":
        torch.save(model.state_dict(), path)
    else:

        class Plain(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj, self.o_proj = (torch.nn.Linear(8, 8) for _ in range(4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                q, k, v = (one(x).view(2, 3, 2, 4).transpose(1, 2) for one in (self.q_proj, self.k_proj, self.v_proj))
                mixed = torch.softmax(q @ k.mT, -1) @ v
                return self.o_proj(mixed.transpose(1, 2).reshape(2, 3, 8))

        torch.export.save(torch.export.export(Plain().eval(), (torch.randn(2, 3, 8),)), path)
    (said,) = refusals(path, "mqa")
    assert "pool the Hugging Face folder" in said
