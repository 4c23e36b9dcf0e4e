"""Roles where real files are unlike textbooks: nodes out of order, norms of TensorFlow, codes, texts as ids.

Each graph is one that a file of a public repository holds, made small.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_cases import node
from role_graphs import D, Graph, V, kinds

from tieaudit.model import Model, Part, Weight
from tieaudit.naming import roles_by_name
from tieaudit.roles import roles

pytest.importorskip("onnx")


def test_nodes_that_an_optimiser_appended_are_read_where_they_belong(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    out = graph.head(graph.op("Add", x, graph.attention(graph.rms(x), biases=True)))
    graph.nodes.append(graph.nodes.pop(3))  # in front of all that reads it, now behind
    model = graph.model(tmp_path, out, check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_a_graph_that_goes_in_a_circle_is_still_read(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    graph.nodes += [node("Add", ["ring_b", x], ["ring_a"]), node("Relu", ["ring_a"], ["ring_b"])]
    model = graph.model(tmp_path, graph.head(x), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def written_by_tensorflow(graph: Graph, x: str, scale: str, bias: str) -> str:
    """x · (scale · root) + (bias − mean · (scale · root))."""
    axes = graph.number([-1], np.int64)
    mean = graph.op("ReduceMean", x, axes, keepdims=1)
    apart = graph.op("Sub", x, mean)
    variance = graph.op("ReduceMean", graph.op("Mul", apart, apart), axes, keepdims=1)
    root = graph.op("Reciprocal", graph.op("Sqrt", graph.op("Add", variance, graph.number(1e-5))))
    factor = graph.op("Mul", root, scale)
    return graph.op("Add", graph.op("Mul", x, factor), graph.op("Sub", bias, graph.op("Mul", mean, factor)))


def test_norms_that_multiply_the_root_first_have_scale_and_bias(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.floats("b", "s", D)
    out = written_by_tensorflow(graph, x, graph.weight("norm_scale", D), graph.weight("norm_bias", D))
    model = graph.model(tmp_path, graph.linear(out, "projection", D, 8))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_a_vector_that_multiplies_a_root_of_something_else_is_no_norm(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.floats("b", "s", D)
    out = graph.op("Mul", graph.op("Sqrt", graph.op("Abs", x)), graph.weight("other", D))
    model = graph.model(tmp_path, graph.linear(out, "projection", D, 8))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_a_table_times_ones_among_zeros_is_a_lookup(tmp_path: Path) -> None:
    graph = Graph()
    ids = graph.op("Unsqueeze", graph.ids(), graph.number([-1], np.int64))
    ones = graph.op("Cast", graph.op("Equal", ids, graph.number(np.arange(V), np.int64)), to=TensorProto.FLOAT)
    x = graph.op("MatMul", ones, graph.weight("token_embedding", V, D))
    model = graph.model(tmp_path, graph.head(graph.op("Add", x, graph.plain(graph.rms(x)))))
    assert kinds(model, list(graph.truth)) == graph.truth


def test_texts_that_become_ids_inside_the_graph_are_ids(tmp_path: Path) -> None:
    graph = Graph()
    graph.inputs.append(onnx.helper.make_tensor_value_info("letters", TensorProto.STRING, ["b", "s"]))
    encode = {"domain": "ai.onnx.ml", "keys_strings": ["a", "b"], "values_int64s": [0, 1]}
    ids = graph.op("LabelEncoder", "letters", **encode)
    proto = graph.proto(graph.head(graph.embedded(ids)), check=False)
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    onnx.checker.check_model(proto)
    from onnx_cases import saved

    assert kinds(saved(proto, tmp_path), list(graph.truth)) == graph.truth


def test_dequantised_biases_are_biases_and_their_scales_are_not(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.floats(1, 3, 8, 8)
    codes = graph.number(np.arange(4), np.int32)
    bias = graph.op("DequantizeLinear", codes, graph.number(0.01))
    out = graph.op("Conv", x, graph.weight("convolution", 4, 3, 3, 3), bias)
    model = graph.model(tmp_path, out, rank=4)
    assert kinds(model)[codes] == "bias"


def test_what_is_added_to_an_image_is_no_table_of_positions(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.op("Add", graph.floats(1, 3, 8, 8), graph.weight("other", 1, 3, 8, 8))  # minus the mean of all images
    out = graph.op("Conv", x, graph.weight("convolution", 4, 3, 3, 3))
    model = graph.model(tmp_path, out, rank=4)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_what_is_added_to_patches_that_attend_is_a_table_of_positions(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.op("Add", graph.floats("b", 9, D), graph.weight("position_embedding", 1, 9, D))
    x = graph.op("Add", x, graph.attention(graph.rms(x)))
    model = graph.model(tmp_path, graph.linear(x, "projection", D, 8))
    assert kinds(model, list(graph.truth)) == graph.truth


def by_name(**shapes: tuple[int, ...]) -> dict[str, str]:
    weights = tuple(
        Weight(name, name, shape, "int64" if "num_batches" in name else "float32", None)
        for name, shape in shapes.items()
    )
    model = Model("model.pth", "torch_checkpoint", (Part("", ("model.pth",)),), weights)
    return {id: role.kind for id, role in roles_by_name(model).items()}


def test_a_running_variance_makes_its_neighbours_a_norm_whatever_they_are_called() -> None:
    counted = {f"stem.1.{end}": (8,) for end in ("weight", "bias", "running_mean", "running_var")}
    found = by_name(**{"stem.0.weight": (8, 3, 3, 3), **counted, "stem.1.num_batches_tracked": ()})
    assert found == {
        "stem.0.weight": "convolution", "stem.1.weight": "norm_scale", "stem.1.bias": "norm_bias",
        "stem.1.running_mean": "buffer", "stem.1.running_var": "buffer", "stem.1.num_batches_tracked": "buffer",
    }  # fmt: skip


def test_a_letter_alone_tells_nothing_but_a_letter_in_a_module_does() -> None:
    assert by_name(k=(8, 8)) == {"k": "other"}  # tempting: a key; exporters call the tenth tensor k
    assert by_name(**{"layer.0.attention.k.weight": (8, 8)}) == {"layer.0.attention.k.weight": "attention_key"}


def test_buffers_that_no_node_reads_are_buffers_all_the_same(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    graph.tensors.append(onnx.numpy_helper.from_array(np.array(7, np.int64), "net.1.num_batches_tracked"))
    assert kinds(graph.model(tmp_path, graph.head(x)))["net.1.num_batches_tracked"] == "buffer"


def test_a_name_against_the_graph_is_told_apart_from_a_table_that_also_scores(tmp_path: Path) -> None:
    from onnx_cases import model_of, saved, tensor, value

    table = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
    nodes = [
        node("Gather", ["lm_head.weight", "ids"], ["x"]),
        node("Transpose", ["lm_head.weight"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["out"]),
    ]
    ids, out = value("ids", TensorProto.INT64, ("b", "s")), value("out", TensorProto.FLOAT, ("b", "s", V))
    tied = saved(model_of(nodes, [ids], [out], [tensor("lm_head.weight", table)]), tmp_path / "tied")
    assert roles(tied)["lm_head.weight"].against == ""  # it is both, and nothing contradicts
    alone = value("x", TensorProto.FLOAT, ("b", "s", D))
    odd = saved(model_of(nodes[:1], [ids], [alone], [tensor("lm_head.weight", table)]), tmp_path / "odd")
    role = roles(odd)["lm_head.weight"]
    assert (role.kind, role.against) == ("token_embedding", "output_head")
    assert "its name says output_head" in role.because


def test_the_value_of_a_critic_or_a_quantiser_is_no_attention_s() -> None:
    critic = {"value_net.0.weight": (8, 8), "value_net.0.bias": (8,), "action_net.weight": (3, 8)}
    told = by_name(**critic, **{"quant.scaling.value": ()})
    assert [kind for kind in told.values() if kind.startswith("attention")] == []
    block = {f"h.0.attention.{part}.weight": (8, 8) for part in ("query", "key", "value")}
    assert by_name(**block)["h.0.attention.value.weight"] == "attention_value"


def test_blocks_between_fused_norms_are_seen(tmp_path: Path) -> None:
    """A norm that adds gives the sum and what it makes of it: the next block starts from the latter."""
    graph = Graph()
    x = graph.embedded(graph.ids())
    normed = graph.layer_norm(x)
    for _ in range(2):
        worked = graph.attention(normed)
        for made in (worked, None):
            after = made or graph.plain(normed)
            scale, bias, total = graph.weight("norm_scale", D), graph.weight("norm_bias", D), graph.name()
            normed = graph.name()
            graph.nodes.append(node("SkipLayerNormalization", [after, x, scale, bias], [normed, "", "", total],
                                    domain="com.microsoft"))  # fmt: skip
            x = total
    model = graph.model(tmp_path, graph.head(normed), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def in_codes(graph: Graph, x: str, kind: str, n_in: int, n_out: int, bias: str) -> str:
    """A product as ONNX Runtime's dynamic quantisation writes it: codes, both scales, and the bias behind them."""
    codes, scale, zero = graph.name(), graph.name(), graph.name()
    graph.nodes.append(node("DynamicQuantizeLinear", [x], [codes, scale, zero]))
    weight = graph.number(np.arange(n_in * n_out).reshape(n_in, n_out) % 251 - 125, np.int8)
    graph.truth[weight] = kind
    summed = graph.op("MatMulInteger", codes, weight, zero, graph.number(0, np.int8))
    scales = graph.op("Mul", scale, graph.number(0.01))
    whole = graph.op("Mul", graph.op("Cast", summed, to=TensorProto.FLOAT), scales)
    return graph.op("Add", whole, graph.weight(bias, n_out)) if bias else whole


@pytest.mark.parametrize("bias", ["output_head_bias", ""])
def test_scales_of_codes_hide_neither_a_bias_nor_the_head(tmp_path: Path, bias: str) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    x = graph.layer_norm(graph.op("Add", x, graph.attention(x)))
    inner = graph.op("Relu", in_codes(graph, x, "ffn_up", D, 3 * D, "ffn_up_bias"))
    x = graph.layer_norm(graph.op("Add", x, in_codes(graph, inner, "ffn_down", 3 * D, D, "ffn_down_bias")))
    model = graph.model(tmp_path, in_codes(graph, x, "output_head", D, V, bias), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_an_activation_that_is_fused_with_its_product_still_activates(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.embedded(graph.ids())
    x = graph.op("Add", x, graph.attention(x))
    flat = graph.op("Reshape", x, graph.number([-1, D], np.int64))
    fused = (graph.weight("ffn_up", D, 3 * D), graph.weight("ffn_up_bias", 3 * D))
    inner = graph.op("FusedGemm", flat, *fused, domain="com.microsoft", activation="Relu")
    down = graph.op("Gemm", inner, graph.weight("ffn_down", 3 * D, D), graph.weight("ffn_down_bias", D))
    x = graph.op("Add", x, graph.op("Reshape", down, graph.op("Shape", x)))
    model = graph.model(tmp_path, graph.head(x), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth


def test_a_type_that_an_exporter_has_chosen_is_a_row_of_types(tmp_path: Path) -> None:
    """Without segment ids a caller cannot give any: the table of two types is looked up by a constant."""
    graph = Graph()
    x = graph.embedded(graph.ids("b", 5))
    x = graph.op("Add", x, graph.op("Gather", graph.weight("type_embedding", 2, D), graph.number([[0] * 5], np.int64)))
    x = graph.op(
        "Add",
        x,
        graph.op("Gather", graph.weight("position_embedding", 64, D), graph.number([[0, 1, 2, 3, 4]], np.int64)),
    )
    x = graph.layer_norm(x)
    model = graph.model(tmp_path, graph.head(graph.op("Add", x, graph.attention(x))), check=False)
    assert kinds(model, list(graph.truth)) == graph.truth
