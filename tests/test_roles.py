"""What a weight is for: from the flow of a graph whose names say nothing, and from names where there is no graph."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from onnx_cases import model_of, node, saved, tensor, value
from role_graphs import D, F, Graph, H, V, decoder, kinds, layers, scrambled

from tieaudit.model import Model, Part, Weight, make_id
from tieaudit.naming import path_of, roles_by_name
from tieaudit.recognisers import Recogniser, in_order
from tieaudit.registry import discover
from tieaudit.roles import roles

pytest.importorskip("onnx")


def test_a_decoder_without_names_shows_every_role_and_its_layers(tmp_path: Path) -> None:
    graph, out = decoder(3)
    model = graph.model(tmp_path, out)
    assert kinds(model, list(graph.truth)) == graph.truth
    for kind in ("attention_query", "attention_output", "ffn_gate", "ffn_down"):
        assert layers(model, graph.truth, kind) == [0, 1, 2], kind
    assert layers(model, graph.truth, "norm_scale") == [0, 0, 1, 1, 2, 2, None]  # the last norm is of no layer


@pytest.mark.parametrize("seed", range(3))
def test_scrambled_names_leave_every_role_as_it_was(tmp_path: Path, seed: int) -> None:
    graph, out = decoder(2)
    proto = graph.proto(out)
    before = roles(saved(proto, tmp_path / "a"))
    again, new = scrambled(proto, seed)
    after = roles(saved(again, tmp_path / "b"))
    assert {new[id]: (r.kind, r.layer, r.side) for id, r in before.items()} == {
        id: (r.kind, r.layer, r.side) for id, r in after.items()
    }


def test_post_norm_blocks_keep_their_norms_in_their_layer(tmp_path: Path) -> None:
    graph = Graph()
    ids, types = graph.ids(), graph.ids()
    x = graph.op("Add", graph.embedded(ids), graph.op("Gather", graph.weight("type_embedding", 2, D), types))
    x = graph.layer_norm(x)
    for _ in range(2):
        x = graph.layer_norm(graph.op("Add", graph.attention(x, biases=True), x))
        x = graph.layer_norm(graph.op("Add", graph.plain(x), x))
    hidden = graph.layer_norm(graph.op("Gelu", graph.linear(x, "projection", D, D, "bias")))
    scores = graph.op("Add", graph.head(hidden), graph.weight("output_head_bias", V))
    model = graph.model(tmp_path, scores, opset=20)
    assert kinds(model, list(graph.truth)) == graph.truth
    assert layers(model, graph.truth, "norm_scale") == [None, 0, 0, 1, 1, None]


@pytest.mark.parametrize("n_layers", [1, 2])
def test_parallel_attention_and_feed_forward_are_one_block(tmp_path: Path, n_layers: int) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    for _ in range(n_layers):
        normed = graph.rms(x)
        x = graph.op("Add", graph.op("Add", x, graph.attention(normed)), graph.plain(normed, biases=False))
    model = graph.model(tmp_path, graph.head(graph.rms(x)))
    assert kinds(model, list(graph.truth)) == graph.truth
    assert layers(model, graph.truth, "ffn_down") == list(range(n_layers))


def test_cross_attention_tells_encoder_from_decoder(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    x = graph.op("Add", x, graph.attention(graph.rms(x)))
    memory = graph.rms(graph.op("Add", x, graph.plain(graph.rms(x), biases=False)))
    n_encoder = len(graph.truth)
    y = graph.embedded(graph.ids())
    y = graph.op("Add", y, graph.attention(graph.rms(y)))
    y = graph.op("Add", y, graph.attention(graph.rms(y), memory))
    y = graph.op("Add", y, graph.plain(graph.rms(y), biases=False))
    model = graph.model(tmp_path, graph.head(graph.rms(y)))
    assert kinds(model, list(graph.truth)) == graph.truth
    found = roles(model)
    sides = [found[id].side for id in graph.truth]
    assert sides == ["encoder"] * n_encoder + ["decoder"] * (len(sides) - n_encoder)


def test_projections_of_one_attention_are_told_apart_from_those_of_another(tmp_path: Path) -> None:
    graph = Graph()
    memory = graph.floats("b", "t", D)
    y = graph.embedded(graph.ids())
    own = len(graph.truth) + 1  # behind the norm
    y = graph.op("Add", y, graph.attention(graph.rms(y), biases=True))
    cross = len(graph.truth) + 1
    y = graph.op("Add", y, graph.attention(graph.rms(y), memory, biases=True))
    end = len(graph.truth)
    model = graph.model(tmp_path, graph.head(graph.rms(y)))
    found, ids = roles(model), list(graph.truth)
    numbers = [{found[id].attention for id in ids[begin : begin + 8]} for begin in (own, cross)]
    assert end - cross == 8 and len(numbers[0]) == len(numbers[1]) == 1
    (first,), (second,) = numbers
    assert first is not None and second is not None and first < second
    assert all(found[id].attention is None for id in ids if not graph.truth[id].startswith("attention_"))


def test_a_norm_divided_by_the_root_as_the_older_exporter_spells_it_has_its_scale(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    for _ in range(2):
        mean = graph.op("ReduceMean", graph.op("Pow", x, graph.number(2.0)), graph.number([-1], np.int64), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.number(1e-5)))
        ratio = graph.op("Mul", x, graph.op("Div", graph.number(1.0), root))  # rsqrt
        x = graph.op("Add", x, graph.gated(graph.op("Mul", ratio, graph.weight("norm_scale", D))))
    # x times (a number over something that is no root) is scaled, and no norm
    gain = graph.op("Mul", x, graph.op("Div", graph.number(1.0), graph.op("Exp", x)))
    x = graph.op("Mul", gain, graph.weight("other", D))
    model = graph.model(tmp_path, graph.head(x))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_fused_projections_that_become_a_sequence_are_told_by_where_its_items_go(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    whole = graph.linear(graph.rms(x), "attention_qkv", D, 3 * D, "attention_qkv_bias")
    items = graph.op("SplitToSequence", whole, graph.number(D, np.int64), axis=-1)
    q, k, v = (graph.heads(graph.op("SequenceAt", items, graph.number(at, np.int64))) for at in range(3))
    weights = graph.op("Softmax", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    seen = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    flat = graph.op("Reshape", seen, graph.number([0, 0, D], np.int64))
    x = graph.op("Add", x, graph.linear(flat, "attention_output", D, D))
    model = graph.model(tmp_path, graph.head(graph.rms(x)))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_position_scores_that_are_added_to_products_begin_no_stream(tmp_path: Path) -> None:
    # T5 looks one bias table up and adds it in every layer; taken for a residual, the second layer lost its roles
    graph = Graph()
    ids = graph.ids()
    x = graph.embedded(ids)
    length = graph.op("Gather", graph.op("Shape", ids), graph.number(1, np.int64))
    buckets = graph.op("Range", graph.number(0, np.int64), length, graph.number(1, np.int64))
    bias = graph.op("Gather", graph.weight("position_embedding", 8, H), buckets)
    bias = graph.op("Unsqueeze", graph.op("Transpose", bias, perm=[1, 0]), graph.number([0, 2], np.int64))
    for _ in range(2):
        h = graph.rms(x)
        q, k, v = (graph.heads(graph.linear(h, f"attention_{kind}", D, D)) for kind in ("query", "key", "value"))
        scores = graph.op("Add", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), bias)
        seen = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v)
        flat = graph.op("Reshape", graph.op("Transpose", seen, perm=[0, 2, 1, 3]), graph.number([0, 0, D], np.int64))
        x = graph.op("Add", x, graph.linear(flat, "attention_output", D, D))
    model = graph.model(tmp_path, graph.head(graph.rms(x)))
    assert kinds(model, list(graph.truth)) == graph.truth
    assert layers(model, graph.truth, "attention_query") == [0, 1]


@pytest.mark.parametrize("op", ["MultiHeadAttention", "GroupQueryAttention", "Attention"])
def test_fused_attention_shows_its_projections(tmp_path: Path, op: str) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    h = graph.op("SimplifiedLayerNormalization", x, graph.weight("norm_scale", D), axis=-1)
    q, k, v = (graph.linear(h, f"attention_{kind}", D, D) for kind in ("query", "key", "value"))
    if op == "Attention":  # of ai.onnx 23
        seen = graph.op(op, q, k, v, q_num_heads=H, kv_num_heads=H)
    else:
        seen = graph.op(op, q, k, v, domain="com.microsoft", num_heads=H)
    skip = graph.op(
        "SkipSimplifiedLayerNormalization",
        x, graph.linear(seen, "attention_output", D, D), graph.weight("norm_scale", D),
        domain="com.microsoft",
    )  # fmt: skip
    model = graph.model(tmp_path, graph.head(skip), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_attention_that_projects_itself_is_told_by_its_slots(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    inside = graph.weight("attention_qkv", D, 3 * D), graph.weight("attention_qkv_bias", 3 * D)
    seen = graph.op("Attention", x, *inside, domain="com.microsoft", num_heads=H)
    out = graph.op("MatMul", seen, graph.weight("attention_output", D, D))
    normed = graph.op(
        "SkipLayerNormalization",
        x, out, graph.weight("norm_scale", D), graph.weight("norm_bias", D), graph.weight("attention_output_bias", D),
        domain="com.microsoft",
    )  # fmt: skip
    model = graph.model(tmp_path, graph.head(normed), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_fused_projections_are_told_by_where_their_parts_go(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    whole = graph.linear(graph.rms(x), "attention_qkv", D, 3 * D, "attention_qkv_bias")
    names = [graph.name() for _ in range(3)]
    graph.nodes.append(node("Split", [whole], names, axis=-1, num_outputs=3))
    q, k, v = (graph.heads(name) for name in names)
    weights = graph.op("Softmax", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    seen = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    flat = graph.op("Reshape", seen, graph.number([0, 0, D], np.int64))
    x = graph.op("Add", x, graph.linear(flat, "attention_output", D, D))
    both = graph.linear(graph.rms(x), "ffn_gate_up", D, 2 * F)
    halves = [graph.name() for _ in range(2)]
    graph.nodes.append(node("Split", [both], halves, axis=-1, num_outputs=2))
    inner = graph.op("Mul", graph.op("Relu", halves[0]), halves[1])
    x = graph.op("Add", x, graph.linear(inner, "ffn_down", F, D))
    model = graph.model(tmp_path, graph.head(graph.rms(x)))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_low_rank_queries_and_shared_keys_and_values_keep_their_names(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    h = graph.rms(x)
    q = graph.linear(graph.rms(graph.linear(h, "attention_query", D, 8), 8), "attention_query", 8, D)
    both = graph.linear(graph.rms(graph.linear(h, "attention_kv", D, 8), 8), "attention_kv", 8, 2 * D)
    parts = [graph.name() for _ in range(2)]
    graph.nodes.append(node("Split", [both], parts, axis=-1, num_outputs=2))
    q, k, v = (graph.heads(one) for one in (q, *parts))
    weights = graph.op("Softmax", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    seen = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    flat = graph.op("Reshape", seen, graph.number([0, 0, D], np.int64))
    x = graph.op("Add", x, graph.linear(flat, "attention_output", D, D))
    model = graph.model(tmp_path, graph.head(graph.rms(x)))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_router_and_chosen_experts_are_seen_through_the_choice(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids("s"))
    h = graph.rms(x)
    scores = graph.op("Softmax", graph.linear(h, "router", D, 4), axis=-1)
    best, chosen = graph.name(), graph.name()
    graph.nodes.append(node("TopK", [scores, graph.number([1], np.int64)], [best, chosen], axis=-1))
    flat = graph.op("Squeeze", chosen, graph.number([1], np.int64))
    rows = graph.op("Unsqueeze", h, graph.number([1], np.int64))
    up = graph.op("MatMul", rows, graph.op("Gather", graph.weight("ffn_up", 4, D, F), flat))
    added = graph.op("Gather", graph.weight("ffn_up_bias", 4, F), flat)
    up = graph.op("Add", up, graph.op("Unsqueeze", added, graph.number([1], np.int64)))
    down = graph.op("MatMul", graph.op("Relu", up), graph.op("Gather", graph.weight("ffn_down", 4, F, D), flat))
    down = graph.op("Mul", graph.op("Squeeze", down, graph.number([1], np.int64)), best)
    model = graph.model(tmp_path, graph.head(graph.rms(graph.op("Add", x, down))), rank=2)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_low_rank_correction_is_an_adapter_pair(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    h = graph.rms(x)
    main = graph.linear(h, "projection", D, D)
    correction = graph.linear(graph.linear(h, "adapter_a", D, 2), "adapter_b", 2, D)
    y = graph.op("Add", main, graph.op("Mul", correction, graph.number(2.0)))
    model = graph.model(tmp_path, graph.head(graph.rms(graph.op("Add", x, y))))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_written_out_layer_norm_has_scale_and_bias(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.floats("b", "s", D)
    axes = graph.number([-1], np.int64)
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, axes, keepdims=1))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), axes, keepdims=1)
    ratio = graph.op("Div", centred, graph.op("Sqrt", graph.op("Add", variance, graph.number(1e-5))))
    scaled = graph.op("Mul", ratio, graph.weight("norm_scale", D))
    out = graph.op("Add", scaled, graph.weight("norm_bias", D))
    model = graph.model(tmp_path, graph.linear(out, "projection", D, 8))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_recurrent_cells_and_convolutions_are_told_by_their_slots(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.floats(1, 3, 8, 8)
    y = graph.op("Conv", x, graph.weight("convolution", 4, 3, 3, 3), graph.weight("bias", 4))
    y = graph.op("Reshape", y, graph.number([4, 1, -1], np.int64))
    size = 36
    y = graph.op(
        "LSTM", y, graph.weight("recurrent_input", 1, 20, size), graph.weight("recurrent_hidden", 1, 20, 5),
        graph.weight("recurrent_input_bias", 1, 40), hidden_size=5,
    )  # fmt: skip
    model = graph.model(tmp_path, graph.linear(y, "projection", 5, 3), rank=4)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_models_without_a_vocabulary_have_no_embedding_and_no_head(tmp_path: Path) -> None:
    graph = Graph()
    noise, label = graph.floats("b", D), graph.ids("b")
    table = graph.weight("type_embedding", 10, D)  # once for each image: a table of classes
    x = graph.op("Add", noise, graph.op("Gather", table, label))
    for _ in range(2):
        x = graph.op("Tanh", graph.linear(x, "projection", D, D, "bias"))
    model = graph.model(tmp_path, graph.linear(x, "projection", D, 10, "bias"), rank=2)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_two_outputs_are_no_vocabulary(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids(), rows=50)
    model = graph.model(tmp_path, graph.linear(x, "projection", D, 2))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_padded_vocabulary_is_still_the_tokens_head(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids(), rows=V + 4)
    model = graph.model(tmp_path, graph.head(graph.rms(x)))
    assert kinds(model, list(graph.truth)) == graph.truth
    head = next(id for id, kind in graph.truth.items() if kind == "output_head")
    assert f"which has {V + 4} rows" in roles(model)[head].because


def test_bodies_of_functions_are_followed(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    body = helper.make_function(
        "here", "Project", ["x", "w"], ["y"], [node("MatMul", ["x", "w"], ["y"])], [helper.make_opsetid("", 18)]
    )
    table, head = (np.random.default_rng(i).standard_normal((V, D)).astype(np.float32) for i in range(2))
    proto = model_of(
        [node("Gather", ["E", "ids"], ["x"]), node("Project", ["x", "W"], ["out"], domain="here")],
        [value("ids", TensorProto.INT64, ("b", "s"))],
        [value("out", TensorProto.FLOAT, ("b", "s", V))],
        [tensor("E", table), tensor("W", head.T)],
        check=False,
    )
    proto.opset_import.append(helper.make_opsetid("here", 1))
    proto.functions.append(body)
    onnx.checker.check_model(proto)
    assert kinds(saved(proto, tmp_path)) == {"E": "token_embedding", "W": "output_head"}


def test_operations_survive_being_sent_to_another_process(tmp_path: Path) -> None:
    graph, out = decoder(1)
    model = graph.model(tmp_path, out)
    again = pickle.loads(pickle.dumps(model))
    assert tuple(again.operations) == tuple(model.operations)
    assert len(model.operations) == len(graph.nodes) + 2  # the input and the output


def test_name_that_contradicts_the_graph_is_mentioned(tmp_path: Path) -> None:
    graph, out = decoder(1)
    key = next(id for id, kind in graph.truth.items() if kind == "attention_key")
    proto = graph.proto(out)
    for one in proto.graph.initializer:
        one.name = "layers.0.mlp.down_proj.weight" if one.name == key else one.name
    for one in proto.graph.node:
        for slot, name in enumerate(one.input):
            one.input[slot] = "layers.0.mlp.down_proj.weight" if name == key else name
    role = roles(saved(proto, tmp_path))["layers.0.mlp.down_proj.weight"]
    assert role.kind == "attention_key"
    assert "its name says ffn_down" in role.because


def test_five_thousand_operations_take_about_a_second(tmp_path: Path) -> None:
    graph, out = decoder(100)
    model = graph.model(tmp_path, out)
    assert len(model.operations) > 5000
    begin = time.process_time()
    found = roles(model)
    n_seconds = time.process_time() - begin
    assert sum(role.kind == "attention_query" for role in found.values()) == 100
    assert n_seconds < 4  # 0.4 s on a quiet core


def test_recognisers_run_in_the_order_of_their_ranks() -> None:
    ranks = [one.rank for one in in_order(discover("recognisers", Recogniser))]
    assert ranks == sorted(ranks)
    assert len(ranks) == len(set(ranks)) >= 9


# names ------------------------------------------------------------------------------------------------------------

NAMED: list[tuple[str, tuple[int, ...], str, int | None, int | None]] = [
    ("model.embed_tokens.weight", (997, 64), "token_embedding", None, None),
    ("model.layers.1.self_attn.q_proj.weight", (64, 64), "attention_query", 1, None),
    ("model.layers.1.self_attn.q_proj.bias", (64,), "attention_query_bias", 1, None),
    ("model.layers.0.mlp.gate_proj.weight", (96, 64), "ffn_gate", 0, None),
    ("model.layers.0.post_attention_layernorm.weight", (64,), "norm_scale", 0, None),
    ("model.layers.0.block_sparse_moe.experts.3.w1.weight", (96, 64), "ffn_gate", 0, 3),
    ("model.layers.0.block_sparse_moe.experts.3.w2.weight", (64, 96), "ffn_down", 0, 3),
    ("model.layers.0.block_sparse_moe.experts.3.w3.weight", (96, 64), "ffn_up", 0, 3),
    ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), "router", 0, None),
    ("lm_head.weight", (997, 64), "output_head", None, None),
    ("transformer.h.2.attn.c_attn.weight", (64, 192), "attention_qkv", 2, None),
    ("transformer.h.2.attn.c_attn.bias", (192,), "attention_qkv_bias", 2, None),
    ("transformer.h.2.attn.bias", (1, 1, 64, 64), "buffer", 2, None),
    ("transformer.h.2.attn.c_proj.weight", (64, 64), "attention_output", 2, None),
    ("transformer.h.2.mlp.c_proj.weight", (256, 64), "ffn_down", 2, None),
    ("transformer.wpe.weight", (64, 64), "position_embedding", None, None),
    ("bert.encoder.layer.0.attention.output.dense.weight", (64, 64), "attention_output", 0, None),
    ("bert.encoder.layer.0.intermediate.dense.weight", (96, 64), "ffn_up", 0, None),
    ("bert.encoder.layer.0.output.dense.weight", (64, 96), "ffn_down", 0, None),
    ("bert.embeddings.token_type_embeddings.weight", (2, 64), "type_embedding", None, None),
    ("bert.embeddings.LayerNorm.beta", (64,), "norm_bias", None, None),
    ("cls.predictions.transform.dense.weight", (64, 64), "projection", None, None),
    ("blk.4.attn_k.weight", (64, 32), "attention_key", 4, None),
    ("blk.4.ffn_gate_inp.weight", (8, 64), "router", 4, None),
    ("token_embd.weight", (997, 64), "token_embedding", None, None),
    ("transformer.h.0.self_attention.query_key_value.weight", (192, 64), "attention_qkv", 0, None),
    ("transformer.h.0.self_attention.dense.weight", (64, 64), "attention_output", 0, None),
    ("layers.0.mixer.in_proj.weight", (256, 64), "projection", 0, None),
    ("layers.0.mixer.conv1d.weight", (128, 1, 4), "convolution", 0, None),
    ("base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight", (8, 64), "adapter_a", 0, None),
    ("lstm.weight_ih_l0", (80, 20), "recurrent_input", None, None),
    ("lstm.bias_hh_l0", (80,), "recurrent_hidden_bias", None, None),
    ("visual.conv1.weight", (64, 3, 8, 8), "convolution", None, None),
    ("bn1.running_mean", (64,), "buffer", None, None),
    ("class_embedding.weight", (1000, 64), "projection", None, None),
]  # fmt: skip


def named_model(names: list[tuple[str, tuple[int, ...]]]) -> Model:
    weights = tuple(Weight(make_id(name), name, shape, "float32", None) for name, shape in names)
    return Model("model.safetensors", "safetensors", (Part("", ("model.safetensors",)),), weights)


@pytest.mark.parametrize(("name", "shape", "kind", "layer", "expert"), NAMED, ids=[row[0] for row in NAMED])
def test_names_tell_kind_layer_and_expert(
    name: str, shape: tuple[int, ...], kind: str, layer: int | None, expert: int | None
) -> None:
    model = named_model([(row[0], row[1]) for row in NAMED])
    role = roles_by_name(model)[make_id(name)]
    assert (role.kind, role.layer, role.expert) == (kind, layer, expert)


@pytest.mark.parametrize(("up", "down"), [("fc1", "fc2"), ("input_linear", "output_linear"), ("up_proj", "down_proj")])
def test_shapes_decide_between_one_branch_and_two(up: str, down: str) -> None:
    names = [(f"decoder.layers.0.mlp.{up}.weight", (192, 64)), (f"decoder.layers.0.mlp.{down}.weight", (64, 96))]
    assert [role.kind for role in roles_by_name(named_model(names)).values()] == ["ffn_gate_up", "ffn_down"]
    names[0] = (names[0][0], (96, 64))
    assert [role.kind for role in roles_by_name(named_model(names)).values()] == ["ffn_up", "ffn_down"]


def test_sides_are_told_where_both_stacks_are_there() -> None:
    both = named_model(
        [(f"{side}.block.0.layer.0.SelfAttention.q.weight", (64, 64)) for side in ("encoder", "decoder")]
    )
    assert [role.side for role in roles_by_name(both).values()] == ["encoder", "decoder"]
    alone = named_model([("bert.encoder.layer.0.attention.self.query.weight", (64, 64)),
                         ("cls.predictions.decoder.weight", (997, 64))])  # fmt: skip
    assert {role.side for role in roles_by_name(alone).values()} == {None}


def test_paths_lose_the_wrappers_of_other_libraries() -> None:
    assert path_of("_orig_mod.fc.base_layer.weight").modules == ("fc",)
    assert path_of("conv.parametrizations.weight.original1").end == "weight"
    assert path_of("layers.0.mlp.experts.gate_up_proj").leaf == "gate_up_proj"
