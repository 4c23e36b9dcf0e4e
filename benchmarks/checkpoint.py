"""A sharded Hugging Face checkpoint the size of DeepSeek-V3 (163 shards, 90,000 tensors, 690 GB) in sparse files.

Names, shapes and element types follow the published checkpoint (float8 weights with a float32 scale per 128 × 128
block). Only `WRITTEN_BYTES` at the start, middle and end of a tensor are written, and small tensors whole: the rest
are holes that read as zeros. So no two tensors are equal and none is constant, but a few elements read at random
places cannot tell them apart: harder than a real checkpoint, in which every element differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

N_TENSORS, N_SHARDS = 90_000, 163
WRITTEN_BYTES = 512
SMALL_BYTES = 4096
_ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Sizes:
    """The configuration: DeepSeek-V3's for `shrink` 1, every width divided by it otherwise."""

    n_layers: int
    shrink: int = 1
    n_dense: int = 3
    n_experts: int = 256

    def width(self, full: int) -> int:
        return full // self.shrink


@dataclass(frozen=True)
class Stored:
    """One tensor."""

    name: str
    kind: str
    """As safetensors spells it."""
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.kind]


@dataclass(frozen=True)
class Layout:
    """A checkpoint before it is written."""

    sizes: Sizes
    shards: Sequence[Sequence[Stored]]

    @property
    def n_tensors(self) -> int:
        return sum(map(len, self.shards))

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for shard in self.shards for one in shard)


def layout(n_tensors: int, shrink: int = 1) -> Layout:
    """About `n_tensors` tensors (whole layers) of 690 GB · n_tensors / 90,000 / shrink², in that many shards."""
    per_layer = 256 * 6 + 20
    sizes = Sizes(n_layers=3 + max(1, round((n_tensors - 60) / per_layer)), shrink=shrink)
    tensors = list(_tensors(sizes))
    n_shards = max(1, len(tensors) * N_SHARDS // N_TENSORS)
    bounds = [len(tensors) * index // n_shards for index in range(n_shards + 1)]
    return Layout(sizes, [tensors[begin:end] for begin, end in pairwise(bounds)])


def _tensors(sizes: Sizes) -> Iterator[Stored]:
    w = sizes.width
    hidden = w(7168)
    yield Stored("model.embed_tokens.weight", "BF16", (w(129280), hidden))
    for layer in range(sizes.n_layers):
        at = f"model.layers.{layer}"
        yield Stored(f"{at}.input_layernorm.weight", "BF16", (hidden,))
        for name, shape in (
            ("q_a_proj", (w(1536), hidden)),
            ("q_b_proj", (w(24576), w(1536))),
            ("kv_a_proj_with_mqa", (w(576), hidden)),
            ("kv_b_proj", (w(32768), w(512))),
            ("o_proj", (hidden, w(16384))),
        ):
            yield from _quantised(f"{at}.self_attn.{name}", shape)
        yield Stored(f"{at}.self_attn.q_a_layernorm.weight", "BF16", (w(1536),))
        yield Stored(f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (w(512),))
        yield Stored(f"{at}.post_attention_layernorm.weight", "BF16", (hidden,))
        if layer < sizes.n_dense:
            yield from _feed_forward(f"{at}.mlp", hidden, w(18432))
            continue
        yield Stored(f"{at}.mlp.gate.weight", "BF16", (sizes.n_experts, hidden))
        yield Stored(f"{at}.mlp.gate.e_score_correction_bias", "F32", (sizes.n_experts,))
        yield from _feed_forward(f"{at}.mlp.shared_experts", hidden, w(2048))
        for expert in range(sizes.n_experts):
            yield from _feed_forward(f"{at}.mlp.experts.{expert}", hidden, w(2048))
    yield Stored("model.norm.weight", "BF16", (hidden,))
    yield Stored("lm_head.weight", "BF16", (w(129280), hidden))


def _feed_forward(at: str, hidden: int, inner: int) -> Iterator[Stored]:
    yield from _quantised(f"{at}.gate_proj", (inner, hidden))
    yield from _quantised(f"{at}.up_proj", (inner, hidden))
    yield from _quantised(f"{at}.down_proj", (hidden, inner))


def _quantised(name: str, shape: tuple[int, int]) -> Iterator[Stored]:
    yield Stored(f"{name}.weight", "F8_E4M3", shape)
    yield Stored(f"{name}.weight_scale_inv", "F32", (-(-shape[0] // 128), -(-shape[1] // 128)))


def write(folder: Path, checkpoint: Layout) -> None:
    """config.json, the index, and the shards. Disk: a few blocks per tensor."""
    generator = np.random.Generator(np.random.PCG64(0))
    weight_map = {}
    for index, shard in enumerate(checkpoint.shards, 1):
        name = f"model-{index:05}-of-{len(checkpoint.shards):06}.safetensors"
        weight_map.update({one.name: name for one in shard})
        _write_shard(folder / name, shard, generator)
    index_json = {"metadata": {"total_size": checkpoint.n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    (folder / "config.json").write_text(json.dumps(_config(checkpoint.sizes), indent=2))


def _write_shard(path: Path, shard: Sequence[Stored], generator: np.random.Generator) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for one in shard:
        header[one.name] = {"dtype": one.kind, "shape": one.shape, "data_offsets": [begin, begin + one.n_bytes]}
        begin += one.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
        begin = 8 + len(text)
        for one in shard:
            for offset, length in written(one.n_bytes):
                file.seek(begin + offset)
                file.write(generator.bytes(length))
            begin += one.n_bytes


def written(n_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of what is written of a tensor; the rest of it is a hole."""
    if n_bytes <= SMALL_BYTES:
        return [(0, n_bytes)]
    return [(begin, WRITTEN_BYTES) for begin in (0, n_bytes // 2, n_bytes - WRITTEN_BYTES)]


def _config(sizes: Sizes) -> dict[str, object]:
    """config.json of the published model, with the sizes of this one."""
    w = sizes.width
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": w(129280),
        "hidden_size": w(7168),
        "intermediate_size": w(18432),
        "moe_intermediate_size": w(2048),
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": sizes.n_experts,
        "first_k_dense_replace": sizes.n_dense,
        "kv_lora_rank": w(512),
        "q_lora_rank": w(1536),
        "qk_rope_head_dim": w(64),
        "qk_nope_head_dim": w(128),
        "v_head_dim": w(128),
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
