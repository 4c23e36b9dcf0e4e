"""Parameter counts that papers print, from live modules; built on the meta device, so that size does not matter.

Each number is worked out beside it, with the tempting wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import tieaudit  # noqa: E402
from tests.torch_modules import TiedLM  # noqa: E402
from tieaudit.formats.torch_module.read import read_module  # noqa: E402
from tieaudit.scan import scan  # noqa: E402


def counted(module: nn.Module) -> tuple[int | None, int | None]:
    """Parameters counted once, and by name."""
    total = scan(read_module(module)).summary  # the graph is not needed
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


@pytest.mark.parametrize(("tied", "expected"), [(False, 4_691_600), (True, 2_691_600)])
def test_press_and_wolf_s_projection_before_the_head(tied: bool, expected: int) -> None:
    """The small model with projection regularisation: 200 · 200 more, without a bias."""
    with torch.device("meta"):
        module = TiedLM(10_000, 200, tied=tied, n_layers=2)
        module.projection = nn.Linear(200, 200, bias=False)
    once, _ = counted(module)
    assert once == expected + 1_600  # b_hh of PyTorch's LSTM


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


NOT_SHARED = (128, 768, 12, 3072)
"""Of ALBERT's Table 4: the base model."""
SHARED = {
    # embedding, shared parts: published (Lan et al. 2020, Table 4), exact. A layer's attention has 4·(768² + 768)
    # = 2,362,368 parameters and its feed-forward part 2·768·3072 + 3072 + 768 = 4,722,432; its norms stay its own.
    (128, ()): ("89M", 89_650_176),
    (128, ("attention",)): ("64M", 89_650_176 - 11 * 2_362_368),
    (128, ("feed-forward",)): ("38M", 89_650_176 - 11 * 4_722_432),
    (768, ()): ("108M", 109_081_344 + 768 * 768 + 768),  # the class maps 768 to 768 first; the paper does not
    (768, ("attention",)): ("83M", 83_095_296 + 590_592),
    (768, ("feed-forward",)): ("57M", 57_134_592 + 590_592),
}
PARTS = {"attention": ("query", "key", "value", "dense"), "feed-forward": ("ffn", "ffn_output")}


@pytest.mark.parametrize(("embedding", "parts"), SHARED)
def test_albert_s_table_of_what_is_shared(embedding: int, parts: tuple[str, ...]) -> None:
    published, expected = SHARED[embedding, parts]
    config = transformers.AlbertConfig(
        vocab_size=30_000, embedding_size=embedding, hidden_size=768, num_attention_heads=12, intermediate_size=3072,
        num_hidden_layers=12, num_hidden_groups=12,
    )  # fmt: skip
    module = on_meta(config, "AlbertModel")
    layers = [group.albert_layers[0] for group in module.encoder.albert_layer_groups]
    for part in parts:
        for layer in layers[1:]:
            for name in PARTS[part]:
                owner, first = (layer.attention, layers[0].attention) if part == "attention" else (layer, layers[0])
                setattr(owner, name, getattr(first, name))
    once, by_path = counted(module)
    assert once == expected
    assert by_path == SHARED[embedding, ()][1]
    if embedding == 768:  # as the paper counts: without the map
        module.encoder.embedding_hidden_mapping_in = nn.Identity()
        once, _ = counted(module)
        assert once == expected - 590_592
    assert once is not None
    # the table is in millions, and counts no pooler (768² + 768)
    assert abs(once - 590_592 - float(published[:-1]) * 1e6) < 1e6


def test_albert_s_masked_head_by_path_and_once() -> None:
    config = transformers.AlbertConfig(
        vocab_size=30_000, embedding_size=128, hidden_size=768, num_attention_heads=12, intermediate_size=3072
    )
    assert counted(on_meta(config, "AlbertForMaskedLM")) == (11_221_680, 15_091_680)


Made = tuple[Any, str]


def gpt2(width: int, layers: int, heads: int) -> Made:
    return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads), "GPT2LMHeadModel"


def bert(kind: str, **sizes: int) -> Made:
    return transformers.BertConfig(**sizes), kind


def t5(width: int, heads: int, inner: int, layers: int, head: int = 64) -> Made:
    sizes = {"d_model": width, "num_heads": heads, "d_ff": inner, "num_layers": layers, "d_kv": head}
    return transformers.T5Config(**sizes), "T5ForConditionalGeneration"


def bart(width: int, layers: int, inner: int, heads: int) -> Made:
    config = transformers.BartConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        encoder_attention_heads=heads, decoder_attention_heads=heads,
    )  # fmt: skip
    return config, "BartForConditionalGeneration"


def marian() -> Made:
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder")
             for what, size in {"layers": 6, "attention_heads": 8, "ffn_dim": 2048}.items()}  # fmt: skip
    config = transformers.MarianConfig(
        vocab_size=58_101, decoder_vocab_size=58_101, pad_token_id=58_100, d_model=512, max_position_embeddings=512,
        **sides,
    )  # fmt: skip
    return config, "MarianMTModel"


def causal(
    family: str, words: int, width: int, inner: int, layers: int, heads: int, pairs: int, *, tied: bool, **more: int
) -> Made:
    """A decoder of the shape of Llama: `pairs` heads of keys and values."""
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=tied, pad_token_id=0, **more,
    )  # fmt: skip
    return config, f"{family}ForCausalLM"


def pythia(width: int, layers: int, heads: int) -> Made:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return transformers.GPTNeoXConfig(vocab_size=50_304, num_attention_heads=heads, **sizes), "GPTNeoXForCausalLM"


def opt_350m() -> Made:
    config = transformers.OPTConfig(
        hidden_size=1024, num_hidden_layers=24, ffn_dim=4096, num_attention_heads=16, word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )  # fmt: skip
    return config, "OPTForCausalLM"


COUNTS: dict[str, tuple[Callable[[], Made], int, int]] = {
    # name: how it is built, parameters counted once, by every path (the tempting answer where something is tied)
    "GPT-2": (lambda: gpt2(768, 12, 12), 124_439_808, 163_037_184),
    "GPT-2 medium": (lambda: gpt2(1024, 24, 16), 354_823_168, 406_286_336),
    "GPT-2 large": (lambda: gpt2(1280, 36, 20), 774_030_080, 838_359_040),
    "GPT-2 xl": (lambda: gpt2(1600, 48, 25), 1_557_611_200, 1_638_022_400),
    "distilgpt2": (lambda: gpt2(768, 6, 12), 81_912_576, 120_509_952),
    "BertModel base": (lambda: bert("BertModel"), 109_482_240, 109_482_240),
    "BertModel base, cased": (lambda: bert("BertModel", vocab_size=28_996), 108_310_272, 108_310_272),
    "BertModel large": (
        lambda: bert(
            "BertModel", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
        335_141_888,
        335_141_888,
    ),
    "BertForMaskedLM base": (lambda: bert("BertForMaskedLM"), 109_514_298, 132_985_716),
    "BertForPreTraining base": (lambda: bert("BertForPreTraining"), 110_106_428, 133_577_846),
    "RoBERTa base": (
        lambda: (
            transformers.RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1),
            "RobertaForMaskedLM",
        ),
        124_697_433,
        163_351_218,
    ),
    "DistilBERT": (lambda: (transformers.DistilBertConfig(), "DistilBertForMaskedLM"), 66_985_530, 90_426_426),
    "T5 small": (lambda: t5(512, 8, 2048, 6), 60_506_624, 109_855_232),
    "T5 base": (lambda: t5(768, 12, 3072, 12), 222_903_552, 296_926_464),
    "T5 large": (lambda: t5(1024, 16, 4096, 24), 737_668_096, 836_365_312),  # the paper says 770M
    "T5 3b": (lambda: t5(1024, 32, 16_384, 24, 128), 2_851_598_336, 2_950_295_552),
    "T5 11b": (lambda: t5(1024, 128, 65_536, 24, 128), 11_307_321_344, 11_406_018_560),
    "BART base": (lambda: bart(768, 6, 3072, 12), 139_420_416, 255_230_976),
    "BART large": (lambda: bart(1024, 12, 4096, 16), 406_291_456, 560_705_536),
    "Marian en-de": (marian, 74_410_496, 163_653_632),
    "Llama-3.2-1B": (
        lambda: causal("Llama", 128_256, 2048, 8192, 16, 32, 8, tied=True), 1_235_814_400, 1_498_482_688,
    ),
    "Llama-3.2-3B": (
        lambda: causal("Llama", 128_256, 3072, 8192, 28, 24, 8, tied=True), 3_212_749_824, 3_606_752_256,
    ),
    "Llama-3.1-8B": (
        lambda: causal("Llama", 128_256, 4096, 14_336, 32, 32, 8, tied=False), 8_030_261_248, 8_030_261_248,
    ),
    "Llama-2-7B": (
        lambda: causal("Llama", 32_000, 4096, 11_008, 32, 32, 32, tied=False), 6_738_415_616, 6_738_415_616,
    ),
    "TinyLlama": (lambda: causal("Llama", 32_000, 2048, 5632, 22, 32, 4, tied=False), 1_100_048_384, 1_100_048_384),
    "SmolLM2-135M": (lambda: causal("Llama", 49_152, 576, 1536, 30, 9, 3, tied=True), 134_515_008, 162_826_560),
    "SmolLM2-360M": (lambda: causal("Llama", 49_152, 960, 2560, 32, 15, 5, tied=True), 361_821_120, 409_007_040),
    "SmolLM2-1.7B": (
        lambda: causal("Llama", 49_152, 2048, 8192, 24, 32, 32, tied=True), 1_711_376_384, 1_812_039_680,
    ),
    "MobileLLM-125M": (lambda: causal("Llama", 32_000, 576, 1536, 30, 9, 3, tied=True), 124_635_456, 143_067_456),
    "MobileLLM-350M": (lambda: causal("Llama", 32_000, 960, 2560, 32, 15, 5, tied=True), 345_355_200, 376_075_200),
    "Qwen2.5-0.5B": (lambda: causal("Qwen2", 151_936, 896, 4864, 24, 14, 2, tied=True), 494_032_768, 630_167_424),
    "Qwen2.5-1.5B": (
        lambda: causal("Qwen2", 151_936, 1536, 8960, 28, 12, 2, tied=True), 1_543_714_304, 1_777_088_000,
    ),
    "Qwen2.5-3B": (
        lambda: causal("Qwen2", 151_936, 2048, 11_008, 36, 16, 2, tied=True), 3_085_938_688, 3_397_103_616,
    ),
    "Qwen2.5-7B": (
        lambda: causal("Qwen2", 152_064, 3584, 18_944, 28, 28, 4, tied=False), 7_615_616_512, 7_615_616_512,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        lambda: causal("Qwen2", 151_936, 1536, 8960, 28, 12, 2, tied=False), 1_777_088_000, 1_777_088_000,
    ),
    "Qwen3-0.6B": (
        lambda: causal("Qwen3", 151_936, 1024, 3072, 28, 16, 8, tied=True, head_dim=128), 596_049_920, 751_632_384,
    ),
    "Qwen3-1.7B": (
        lambda: causal("Qwen3", 151_936, 2048, 6144, 28, 16, 8, tied=True, head_dim=128), 1_720_574_976, 2_031_739_904,
    ),
    "Qwen3-4B": (
        lambda: causal("Qwen3", 151_936, 2560, 9728, 36, 32, 8, tied=True, head_dim=128), 4_022_468_096, 4_411_424_256,
    ),
    "Gemma-2B": (
        lambda: causal("Gemma", 256_000, 2048, 16_384, 18, 8, 1, tied=True, head_dim=256), 2_506_172_416, 3_030_460_416,
    ),
    "Gemma-7B": (
        lambda: causal("Gemma", 256_000, 3072, 24_576, 28, 16, 16, tied=True, head_dim=256),
        8_537_680_896,
        9_324_112_896,
    ),
    "Gemma2-2B": (
        lambda: causal("Gemma2", 256_000, 2304, 9216, 26, 8, 4, tied=True, head_dim=256), 2_614_341_888, 3_204_165_888,
    ),
    "Gemma2-9B": (
        lambda: causal("Gemma2", 256_000, 3584, 14_336, 42, 16, 8, tied=True, head_dim=256),
        9_241_705_984,
        10_159_209_984,
    ),
    "Gemma3-270M": (
        lambda: causal("Gemma3", 262_144, 640, 2048, 18, 4, 1, tied=True, head_dim=256), 268_098_176, 435_870_336,
    ),
    "Gemma3-1B": (
        lambda: causal("Gemma3", 262_144, 1152, 6912, 26, 4, 1, tied=True, head_dim=256), 999_885_952, 1_301_875_840,
    ),
    "Phi-4-mini": (
        lambda: causal("Phi3", 200_064, 3072, 8192, 32, 24, 8, tied=True), 3_836_021_760, 4_450_618_368,
    ),
    "Phi-3-mini": (lambda: causal("Phi3", 32_064, 3072, 8192, 32, 32, 32, tied=False), 3_821_079_552, 3_821_079_552),
    "Phi-2": (lambda: causal("Phi", 51_200, 2560, 10_240, 32, 32, 32, tied=False), 2_779_683_840, 2_779_683_840),
    "OPT-125M": (lambda: (transformers.OPTConfig(), "OPTForCausalLM"), 125_239_296, 163_848_192),
    "OPT-350M": (opt_350m, 331_196_416, 356_935_680),
    "Pythia-70M": (lambda: pythia(512, 6, 8), 70_426_624, 70_426_624),
    "Pythia-160M": (lambda: pythia(768, 12, 12), 162_322_944, 162_322_944),
    "Pythia-410M": (lambda: pythia(1024, 24, 16), 405_334_016, 405_334_016),
    "Pythia-1.4B": (lambda: pythia(2048, 24, 16), 1_414_647_808, 1_414_647_808),
    "BLOOM-560M": (
        lambda: (
            transformers.BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16),
            "BloomForCausalLM",
        ),
        559_214_592,
        816_115_712,
    ),
    "OLMo-2-1B": (lambda: causal("Olmo2", 100_352, 2048, 8192, 16, 16, 16, tied=False), 1_484_916_736, 1_484_916_736),
    "RemBERT": (lambda: (transformers.RemBertConfig(), "RemBertModel"), 575_920_384, 575_920_384),
    "RemBERT, masked": (lambda: (transformers.RemBertConfig(), "RemBertForMaskedLM"), 993_263_548, 993_263_548),
}  # fmt: skip
"""Every row of the project's table of exact counts. T5 v1.1 is below, because no configuration of version 5 builds it.

Counts of classes of other libraries (the translation models of Press & Wolf, Vaswani and Takase: Nematus,
tensor2tensor, fairseq) are not here: nothing installed builds those.
"""


@pytest.mark.parametrize("name", COUNTS)
def test_released_models_count_what_is_published(name: str) -> None:
    make, once, by_path = COUNTS[name]
    assert counted(on_meta(*make())) == (once, by_path)


@pytest.mark.parametrize(
    ("width", "heads", "inner", "layers", "once", "by_path"),
    [(512, 6, 1024, 8, 76_961_152, 109_860_224), (768, 12, 2048, 12, 247_577_856, 296_926_464)],
)
def test_t5_1_1_has_two_tables_and_a_head_of_its_own(
    width: int, heads: int, inner: int, layers: int, once: int, by_path: int
) -> None:
    """Version 5 ties the head of every T5 and leaves it to the checkpoint to hold another one, as that of 1.1 does."""
    sizes = {"d_model": width, "num_heads": heads, "d_ff": inner, "num_layers": layers, "d_kv": 64}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    module = on_meta(config, "T5ForConditionalGeneration")
    module.lm_head.weight = nn.Parameter(torch.empty_like(module.lm_head.weight))
    assert counted(module) == (once, by_path)


def test_pythia_s_published_counts_without_embeddings_prove_that_it_is_untied() -> None:
    outside = {"Pythia-70M": 18_915_328, "Pythia-160M": 85_056_000, "Pythia-410M": 302_311_424,
               "Pythia-1.4B": 1_208_602_624}  # fmt: skip
    for name, without in outside.items():
        make, once, _ = COUNTS[name]
        assert once - without == 2 * 50_304 * make()[0].hidden_size


def test_gemma_s_published_counts_without_embeddings_prove_that_it_is_tied() -> None:
    """Table 2 of Gemma (2024); its table of words has 128 padded rows more than the released one."""
    for name, without in {"Gemma-2B": 1_981_884_416, "Gemma-7B": 7_751_248_896}.items():
        make, once, _ = COUNTS[name]
        assert once - without == 256_000 * make()[0].hidden_size
