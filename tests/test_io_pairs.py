"""The pair of input embedding and output head that io proposes is the library's, whatever the shapes and names are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tieaudit.formats.huggingface import huggingface
from tieaudit.plan import Choices, plan
from tieaudit.propose import propose, schemes
from tieaudit.scan import look
from tieaudit.toy import ramp, toy
from tieaudit.verdict import Candidate, Refusal, Subject

E, H = "model.embed_tokens.weight", "lm_head.weight"
BY_CLASS = {E: "token_embedding", H: "output_head"}


def proposed(subject: Subject) -> tuple[list[Candidate], list[Refusal]]:
    return propose(subject, schemes(["io"])[0])


def test_a_padded_vocabulary_is_a_candidate_of_the_rows_of_both_that_nothing_writes() -> None:
    subject = toy({E: ramp(72, 8), H: ramp(64, 8, seed=1)}, roles_by_class=BY_CLASS)
    ((one,), refusals) = proposed(subject)
    assert {member.id for member in one.members} == {E, H}
    assert (one.action, one.n_bytes_saved, refusals) == ("fit", 64 * 8 * 4, [])  # 64 rows, not 72
    assert "64 rows of both" in one.because
    made = plan(subject, Choices(schemes=("io",), allow_lossy=True))
    assert made.edits == ()
    assert "nothing writes that" in made.refusals[0].because


def test_two_widths_need_a_map_whose_bytes_are_not_saved() -> None:
    subject = toy({E: ramp(64, 8), H: ramp(64, 32, seed=1)}, roles_by_class=BY_CLASS)
    ((one,), _) = proposed(subject)
    # 64·32 values of the head become a map of 8·32, four bytes each; tempting: all 64·32
    assert (one.action, one.n_bytes_saved) == ("fit", (64 * 32 - 8 * 32) * 4)


def test_tables_that_share_neither_rows_nor_width_are_refused() -> None:
    candidates, (refusal,) = proposed(toy({E: ramp(72, 8), H: ramp(64, 32, seed=1)}, roles_by_class=BY_CLASS))
    assert candidates == []
    assert "fits no token embedding" in refusal.because


def test_of_a_table_for_both_sides_and_a_copy_in_each_the_class_decides() -> None:
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tables = {name: ramp(64, 8, seed=at) for at, name in enumerate(names)}
    told = dict.fromkeys(names, "token_embedding")
    ((one,), _) = proposed(toy({**tables, H: ramp(64, 8, seed=9)}, roles_by_class={**told, H: "output_head"}))
    assert {member.id for member in one.members} == {"shared.weight", H}
    ((one,), _) = proposed(toy({**dict(list(tables.items())[1:]), H: ramp(64, 8, seed=9)}))
    assert {member.id for member in one.members} == {"decoder.embed_tokens.weight", H}  # no class: the decoder's


SMALL: dict[str, Any] = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "decoder_start_token_id": 1}  # fmt: skip
CLASSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", LAYERS, "share"),
    "bert": ("BertLMHeadModel", LAYERS, "share"),
    "bart": ("BartForCausalLM", SIDES, "share"),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        "share",
    ),
    "marian": ("MarianForCausalLM", {**SIDES, "decoder_vocab_size": 160}, "fit"),  # the head keeps 101 rows
    "rembert": ("RemBertForCausalLM", {**LAYERS, "input_embedding_size": 8, "output_embedding_size": 40}, "fit"),
}


@pytest.fixture(params=CLASSES)
def untied(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A live model of the library's own class whose embedding and head are two tensors."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, settings, _ = CLASSES[request.param]
    config = transformers.AutoConfig.for_model(request.param, **{**SMALL, **settings})
    config.tie_word_embeddings, config.use_cache, config.is_decoder = False, False, True
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # no two tensors equal by their initialisation
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return request.param, model


def library_pair(model: Any) -> set[str]:
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert len(tables) == 2
    return {name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in tables}


def test_a_folder_yields_exactly_the_librarys_pair(untied: tuple[str, Any], tmp_path: Path) -> None:
    arch, model = untied
    model.save_pretrained(tmp_path / arch)
    ((path, files),) = huggingface.group([tmp_path / arch])
    subject = look(huggingface.load(path, files))
    ((one,), refusals) = proposed(subject)
    assert {subject.model.by_id[member.id].name for member in one.members} == library_pair(model)
    assert (one.action, refusals) == (CLASSES[arch][2], [])
    assert json.loads((tmp_path / arch / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_scrambled_export_yields_exactly_the_librarys_pair(untied: tuple[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from benchmarks.role_exports import export, scramble
    from benchmarks.role_truth import truth_of
    from benchmarks.roles import live_pair
    from tieaudit.formats.onnx.read import load

    arch, model = untied
    if arch != "rembert":
        pytest.skip("one export here, because they are slow: benchmarks/roles.py looks at those of a whole zoo")
    proto = export(model)
    origin = scramble(proto, model)
    path = tmp_path / "model.onnx"
    onnx.save(proto, str(path))
    assert not any("embed" in one.name or "head" in one.name for one in proto.graph.initializer)
    ((one,), refusals) = proposed(look(load(path, (path,))))
    truth = {name: said for name, said in truth_of(model).items() if said is not None}
    wanted = live_pair(model, truth, origin.values())
    assert len(wanted) == 2
    assert {origin[member.id] for member in one.members} == wanted
    assert (one.action, refusals) == (CLASSES[arch][2], [])
