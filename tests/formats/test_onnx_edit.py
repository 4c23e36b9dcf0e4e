"""Sharing, respelling and unsharing in ONNX files: which name and graph keep the tensor, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_cases import (
    AS_STORED,
    TRANSPOSED,
    D,
    V,
    model_of,
    n_large_copies,
    node,
    plan,
    rewritten,
    run,
    saved,
    table,
    tensor,
    tie,
    value,
)

from tieaudit.change import Respell, SetConfig, Share, Unshare
from tieaudit.errors import RewriteRefused
from tieaudit.formats.onnx.edit import can_realise, edit
from tieaudit.formats.onnx.read import load
from tieaudit.model import Member, Model
from tieaudit.storage import MemoryStorage

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
IDS = np.array([[1, 5, 0], [V - 1, -1, 7]], np.int64)
IDS_IN = value("ids", I64, ["b", "t"])


def x(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(nodes: list[onnx.NodeProto], outputs: list[str], tensors: list[Any] = (), inputs: list[Any] = ()) -> Any:  # type: ignore[assignment]
    return helper.make_graph(nodes, "body", list(inputs), [value(name, F, None) for name in outputs], list(tensors))


def same(before: onnx.ModelProto | Path, after: onnx.ModelProto | Path, *feeds: dict[str, Any]) -> None:
    for feed in feeds:
        for level in (0, 99):
            for one, other in zip(run(before, feed, level), run(after, feed, level), strict=True):
                np.testing.assert_allclose(other, one, atol=1e-5)


def refusal(proto: onnx.ModelProto, folder: Path, change: Any) -> str:
    """Why the edit is refused; `edit` must then refuse too and write nothing."""
    model = saved(proto, folder / "in")
    reason = can_realise(model, change, "ort-cpu")
    assert reason is not None
    with pytest.raises(RewriteRefused):
        edit(model, plan(model, change), folder / "out")
    assert not (folder / "out").exists()
    return reason


# ---------------------------------------------------------------- several members, any order


def four_members() -> onnx.ModelProto:
    """Two lookup tables [V,d] and two heads [d,V], one of them behind a Gemm that was given [V,d]."""
    nodes = [
        node("Gather", ["E1", "ids"], ["a"]), node("Gather", ["E2", "ids"], ["b"]), node("Add", ["a", "b"], ["x"]),
        node("MatMul", ["x", "H1"], ["y"]), node("Reshape", ["x", "flat"], ["rows"]),
        node("Gemm", ["rows", "H2"], ["z"], transB=1),
    ]  # fmt: skip
    tensors = [
        tensor("H1", table().T), tensor("E1", table()), tensor("H2", table()), tensor("E2", table()),
        tensor("flat", np.array([-1, D])),
    ]  # fmt: skip
    return model_of(nodes, [IDS_IN], [value("y", F, ["b", "t", V]), value("z", F, ["n", V])], tensors)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("style", ["auto", "gather"])
def test_members_in_every_order_become_one(size: int, style: str, tmp_path: Path) -> None:
    proto = four_members()
    model = saved(proto, tmp_path / "in")
    for number, names in enumerate(itertools.permutations(["E1", "H1", "H2", "E2"], size)):
        turned = {"H1"} if names[0] != "H1" else set(names) - {"H1"}
        dest = tmp_path / str(number)
        written, again, after = rewritten(model, dest, tie(*names, turned=sorted(turned)), transposed_as=style)
        left = [weight.name for weight in again.weights if weight.n_elements == V * D]
        assert len(left) == 4 - size + 1
        assert set(written.renamed) == set(names) - set(left)
        assert len(set(written.renamed.values())) == 1
        for one, other in zip(run(proto, {"ids": IDS}), run(after, {"ids": IDS}), strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)


def test_the_first_member_of_the_stored_layout_keeps_its_name(tmp_path: Path) -> None:
    model = saved(four_members(), tmp_path / "in")
    written, _, _ = rewritten(model, tmp_path / "out", tie("E2", "E1", "H2"))
    assert dict(written.renamed) == {"E1": "E2", "H2": "E2"}


def test_a_node_that_reads_the_dropped_weight_in_two_slots(tmp_path: Path) -> None:
    nodes = [node("Concat", ["A", "B", "B"], ["y"], axis=0), node("Sub", ["B", "A"], ["z"])]
    proto = model_of(nodes, [], [value("y", F, [3 * V, D]), value("z", F, [V, D])],
                     [tensor("A", table()), tensor("B", table())])  # fmt: skip
    _, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("A", "B"))
    assert list(after.graph.node[0].input) == ["A", "A", "A"]
    same(proto, after, {})


def test_equal_strings_and_small_integers_are_shared_as_they_are(tmp_path: Path) -> None:
    words = helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"bc"])
    other = helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"bc"])
    nodes = [node("Concat", ["s", "t"], ["y"], axis=0), node("Concat", ["i", "j"], ["z"], axis=0)]
    ints = [tensor("i", np.array([2**53 + 1])), tensor("j", np.array([2**53 + 1]))]
    outputs = [value("y", TensorProto.STRING, [4]), value("z", I64, [2])]
    proto = model_of(nodes, [], outputs, [words, other, *ints])
    _, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("s", "t"), tie("i", "j"))
    assert [weight.name for weight in again.weights] == ["s", "i"]
    y, z = run(after, {})
    assert y.tolist() == ["a", "bc", "a", "bc"]
    assert z.tolist() == [2**53 + 1] * 2


# ---------------------------------------------------------------- common values


@pytest.mark.parametrize("style", ["auto", "gather"])
@pytest.mark.parametrize("first", ["E", "W"])
@pytest.mark.parametrize("given", [True, False])
def test_lossy_members_take_the_common_value(given: bool, first: str, style: str, tmp_path: Path) -> None:
    e, w = table(seed=1), table(seed=2).T
    common = table(seed=3) if given else (e if first == "E" else w.T)
    nodes = [node("Gather", ["E", "ids"], ["x"]), node("MatMul", ["x", "W"], ["y"])]
    proto = model_of(nodes, [IDS_IN], [value("y", F, ["b", "t", V])], [tensor("E", e), tensor("W", w)])
    stored = common if first == "E" else common.T
    values = MemoryStorage(np.ascontiguousarray(stored).tobytes(), "common") if given else None
    second = "W" if first == "E" else "E"
    _, again, after = rewritten(
        saved(proto, tmp_path / "in"), tmp_path / "out", tie(first, second, turned=[second], values=values),
        transposed_as=style, lossless=False,
    )  # fmt: skip
    left = next(weight for weight in again.weights if weight.n_elements == V * D)
    assert left.name == ("E" if style == "auto" else "W")
    assert left.storage is not None
    want = common if style == "auto" else common.T
    assert left.storage.read_ranges([(0, left.n_bytes)])[0] == np.ascontiguousarray(want).tobytes()
    np.testing.assert_allclose(run(after, {"ids": IDS})[0], common[IDS] @ common.T, atol=1e-5)


def test_a_common_value_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    reason = refusal(four_members(), tmp_path, tie("E1", "E2", values=MemoryStorage(b"1234", "x")))
    # 96 × 16 × 4 = 6144 bytes, not 1536 elements
    assert reason == "expected 6144 bytes for the common value, found 4"


# ---------------------------------------------------------------- subgraphs and names


def branches(then_name: str = "W", else_name: str = "W", *, main: bool = False, other: bool = False) -> onnx.ModelProto:
    """A MatMul with an equal weight in both branches of an If; perhaps also in the main graph, or a stranger there."""
    then = graph([node("MatMul", ["x", then_name], ["p"])], ["p"], [tensor(then_name, table().T)])
    otherwise = graph([node("MatMul", ["x", else_name], ["q"]), node("Neg", ["q"], ["r"])], ["r"],
                      [tensor(else_name, table().T)])  # fmt: skip
    nodes = [node("If", ["c"], ["y"], name="fork", then_branch=then, else_branch=otherwise)]
    tensors = [tensor("M", table().T)] if main else []
    if main:
        nodes.append(node("MatMul", ["x", "M"], ["z"]))
    if other:
        tensors.append(tensor("W", x(D)))
        nodes.append(node("Mul", ["x", "W"], ["z"]))
    outputs = [value("y", F, ["n", V])] + ([value("z", F, ["n", V if main else D])] if main or other else [])
    return model_of(nodes, [value("x", F, ["n", D]), value("c", BOOL, [])], outputs, tensors)


BOTH = [{"x": x(3, D), "c": np.array(flag)} for flag in (True, False)]
THEN, ELSE = "|fork.then_branch|W", "|fork.else_branch|W"


def test_copies_in_sibling_branches_are_hoisted_under_a_fresh_name(tmp_path: Path) -> None:
    proto = branches()
    written, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie(THEN, ELSE))
    assert dict(written.renamed) == {THEN: "W_shared", ELSE: "W_shared"}
    assert [weight.id for weight in again.weights] == ["W_shared"]
    same(proto, after, *BOTH)


def test_a_stranger_of_the_same_name_outside_is_left_alone(tmp_path: Path) -> None:
    proto = branches(other=True)
    _, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie(THEN, ELSE))
    assert sorted(weight.id for weight in again.weights) == ["W", "W_shared"]
    same(proto, after, *BOTH)


def test_fresh_names_avoid_every_name_in_the_file(tmp_path: Path) -> None:
    proto = branches()
    fork = {item.name: item.g for item in proto.graph.node[0].attribute}
    fork["then_branch"].node[0].name = "W_shared"
    fork["else_branch"].node[1].output[0] = fork["else_branch"].output[0].name = "W_shared_1"
    written, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie(THEN, ELSE))
    assert set(written.renamed.values()) == {"W_shared_2"}
    same(proto, after, *BOTH)


def test_a_member_in_the_main_graph_keeps_its_name(tmp_path: Path) -> None:
    proto = branches(main=True)
    written, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie(THEN, "M", ELSE))
    assert dict(written.renamed) == {THEN: "M", ELSE: "M"}
    assert [weight.id for weight in again.weights] == ["M"]
    same(proto, after, *BOTH)


def test_a_hidden_name_is_not_used(tmp_path: Path) -> None:
    # the else branch calls something else M, so M cannot serve it under that name
    proto = branches("W", "V", main=True)
    otherwise = next(item.g for item in proto.graph.node[0].attribute if item.name == "else_branch")
    otherwise.initializer.append(tensor("M", x(D)))
    otherwise.node.insert(0, node("Mul", ["x", "M"], ["scaled"]))
    otherwise.node[1].input[0] = "scaled"
    members = [THEN, "M", "|fork.else_branch|V"]
    model = saved(proto, tmp_path / "in")
    written = edit(model, plan(model, tie(*members)), tmp_path / "out")
    assert dict(written.renamed) == dict.fromkeys(members, "M_shared")
    same(proto, tmp_path / "out" / "model.onnx", *BOTH)


def test_equal_names_inside_and_outside_become_the_outer_one(tmp_path: Path) -> None:
    proto = branches(main=True)
    for item in (proto.graph.initializer[0], proto.graph.node[1]):
        if isinstance(item, TensorProto):
            item.name = "W"
        else:
            item.input[1] = "W"
    written, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("W", THEN, ELSE))
    assert dict(written.renamed) == {THEN: "W", ELSE: "W"}
    assert [weight.id for weight in again.weights] == ["W"]
    same(proto, after, *BOTH)


def test_a_transposed_copy_in_a_nested_graph(tmp_path: Path) -> None:
    # a Loop inside an If branch holds the head, the main graph the table
    loop = graph([node("MatMul", ["rows", "W"], ["l"]), node("Identity", ["on"], ["go"])], ["go", "l"],
                 [tensor("W", table().T)], [value("i", I64, []), value("on", BOOL, [])])  # fmt: skip
    loop.output[0].type.tensor_type.elem_type = BOOL
    then = graph([node("Loop", ["n", "c"], ["p"], name="loop", body=loop)], ["p"])
    otherwise = graph([node("Identity", ["zero"], ["q"])], ["q"], [tensor("zero", np.zeros((1, 1, V), np.float32))])
    nodes = [
        node("Gather", ["E", "ids"], ["rows"]),
        node("If", ["c"], ["y"], name="fork", then_branch=then, else_branch=otherwise),
    ]
    inputs = [value("ids", I64, ["t"]), value("c", BOOL, []), value("n", I64, [])]
    proto = model_of(nodes, inputs, [value("y", F, ["n0", "n1", V])], [tensor("E", table())])
    inner = "|fork.then_branch/loop.body|W"
    written, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("E", inner, turned=[inner]))
    assert dict(written.renamed) == {inner: "E"}
    assert [(item.scope, item.node, item.pattern) for item in written.rewritten] == [
        ("fork.then_branch/loop.body", "l", "matmul_to_gemm")
    ]
    assert sum(weight.n_elements == V * D for weight in again.weights) == 1
    same(proto, after, {"ids": np.array([1, 2, -3]), "c": np.array(True), "n": np.array(2)})


def test_constant_nodes_are_members_like_any_other(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "B"], ["p"]),  # before the Constant that will serve it
        node("Constant", [], ["A"], value=tensor("", table().T)), node("MatMul", ["x", "A"], ["q"]),
        node("Constant", [], ["B0"], value=tensor("", table().T)), node("MatMul", ["x", "B0"], ["r"]),
        node("Sum", ["p", "q", "r"], ["y"]),
    ]  # fmt: skip
    proto = model_of(nodes, [value("x", F, ["n", D])], [value("y", F, ["n", V])], [tensor("B", table().T)])
    model = saved(proto, tmp_path / "in")
    written, again, after = rewritten(model, tmp_path / "out", tie("A", "B0", "B"))
    assert dict(written.renamed) == {"B0": "A", "B": "A"}
    assert [(weight.id, weight.held_as) for weight in again.weights] == [("A", "initializer")]
    same(proto, after, {"x": x(2, D)})


def test_a_constant_moves_to_the_front_where_initializers_must_be_inputs(tmp_path: Path) -> None:
    nodes = [
        node("Constant", [], ["A"], value=tensor("", table())), node("MatMul", ["x", "A"], ["p"]),
        node("Constant", [], ["B"], value=tensor("", table())), node("MatMul", ["x", "B"], ["q"]),
        node("Sum", ["p", "q"], ["y"]),
    ]  # fmt: skip
    proto = model_of(nodes, [value("x", F, ["n", V])], [value("y", F, ["n", D])], opset=8, ir_version=3)
    model = saved(proto, tmp_path / "in")
    written, again, after = rewritten(model, tmp_path / "out", tie("B", "A"))
    assert dict(written.renamed) == {"A": "B"}
    assert [(weight.id, weight.held_as) for weight in again.weights] == [("B", "constant_node")]
    same(proto, after, {"x": x(2, V)})


def test_stale_notes_about_removed_values_go_and_others_stay(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["W"], ["t"]), node("MatMul", ["x", "t"], ["h"]), node("Tanh", ["h"], ["y"])]
    nodes.insert(0, node("Gather", ["E", "ids"], ["x"]))
    proto = model_of(nodes, [IDS_IN], [value("y", F, ["b", "t", V])], [tensor("E", table()), tensor("W", table())])
    for name, shape in (("W", [V, D]), ("t", [D, V]), ("x", ["b", "t", D]), ("h", ["b", "t", V]), ("E", [V, D])):
        proto.graph.value_info.append(value(name, F, shape))
    proto.graph.doc_string = "kept"
    proto.metadata_props.add(key="author", value="somebody")
    _, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("E", "W"))
    assert [item.name for item in after.graph.value_info] == ["t", "x", "h", "E"]
    assert after.graph.doc_string == "kept"
    assert after.metadata_props[0].value == "somebody"
    _, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "two", tie("E", "W"), Respell("W"))
    assert [item.name for item in after.graph.value_info] == ["x", "h", "E"]


def test_quantization_annotations_follow_their_tensor(tmp_path: Path) -> None:
    proto = four_members()
    note = proto.graph.quantization_annotation.add(tensor_name="E2")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="flat")
    _, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("E1", "E2"))
    assert [item.tensor_name for item in after.graph.quantization_annotation] == ["E1"]
    # an annotation is made for one layout: H1 stays as it is, and the lookup changes, against what is cheaper
    proto.graph.quantization_annotation[0].tensor_name = "H1"
    written, _, _ = rewritten(saved(proto, tmp_path / "in"), tmp_path / "two", tie("E1", "H1", turned=["H1"]))
    assert dict(written.renamed) == {"E1": "H1"}


# ---------------------------------------------------------------- refusals


def test_overridable_weights_are_refused(tmp_path: Path) -> None:
    proto = four_members()
    proto.graph.input.append(value("E1", F, [V, D]))
    assert "a caller may replace its value" in refusal(proto, tmp_path, tie("E1", "E2"))


def test_two_graph_outputs_are_refused_and_one_survives(tmp_path: Path) -> None:
    proto = four_members()
    proto.graph.output.append(value("E2", F, [V, D]))
    written, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("E1", "E2", "H1", turned=["H1"]))
    assert dict(written.renamed) == {"E1": "E2", "H1": "E2"}
    same(proto, after, {"ids": IDS})
    proto.graph.output.append(value("E1", F, [V, D]))
    assert "both outputs of a graph" in refusal(proto, tmp_path / "no", tie("E1", "E2"))


def test_the_result_of_a_body_is_not_lifted_out_of_it(tmp_path: Path) -> None:
    then = graph([], ["W"], [tensor("W", table())])
    otherwise = graph([node("Neg", ["E"], ["n"])], ["n"])
    nodes = [node("If", ["c"], ["y"], name="fork", then_branch=then, else_branch=otherwise)]
    proto = model_of(nodes, [value("c", BOOL, [])], [value("y", F, [V, D])], [tensor("E", table())])
    assert "is an output of its graph" in refusal(proto, tmp_path, tie("E", "|fork.then_branch|W"))


def test_sparse_weights_and_function_bodies_are_refused(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(tensor("S", x(2)), tensor("", np.array([0, 3])), [V])
    function = helper.make_function(
        "local", "f", ["a"], ["b"],
        [node("Constant", [], ["K"], value=tensor("", x(V))), node("Add", ["a", "K"], ["b"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    nodes = [node("Add", ["S", "A"], ["s"]), node("f", ["s"], ["y"], domain="local")]
    proto = model_of(nodes, [], [value("y", F, [V])], [tensor("A", x(V))], check=False)
    proto.graph.sparse_initializer.append(sparse)
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    assert "it is sparse" in refusal(proto, tmp_path / "a", tie("A", "S"))
    assert "model-local function" in refusal(proto, tmp_path / "b", tie("A", "|function:local:f|K"))


def test_bodies_of_unknown_operations_keep_their_weights(tmp_path: Path) -> None:
    body = graph([node("MatMul", ["x", "W"], ["p"])], ["p"], [tensor("W", table().T)])
    nodes = [node("Mystery", ["x"], ["y"], domain="acme", name="m", body=body), node("MatMul", ["x", "M"], ["z"])]
    outputs = [value("y", F, ["n", V]), value("z", F, ["n", V])]
    proto = model_of(nodes, [value("x", F, ["n", D])], outputs, [tensor("M", table().T)], check=False)
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    assert "inside acme.Mystery" in refusal(proto, tmp_path, tie("M", "|m.body|W"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tie("E1", "absent"), "there is no weight absent"),
        (tie("E1", "flat"), "they cannot be one tensor"),
        (tie("E1", "H1"), "they cannot be one tensor"),
        (Share((Member("E1", TRANSPOSED), Member("H1", AS_STORED))), "first member"),
        (SetConfig("config.json", ("tie_word_embeddings",), True), "no settings"),
        (Respell("E1"), "no Transpose node reads E1"),
        (Unshare("E1", "E2", (("", "", "a", 0),)), "is taken"),
        (Unshare("E1", "fresh", (("", "", "b", 0),)), "no use of E1"),
        (Unshare("E1", "fresh"), "needs the uses"),
    ],
)
def test_impossible_edits_say_why(change: Any, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(four_members(), tmp_path, change)


def test_packed_types_are_shared_and_no_output_of_theirs_is_turned(tmp_path: Path) -> None:
    def packed(name: str) -> TensorProto:
        return helper.make_tensor(name, TensorProto.INT4, [2, 2], [1, 2, 2, -1])

    nodes = [node("DequantizeLinear", [name, "scale"], [f"y{name}"]) for name in "AB"]
    outputs = [value(f"y{name}", F, [2, 2]) for name in "AB"]
    proto = model_of(nodes, [], outputs, [packed("A"), packed("B"), tensor("scale", np.float32(0.5))], opset=21)
    _, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("A", "B"))
    assert [weight.name for weight in again.weights] == ["A", "scale"]
    same(proto, after, {})
    assert "is an output of its graph, in this layout" in refusal(proto, tmp_path / "no", tie("A", "B", turned=["B"]))


def test_embedding_layers_decide_the_stored_layout(tmp_path: Path) -> None:
    # EmbedLayerNormalization needs [V,d] whatever the user would like
    nodes = [
        node("EmbedLayerNormalization", ["ids", "seg", "W", "P", "S", "g", "b"], ["x", "m"], domain="com.microsoft"),
        node("MatMul", ["x", "H"], ["y"]),
    ]
    tensors = [tensor("W", table()), tensor("H", table().T), tensor("P", x(8, D)), tensor("S", x(2, D)),
               tensor("g", x(D)), tensor("b", x(D))]  # fmt: skip
    ids = [value(name, TensorProto.INT32, ["b", "t"]) for name in ("ids", "seg")]
    proto = model_of(nodes, ids, [value("y", F, ["b", "t", V])], tensors)
    feed = {"ids": np.array([[1, 2, 3]], np.int32), "seg": np.array([[0, 1, 0]], np.int32)}
    for style in ("auto", "gather", "gemm"):
        model = saved(proto, tmp_path / style / "in")
        change = tie("H", "W", turned=["W"])
        written, _, after = rewritten(model, tmp_path / style / "out", change, transposed_as=style)
        assert dict(written.renamed) == {"H": "W"}
        same(proto, after, feed)


# ---------------------------------------------------------------- respell


def dynamo_style(*, gather: bool = False, cast: bool = False) -> onnx.ModelProto:
    """One initializer W, read as it is and through one Transpose that several consumers share."""
    w = table().T if gather else table()
    kind = TensorProto.FLOAT16 if cast else F
    nodes = [node("Identity", ["W"], ["w0"]), node("Cast", ["w0"], ["w"], to=F), node("Transpose", ["w"], ["t"])]
    if gather:
        nodes += [node("Gather", ["t", "ids"], ["x"]), node("MatMul", ["x", "w"], ["y"])]
    else:
        nodes += [
            node("Gather", ["w", "ids"], ["x"]), node("MatMul", ["x", "t"], ["y0"]), node("Identity", ["t"], ["t0"]),
            node("MatMul", ["x", "t0"], ["y1"]), node("Add", ["y0", "y1"], ["y"]),
        ]  # fmt: skip
    return model_of(
        nodes, [IDS_IN], [value("y", F, ["b", "t", V])],
        [tensor("W", w.astype(np.float16) if kind != F else w)],
    )  # fmt: skip


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_a_tie_made_by_a_transpose_is_expressed_without_it(gather: bool, cast: bool, tmp_path: Path) -> None:
    proto = dynamo_style(gather=gather, cast=cast)
    model = saved(proto, tmp_path / "in")
    written, again, after = rewritten(model, tmp_path / "out", Respell("W"))
    assert not written.renamed
    assert all(item.op_type != "Transpose" or item.doc_string or item.metadata_props for item in after.graph.node)
    assert {item.pattern for item in written.rewritten} == {"gather_axis1" if gather else "matmul_to_gemm"}
    assert {(item.node, item.slot) for item in written.rewritten} == ({("x", 0)} if gather else {("y0", 1), ("y1", 1)})
    kept, dest = again.by_id["W"], tmp_path / "all.onnx"
    assert kept.shape == ((D, V) if gather else (V, D))
    same(proto, after, {"ids": IDS})
    run(tmp_path / "out" / "model.onnx", {"ids": IDS}, 99, dest)
    run(proto, {"ids": IDS}, 99, tmp_path / "folded.onnx")
    assert n_large_copies(tmp_path / "folded.onnx") == 2  # what the Transpose becomes
    assert n_large_copies(dest) == 1


def test_a_lookup_through_a_transpose_gets_its_own_layout_where_the_user_wants_a_gemm(tmp_path: Path) -> None:
    proto = dynamo_style(gather=True)
    written, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", Respell("W"),
                                      transposed_as="gemm")  # fmt: skip
    (new,) = [weight for weight in again.weights if weight.n_elements == V * D]
    assert new.shape == (V, D)
    assert dict(written.renamed) == {"W": new.id}
    same(proto, after, {"ids": IDS})


def test_sharing_and_then_respelling_one_class(tmp_path: Path) -> None:
    proto = dynamo_style()
    proto.graph.initializer.append(tensor("W2", table()))
    proto.graph.node[3].input[0] = "W2"
    model = saved(proto, tmp_path / "in")
    written, again, after = rewritten(model, tmp_path / "out", tie("W2", "W"), Respell("W"))
    assert dict(written.renamed) == {"W": "W2"}
    assert [weight.id for weight in again.weights if weight.n_elements == V * D] == ["W2"]
    same(proto, after, {"ids": IDS})


def test_edits_that_follow_one_another_report_the_first_and_the_last_place(tmp_path: Path) -> None:
    # H becomes E, read by a Gemm; then E becomes P, whose own consumer wants [d,V], and the Gemm turns once more
    nodes = [
        node("Gather", ["E", "ids"], ["x"]), node("MatMul", ["x", "H"], ["y"]), node("Neg", ["P"], ["pin"]),
    ]  # fmt: skip
    tensors = [tensor("E", table()), tensor("H", table().T), tensor("P", table().T)]
    outputs = [value("y", F, ["b", "t", V]), value("pin", F, [D, V])]
    proto = model_of(nodes, [IDS_IN], outputs, tensors)
    model = saved(proto, tmp_path / "in")
    changes = (tie("E", "H", turned=["H"]), tie("P", "E", turned=["E"]))
    written, again, after = rewritten(model, tmp_path / "out", *changes)
    assert dict(written.renamed) == {"E": "P", "H": "P"}
    assert {(item.node, item.slot, item.new_node, item.pattern) for item in written.rewritten} == {
        ("x", 0, "x_gather", "gather_axis1"), ("y", 1, "y_gemm", "gemm_flip"),
    }  # fmt: skip
    assert {use.node for use in again.uses if use.weight == "P"} == {"x_gather", "y_gemm", "pin"}
    same(proto, after, {"ids": IDS})


def test_a_view_that_nobody_reads_goes_with_its_weight(tmp_path: Path) -> None:
    proto = four_members()
    proto.graph.node.extend([node("Identity", ["H1"], ["dead"]), node("Cast", ["dead"], ["deader"], to=F)])
    _, again, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("E1", "H1", turned=["H1"]))
    assert "H1" not in again.by_id
    assert not [item for item in after.graph.node if item.output[0].startswith("dead")]


def test_respelling_is_refused_where_a_consumer_has_no_other_form(tmp_path: Path) -> None:
    proto = dynamo_style()
    proto.graph.node.append(node("Exp", ["t"], ["odd"]))
    proto.graph.output.append(value("odd", F, [D, V]))
    proto.graph.node.append(node("Exp", ["w"], ["odd2"]))
    proto.graph.output.append(value("odd2", F, [V, D]))
    assert "'odd' (Exp)" in refusal(proto, tmp_path, Respell("W"))


# ---------------------------------------------------------------- unshare


def test_named_uses_move_to_a_copy_and_views_are_repeated(tmp_path: Path) -> None:
    proto = dynamo_style()
    model = saved(proto, tmp_path / "in")
    written, again, after = rewritten(model, tmp_path / "out", Unshare("W", "W.copy", (("", "", "y1", 1),)))
    assert not written.renamed
    assert {weight.id for weight in again.weights if weight.n_elements == V * D} == {"W", "W.copy"}
    assert {use.weight for use in again.uses if (use.node, use.slot) == ("y1", 1)} == {"W.copy"}
    assert {use.weight for use in again.uses if (use.node, use.slot) == ("y0", 1)} == {"W"}
    same(proto, after, {"ids": IDS})


def test_views_that_only_moved_uses_need_move_along(tmp_path: Path) -> None:
    model = saved(dynamo_style(), tmp_path / "in")
    uses = (("", "", "y0", 1), ("", "", "y1", 1))
    _, again, after = rewritten(model, tmp_path / "out", Unshare("W", "copy", uses))
    assert [item.op_type for item in after.graph.node].count("Transpose") == 1
    assert {use.weight for use in again.uses if use.node in ("y0", "y1") and use.slot == 1} == {"copy"}


def aliased(folder: Path) -> Model:
    """Three initializers on one range of a data file."""
    nodes = [node("Gather", [name, "ids"], [name.lower()]) for name in "ABC"]
    nodes.append(node("Sum", ["a", "b", "c"], ["y"]))
    tensors = [tensor(name, table()) for name in "ABC"]
    proto = model_of(nodes, [IDS_IN], [value("y", F, ["b", "t", D])], tensors)
    saved(proto, folder, save_as_external_data=True, location="w.bin", size_threshold=0)
    again = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for other in again.graph.initializer[1:]:
        del other.external_data[:]
        other.external_data.extend(again.graph.initializer[0].external_data)
    (folder / "model.onnx").write_bytes(again.SerializeToString())
    return load(folder / "model.onnx", (folder / "model.onnx",))


def test_names_on_one_range_get_bytes_of_their_own(tmp_path: Path) -> None:
    model = aliased(tmp_path / "in")
    assert model.by_id["A"].storage == model.by_id["B"].storage
    _, again, _ = rewritten(model, tmp_path / "out", Unshare("A", "B"), Unshare("A", "C"))
    assert (tmp_path / "out" / "w.bin").stat().st_size == 3 * 6144
    regions = {again.by_id[name].storage.region for name in "ABC"}  # type: ignore[union-attr]
    assert len(regions) == 3
    contents = {again.by_id[name].storage.read_ranges([(0, 6144)])[0] for name in "ABC"}  # type: ignore[union-attr]
    assert contents == {table().tobytes()}


def test_a_shared_range_stays_shared_when_something_else_is_edited(tmp_path: Path) -> None:
    model = aliased(tmp_path / "in")
    _, again, _ = rewritten(model, tmp_path / "out", Unshare("A", "new", (("", "", "a", 0),)))
    # A, B and C on one range, the copy on another: not 4 × 6144
    assert (tmp_path / "out" / "w.bin").stat().st_size == 2 * 6144
    assert again.by_id["A"].storage == again.by_id["B"].storage == again.by_id["C"].storage
    assert again.by_id["new"].storage != again.by_id["A"].storage
