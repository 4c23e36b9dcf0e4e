"""Uses of ONNX weights: views, scopes, functions, ids and outputs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.onnx_files import graph, ids, info, read, rows, save, tensor, the_use
from onnx import NodeProto, TensorProto, helper

from tieaudit.model import Model, Use
from tieaudit.view import AS_STORED, TRANSPOSED, Cast, Dequantise, Opaque, Reshape, Transpose, View


def _ints(name: str, *numbers: int) -> TensorProto:
    return tensor(name, numbers, np.int64)


def _model(tmp_path: Path, nodes: list[NodeProto], *tensors: TensorProto, **options: Any) -> Model:
    return read(save(tmp_path / "m.onnx", graph(nodes, tensors, **{"inputs": ["x", ids()], **options})))


@pytest.mark.parametrize(
    ("node", "view"),
    [
        (helper.make_node("Identity", ["w"], ["v"]), AS_STORED),
        (helper.make_node("Transpose", ["w"], ["v"]), View((Transpose((2, 1, 0)),))),  # the default reverses
        (helper.make_node("Transpose", ["w"], ["v"], perm=[0, 2, 1]), View((Transpose((0, 2, 1)),))),
        (helper.make_node("Transpose", ["w"], ["v"], perm=[0, 1, 2]), AS_STORED),
        (helper.make_node("Transpose", ["w"], ["v"], perm=[0, 7, 2]), View((Opaque("permuted by a malformed perm"),))),
        (helper.make_node("Cast", ["w"], ["v"], to=10), View((Cast("float16"),))),
        (helper.make_node("Cast", ["w"], ["v"], to=1), AS_STORED),
        (helper.make_node("Reshape", ["w", "shape"], ["v"]), View((Reshape((2, 2, 3)),))),  # [0, -1, 3]
        (helper.make_node("Reshape", ["w", "unknown"], ["v"]), View((Opaque("reshaped"),))),
        (helper.make_node("Reshape", ["w", "wrong"], ["v"]), View((Opaque("reshaped"),))),
        (helper.make_node("Squeeze", ["w", "one"], ["v"]), View((Reshape((2, 6)),))),
        (helper.make_node("Squeeze", ["w"], ["v"]), View((Reshape((2, 6)),))),
        (helper.make_node("Squeeze", ["w"], ["v"], axes=[1]), View((Reshape((2, 6)),))),
        (helper.make_node("Squeeze", ["w"], ["v"], axes=[0]), View((Opaque("reshaped"),))),  # that size is 2
        (helper.make_node("Unsqueeze", ["w", "ends"], ["v"]), View((Reshape((1, 2, 1, 6, 1)),))),
        (helper.make_node("Flatten", ["w"], ["v"], axis=-1), View((Reshape((2, 6)),))),
        (helper.make_node("DequantizeLinear", ["w", "scale"], ["v"]), View((Dequantise(),))),
    ],
)
def test_each_view_node_gives_its_step(tmp_path: Path, node: NodeProto, view: View) -> None:
    constants = [_ints("shape", 0, -1, 3), _ints("wrong", 5, -1), _ints("one", 1), _ints("ends", 0, -1)]
    nodes = [helper.make_node("Shape", ["x"], ["unknown"]), node, helper.make_node("Relu", ["v"], ["y"])]
    model = _model(tmp_path, nodes, rows("w", 2, 1, 6), tensor("scale", 0.5), *constants)
    use = the_use(model, "w")
    assert (use.op, use.node, use.slot, use.chain) == ("Relu", "y", 0, ("v",))
    assert use.view == view


@pytest.mark.parametrize(
    ("op", "domain", "options", "slot", "view"),
    [
        ("Gemm", "", {"transB": 1}, 1, TRANSPOSED),
        ("Gemm", "", {"transA": 1}, 1, AS_STORED),
        ("Gemm", "", {"transA": 1}, 0, TRANSPOSED),
        ("FusedMatMul", "com.microsoft", {"transB": 1}, 1, TRANSPOSED),
        ("FusedMatMul", "com.microsoft", {"transB": 1, "transBatchB": 1}, 1,
         View((Opaque("permuted by its consumer"),))),
        ("FusedMatMul", "mine", {"transB": 1}, 1, AS_STORED),
    ],
)  # fmt: skip
def test_the_transposition_of_an_operand_is_part_of_its_view(
    tmp_path: Path, op: str, domain: str, options: dict[str, int], slot: int, view: View
) -> None:
    inputs = ["w", "x"] if slot == 0 else ["x", "w"]
    model = _model(tmp_path, [helper.make_node(op, inputs, ["y"], domain=domain, **options)], rows("w", 3, 4))
    use = the_use(model, "w")
    assert (use.view, use.slot) == (view, slot)
    assert use.op == (f"{domain}.{op}" if domain else op)


def test_a_transpose_before_a_transposing_gemm_is_as_stored(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("Gemm", ["x", "t"], ["y"], transB=1)]
    use = the_use(_model(tmp_path, nodes, rows("w", 3, 4)), "w")
    assert use.view == AS_STORED and use.chain == ("t",)


def test_every_consumer_behind_a_shared_view_is_a_use_and_a_returned_view_too(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("Add", ["t", "t"], ["b"]),
    ]
    model = _model(tmp_path, nodes, rows("w", 3, 3), outputs=["a", "b", "t"])
    found = [(use.op, use.node, use.slot, str(use.view)) for use in model.uses]
    assert found == [
        ("output", "@t", 0, "transposed"),
        ("MatMul", "a", 1, "transposed"),
        ("Add", "b", 0, "transposed"),
        ("Add", "b", 1, "transposed"),
    ]


def test_scale_and_zero_point_are_used_by_the_dequantisation_itself(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    made = [tensor("q", np.ones((3, 3)), np.int8), tensor("scale", 0.1), tensor("zero", 0, np.int8)]
    model = _model(tmp_path, nodes, *made)
    assert [(use.weight, use.op, use.slot) for use in model.uses] == [
        ("q", "MatMul", 1), ("scale", "DequantizeLinear", 1), ("zero", "DequantizeLinear", 2),
    ]  # fmt: skip
    assert [weight.parameter for weight in model.weights] == [True, False, False]


def test_a_body_uses_the_weight_of_the_graph_around_it_in_its_own_scope(tmp_path: Path) -> None:
    body = graph([helper.make_node("MatMul", ["x", "w"], ["y"])])
    node = helper.make_node("If", ["c"], ["z"], name="If_0", then_branch=body, else_branch=body)
    model = _model(tmp_path, [node], rows("w", 3, 3), inputs=["x", info("c", 9, 0)], outputs=["z"])
    assert {(use.scope, use.node) for use in model.uses} == {("If_0.then_branch", "y"), ("If_0.else_branch", "y")}
    assert all(use.feeds_output for use in model.uses)  # through the If's own output


def test_two_bodies_of_one_path_are_told_apart(tmp_path: Path) -> None:
    body = graph([helper.make_node("Relu", ["w"], ["y"])])
    nodes = [helper.make_node("If", ["c"], [out], name="same", then_branch=body) for out in ("a", "b")]
    model = _model(tmp_path, nodes, rows("w", 3, 3), outputs=["a", "b"])
    assert [use.scope for use in model.uses] == ["a.then_branch", "b.then_branch"]


def test_two_bodies_whose_handles_are_equal_by_accident_are_told_apart(tmp_path: Path) -> None:
    body = graph([helper.make_node("Relu", ["w"], ["y"])], [rows("inner", 2, 2)])
    nodes = [
        helper.make_node("If", ["c"], ["a"], name="b", then_branch=body),  # called like the other's output
        helper.make_node("If", ["c"], ["b"], then_branch=body),
    ]
    model = _model(tmp_path, nodes, rows("w", 3, 3), outputs=["a", "b"])
    assert [use.scope for use in model.uses] == ["b.then_branch", "b.then_branch~2"]
    assert len(model.by_id) == len(model.weights) == 3


def test_a_function_is_followed_into_its_body_and_out_again(tmp_path: Path) -> None:
    opset = [helper.make_opsetid("", 17)]
    transposing = helper.make_function(
        "mine", "t", ["a"], ["b"], [helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0])], opset
    )
    linear = helper.make_function(
        "mine", "linear", ["x", "a"], ["b"], [helper.make_node("MatMul", ["x", "a"], ["b"])], opset
    )
    nodes = [
        helper.make_node("t", ["w"], ["wt"], domain="mine"),
        helper.make_node("linear", ["x", "wt"], ["y"], domain="mine"),
    ]
    path = save(tmp_path / "m.onnx", graph(nodes, [rows("w", 3, 3)], ["x"]), [transposing, linear])
    model = read(path)
    use = the_use(model, "w")
    assert (use.op, use.scope, use.view, use.feeds_output) == ("MatMul", "function:mine:linear", TRANSPOSED, True)
    assert model.weights[0].parameter is True


def test_functions_that_call_each_other_twice_do_not_take_for_ever(tmp_path: Path) -> None:
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    functions = []
    for index in range(40):  # 2^40 paths to the end
        inner = [helper.make_node(f"f{index + 1}", ["a"], [out], domain="mine") for out in ("b", "c")]
        functions.append(helper.make_function("mine", f"f{index}", ["a"], ["b"], inner, opset))
    functions.append(helper.make_function("mine", "f40", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opset))
    body = graph([helper.make_node("f0", ["w"], ["y"], domain="mine")], [rows("w", 3, 3)])
    started = time.process_time()
    assert read(save(tmp_path / "m.onnx", body, functions)).uses
    assert time.process_time() - started < 20


def test_values_that_form_a_cycle_end(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["w"], ["a"]),
        helper.make_node("Identity", ["a"], ["w2"]),
        helper.make_node("Add", ["w2", "b"], ["a2"]),
        helper.make_node("Add", ["a2", "ids"], ["b"]),
        helper.make_node("Gather", ["w", "b"], ["y"]),
        helper.make_node("Identity", ["w"], ["w"]),
    ]
    assert _model(tmp_path, nodes, rows("w", 3, 3)).uses


def test_reading_takes_linear_time(tmp_path: Path) -> None:
    def seconds(n_nodes: int) -> float:
        nodes = [helper.make_node("Identity", ["w"], ["v0"])]
        nodes += [helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(n_nodes)]
        nodes += [helper.make_node("Add", ["w", f"v{i}"], [f"z{i}"]) for i in range(n_nodes)]
        path = save(tmp_path / "m.onnx", graph(nodes, [rows("w", 2, 2)], outputs=[f"z{n_nodes - 1}"]))
        started = time.process_time()
        read(path)
        return time.process_time() - started

    seconds(100)
    assert seconds(4000) < 12 * seconds(1000) + 0.5  # 16 times would be quadratic


LOOKED_UP: dict[str, tuple[list[NodeProto], bool]] = {
    "the ids themselves": ([helper.make_node("Identity", ["ids"], ["i"])], True),
    "ids reshaped, cast and shifted": (
        [
            helper.make_node("Reshape", ["ids", "flat"], ["a"]),
            helper.make_node("Cast", ["a"], ["b"], to=6),
            helper.make_node("Add", ["b", "two"], ["i"]),
        ],
        True,
    ),
    "shifted decoder ids": (
        [
            helper.make_node("Slice", ["ids", "zero", "two"], ["a"]),
            helper.make_node("Concat", ["start", "a"], ["b"], axis=1),
            helper.make_node("Equal", ["b", "two"], ["c"]),
            helper.make_node("Where", ["c", "two", "b"], ["i"]),
        ],
        True,
    ),
    "positions made of the ids' shape": (
        [
            helper.make_node("Shape", ["ids"], ["a"]),
            helper.make_node("Gather", ["a", "two"], ["b"]),
            helper.make_node("Range", ["zero", "b", "two"], ["c"]),
            helper.make_node("Add", ["c", "begin"], ["i"]),
        ],
        False,
    ),
    "positions counted along the mask": (
        [
            helper.make_node("CumSum", ["mask", "zero"], ["a"]),
            helper.make_node("Mul", ["a", "mask"], ["b"]),
            helper.make_node("Add", ["b", "two"], ["i"]),
        ],
        False,
    ),
    "positions given": ([helper.make_node("Identity", ["position_ids"], ["i"])], False),
    "an argmax of the data": ([helper.make_node("ArgMax", ["x"], ["i"])], False),
    "data cast to integers": ([helper.make_node("Cast", ["x"], ["i"], to=7)], False),
}


@pytest.mark.parametrize("case", LOOKED_UP)
def test_ids_are_told_from_positions(tmp_path: Path, case: str) -> None:
    nodes, expected = LOOKED_UP[case]
    nodes = [*nodes, helper.make_node("Gather", ["w", "i"], ["y"])]
    constants = [_ints("flat", -1), _ints("two", 2), _ints("zero", 0), tensor("start", [[2]], np.int64)]
    inputs = ["x", ids(), ids("mask"), ids("position_ids"), ids("begin")]
    model = _model(tmp_path, nodes, rows("w", 9, 3), *constants, inputs=inputs)
    assert the_use(model, "w").reads_ids is expected


def test_ids_in_a_loop_body_are_its_states_but_not_its_counter(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["w", "token"], ["a"]),
        helper.make_node("Gather", ["p", "iteration"], ["b"]),
        helper.make_node("Gather", ["q", "count"], ["c"]),
        helper.make_node("Add", ["count", "one"], ["count_out"]),
        helper.make_node("ArgMax", ["a"], ["token_out"]),
        helper.make_node("Identity", ["go"], ["go_out"]),
    ]
    states = [ids("iteration"), info("go", TensorProto.BOOL, 0), ids("token"), ids("count")]
    body = graph(nodes, inputs=states, outputs=["go_out", "token_out", "count_out"])
    loop = helper.make_node("Loop", ["", "", "ids", "one"], ["y", "z"], body=body)
    made = [rows("w", 9, 3), rows("p", 9, 3), rows("q", 9, 3), _ints("one", 1)]
    model = _model(tmp_path, [loop], *made)
    assert {name: the_use(model, name).reads_ids for name in "wpq"} == {"w": True, "p": False, "q": False}
    assert the_use(model, "w").feeds_output  # its ArgMax is the state that the Loop returns


def test_word_and_type_tables_of_a_fused_embedding_read_ids_and_the_position_table_does_not(tmp_path: Path) -> None:
    names = ["word", "position", "type"]
    node = helper.make_node(
        "EmbedLayerNormalization", ["ids", "types", *names, "g", "b"], ["y", ""], domain="com.microsoft"
    )
    made = [rows(name, 9, 4) for name in names]
    model = _model(tmp_path, [node], *made, rows("g", 4), rows("b", 4), inputs=[ids(), ids("types")])
    assert [use.reads_ids for use in model.uses] == [True, False, True, False, False]
    assert all(weight.parameter for weight in model.weights)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([helper.make_node("Identity", ["h"], ["y"])], True),
        (
            [
                helper.make_node("Add", ["h", "bias"], ["a"]),
                helper.make_node("Div", ["a", "cap"], ["b"]),
                helper.make_node("Tanh", ["b"], ["c"]),
                helper.make_node("Cast", ["c"], ["d"], to=1),
                helper.make_node("LogSoftmax", ["d"], ["y"]),
            ],
            True,
        ),
        ([helper.make_node("MatMul", ["h", "v"], ["y"])], False),
        ([helper.make_node("LayerNormalization", ["h", "bias"], ["y"])], False),
        ([helper.make_node("Relu", ["h"], ["unused"]), helper.make_node("Relu", ["x"], ["y"])], False),
    ],
)
def test_an_output_is_fed_through_element_wise_operations_only(
    tmp_path: Path, nodes: list[NodeProto], expected: bool
) -> None:
    first = helper.make_node("MatMul", ["x", "w"], ["h"])
    made = [rows("w", 3, 3), rows("v", 3, 3), rows("bias", 3), tensor("cap", 30.0)]
    assert the_use(_model(tmp_path, [first, *nodes], *made), "w").feeds_output is expected


def test_a_search_node_body_has_outputs_of_its_own(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["w", "input_ids"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["logits"])]
    body = graph(nodes, [rows("v", 3, 9)], [ids("input_ids")], ["logits"])
    node = helper.make_node("GreedySearch", ["ids"], ["y"], name="search", domain="com.microsoft", decoder=body)
    model = _model(tmp_path, [node], rows("w", 9, 3))
    uses: list[Use] = list(model.uses)
    assert [(use.weight, use.reads_ids, use.feeds_output) for use in uses] == [
        ("w", True, False),
        ("|search.decoder|v", False, True),
    ]
