"""What each parameter of a live model is for, by the class of its module: the truth that roles are measured against.

Written by hand from the modules' code, and independent of the recognisers: a row names the class that owns an attribute
(`*` for any characters), the attribute, and the kind. A parameter without a row is not measured and is listed.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Truth(NamedTuple):
    """The truth about one parameter."""

    kind: str
    layer: int | None
    side: str | None


_ROWS = """
*Attention* q_proj query q to_q query_proj linear_q q_a_proj q_b_proj q_lin Wq query_global = attention_query
*Attention* k_proj key k to_k key_proj linear_k k_lin Wk key_global = attention_key
*Attention* v_proj value v to_v value_proj linear_v v_lin Wv value_global = attention_value
*Attention* qkv_proj Wqkv c_attn query_key_value qkv in_proj wqkv = attention_qkv
*Attention* to_kv kv_a_proj_with_mqa kv_b_proj kv_proj = attention_kv
*Attention* o_proj out_proj o to_out Wo c_proj dense linear_out out_lin o_a_proj o_b_proj wo = attention_output
*SelfOutput dense = attention_output
*CrossOutput dense = attention_output
AlbertAttention dense = attention_output
MultiheadAttention out_proj = attention_output
*Attention output_gate gate_proj g_proj = projection
*Attention linear_pos r_proj pos_proj relative_k_proj = projection
*DeltaNet* in_proj_qkv in_proj_qkvz in_proj_ba in_proj_a in_proj_b in_proj_z out_proj = projection
*Mixer* in_proj x_proj dt_proj out_proj = projection
*ShortConv in_proj out_proj = projection
MoonshineDecoderMLP fc1 = ffn_gate_up
*MLP gate_proj = ffn_gate
*MLP up_proj fc1 fc_in c_fc dense_h_to_4h wi = ffn_up
*MLP down_proj fc2 fc_out c_proj dense_4h_to_h wo = ffn_down
*MLP gate_up_proj = ffn_gate_up
ModernBert*MLP Wi = ffn_gate_up
ModernBert*MLP Wo = ffn_down
MLP c_fc = ffn_up
MLP c_proj = ffn_down
Lfm2*MLP w1 = ffn_gate
Lfm2*MLP w3 = ffn_up
Lfm2*MLP w2 = ffn_down
*DenseGatedActDense wi_0 = ffn_gate
*DenseGatedActDense wi_1 = ffn_up
*DenseGatedActDense wo = ffn_down
*DenseActDense wi fc1 = ffn_up
*DenseActDense wo fc2 = ffn_down
*Intermediate dense = ffn_up
*Output dense = ffn_down
AlbertLayer ffn = ffn_up
AlbertLayer ffn_output = ffn_down
*EncoderLayer fc1 = ffn_up
*EncoderLayer fc2 = ffn_down
*DecoderLayer fc1 = ffn_up
*DecoderLayer fc2 = ffn_down
*FeedForward intermediate_dense up_proj ff1 = ffn_up
*FeedForward output_dense down_proj ff2 = ffn_down
FFN lin1 = ffn_up
FFN lin2 = ffn_down
*Experts gate_up_proj = ffn_gate_up
*Experts down_proj = ffn_down
*Experts up_proj = ffn_up
*Router weight = router
*Router classifier = router
*Moe* router gate = router
*MoE* router gate = router
*SharedExpert* gate = router
*Moe* shared_expert_gate = router
BottleneckLayer dense = projection
OutputBottleneck dense = projection
*PredictionHeadTransform dense = projection
*LMPredictionHead dense = projection
*LMHead dense = projection
*MLMHead dense = projection
*PredictionHead dense = projection
*GeneratorPredictions dense = projection
*DiscriminatorPredictions dense dense_prediction = projection
*Model pooler = projection
*Pooler dense = projection
*Encoder embedding_hidden_mapping_in = projection
*Transformer embedding_hidden_mapping_in = projection
*Embeddings embedding_transformation = projection
*Projector linear_1 linear_2 linear = projection
*CTCEncoder input_linear out out_mid = projection
*Subsampling out = projection
*FeatureProjection projection = projection
*AudioEmbedding down_proj_for_speech up_proj_for_speech = projection
*AudioEmbedding down_proj_for_vision_speech up_proj_for_vision_speech = projection
*ImageEmbedding img_projection_down img_projection_up = projection
*Embeddings position_embeddings position_embedding = position_embedding
*Embeddings x_position_embeddings y_position_embeddings h_position_embeddings w_position_embeddings = position_embedding
*Embeddings token_type_embeddings task_type_embeddings = type_embedding
*Embeddings word_embeddings tok_embeddings = token_embedding
*coder embed_positions embed_position = position_embedding
*Model wpe embed_positions positions_embed position_embeddings = position_embedding
*Model wte embed_tokens tokens_embed embeddings shared embed_in word_embeddings word_embedding = token_embedding
*coder embed_tokens = token_embedding
*Stack embed_tokens = token_embedding
*ForConditionalGeneration shared = token_embedding
*Prenet embed_tokens = token_embedding
*Attention* relative_attention_bias rel_pos_emb distance_embedding = position_embedding
*RelativePositionalEncoding pe_k = position_embedding
*RelativeAttentionBias bias_values = position_embedding
*Head decoder lm_head output_projection = output_head
*For* lm_head embed_out output_projection proj_out decoder generator_lm_head head = output_head
*Generator* lm_head = output_head
*Postnet lm_head = output_head
*ConcatEmbeddingToMel embedding = type_embedding
*Attention conv_kernel_layer conv_out_layer = projection
*Attention* k_head = attention_key
*Attention* q_head = attention_query
*Attention* v_head = attention_value
*Attention* post_proj output = attention_output
*PositionwiseFFN linear_1 = ffn_up
*PositionwiseFFN linear_2 = ffn_down
RwkvSelfAttention receptance = projection
RwkvFeedForward key = ffn_up
RwkvFeedForward value = ffn_down
RwkvFeedForward receptance = ffn_gate
*Mlp gate_proj = ffn_gate
*Mlp up_proj = ffn_up
*Mlp down_proj = ffn_down
*RecurrentBlock linear_x linear_y linear_out = projection
*Decoder project_in project_out = projection
*Decoder output_projection = output_head
DistilBert* vocab_transform = projection
JetMoeMoE input_linear = ffn_gate_up
JetMoeMoE output_linear = ffn_down
JetMoeMoA input_linear = attention_query
JetMoeMoA output_linear = attention_output
JetMoeTopKGating layer = router
*DeltaAttention b_proj f_a_proj f_b_proj g_a_proj g_b_proj = projection
*ForgetGate f_a_proj f_b_proj = projection
*Indexer wk wq_b weights_proj = projection
Doge* dt_proj = projection
Speech* enc_to_dec_proj = projection
XmodAdapter dense1 = adapter_a
XmodAdapter dense2 = adapter_b
*For* classifier projector = projection
*Model text_projection visual_projection = projection
*TextEmbeddings token_embedding = token_embedding
*Aligner linear1 linear2 = projection
*MixFFN dense1 = ffn_up
*MixFFN dense2 = ffn_down
*ImageToTextProjection dense = projection
*TextFFN fc1 = ffn_up
*TextFFN fc2 = ffn_down
*TextTransformer segment_emb = type_embedding
*VisionEmbeddings column_embedder row_embedder = position_embedding
*VisionEmbeddings patch_projection = projection
*VisionMlp wi_0 = ffn_gate
*VisionMlp wi_1 = ffn_up
*VisionMlp wo = ffn_down
Ovis2VisionModel head_linear = projection
*VisionAttention projection_layer proj = attention_output
*VisionMLP linear_fc1 = ffn_up
*VisionMLP linear_fc2 = ffn_down
*PatchMerger linear_fc1 linear_fc2 = projection
*VisionModel pos_embed = position_embedding
*RelativePositionBias* relative_attention_bias = position_embedding
*SimpleMLP proj = projection
XPathEmbeddings inner2emb xpath_unitseq2_embeddings xpath_unitseq2_inner = projection
"""

_TABLE = [
    (owner, attribute, kind.strip())
    for line in _ROWS.strip().splitlines()
    for left, _, kind in [line.partition("=")]
    for owner, *attributes in [left.split()]
    for attribute in attributes
]
_OWN = {  # parameters that a module holds itself, by name
    "A_log": "other", "D": "other", "dt_bias": "bias", "sinks": "other", "alpha_n": "other", "alpha_p": "other",
    "probe": "other", "query": "other", "masked_spec_embed": "other", "global_img_feature_extensor": "other",
    "sub_img_feature_extensor": "other", "b1": "bias", "b2": "bias", "in_proj_weight": "attention_qkv",
    "in_proj_bias": "attention_qkv_bias", "e_score_correction_bias": "bias", "original0": "other",
    "original1": "convolution", "cls_token": "other", "layer_scalar": "other", "r_w_bias": "bias", "r_r_bias": "bias",
    "q_bias": "attention_query_bias", "v_bias": "attention_value_bias", "r_kernel": "projection",
    "r_s_bias": "bias", "seg_embed": "type_embedding", "time_decay": "other", "time_first": "other",
    "time_mix_key": "other", "time_mix_value": "other", "time_mix_receptance": "other", "recurrent_param": "other",
    "input_gate_weight": "projection", "recurrent_gate_weight": "projection", "input_gate_bias": "bias",
    "recurrent_gate_bias": "bias", "input_residual": "other", "post_attention_residual": "other", "A": "other",
    "eoi_embedding": "other", "mm_input_projection_weight": "projection",
    "lambda_1": "other", "lambda_2": "other", "logit_scale": "other", "class_embedding": "other", "cls_emb": "other",
    "distillation_token": "other", "latent_query": "other", "image_newline": "other", "per_dim_scale": "other",
    "pooling_attention_query": "other",
    "lambda1": "other", "bias_u": "bias", "bias_v": "bias", "pos_bias_u": "bias", "pos_bias_v": "bias",
}  # fmt: skip


def truth_of(model: Any) -> dict[str, Truth | None]:
    """Parameter name → the truth, None where no row says it. Every name of a shared one is there."""
    import torch

    inputs, head = _asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")
    is_pair = bool(getattr(model.config, "is_encoder_decoder", False))
    found: dict[str, Truth | None] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names = path.split(".")
        parent = model.get_submodule(path.rpartition(".")[0]) if path else model
        attribute = names[-1]
        if attribute.isdigit() and len(names) > 2:
            attribute, parent = names[-2], model.get_submodule(".".join(names[:-2]))
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            kind = _kind(torch, module, type(parent).__name__, attribute, name, module is inputs, module is head)
            full = f"{path}.{name}" if path else name
            numbers = [int(part) for part in names if part.isdigit()]
            layer = numbers[0] if numbers and "albert_layers" not in names else None  # one set for all layers
            side = next((part for part in names if part in ("encoder", "decoder")), None) if is_pair else None
            found[full] = None if kind is None else Truth(kind, layer, side)
    return found


def _asked(model: Any, question: str) -> Any:
    try:
        return getattr(model, question)()
    except Exception:  # classes without an answer raise several kinds of errors
        return None


def _kind(torch: Any, module: Any, owner: str, attribute: str, name: str, is_input: bool, is_head: bool) -> str | None:
    own = type(module).__name__
    if name in _OWN:
        return _OWN[name]
    suffix = "_bias" if name == "bias" or name.endswith("_bias") else ""
    if "Norm" in own and not isinstance(module, torch.nn.Linear):
        return (
            "norm_bias" if name in ("bias", "beta") else "norm_scale" if name in ("weight", "scale", "gamma") else None
        )
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return "bias" if suffix else "convolution"
    if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        return ("recurrent_input" if "_ih" in name else "recurrent_hidden") + ("_bias" if "bias" in name else "")
    if is_input and name == "weight":
        return "token_embedding"
    if is_head:
        return f"output_head{suffix}"
    if name not in ("weight", "bias"):  # held by the module itself: experts, routers, heads with a bias of their own
        if name in ("down_proj_bias", "gate_up_proj_bias", "up_proj_bias"):
            return f"ffn_{name.removesuffix('_proj_bias')}_bias"
        return _row(own, name)
    kind = _row(own, name) or _row(owner, attribute)
    if kind is None and name == "bias" and "Head" in own:
        return "output_head_bias"
    if kind is None or not suffix:
        return kind
    return f"{kind}_bias" if kind.startswith(("attention_", "ffn_", "output_head")) else "bias"


def _row(owner: str, attribute: str) -> str | None:
    for pattern, name, kind in _TABLE:
        if attribute == name and fnmatchcase(owner, pattern):
            return kind
    return None
