"""The words that names of weights are made of, and names taken apart into them.

They are those of transformers, of the original checkpoints of its models, of timm, fairseq and open_clip, and of
llama.cpp (gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_TABLE = """
attention_query: query_net q_proj query q wq to_q query_proj linear_q q_lin q_head q_a_proj q_b_proj attn_q
    query_global query_layer q_attn wq_a wq_b attn_q_a attn_q_b queries q_linear fc_q w_q in_proj_q q_proj_weight
    q_down_proj q_up_proj qproj
attention_key: key_net k_proj key k wk to_k key_proj linear_k k_lin k_head attn_k key_global key_layer keys k_linear
    fc_k w_k k_proj_weight kproj
attention_value: value_net v_proj value v wv to_v value_proj linear_v v_lin v_head attn_v value_global value_layer
    values v_linear fc_v w_v v_proj_weight vproj
attention_qkv: qkv qkv_proj query_key_value c_attn wqkv in_proj_weight to_qkv attn_qkv qkv_linear qkv_fused
attention_kv: kv kv_proj to_kv kv_a_proj_with_mqa kv_b_proj wkv_a wkv_b attn_kv_a_mqa attn_kv_b key_value kv_a kv_b
    kv_linear wkv
attention_output: out_projection o_proj attn_output out_lin to_out post_proj o_a_proj o_b_proj attn_out o_net wo_a
    wo_b
ffn_gate: linear_gate proj_up_gate gate_proj wi_0 ffn_gate gate_layer ffn_gate_exps ffn_gate_shexp w_gate
ffn_up: dense_in linear_up proj_up up_proj wi_1 ffn_up c_fc fc_in dense_h_to_4h intermediate_dense ffn_up_exps
    ffn_up_shexp w_up lin1 fc_up
ffn_down: dense_out linear_down proj_down down_proj ffn_down fc_out dense_4h_to_h output_dense ffn_down_exps
    ffn_down_shexp w_down lin2 fc_down
ffn_gate_up: gate_up_proj gate_up gate_and_up_proj ffn_gate_up
router: router ffn_gate_inp shared_expert_gate router_proj ffn_gate_inp_shexp
position_embedding: wpe embed_positions embed_position position_embeddings position_embedding positions_embed
    pos_embed pos_embedding position_embd relative_attention_bias rel_pos_emb distance_embedding
    positional_embedding pos_emb relative_position_bias_table rel_pos_h rel_pos_w pe_k x_position_embeddings
    y_position_embeddings h_position_embeddings w_position_embeddings bias_values rel_embeddings attn_rel_b
    pos_embeds embed_pos
type_embedding: token_type_embeddings token_types segment_embeddings task_type_embeddings token_type_embedding
    seg_embed type_embeddings language_embeddings langs_embeddings lang_embeddings
adapter_a: lora_a lora_embedding_a adapter_down down_sampler
adapter_b: lora_b lora_embedding_b adapter_up up_sampler
recurrent_input: weight_ih input_gates wx
recurrent_hidden: weight_hh
"""


def _words(table: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in table.replace("\n    ", " ").strip().splitlines():
        kind, _, words = line.partition(":")
        found.update(dict.fromkeys(words.split(), kind))
    return found


PLAIN = _words(_TABLE)
"""Last component of a module's path, in lower case → the kind that it says plainly."""
FEED = re.compile(
    r"mlp|ffn|ffwd|(?<![a-z])ff(\.|_|\d|$)|feed_?forward|expert|moe|dense(gated)?(relu|act)|intermediate|swiglu|geglu|blocksparse"
)
"""Modules that are called a feed-forward."""
TOKEN = frozenset(
    "embed_tokens wte word_embeddings word_embedding tok_embeddings token_embedding token_embeddings tokens_embed "
    "embed_in token_embd embed_token shared word_embed embedding_tokens".split()
)
PERHAPS_TOKEN = frozenset(
    "embeddings embedding embed emb embedder encoder_embed decoder_embed encoder wemb lut".split()
)
HEAD = frozenset("lm_head embed_out output_projection generator_lm_head score_head lm_proj unembed".split())
PERHAPS_HEAD = frozenset("decoder head output proj_out generator final_proj logits fc out projection to_logits".split())
_WRAPPERS = frozenset("weight bias base_layer module qweight kernel default modules_to_save original_module".split())
NORM_SCALES = frozenset("weight gamma scale g alpha a_2".split())
NORM_BIASES = frozenset("bias beta b b_2 shift".split())


_EMBEDS = frozenset("emb embs embed embeds embedding embeddings embedder embedders embd lut table lookup".split())
_OF_POSITIONS = frozenset("pos position positions positional row column col".split())
_OF_TYPES = frozenset("type types segment seg segments".split())
_OF_TOKENS = frozenset(
    "tok token tokens word words vocab vocabulary item items char chars character characters subword wordpiece bpe "
    "src tgt source target shared text input".split()
)
_OF_CLASSES = frozenset("class classes label labels time timestep speaker lang language style patch".split())


def table_word(modules: Sequence[str]) -> str | None:
    """The kind of a table that its name puts together: tok_emb, src_word_embedding, pos_emb.emb; None for others."""
    words = frozenset[str]()
    for module in reversed([part for part in modules if not part.isdigit()][-2:]):
        parts = frozenset(part for part in re.split(r"[_\d]+", module) if part)
        if not words and not parts & _EMBEDS:
            return None
        words |= parts
        if parts - _EMBEDS:
            break
    if words & _OF_CLASSES:
        return None
    kinds = ((_OF_TYPES, "type_embedding"), (_OF_POSITIONS, "position_embedding"), (_OF_TOKENS, "token_embedding"))
    return next((kind for known, kind in kinds if words & known), None)


_ASKED = {"q": "query", "query": "query", "queries": "query", "k": "key", "key": "key", "keys": "key",
          "v": "value", "value": "value", "values": "value", "o": "output", "out": "output", "output": "output",
          "qkv": "qkv", "gqkv": "qkv", "kv": "kv", "qk": "qkv"}  # fmt: skip
_SAYS_NOTHING = frozenset(
    "proj project projection linear lin layer net head heads weight dense attn attention self cross c fc to w".split()
)


def attention_word(leaf: str) -> str | None:
    """What a matrix inside an attention is, by words that are put together: linear_qkv, project_q, wo_ud, proj."""
    parts = [part for part in re.split(r"[_\d]+", leaf) if part]
    if parts and re.fullmatch("w(q|k|v|o|qkv|kv)", parts[0]):
        return f"attention_{_ASKED[parts[0][1:]]}"
    said = [part for part in parts if part not in _SAYS_NOTHING]
    if not said:
        return "attention_output" if {"proj", "projection", "dense", "fc"} & set(parts) else None
    kinds = {_ASKED.get(part, "") for part in said}
    return f"attention_{kinds.pop()}" if len(kinds) == 1 and "" not in kinds else None


@dataclass(frozen=True)
class Path:
    """A name taken apart."""

    modules: tuple[str, ...]
    """Lower-case components of the module that owns the tensor."""
    end: str
    """What the tensor is called there."""
    turned: bool = False
    """Whether matrices of this name are [in, out], as kernels are, and not [out, in]."""

    @cached_property
    def leaf(self) -> str:
        """The module's own name: the last component that is not a number."""
        return next((part for part in reversed(self.modules) if not part.isdigit()), "")

    @cached_property
    def around(self) -> str:
        """The modules around the leaf."""
        modules = self.modules
        while modules and modules[-1].isdigit():
            modules = modules[:-1]
        return ".".join(modules[:-1])

    @property
    def ends_in_number(self) -> bool:
        return bool(self.modules) and self.modules[-1].isdigit()


def path_of(name: str) -> Path:
    """`model.layers.0.mlp.gate_proj.weight` → its modules and `weight`. Wrappers of other libraries are left out."""
    plain = re.sub(r"_\._(?=\d)", "_", re.sub(r":\d+$", "", name.lower()))  # layer_._0 and kernel:0 of Keras
    parts = [part for part in re.split(r"[./]", plain) if part and part not in ("_orig_mod", "parametrizations")]
    is_tree = bool(parts) and parts[0] == "params" or "/" in name
    if parts and parts[0] == "params":
        parts = parts[1:]
    end = parts.pop() if parts else ""
    if end in ("original0", "weight_g") or "sink" in end:  # a length without its direction; scores of no position
        return Path(tuple(parts), "apart")
    if end.startswith(("original", "weight_")) and not end.startswith(("weight_ih", "weight_hh")):
        parts, end = (parts[:-1], "weight") if parts and parts[-1] == "weight" else (parts, "weight")
    while parts and parts[-1] in _WRAPPERS:
        end = parts.pop() if parts[-1] in ("weight", "bias") else (parts.pop(), end)[1]
    if len(parts) > 1 and parts[-1] == "linear" and parts[-2] in PLAIN:
        parts.pop()
    if parts and (end in ("kernel", "w") or is_tree and end in ("embedding", "embeddings")):
        return Path(tuple(parts), "weight", turned=end in ("kernel", "w"))
    if parts and (lettered := re.fullmatch(r"(w|b)_(q|k|v|o|in|out|e|u|pos|gate)", end)):
        own = [] if lettered[2] in ("e", "u", "pos") else [f"w_{lettered[2]}"]
        return Path((*parts, *own), "weight" if lettered[1] == "w" else "bias", turned=True)
    if end == "b" and parts:
        return Path(tuple(parts), "bias")
    if end in _WRAPPERS | NORM_SCALES | NORM_BIASES or end.startswith(("bias_ih", "bias_hh", "weight_ih", "weight_hh")):
        return Path(tuple(parts), end)
    if apart := re.fullmatch(r"(\w*norm\d?|w\d)_(weight|bias)", end):
        return Path((*parts, apart[1]), apart[2])
    if end.endswith("_bias") and (end.removesuffix("_bias") in PLAIN or end == "in_proj_bias"):
        stem = end.removesuffix("_bias")
        return Path((*parts, "in_proj_weight" if stem == "in_proj" else stem), "bias")
    return Path((*parts, end), "weight") if end in PLAIN or end in TOKEN | HEAD else Path(tuple(parts), end)
