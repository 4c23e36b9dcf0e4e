"""The norm directly before the head of a language model of a known class, by the names of its parameters.

A folder holds no graph: what reads a norm, and whether its gain is w or 1 + w, only the class says. The classes below
were read in transformers 5.23 (models/*/modeling_*.py): their heads are given the norm's result and nothing else is.
"""

from __future__ import annotations

import re

from tieaudit.change import Gain
from tieaudit.model import Model

_NORM, _LN_F = "model.norm", "transformer.ln_f"
_BY_W = (
    "apertus arcee cohere cohere2 ernie4_5 exaone4 glm glm4 granite granitemoe hunyuan_v1_dense llama ministral "
    "ministral3 mistral mixtral olmo2 olmo3 olmoe phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 "
    "stablelm starcoder2"
)
_BY_ONE_PLUS_W = "gemma gemma2 gemma3_text nemotron qwen3_next vaultgemma"
NORMS: dict[str, tuple[str, float]] = {
    **{name: (_NORM, 0.0) for name in _BY_W.split()},
    **{name: (_NORM, 1.0) for name in _BY_ONE_PLUS_W.split()},
    **{name: (_LN_F, 0.0) for name in ("codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj")},
    "gpt_neox": ("gpt_neox.final_layer_norm", 0.0),
    "phi": ("model.final_layernorm", 0.0),
}
"""Model type → the norm before the head, and what is added to its stored gain."""
_HEADS = ("lm_head", "embed_out")
_IN_A_LAYER = re.compile(r"\.(layers|h)\.\d+\.")
_BESIDE = re.compile(r".*(embed_tokens|wte|wpe|embed_in|rotary_emb|inv_freq|masked_bias|attn\.bias).*")


def gain_of(model: Model, head: str) -> Gain | str:
    """The norm before `head`, or why it is not known for certain."""
    kind, name = model.metadata.get("model_type", ""), model.by_id[head].name
    if kind not in NORMS or not model.metadata.get("architecture", "").endswith(("ForCausalLM", "LMHeadModel")):
        what = model.metadata.get("architecture") or kind or "a class that is not named"
        return f"which norm stands before the head of {what}, and how its gain is applied, is not known for certain"
    norm, added = NORMS[kind]
    own = {f"{norm}.weight", f"{norm}.bias"}
    stored = {one.name: one.id for one in model.weights if not one.absent}
    known = own | {f"{one}.{leaf}" for one in _HEADS for leaf in ("weight", "bias")}
    others = [one for one in stored if one not in known and not _IN_A_LAYER.search(one) and not _BESIDE.fullmatch(one)]
    if name not in known - own or f"{norm}.weight" not in stored:
        return f"{norm}.weight is not stored beside {name}"
    if others:
        return f"{others[0]} may read {norm}.weight's result too"
    return Gain(tuple(stored[one] for one in (f"{norm}.weight", f"{norm}.bias") if one in stored), added)
