"""Roles by name in the layouts of other projects: no graph, no class, nothing but names and shapes.

Each layout is that of a project's own checkpoints, made small: V rows of a vocabulary, D wide, F inside a feed-forward,
P positions. What a name does not say is told by shape, so that the shapes here are as unlike as they are in real files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tieaudit.load import load_one
from tieaudit.model import Model, Part, Weight, make_id
from tieaudit.naming import roles_by_name
from tieaudit.propose import propose, schemes
from tieaudit.scan import look
from tieaudit.toy import ramp, toy

SIZES = {"V": 997, "D": 64, "F": 256, "P": 32}

LAYOUTS = {
    "a lecture's GPT": """
        token_embedding_table.weight V,D token_embedding
        position_embedding_table.weight P,D position_embedding
        blocks.0.sa.heads.0.key.weight 16,D attention_key
        blocks.0.sa.proj.weight D,D attention_output
        blocks.0.ffwd.net.0.weight F,D ffn_up
        blocks.0.ffwd.net.0.bias F ffn_up_bias
        blocks.0.ffwd.net.2.weight D,F ffn_down
        blocks.0.ffwd.net.2.bias D ffn_down_bias
        lm_head.weight V,D output_head
        lm_head.bias V output_head_bias""",
    "minGPT": """
        tok_emb.weight V,D token_embedding
        pos_emb 1,P,D position_embedding
        blocks.0.mlp.0.weight F,D ffn_up
        blocks.0.mlp.2.weight D,F ffn_down
        head.weight V,D output_head""",
    "the annotated Transformer": """
        src_embed.0.lut.weight V,D token_embedding
        encoder.layers.0.self_attn.linears.0.weight D,D attention_query
        encoder.layers.0.self_attn.linears.1.weight D,D attention_key
        encoder.layers.0.self_attn.linears.2.weight D,D attention_value
        encoder.layers.0.self_attn.linears.3.weight D,D attention_output
        encoder.layers.0.feed_forward.w_1.weight F,D ffn_up
        encoder.layers.0.feed_forward.w_2.weight D,F ffn_down
        generator.proj.weight V,D output_head
        generator.proj.bias V output_head_bias""",
    "Megatron core": """
        embedding.word_embeddings.weight V,D token_embedding
        decoder.layers.0.self_attention.linear_qkv.weight 3D,D attention_qkv
        decoder.layers.0.self_attention.linear_qkv.layer_norm_weight D norm_scale
        decoder.layers.0.self_attention.linear_proj.weight D,D attention_output
        decoder.layers.0.mlp.linear_fc1.weight 2F,D ffn_gate_up
        decoder.layers.0.mlp.linear_fc1.layer_norm_weight D norm_scale
        decoder.layers.0.mlp.linear_fc2.weight D,F ffn_down
        output_layer.weight V,D output_head""",
    "litgpt": """
        transformer.wte.weight V,D token_embedding
        transformer.h.0.mlp.fc_1.weight F,D ffn_gate
        transformer.h.0.mlp.fc_2.weight F,D ffn_up
        transformer.h.0.mlp.proj.weight D,F ffn_down
        lm_head.weight V,D output_head""",
    "RWKV": """
        emb.weight V,D token_embedding
        blocks.0.att.receptance.weight D,D projection
        blocks.0.ffn.key.weight F,D ffn_up
        blocks.0.ffn.value.weight D,F ffn_down
        ln_out.weight D norm_scale
        head.weight V,D output_head""",
    "x-transformers": """
        token_emb.emb.weight V,D token_embedding
        pos_emb.emb.weight P,D position_embedding
        attn_layers.layers.0.1.ff.0.0.weight F,D ffn_up
        attn_layers.layers.0.1.ff.2.weight D,F ffn_down
        to_logits.weight V,D output_head""",
    "CTRL": """
        transformer.w.weight V,D token_embedding
        transformer.h.0.ffn.0.weight F,D ffn_up
        transformer.h.0.ffn.2.weight D,F ffn_down
        lm_head.weight V,D output_head""",
    "JAX": """
        params/wte/embedding V,D token_embedding
        params/wpe/embedding P,D position_embedding
        params/h_0/attn/c_attn/kernel D,3D attention_qkv
        params/h_0/attn/c_attn/bias 3D attention_qkv_bias
        params/h_0/attn/c_proj/kernel D,D attention_output
        params/h_0/ln_1/scale D norm_scale
        params/h_0/mlp/c_fc/kernel D,F ffn_up
        params/h_0/mlp/c_proj/kernel F,D ffn_down
        params/lm_head/kernel D,V output_head""",
    "JAX, automatic names": """
        params/shared_embedding/embedding V,D token_embedding
        params/decoder/encoderdecoderblock_0/LayerNorm_0/scale D norm_scale
        params/decoder/encoderdecoderblock_0/MultiHeadDotProductAttention_0/query/kernel D,4,16 attention_query
        params/decoder/encoderdecoderblock_0/MultiHeadDotProductAttention_0/out/kernel 4,16,D attention_output
        params/decoder/encoderdecoderblock_0/MlpBlock_0/Dense_0/kernel D,F ffn_up
        params/decoder/encoderdecoderblock_0/MlpBlock_0/Dense_0/bias F ffn_up_bias
        params/decoder/encoderdecoderblock_0/MlpBlock_0/Dense_1/kernel F,D ffn_down
        params/decoder/logitdense/kernel D,V output_head
        params/decoder/logitdense/bias V output_head_bias""",
    "Keras": """
        bert/embeddings/word_embeddings/embeddings:0 V,D token_embedding
        bert/embeddings/token_type_embeddings/embeddings:0 2,D type_embedding
        bert/embeddings/LayerNorm/gamma:0 D norm_scale
        bert/embeddings/LayerNorm/beta:0 D norm_bias
        bert/encoder/layer_._0/attention/self/query/kernel:0 D,D attention_query
        bert/encoder/layer_._0/attention/self/query/bias:0 D attention_query_bias
        bert/encoder/layer_._0/intermediate/dense/kernel:0 D,F ffn_up
        bert/encoder/layer_._0/output/dense/kernel:0 F,D ffn_down
        cls/predictions/output_bias V output_head_bias""",
    "TransformerLens": """
        embed.W_E V,D token_embedding
        pos_embed.W_pos P,D position_embedding
        blocks.0.attn.W_Q 4,D,16 attention_query
        blocks.0.attn.W_O 4,16,D attention_output
        blocks.0.attn.b_Q 4,16 attention_query_bias
        blocks.0.mlp.W_in D,F ffn_up
        blocks.0.mlp.b_in F ffn_up_bias
        blocks.0.mlp.W_out F,D ffn_down
        blocks.0.ln1.w D norm_scale
        blocks.0.ln1.b D norm_bias
        unembed.W_U D,V output_head
        unembed.b_U V output_head_bias""",
    "an LSTM's language model": """
        encoder.weight V,D token_embedding
        rnn.weight_ih_l0 F,D recurrent_input
        decoder.weight V,D output_head
        decoder.bias V output_head_bias""",
    "a translator of two LSTMs": """
        encoder.embedding.weight V,D token_embedding
        decoder.embedding.weight V,D token_embedding
        decoder.fc_out.weight V,3D output_head
        decoder.fc_out.bias V output_head_bias""",
    "a head called a classifier": """
        embed.weight V,D token_embedding
        layers.0.attention.Wo.weight D,D attention_output
        classifier.weight V,D output_head""",
    "a captioner's head, turned": """
        text.token_embedding.weight V,D token_embedding
        text_decoder.text_projection D,V output_head
        visual.attn_pool.query 8,D other
        visual.attn_pool.attn.in_proj_weight 3D,D attention_qkv""",
    "a vision network of convolutions": """
        stem.1.weight D norm_scale
        stem.1.bias D norm_bias
        stages.0.blocks.0.mlp.fc1.weight F,D,1,1 convolution
        stages.0.blocks.0.mlp.fc1.bias F bias
        stages.0.blocks.0.gamma D other
        encoder.convnormrelu.0.weight D,3,3,3 convolution
        encoder.convnormrelu.0.bias D bias""",
    "a transformer of images": """
        transformer_blocks.0.attn.to_q.weight D,D attention_query
        network.0.attn.attn.weight 9D,D projection
        network.0.attn.attn.bias 9D bias
        proj_out.weight 16,D projection""",
}  # fmt: skip


def rows_of(layout: str) -> list[tuple[str, tuple[int, ...], str]]:
    rows = []
    for line in layout.strip().splitlines():
        name, shape, kind = line.split()
        sizes = [int(size[:-1] or 1) * SIZES[size[-1]] if size[-1] in SIZES else int(size) for size in shape.split(",")]
        rows.append((name, tuple(sizes), kind))
    return rows


def model_of_names(rows: list[tuple[str, tuple[int, ...], str]]) -> Model:
    weights = tuple(Weight(make_id(name), name, shape, "float32", None) for name, shape, _ in rows)
    return Model("model.safetensors", "safetensors", (Part("", ("model.safetensors",)),), weights)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_layout_of_another_project_is_told_by_names_and_shapes(layout: str) -> None:
    rows = rows_of(layout)
    told = roles_by_name(model_of_names(rows))
    assert {name: told[make_id(name)].kind for name, _, _ in rows} == {name: kind for name, _, kind in rows}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_pair_of_another_projects_model_is_its_one_candidate(tmp_path: Path, layout: str) -> None:
    """Where a head fits more than one table, the decoder's; where it has another width, a pair that nothing writes."""
    rows = rows_of(layout)
    drawn = np.random.default_rng(0)
    file = tmp_path / "model.safetensors"
    save_file({name: drawn.standard_normal(shape).astype(np.float32) for name, shape, _ in rows}, file)
    model = load_one(file)
    candidates, _ = propose(look(model), schemes(["io"])[0])
    tables = [name for name, _, kind in rows if kind == "token_embedding"]
    heads = [name for name, _, kind in rows if kind == "output_head"]
    pairs = [[model.by_id[member.id].name for member in one.members] for one in candidates]
    assert pairs == ([[tables[-1], heads[0]]] if heads else [])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("params/h_3/ln_1/scale", 3),
        ("bert/encoder/layer_._3/output/dense/kernel:0", 3),
        ("decoder/encoderdecoderblock_3/LayerNorm_0/scale", 3),
        ("layers_3/mlp/wo/kernel", 3),
        ("expert_3.weight", None),
    ],
)
def test_a_number_that_is_written_to_the_layers_name_is_the_layer(name: str, layer: int | None) -> None:
    assert roles_by_name(model_of_names([(name, (64,), "")]))[make_id(name)].layer == layer


def test_two_matrices_of_a_tables_shape_without_a_name_are_no_head() -> None:
    rows = rows_of("emb.weight V,D token_embedding\nmemory.weight V,D projection\nbank.weight V,D projection")
    told = roles_by_name(model_of_names(rows))
    assert [told[make_id(name)].kind for name, _, _ in rows] == [kind for _, _, kind in rows]


def test_the_width_of_the_stream_tells_up_from_down_where_experts_are_narrow() -> None:
    """32 inside 64: what narrows is up, though elsewhere it is what widens."""
    rows = [
        ("wte.weight", (997, 64), ""),
        ("h.0.mlp.net.0.weight", (32, 64), ""),
        ("h.0.mlp.net.2.weight", (64, 32), ""),
    ]
    told = roles_by_name(model_of_names(rows))
    assert [told[make_id(name)].kind for name, _, _ in rows[1:]] == ["ffn_up", "ffn_down"]


def test_a_plain_name_turns_what_stands_beside_it() -> None:
    """GPT-2 keeps [in, out] and says so nowhere without biases: where c_fc would be down by shape, c_proj is not up."""
    rows = [
        ("wte.weight", (997, 64), ""),
        ("h.0.mlp.c_fc.weight", (64, 256), ""),
        ("h.0.mlp.c_proj.weight", (256, 64), ""),
    ]
    told = roles_by_name(model_of_names(rows))
    assert [told[make_id(name)].kind for name, _, _ in rows[1:]] == ["ffn_up", "ffn_down"]


@pytest.mark.parametrize(
    ("name", "beside", "kind"),
    [
        ("shared.weight", "encoder.block.0.wi.weight", "token_embedding"),  # T5
        ("shared.weight", "head_b.weight", None),  # the trunk of two tasks
        ("model.layers.0.mlp.shared.weight", "encoder.block.0.wi.weight", None),  # an expert that all tokens use
        ("stuff.0.dense.weight", "stuff.1.dense.weight", None),
        ("block.0.ff.dense.weight", "block.1.ff.dense.weight", "ffn_up"),
    ],
)
def test_a_word_counts_where_it_means_something(name: str, beside: str, kind: str | None) -> None:
    found = roles_by_name(toy({name: ramp(64, 32), beside: ramp(32, 32)}, format="safetensors").model)[name].kind
    assert found == kind or kind is None and found not in ("token_embedding", "ffn_up")


def test_what_has_a_bias_is_a_layer_and_no_table() -> None:
    sae = {"encoder.weight": ramp(512, 32), "encoder.bias": ramp(512), "decoder.weight": ramp(32, 512, seed=1)}
    for names in (sae | {"decoder.bias": ramp(32)}, {"embed_in.weight": ramp(256, 12), "embed_in.bias": ramp(256)}):
        found = {role.kind for role in roles_by_name(toy(names, format="safetensors").model).values()}
        assert not found & {"token_embedding", "output_head"}


def test_where_the_class_says_which_is_the_head_no_other_is_told_by_shape() -> None:
    names = {"embeddings.word_embeddings.weight": ramp(97, 16), "cls.decoder.weight": ramp(97, 16, seed=1)}
    names["cls.dense.weight"] = ramp(8, 97)  # MobileBERT: columns that are put beside the decoder's
    hints = {"embeddings.word_embeddings.weight": "token_embedding", "cls.decoder.weight": "output_head"}
    one = toy(names, roles_by_class=hints)
    assert one.roles["cls.dense.weight"].kind != "output_head"
    (pair,), _ = propose(one, schemes(["io"])[0])
    assert [member.id for member in pair.members] == list(hints)


def test_an_empty_matrix_is_no_head_and_no_fault() -> None:
    names = {"embeddings.word_embeddings.weight": ramp(97, 16), "cls.dense.weight": ramp(0, 97)}
    assert toy(names).roles["cls.dense.weight"].kind != "output_head"
    one = toy(names, roles_by_class={"cls.dense.weight": "output_head"})
    assert propose(one, schemes(["io"])[0])[0] == []


def test_of_fc11_and_fc12_the_second_one_is_the_gate() -> None:
    shapes = {"fc11": (64, 16), "fc12": (64, 16), "fc2": (16, 64)}
    names = {f"encoder.layers.0.mlp.{name}.weight": ramp(*shape) for name, shape in shapes.items()}
    found = roles_by_name(toy(names, format="safetensors").model)
    assert [found[name].kind for name in names] == ["ffn_up", "ffn_gate", "ffn_down"]
