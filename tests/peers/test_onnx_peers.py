"""Cases of peers' test suites that are about ONNX files, and what tieaudit does with them: see docs/peer-cases.md.

Peers' passes rewrite; here each case says which ties are measured, and where it matters what `dedup` delivers, with
the outputs of ONNX Runtime before and after. IR: onnx/ir-py, OPT: onnx/optimizer, ORT: microsoft/onnxruntime,
PT: pytorch/pytorch, OPTM: huggingface/optimum-onnx.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import peer_models as peers
import pytest
import tiny_onnx
from onnx import TensorProto, helper
from onnx_cases import node
from peer_models import FLOAT, INT64, branch, codes, deduplicated, found, initializers, measured, random, shared, write

from tieaudit.load import load_one
from tieaudit.view import TRANSPOSED

pytest.importorskip("onnxruntime")

X = random(1, 3, seed=9)
ONE_TWO_THREE = np.array([1, 2, 3], np.float32)
SUM = [node("Add", ["x", "w1"], ["s"]), node("Add", ["s", "w2"], ["y"])]


def two(path: Path, first: Any, second: Any) -> Path:
    """Two weights of any element type and shape, each seen through its own Identity."""
    weights = {"w1": np.asarray(first), "w2": np.asarray(second)}
    nodes = [node("Identity", [name], [f"{name}_out"]) for name in weights]
    kinds = {f"{name}_out": helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in weights.items()}
    return write(path, nodes, weights, kinds, {})


# --- IR: onnx/ir-py, initializer deduplication ---------------------------------------------------------------------


def test_IR_1_two_equal_operands_of_one_add_become_one_initializer(tmp_path: Path) -> None:
    nodes = [node("Add", ["w1", "w2"], ["s"]), node("Add", ["s", "x"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE})
    assert measured(path) == [{"w1", "w2"}]
    after = deduplicated(path, {"x": X})
    assert len(initializers(after)) == 1
    assert len(set(after.graph.node[0].input)) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(np.array([1, 2], np.float32), np.array([[1, 2]], np.float32), id="shape"),
        pytest.param(np.array([1, 2], np.float32), np.array([1, 2], np.float64), id="dtype"),
        pytest.param(np.array([1, 2], np.float32), np.array([2, 1], np.float32), id="order"),
    ],
)
def test_IR_3_IR_6_IR_9_another_shape_dtype_or_order_is_another_value(tmp_path: Path, first: Any, second: Any) -> None:
    path = two(tmp_path / "m.onnx", first, second)
    assert measured(path) == []
    assert peers.nothing_to_do(path)


def test_IR_4_equal_strings_in_another_shape_are_another_value(tmp_path: Path) -> None:
    items = [helper.make_tensor("a", TensorProto.STRING, [2], [b"p", b"q"])]
    items += [helper.make_tensor("b", TensorProto.STRING, [1, 2], [b"p", b"q"])]
    nodes = [node("Identity", ["a"], ["ya"]), node("Identity", ["b"], ["yb"])]
    outs = [cases.value("ya", TensorProto.STRING, [2]), cases.value("yb", TensorProto.STRING, [1, 2])]
    path = tmp_path / "m.onnx"
    onnx.save(cases.model_of(nodes, [], outs, items), str(path))
    assert measured(path) == []


def test_IR_7_two_equal_scalars_are_equal_constants_and_no_tie(tmp_path: Path) -> None:
    # ir-py stores one; here a scalar is a constant, and to merge 4 bytes helps nobody
    path = write(tmp_path / "m.onnx", SUM, {"w1": np.float32(5), "w2": np.float32(5)})
    assert measured(path) == []
    assert [set(group) for group in found(path).constant_classes] == [{"w1", "w2"}]
    assert peers.nothing_to_do(path)


def in_branches(path: Path, main: dict[str, Any], then: dict[str, Any], other: dict[str, Any]) -> Path:
    """y = x + main…, then + the weights of the branch that is taken."""

    def body(weights: dict[str, Any], out: str) -> onnx.GraphProto:
        names, nodes = list(weights), []
        value = "base"
        for index, name in enumerate(names):
            to = out if index == len(names) - 1 else f"{out}_{index}"
            nodes.append(node("Add", [value, name], [to]))
            value = to
        return branch(nodes, weights, out)

    nodes, value = [], "x"
    for index, name in enumerate(main):
        nodes.append(node("Add", [value, name], [f"b{index}"]))
        value = f"b{index}"
    nodes.append(node("Identity", [value], ["base"]))
    nodes.append(
        node("If", ["flag"], ["y"], name="If_0", then_branch=body(then, "then"), else_branch=body(other, "else"))
    )
    return write(path, nodes, main, inputs={"x": (FLOAT, [1, 3]), "flag": (TensorProto.BOOL, [])})


def test_IR_10_copies_in_a_subgraph_are_one_class_with_the_outer_one_and_move_out(tmp_path: Path) -> None:
    # ir-py never merges across the boundary of a scope; here the outer one serves the subgraph too
    w = ONE_TWO_THREE
    path = in_branches(tmp_path / "m.onnx", {"a": w}, {"b": w, "c": w}, {"d": w * 2})
    inner = "|If_0.then_branch|"
    assert measured(path) == [{"a", f"{inner}b", f"{inner}c"}]
    after = deduplicated(path, {"x": X, "flag": np.array(True)})
    peers.assert_same_outputs(path, tmp_path / "out" / "m.onnx", {"x": X, "flag": np.array(False)})
    assert list(initializers(after)) == ["a"]


def test_IR_10_equal_scalars_on_both_sides_of_a_scope_are_no_tie(tmp_path: Path) -> None:
    one = np.float32(1)
    path = in_branches(tmp_path / "m.onnx", {"a": one}, {"b": one, "c": one}, {"d": one})
    assert measured(path) == []
    assert peers.nothing_to_do(path)


def test_IR_12_an_initializer_behind_an_identity_is_the_same_weight(tmp_path: Path) -> None:
    nodes = [node("Identity", ["w"], ["w_id"]), node("Add", ["w_id", "x"], ["s"]), node("Mul", ["s", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": ONE_TWO_THREE})
    assert shared(path) == [{"w"}]
    assert measured(path) == []


def test_IR_16_equal_constant_nodes_are_measured_whatever_their_size(tmp_path: Path) -> None:
    # ir-py has a limit of elements; here there is none
    for n in (4, 5000):
        value = random(n)
        nodes = [node("Constant", [], [name], value=cases.tensor("", value)) for name in ("c1", "c2")]
        nodes += [node("Add", ["x", "c1"], ["s"]), node("Add", ["s", "c2"], ["y"])]
        path = write(tmp_path / f"{n}.onnx", nodes, {}, inputs={"x": (FLOAT, [1, n])})
        assert measured(path) == [{"c1", "c2"}]
        deduplicated(path, {"x": random(1, n, seed=9)})


# --- OPT: onnx/optimizer -------------------------------------------------------------------------------------------


def test_OPT_5_an_unused_copy_is_in_the_class_and_goes_with_it(tmp_path: Path) -> None:
    # an unused weight alone stays: what is dead is not judged here; an unused copy is merged like any other
    path = write(
        tmp_path / "m.onnx",
        [node("MatMul", ["x", "w"], ["y"])],
        {"w": random(3, 8), "copy": random(3, 8), "dead": random(3, 8, seed=1)},
    )
    assert measured(path) == [{"w", "copy"}]
    assert list(initializers(deduplicated(path, {"x": X}))) == ["w", "dead"]


def test_OPT_6_a_copy_that_a_caller_may_replace_stays(tmp_path: Path) -> None:
    given = {"x": (FLOAT, [1, 3]), "w2": (FLOAT, [3])}
    path = write(tmp_path / "m.onnx", SUM, {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE}, inputs=given)
    assert measured(path) == [{"w1", "w2"}]
    result = peers.cli("apply", path, "--to", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    assert "an input of its graph too" in result.output


def test_OPT_8_a_weight_read_by_a_loop_body_too_is_one_shared_weight(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Add", ["state", "w"], ["next"])],
        "body",
        [cases.value("i", INT64, []), cases.value("go", TensorProto.BOOL, []), cases.value("state", FLOAT, [1, 3])],
        [cases.value("go_on", TensorProto.BOOL, []), cases.value("next", FLOAT, [1, 3])],
    )
    nodes = [node("Loop", ["n", "", "x"], ["looped"], body=body, name="L"), node("Add", ["looped", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": ONE_TWO_THREE, "n": np.array(3, np.int64)}, shapes={"y": [1, 3]})
    (tie,) = found(path).ties
    assert (tie.origin, set(tie.ids), len(tie.members)) == ("aliased", {"w"}, 2)
    assert {use.scope for use in load_one(path).uses_of["w"]} == {"", "L.body"}


def test_OPT_8_a_copy_inside_a_loop_body_is_read_from_outside_afterwards(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Add", ["state", "inner"], ["next"])],
        "body",
        [cases.value("i", INT64, []), cases.value("go", TensorProto.BOOL, []), cases.value("state", FLOAT, [1, 3])],
        [cases.value("go_on", TensorProto.BOOL, []), cases.value("next", FLOAT, [1, 3])],
        peers.tensors({"inner": ONE_TWO_THREE}),
    )
    nodes = [node("Loop", ["n", "", "x"], ["looped"], body=body, name="L"), node("Add", ["looped", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": ONE_TWO_THREE, "n": np.array(3, np.int64)}, shapes={"y": [1, 3]})
    assert measured(path) == [{"w", "|L.body|inner"}]
    after = deduplicated(path, {"x": X})
    (loop,) = (one for one in after.graph.node if one.op_type == "Loop")
    assert not loop.attribute[0].g.initializer


def test_OPT_9_a_weight_that_is_a_graph_output_keeps_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", SUM, {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE}, ["y", "w2"])
    assert measured(path) == [{"w1", "w2"}]
    after = deduplicated(path, {"x": X})
    assert [output.name for output in after.graph.output] == ["y", "w2"]
    assert len(initializers(after)) == 1


# --- ORT: microsoft/onnxruntime, constant sharing ------------------------------------------------------------------


@pytest.mark.parametrize("opset", [12, 13, 14, 23])
def test_ORT_1_scalars_and_single_elements_of_another_type_or_rank_are_other_constants(
    tmp_path: Path, opset: int
) -> None:
    weights: dict[str, Any] = {}
    for index in range(3):
        weights |= {f"i64_{index}": np.int64(512), f"i32_{index}": np.int32(512), f"row_{index}": np.array([512], "i4")}
    nodes = [node("Identity", [name], [f"{name}_out"]) for name in weights]
    kinds = {f"{name}_out": INT64 if name.startswith("i64") else TensorProto.INT32 for name in weights}
    path = write(tmp_path / "m.onnx", nodes, weights, kinds, {}, opset=opset)
    # the runtime merges each of the three groups of three; here they are equal constants, too small to be a finding
    groups = [{f"{kind}_{index}" for index in range(3)} for kind in ("i64", "i32", "row")]
    assert [set(group) for group in found(path).constant_classes] == groups
    assert measured(path) == []


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_ORT_3_twelve_equal_rows_are_one_class_and_keep_their_rank(tmp_path: Path, kind: Any) -> None:
    names = [f"w{index}" for index in range(12)]
    nodes = [node("Mul", ["x" if not index else f"h{index}", name], [f"h{index + 1}"])
             for index, name in enumerate(names)]  # fmt: skip
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    path = write(
        tmp_path / "m.onnx", nodes, {name: np.arange(8, dtype=kind).reshape(1, 8) / 8 for name in names},
        {"h12": element}, {"x": (element, [1, 8])},
    )  # fmt: skip
    assert measured(path) == [set(names)]
    assert list(initializers(deduplicated(path, {"x": random(1, 8, kind=kind)})).values()) == [(1, 8)]


def test_ORT_4_one_in_two_element_types_is_two_constants(tmp_path: Path) -> None:
    path = two(tmp_path / "m.onnx", np.float32(1), np.float16(1))
    assert found(path).constant_classes == ()
    assert measured(path) == []


def test_ORT_6_infinity_and_the_largest_integer_are_read_exactly(tmp_path: Path) -> None:
    weights: dict[str, Any] = {f"inf{index}": np.float32(np.inf) for index in range(12)}
    weights |= {f"max{index}": np.int64(2**63 - 1) for index in range(12)} | {"less": np.int64(2**63 - 2)}
    nodes = [node("Identity", [name], [f"{name}_out"]) for name in weights]
    kinds = {f"{name}_out": FLOAT if name.startswith("inf") else INT64 for name in weights}
    path = write(tmp_path / "m.onnx", nodes, weights, kinds, {})
    # through float64, 2⁶³ − 2 would be the same as 2⁶³ − 1
    assert [len(group) for group in found(path).constant_classes] == [12, 12]


def test_ORT_7_constants_that_are_graph_outputs_keep_their_names(tmp_path: Path) -> None:
    nodes = [node("Add", ["x", "one"], ["y"])]
    weights = {"one": np.float32(1), "byte": np.uint8(1)}
    path = write(tmp_path / "m.onnx", nodes, weights, {"y": FLOAT, "one": FLOAT, "byte": TensorProto.UINT8})
    assert (measured(path), found(path).constant_classes) == ([], ())
    assert peers.nothing_to_do(path)


def test_ORT_9_a_weight_that_is_only_passed_on_is_read_and_is_no_tie(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Identity", ["w"], ["y"])], {"w": random(64)}, inputs={})
    assert found(path).ties == ()
    assert peers.nothing_to_do(path)


# --- PT: pytorch/pytorch, what its exporters write -----------------------------------------------------------------


def test_PT_3_parameters_of_equal_value_are_one_class_wherever_they_lived(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "a.weight"], ["h"]), node("MatMul", ["h", "b.weight"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"a.weight": random(3, 3), "b.weight": random(3, 3)})
    assert measured(path) == [{"a.weight", "b.weight"}]
    assert len(initializers(deduplicated(path, {"x": X}))) == 1


def test_PT_5_one_layer_applied_to_two_inputs_is_an_intact_tie(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["o1"], transB=1), node("Gemm", ["z", "w", "b"], ["o2"], transB=1)]
    nodes += [node("Identity", ["o1"], ["o3"]), node("Identity", ["o2"], ["o4"])]
    path = write(
        tmp_path / "m.onnx", nodes, {"w": random(4, 3), "b": random(4)}, ["o1", "o2", "o3", "o4"],
        {"x": (FLOAT, [1, 3]), "z": (FLOAT, [1, 3])},
    )  # fmt: skip
    assert shared(path) == [{"w"}, {"b"}]
    assert measured(path) == []
    assert peers.nothing_to_do(path)


# --- OPTM: huggingface/optimum-onnx --------------------------------------------------------------------------------


def test_OPTM_1_twelve_layers_written_twelve_times_are_stored_once_again(tmp_path: Path) -> None:
    d, weights, nodes, value = 24, {}, [], "x"
    for layer in range(12):
        weights |= {f"layer.{layer}.up": random(d, d) / 5, f"layer.{layer}.down": random(d, d, seed=1) / 5}
        nodes += [
            node("MatMul", [value, f"layer.{layer}.up"], [f"u{layer}"]),
            node("Tanh", [f"u{layer}"], [f"t{layer}"]),
        ]
        value = "y" if layer == 11 else f"h{layer}"
        nodes.append(node("MatMul", [f"t{layer}", f"layer.{layer}.down"], [value]))
    path = write(tmp_path / "m.onnx", nodes, weights, inputs={"x": (FLOAT, [2, d])})
    assert [len(group) for group in measured(path)] == [12, 12]
    after = deduplicated(path, {"x": random(2, d, seed=9)})
    assert len(initializers(after)) == 2
    assert (tmp_path / "out" / "m.onnx").stat().st_size < path.stat().st_size / 4


def test_OPTM_5_two_parts_are_compared_by_value_and_never_by_name(tmp_path: Path) -> None:
    table, bias = random(40, 16), random(16, seed=5)
    given = {"ids": (INT64, ["n"])}

    def part(name: str, weight: str, bias_values: Any) -> None:
        nodes = [node("Gather", [weight, "ids"], ["e"]), node("Add", ["e", "bias"], ["y"])]
        write(tmp_path / "m" / name, nodes, {weight: table, "bias": bias_values}, inputs=given)

    part("encoder_model.onnx", "encoder.embed", bias)
    part("decoder_model.onnx", "decoder.embed", bias + 1)
    path = tmp_path / "m"
    assert measured(path) == [{"decoder_model||decoder.embed", "encoder_model||encoder.embed"}]
    assert codes(path) == ["TIE203"]
    to = peers.applied(path, name="m")
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        peers.assert_same_outputs(path / name, to / name, {"ids": np.array([0, 39, 7])})


def test_OPTM_6_scalars_and_rows_of_indices_stay_where_they_are(tmp_path: Path) -> None:
    shape, scale = np.array([1, 3], np.int64), np.float32(2)
    weights = {"shape1": shape, "shape2": shape, "scale1": scale, "scale2": scale}
    nodes = [node("Reshape", ["x", "shape1"], ["a"]), node("Mul", ["a", "scale1"], ["b"])]
    nodes += [node("Reshape", ["b", "shape2"], ["c"]), node("Mul", ["c", "scale2"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, weights)
    # equal shapes are measured, and as no parameter of any size that counts they are left alone
    assert [load_one(path).by_id[name].parameter for name in weights] == [False] * 4
    assert codes(path) == []
    assert peers.nothing_to_do(path)


def test_OPTM_8_a_head_of_the_table_s_own_shape_is_read_again_without_a_transpose(tmp_path: Path) -> None:
    table = random(40, 16)
    nodes = [node("Gather", ["embed", "ids"], ["e"]), node("Gemm", ["e", "head"], ["y"], transB=1)]
    path = write(tmp_path / "m.onnx", nodes, {"embed": table, "head": table}, inputs={"ids": (INT64, ["n"])})
    assert measured(path) == [{"embed", "head"}]
    after = deduplicated(path, {"ids": np.array([0, 39, 7])})
    assert [one.op_type for one in after.graph.node] == ["Gather", "Gemm"]
    assert list(initializers(after)) == ["embed"]


def test_OPTM_9_a_scaled_embedding_under_names_like_bart_s_is_tied_by_what_reads_it(tmp_path: Path) -> None:
    # optimum asks for the class name Embedding, so that BartScaledWordEmbedding exports stay doubled
    table = random(60, 16)
    nodes = [
        node("Gather", ["model.shared.weight", "ids"], ["/model/decoder/embed_tokens/Gather"]),
        node("Mul", ["/model/decoder/embed_tokens/Gather", "scale"], ["h"]),
        node("MatMul", ["h", "onnx::MatMul_1204"], ["logits"]),
    ]
    weights = {"model.shared.weight": table, "scale": np.float32(4), "onnx::MatMul_1204": table.T}
    path = write(tmp_path / "m.onnx", nodes, weights, ["logits"], {"ids": (INT64, ["n"])})
    (tie,) = found(path).ties
    assert [member.view for member in tie.members][1] == TRANSPOSED
    assert codes(path) == ["TIE202"]
    after = deduplicated(path, {"ids": np.array([0, 59, 7])}, atol=1e-5)
    assert sorted(initializers(after).values())[-1] == (60, 16)
    assert sum(len(shape) == 2 for shape in initializers(after).values()) == 1


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_OPTM_weak_a_three_copies_become_one_in_every_order_of_initializers(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    # optimum: missed, IndexError, or an invalid graph, depending on the order
    table = random(40, 16)
    copies = list({"shared": table, "decoder.embed": table, "lm_head_T": table.T}.items())
    nodes = [node("Gather", ["shared", "ids"], ["a"]), node("Gather", ["decoder.embed", "ids"], ["b"])]
    nodes += [node("Add", ["a", "b"], ["h"]), node("MatMul", ["h", "lm_head_T"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, dict(copies[i] for i in order), inputs={"ids": (INT64, ["n"])})
    assert measured(path) == [{"shared", "decoder.embed", "lm_head_T"}]
    after = deduplicated(path, {"ids": np.array([0, 39, 7])}, atol=1e-5)
    assert sum(len(shape) == 2 for shape in initializers(after).values()) == 1


def test_OPTM_weak_b_a_node_that_reads_the_dropped_copy_twice_is_rewritten_in_both_slots(tmp_path: Path) -> None:
    nodes = [node("Add", ["x", "w1"], ["s"]), node("Mul", ["w2", "w2"], ["q"]), node("Add", ["s", "q"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE})
    after = deduplicated(path, {"x": X})
    assert list(initializers(after)) == ["w1"]
    assert list(after.graph.node[1].input) == ["w1", "w1"]


def test_OPTM_weak_c_a_use_inside_a_branch_is_rewritten_too(tmp_path: Path) -> None:
    then = branch([node("Add", ["x", "w2"], ["t"])], {}, "t")
    other = branch([node("Sub", ["x", "w2"], ["e"])], {}, "e")
    nodes = [node("If", ["flag"], ["i"], then_branch=then, else_branch=other), node("Add", ["i", "w1"], ["y"])]
    given = {"x": (FLOAT, [1, 3]), "flag": (TensorProto.BOOL, [])}
    path = write(tmp_path / "m.onnx", nodes, {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE}, inputs=given)
    to = peers.applied(path)
    for flag in (True, False):
        peers.assert_same_outputs(path, to, {"x": X, "flag": np.array(flag)})
        assert list(initializers(onnx.load(str(to)))) == ["w1"]


def test_OPTM_weak_d_OPT_6_an_initializer_of_an_old_file_goes_with_its_entry_among_the_inputs(tmp_path: Path) -> None:
    # before IR version 4 every initializer had to be an input, and ONNX Runtime takes no value for it
    given = {"x": (FLOAT, [1, 3]), "w1": (FLOAT, [3]), "w2": (FLOAT, [3])}
    weights = {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE}
    path = write(tmp_path / "m.onnx", SUM, weights, inputs=given, opset=9, ir_version=3)
    assert measured(path) == [{"w1", "w2"}]
    after = deduplicated(path, {"x": X})
    assert list(initializers(after)) == ["w1"]
    assert [one.name for one in after.graph.input] == ["x", "w1"]  # not w2, which would have become a real input


def test_OPTM_weak_d_an_old_file_gets_no_initializer_that_is_not_an_input(tmp_path: Path) -> None:
    # the body hides the name that the survivor has, so it would need another one
    body = branch([node("Add", ["x", "w1"], ["s"]), node("Add", ["s", "w2"], ["t"])], {"w1": ONE_TWO_THREE * 2}, "t")
    body.input.append(cases.value("w1", FLOAT, [3]))
    other = branch([node("Neg", ["x"], ["e"])], {}, "e")
    nodes = [node("If", ["flag"], ["i"], then_branch=body, else_branch=other), node("Add", ["i", "w1"], ["y"])]
    given = {"x": (FLOAT, [1, 3]), "flag": (TensorProto.BOOL, []), "w1": (FLOAT, [3]), "w2": (FLOAT, [3])}
    weights = {"w1": ONE_TWO_THREE, "w2": ONE_TWO_THREE}
    graph = helper.make_graph(
        nodes, "g", [cases.value(name, *kind) for name, kind in given.items()], [cases.value("y", FLOAT, [1, 3])],
        peers.tensors(weights),
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3)
    path.write_bytes(made.SerializeToString())
    result = peers.cli("apply", path, "--to", tmp_path / "out.onnx")
    assert result.exit_code == 2, result.output
    assert "IR version 3 has no initializers that are not inputs" in " ".join(result.output.split())
    assert not (tmp_path / "out.onnx").exists()


def test_OPTM_weak_e_IS_12_names_of_new_values_never_collide_with_those_that_exist(tmp_path: Path) -> None:
    first = tiny_onnx.lost(tmp_path / "plain.onnx")
    ids = np.array([[0, 5, 59]], np.int64)
    new = {out for one in deduplicated(first, {"ids": ids}, 1e-5).graph.node for out in one.output}
    new |= set(initializers(onnx.load(str(tmp_path / "out" / "plain.onnx"))))
    made = onnx.load(str(first))
    taken = [*sorted(new - {"x", "h", "logits", "wte.weight"}), "wte.weight_transposed", "wte.weight_T"]
    for name in taken:  # every name that the rewrite chose is taken by something else now
        made.graph.node.append(node("Neg", ["h"], [name]))
        made.graph.output.append(cases.value(name, FLOAT, ["batch", "sequence", tiny_onnx.D]))
    path = tmp_path / "taken.onnx"
    onnx.save(made, str(path))
    after = deduplicated(path, {"ids": ids}, 1e-5)
    made_here = [out for one in after.graph.node for out in one.output] + list(initializers(after))
    assert len(made_here) == len(set(made_here))
