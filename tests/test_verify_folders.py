"""Proofs about folders of transformers models, and comparisons across a folder and ONNX files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tieaudit.change import Plan, Proof, SetConfig, Share
from tieaudit.load import load_one
from tieaudit.model import Member
from tieaudit.rewrite import rewrite
from tieaudit.verify import compare, prove

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

GPT2 = ("transformer.wte.weight", "lm_head.weight")
BART = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "lm_head.weight",
)


def outcomes(proof: Proof) -> dict[str, str]:
    return {level.name: level.outcome for level in proof.levels}


def because(proof: Proof, name: str) -> str:
    return next(level.because for level in proof.levels if level.name == name)


def live(arch: str, *, tie: bool = True) -> Any:
    torch.manual_seed(0)
    ids = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tie}
    if arch == "gpt2":
        config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, **ids)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, decoder_start_token_id=1, **ids,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).eval()


def lost(model: Any, folder: Path) -> Path:
    """The weights with every tied name written out as a copy of its own."""
    folder.mkdir()
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    safetensors_torch.save_file(copies, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    (folder / "README.md").write_text("a model")
    return folder


def repaired(folder: Path, to: Path, ids: tuple[str, ...], *more: Any, lossless: bool = True) -> tuple[Any, ...]:
    before = load_one(folder)
    share = Share(tuple(Member(id) for id in ids))
    plan = Plan(before.path, "transformers-5", ("dedup",), (share, *more), 0, lossless)
    to.mkdir()
    written, after = rewrite(before, plan, to)
    return before, after, plan, written


@pytest.mark.parametrize(("arch", "ids"), [("gpt2", GPT2), ("bart", BART)])
def test_a_repaired_folder_holds_on_every_level(tmp_path: Path, arch: str, ids: tuple[str, ...]) -> None:
    proof = prove(*repaired(lost(live(arch), tmp_path / "lost"), tmp_path / "out", ids))
    assert outcomes(proof) == {"structural": "held", "regional": "held", "end to end": "held"}
    assert proof.not_exercised == ()


def test_a_dropped_weight_that_nothing_restores_fails(tmp_path: Path) -> None:
    before, _, plan, written = repaired(lost(live("gpt2"), tmp_path / "lost"), tmp_path / "out", GPT2)
    path = tmp_path / "out" / "model.safetensors"
    tensors = safetensors_torch.load_file(str(path))
    tensors.pop("transformer.h.0.mlp.c_fc.weight")
    safetensors_torch.save_file(tensors, str(path), metadata={"format": "pt"})
    proof = prove(before, load_one(tmp_path / "out"), plan, written)
    assert outcomes(proof)["structural"] == "failed"
    assert "transformer.h.0.mlp.c_fc.weight" in because(proof, "structural")


def test_a_changed_file_beside_the_weights_fails(tmp_path: Path) -> None:
    made = repaired(lost(live("gpt2"), tmp_path / "lost"), tmp_path / "out", GPT2)
    (tmp_path / "out" / "README.md").write_text("A model")
    assert because(prove(*made), "structural") == "README.md: not named by the plan, but its content changed"


def test_a_changed_key_of_the_configuration_fails(tmp_path: Path) -> None:
    made = repaired(lost(live("gpt2"), tmp_path / "lost"), tmp_path / "out", GPT2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["layer_norm_epsilon"] = 0.1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert outcomes(prove(*made))["structural"] == "failed"


def test_a_lossy_tie_of_an_untied_folder_has_drift_and_parity(tmp_path: Path) -> None:
    folder = lost(live("gpt2", tie=False), tmp_path / "untied")
    flag = SetConfig("config.json", ("tie_word_embeddings",), True)
    proof = prove(*repaired(folder, tmp_path / "out", GPT2, flag, lossless=False))
    assert outcomes(proof) == {"structural": "held", "regional": "held", "end to end": "held"}
    assert proof.drift is not None and proof.drift > 0.01


def test_a_setting_that_tells_the_truth_changes_no_tensor(tmp_path: Path) -> None:
    folder = lost(live("gpt2", tie=False), tmp_path / "mislabelled")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    before = load_one(folder)
    edit = SetConfig("config.json", ("tie_word_embeddings",), False)
    plan = Plan(before.path, "transformers-5", ("declare",), (edit,), 0, True)
    (tmp_path / "out").mkdir()
    written, after = rewrite(before, plan, tmp_path / "out")
    proof = prove(before, after, plan, written)
    # 4.57 discards the head of the original: the outputs may differ, but the loaded tensors are the stored ones
    assert outcomes(proof) == {"structural": "held", "regional": "held", "end to end": "held"}


def test_a_folder_and_its_onnx_export_compare_equal(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = live("gpt2")
    model.save_pretrained(tmp_path / "folder")
    export(Whole(model), ["input_ids", "attention_mask"], tmp_path / "model.onnx")
    one, other = load_one(tmp_path / "folder"), load_one(tmp_path / "model.onnx")
    for proof in (compare(one, other), compare(other, one)):
        assert outcomes(proof)["end to end"] == "held"
        assert proof.levels[-1].max_difference != 0.0  # two runtimes; 0.0 would mean that one ran twice
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "changed")
    assert outcomes(compare(load_one(tmp_path / "changed"), other))["end to end"] == "failed"


def test_a_folder_and_an_export_in_parts_compare_equal(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = live("bart")
    model.save_pretrained(tmp_path / "folder")
    parts = tmp_path / "parts"
    parts.mkdir()
    export(Encoder(model), ["input_ids", "attention_mask"], parts / "encoder_model.onnx", "last_hidden_state")
    names = ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    export(Decoder(model), names, parts / "decoder_model.onnx")
    proof = compare(load_one(parts), load_one(tmp_path / "folder"))
    assert outcomes(proof)["end to end"] == "held"
    assert proof.levels[-1].max_difference != 0.0


class Whole(torch.nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=False)[0]


class Encoder(Whole):
    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.model.model.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


class Decoder(Whole):
    def forward(self, encoder_attention_mask: Any, input_ids: Any, encoder_hidden_states: Any) -> Any:
        hidden = self.model.model.decoder(
            input_ids=input_ids, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask, use_cache=False, return_dict=False,
        )[0]  # fmt: skip
        return self.model.lm_head(hidden) + self.model.final_logits_bias


def export(module: Any, names: list[str], path: Path, output: str = "logits") -> None:
    ids = torch.from_numpy(np.array([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]))
    given = {"encoder_hidden_states": torch.randn(2, 5, 16)}
    given.update({name: torch.ones_like(ids) for name in names if "mask" in name})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(given.get(name, ids) for name in names), str(path), input_names=names, output_names=[output],
            dynamic_axes={name: {0: "batch", 1: _length(name, names)} for name in (*names, output)},
            dynamo=False, opset_version=17,
        )  # fmt: skip


def _length(name: str, names: list[str]) -> str:
    return "encoder_sequence" if "encoder" in name and "encoder_hidden_states" in names else "sequence"
