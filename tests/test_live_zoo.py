"""Live models of the library's own classes: their groups, their counts, and the way untied and back."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tieaudit.calling import outputs, sample_inputs  # noqa: E402
from tieaudit.depth import shared_across_depth  # noqa: E402

SMALL: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO_SIDED = {
    **SMALL, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "decoder_start_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip
ONE_SIDED = {
    **SMALL, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {**SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "LlamaForCausalLM": ("LlamaConfig", {**ONE_SIDED, "num_key_value_heads": 1}),
    "BertForPreTraining": ("BertConfig", ONE_SIDED),
    "RobertaForMaskedLM": ("RobertaConfig", ONE_SIDED),
    "AlbertForMaskedLM": ("AlbertConfig", {**ONE_SIDED, "embedding_size": 8}),
    "BartForConditionalGeneration": ("BartConfig", TWO_SIDED),
    "MarianMTModel": ("MarianConfig", {**TWO_SIDED, "decoder_vocab_size": 97}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {**SMALL, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**TWO_SIDED, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
    ),
}


def built(kind: str) -> nn.Module:
    config, sizes = KINDS[kind]
    torch.manual_seed(0)
    module = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases begin as equal constants
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def identity_groups(module: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_counts_are_those_of_the_live_module(kind: str) -> None:
    module = built(kind)
    report = tieaudit.scan(module)
    buffers = {weight.id for weight in report.subject.model.weights if not weight.parameter}
    found = {frozenset(tie.ids) for tie in report.subject.found.ties if not set(tie.ids) <= buffers}
    assert found == identity_groups(module)
    assert found  # every one of these classes ties something
    assert report.summary.n_parameters == sum(p.numel() for p in module.parameters())
    named = sum(p.numel() for _, p in module.named_parameters(remove_duplicate=False))
    assert report.summary.n_parameters_named == named > report.summary.n_parameters
    assert report.cannot_tell == ()


@pytest.mark.parametrize("kind", KINDS)
def test_untied_and_tied_again_gives_the_same_outputs_and_state(kind: str) -> None:
    module = built(kind)
    inputs = sample_inputs(module)
    before, state = outputs(module, inputs), {name: value.clone() for name, value in module.state_dict().items()}
    truth = identity_groups(module)

    def same() -> bool:
        after, now = outputs(module, inputs), module.state_dict()
        return (
            all((before[name] == after[name]).all() for name in before)
            and now.keys() == state.keys()
            and all(torch.equal(now[name], state[name]) for name in state)
        )

    untied = tieaudit.untie(module)
    assert identity_groups(module) == set()
    assert same()
    tieaudit.tie(module)
    assert identity_groups(module) == truth
    assert same()
    tieaudit.untie(module)
    assert same()
    untied.undo()
    assert identity_groups(module) == truth
    assert same()


def test_the_calls_of_albert_s_one_layer_are_in_the_exported_graph() -> None:
    module = built("AlbertForMaskedLM")
    ids = torch.randint(3, 90, (2, 7))
    made_up, given = tieaudit.scan(module), tieaudit.scan(module, inputs={"input_ids": ids})
    group = "albert.encoder.albert_layer_groups.0"
    inside = [name for name, _ in module.named_parameters() if name.startswith(group + ".")]
    for report in (made_up, given):
        (one,) = shared_across_depth(report.subject.model)
        assert (one.module, one.n_calls, list(one.ids)) == (group, 2, inside)  # num_hidden_layers
        assert [tie for tie in report.subject.found.ties if set(tie.ids) & set(inside)] == []
        # four bytes each: attention 4·(16² + 16), two norms of 32, feed-forward 2·16·24 + 24 + 16
        assert f"  {group}  16 weights  7.8 kB  used in 2 calls" in tieaudit.render(report)
        (document,) = json.loads(tieaudit.render(report, "json"))["models"]
        assert document["shared_across_depth"] == [{"module": group, "n_calls": 2, "ids": inside}]
        calls = {weight["name"]: weight["n_calls"] for weight in document["weights"] if weight["parameter"]}
        # the table serves two modules, once each; a position table, norms and heads once
        assert {name: count for name, count in calls.items() if count != 1} == dict.fromkeys(
            [*inside, "albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"], 2
        )
    assert made_up.subject.model.metadata["uses"] == (
        "from torch.export with generated inputs: input_ids int64 2×7, attention_mask int64 2×7"
    )
    assert given.subject.model.metadata["uses"] == "from torch.export with the given inputs"


def test_training_parity_of_a_three_way_tie() -> None:
    module = built("T5ForConditionalGeneration")
    parity = tieaudit.gradients(module, sample_inputs(module))
    assert parity.held
    (tied,) = parity.tied
    assert len(tied.slots) >= 3
    assert len(tied.reached) >= 3  # both embeddings and the head
