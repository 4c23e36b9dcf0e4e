"""Cases of transformers that its own classes act out here: made in memory, saved, loaded, and scanned at every step.

TF: its test suite; FACT-1_2: what 5.23 was seen to do with a folder, and 4.57 otherwise. Only version 5 is run; what
the older one does is what the data file about it says. See docs/peer-cases.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")
safetensors = pytest.importorskip("safetensors.torch")

import peer_models as peers  # noqa: E402

import tieaudit  # noqa: E402
from tests.peer_modules import codes, groups, report  # noqa: E402
from tieaudit.formats.huggingface import read  # noqa: E402
from tieaudit.formats.huggingface.defaults import table  # noqa: E402
from tieaudit.load import load_one  # noqa: E402

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
N_TABLE, N_REST = 64 * 16, 16 * (4 * 16 + 3 * 24 + 3)  # q, k, v, o; gate, up, down; three norms


def llama(*, tied: bool = True) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def folder(path: Path, *, tied: bool | None = True, drop: str = "", moved: bool = False) -> Path:
    """What save_pretrained writes of a cloned state dict, less one name, with another head, or without the flag."""
    module = llama()
    module.save_pretrained(path, state_dict={name: one.clone() for name, one in module.state_dict().items()})
    file, config = path / "model.safetensors", path / "config.json"
    tensors = safetensors.load_file(file)
    tensors.pop(drop, None)
    if moved:
        tensors[HEAD] = tensors[HEAD] + 1
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads(config.read_text())
    settings["tie_word_embeddings"] = tied
    config.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return path


def loaded(path: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(path, local_files_only=True)


def pairs(module: Any, origin: str = "aliased") -> list[tuple[str, ...]]:
    """Of parameters: the rotary frequencies are two equal buffers."""
    return [group for group in groups(module, origin) if "inv_freq" not in group[0]]


def test_TF_1_a_resized_vocabulary_leaves_the_head_tied_and_the_count_right() -> None:
    module = llama()
    assert report(module).summary.n_parameters == N_TABLE + N_REST
    module.resize_token_embeddings(74, mean_resizing=False)
    assert pairs(module) == [(EMBED, HEAD)]
    assert report(module).summary.n_parameters == N_TABLE + 10 * 16 + N_REST


def test_TF_2_a_tied_model_that_was_saved_and_loaded_has_one_tensor_for_every_group(tmp_path: Path) -> None:
    module = llama()
    module.save_pretrained(tmp_path)
    assert report(tmp_path).summary.n_parameters == report(module).summary.n_parameters == N_TABLE + N_REST
    assert pairs(loaded(tmp_path)) == pairs(module) == [(EMBED, HEAD)]


def test_FACT_1_2a_a_declared_tie_over_another_head_is_one_model_in_4_and_another_in_5(tmp_path: Path) -> None:
    """4.57: tied, the head of the file discarded, and the next save drops it. 5.23: untied, kept, written again."""
    path = folder(tmp_path / "m", moved=True)
    assert codes(path) == ["TIE101"]
    module = loaded(path)
    assert pairs(module) == pairs(module, "measured") == []
    module.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is True
    assert codes(tmp_path / "again") == ["TIE101"]  # the contradiction is saved again, and found again
    (claim,) = load_one(path).declarations
    assert set(claim.honoured_by) == {"transformers 4", "transformers 5"}
    assert report(path).summary.n_parameters == 2 * N_TABLE + N_REST


def test_FACT_1_2a_the_loaded_module_contradicts_its_class_as_the_folder_did(tmp_path: Path) -> None:
    pytest.importorskip("tieaudit.formats.torch_module.declared")
    assert codes(loaded(folder(tmp_path / "m", moved=True))) == ["TIE101"]
    module = llama()
    assert codes(module) == []
    tieaudit.untie(module)
    assert codes(module) == ["TIE102"]


def test_FACT_1_2b_an_undeclared_head_that_is_not_stored_comes_back_random(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", tied=False, drop=HEAD)
    assert codes(path) == ["TIE105"]
    module = loaded(path)
    assert pairs(module) == pairs(module, "measured") == []
    assert torch.equal(module.model.embed_tokens.weight, llama().model.embed_tokens.weight)
    assert not torch.equal(module.lm_head.weight, llama().lm_head.weight)


def test_FACT_1_2c_a_head_alone_fills_the_embedding_in_5_and_not_in_4(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", drop=EMBED)
    assert codes(path) == ["TIE106"]
    module = loaded(path)
    assert pairs(module) == [(EMBED, HEAD)]
    assert torch.equal(module.model.embed_tokens.weight, llama().lm_head.weight)


def test_FACT_1_2d_a_cloned_state_dict_writes_both_names_and_the_second_is_waste(tmp_path: Path) -> None:
    """huggingface/transformers#48972: save_pretrained looks at storages, which clones do not share."""
    path = folder(tmp_path / "m")
    assert codes(path) == ["TIE102"]
    assert report(path).summary.n_bytes_duplicate == N_TABLE * 4
    peers.applied(path, name="tied")
    tied = path.parent / "out" / "tied"
    assert report(tied).summary.n_bytes == (N_TABLE + N_REST) * 4
    assert pairs(loaded(tied)) == [(EMBED, HEAD)]


DEFAULTS = {
    (True, False): "aria emu3 glm4v glm4v_moe llava perception_lm video_llava vipllava",
    (False, True): "csm mt5 qwen3_vl_moe_text vilt",
    (False, None): "glm4v_text qwen2_5_vl_text qwen2_vl_text qwen3_vl_text",
}


def test_FACT_1_2e_without_the_flag_173_types_mean_something_else_in_4_than_in_5() -> None:
    """175 of the 387 that can be made in both; in 384 of them the data files hold what the class itself says."""
    four, five = table(4)["types"], table(5)["types"]
    changed: dict[tuple[Any, Any], list[str]] = {}
    for kind in sorted(four.keys() & five.keys()):
        now = (four[kind].get(""), five[kind].get(""))
        if now[0] is not now[1]:
            changed.setdefault(now, []).append(kind)
    assert {key: " ".join(kinds) for key, kinds in changed.items() if key != (True, None)} == DEFAULTS
    assert len(changed[True, None]) == 157
    assert five["mistral3"][""] is not five["mistral3"]["text_config"]  # and the level that is read decides


def test_FACT_1_2e_a_folder_without_the_flag_says_which_version_ties_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "ask_class", lambda *_: {"error": "transformers is not installed"})
    path = tmp_path / "m"
    path.mkdir()
    config = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}
    (path / "config.json").write_text(json.dumps(config))
    safetensors.save_file(
        {"shared.weight": torch.randn(40, 8), HEAD: torch.randn(40, 8)}, path / "model.safetensors", {"format": "pt"}
    )
    (claim,) = load_one(path).declarations
    assert (claim.active, claim.honoured_by) == (True, ("transformers 5",))
    assert "4.57.6 does not tie these" in claim.because
    assert codes(path) == ["TIE101"]
