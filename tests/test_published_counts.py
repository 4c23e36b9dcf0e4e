"""Parameter counts that papers print, from live modules; built on the meta device, so that size does not matter.

Each number is worked out beside it, with the tempting wrong answer.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.torch_modules import TiedLM  # noqa: E402


def counted(module: nn.Module) -> tuple[int | None, int | None]:
    """Parameters counted once, and by name."""
    total = tieaudit.scan(module).summary
    return total.n_parameters, total.n_parameters_named


@pytest.mark.parametrize(
    ("size", "untied", "tied", "n_second_biases"),
    [
        # 2·10,000·d + 10,000 (output bias) + 2 layers · 4·(2·d² + d), one bias vector for each gate
        (200, 4_651_600, 2_651_600, 1_600),
        (1500, 66_022_000, 51_022_000, 12_000),
    ],
)
def test_press_and_wolf_s_language_models(size: int, untied: int, tied: int, n_second_biases: int) -> None:
    """Table 6 of Press & Wolf 2017. PyTorch's LSTM has two bias vectors for each gate, b_ih and b_hh: 2·4·d more."""
    with torch.device("meta"):
        apart = TiedLM(10_000, size, tied=False, n_layers=2)
        one = TiedLM(10_000, size, n_layers=2)
    assert n_second_biases == 2 * 4 * size
    assert counted(apart) == (untied + n_second_biases,) * 2
    assert counted(one) == (tied + n_second_biases, untied + n_second_biases)
    for module in (apart, one):  # as in the paper: one bias for each gate
        for layer in range(2):
            del module.rnn._parameters[f"bias_hh_l{layer}"]
    assert counted(apart) == (untied, untied)
    assert counted(one) == (tied, untied)
    tieaudit.untie(one)
    assert counted(one) == (untied, untied)


transformers = pytest.importorskip("transformers")


def on_meta(config: Any, kind: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


ALBERT = {
    # published 12M; 31M with an embedding as wide as the model; large 18M, xlarge 60M, xxlarge 235M (cards: 58M, 223M)
    (128, 768, 12, 3072): 11_683_584,
    (768, 768, 12, 3072): 31_705_344,
    (128, 1024, 16, 4096): 17_683_968,
    (128, 2048, 16, 8192): 58_724_864,
    (128, 4096, 64, 16384): 222_595_584,
}


@pytest.mark.parametrize(("sizes", "expected"), ALBERT.items())
def test_albert_s_table_of_shared_layers(sizes: tuple[int, int, int, int], expected: int) -> None:
    embedding, hidden, heads, inner = sizes
    config = transformers.AlbertConfig(
        vocab_size=30_000, embedding_size=embedding, hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=inner, num_hidden_layers=12,
    )  # fmt: skip
    assert counted(on_meta(config, "AlbertModel")) == (expected, expected)  # one layer under one name: no path repeats


def test_albert_s_masked_head_by_path_and_once() -> None:
    config = transformers.AlbertConfig(
        vocab_size=30_000, embedding_size=128, hidden_size=768, num_attention_heads=12, intermediate_size=3072
    )
    assert counted(on_meta(config, "AlbertForMaskedLM")) == (11_221_680, 15_091_680)


T5 = {"small": (512, 8, 2048, 6), "base": (768, 12, 3072, 12)}


def t5(name: str) -> Any:
    width, heads, inner, layers = T5[name]
    return transformers.T5Config(d_model=width, num_heads=heads, d_ff=inner, num_layers=layers, d_kv=64)


def bart(width: int, layers: int, inner: int, heads: int) -> Any:
    return transformers.BartConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        encoder_attention_heads=heads, decoder_attention_heads=heads,
    )  # fmt: skip


def llama(**sizes: int) -> Any:
    return transformers.LlamaConfig(**sizes, tie_word_embeddings=True, vocab_size=128_256, num_hidden_layers=16)


COUNTS = {
    "GPT-2": (lambda: transformers.GPT2Config(), "GPT2LMHeadModel", 124_439_808, 163_037_184),
    "GPT-2 xl": (
        lambda: transformers.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
        "GPT2LMHeadModel",
        1_557_611_200,
        1_638_022_400,
    ),
    "distilgpt2": (lambda: transformers.GPT2Config(n_layer=6), "GPT2LMHeadModel", 81_912_576, 120_509_952),
    "BertModel base": (lambda: transformers.BertConfig(), "BertModel", 109_482_240, 109_482_240),
    "BertForMaskedLM base": (lambda: transformers.BertConfig(), "BertForMaskedLM", 109_514_298, 132_985_716),
    "BertForPreTraining base": (lambda: transformers.BertConfig(), "BertForPreTraining", 110_106_428, 133_577_846),
    "DistilBERT": (lambda: transformers.DistilBertConfig(), "DistilBertForMaskedLM", 66_985_530, 90_426_426),
    "T5 small": (lambda: t5("small"), "T5ForConditionalGeneration", 60_506_624, 109_855_232),
    "T5 base": (lambda: t5("base"), "T5ForConditionalGeneration", 222_903_552, 296_926_464),
    "BART base": (lambda: bart(768, 6, 3072, 12), "BartForConditionalGeneration", 139_420_416, 255_230_976),
    "BART large": (lambda: bart(1024, 12, 4096, 16), "BartForConditionalGeneration", 406_291_456, 560_705_536),
    "Llama-3.2-1B": (
        lambda: llama(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
        "LlamaForCausalLM",
        1_235_814_400,
        1_498_482_688,
    ),
    "OPT-125M": (lambda: transformers.OPTConfig(), "OPTForCausalLM", 125_239_296, 163_848_192),
    "Pythia-70M": (
        lambda: transformers.GPTNeoXConfig(
            vocab_size=50_304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
        ),
        "GPTNeoXForCausalLM",
        70_426_624,
        70_426_624,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_released_models_count_what_is_published(name: str) -> None:
    make, kind, once, by_path = COUNTS[name]
    assert counted(on_meta(make(), kind)) == (once, by_path)
