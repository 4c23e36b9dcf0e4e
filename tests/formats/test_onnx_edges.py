"""Constructs at the edges of ONNX: functions, bodies, sparse and odd tensors, old files, training, odd names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from edge_models import (
    BOOL,
    FEED,
    I64,
    IDS,
    LOGITS,
    Case,
    D,
    E,
    F,
    V,
    aliased,
    assert_merged,
    assert_same,
    body,
    classes,
    function,
    node,
    planned,
    random,
    rewritten,
    tensor,
    value,
)
from onnx import TensorProto, helper

from tieaudit.load import load_one
from tieaudit.scan import look, scan

pytest.importorskip("onnxruntime")

X = value("x", F, [1, D])
GIVEN = {"x": random(1, D, seed=5)}
HEAD = tensor("head", random(D, V, seed=3))
TABLE = tensor("E", E)
LOOK = node("Gather", "E ids", "e")
W = random(D, D, seed=7)
EQUAL = {"A": "as stored", "B": "as stored"}
TIED = {"E": "as stored", "H": "transposed"}
MINE = {"domain": "local"}
LINEAR = function("Linear", "x w", "y", node("MatMul", "x w", "p"), node("Tanh", "p", "y"))


def constant(name: str) -> onnx.NodeProto:
    return node("Constant", "", name, value=tensor("v", W))


def chained(first: onnx.NodeProto, second: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A lookup, two layers, a head; the layers read `e` and `a` and make `a` and `b`."""
    return [LOOK, first, second, node("MatMul", "b head", "logits")]


PAIR = [TABLE, tensor("A", W), tensor("B", W), HEAD]


def layers(first: onnx.NodeProto, second: onnx.NodeProto, **more: Any) -> Case:
    return Case(chained(first, second), PAIR, equal=[EQUAL], **more)


def decoder(flag: str) -> Any:
    """A branch of a merged decoder: it looks up in the table outside and has a head of its own."""
    nodes = [node("Gather", "E ids", f"e{flag}"), node("MatMul", f"e{flag} H{flag}", f"l{flag}")]
    return body(nodes, [tensor(f"H{flag}", E.T)], [], [value(f"l{flag}")])


IF_HEADS = {"E": "as stored", "|fork.else_branch|H2": "transposed", "|fork.then_branch|H1": "transposed"}
FLAG = value("c", BOOL, [])
LOCAL: dict[str, Any] = {"domains": ["local"]}

CASES: dict[str, Case] = {
    "two weights passed to one function": layers(
        node("Linear", "e A", "a", domain="local"), node("Linear", "a B", "b", domain="local"),
        functions=[LINEAR], **LOCAL,
    ),
    "a head passed to a function, so that the lookup turns": Case(
        [LOOK, node("Project", "e H", "logits", domain="local")], [TABLE, tensor("H", E.T)], equal=[TIED],
        functions=[function("Project", "x w", "y", node("MatMul", "x w", "y"))], **LOCAL,
    ),
    "a function in a function": Case(
        [node("Outer", "e A", "a", domain="local"), node("Outer", "a B", "y", domain="local")],
        [tensor("A", W), tensor("B", W)], [value("e", F, [1, D])], [value("y", F, [1, D])], {"e": GIVEN["x"]},
        equal=[EQUAL],
        functions=[LINEAR, function("Outer", "x w", "y", node("Linear", "x w", "y", **MINE), domains=["local"])],
        **LOCAL,
    ),
    "constants of two functions": Case(
        chained(node("F", "e", "a", domain="local"), node("G", "a", "b", domain="local")), [TABLE, HEAD],
        equal=[{"|function:local:F|w": "as stored", "|function:local:G|w": "as stored"}],
        functions=[function(name, "x", "y", constant("w"), node("MatMul", "x w", "y")) for name in "FG"],
        refused="model-local function, whose body sees no outer names", **LOCAL,
    ),
    "a merged decoder: heads in branches, the table outside": Case(
        [node("If", "c", "logits", name="fork", then_branch=decoder("1"), else_branch=decoder("2"))],
        [TABLE], [IDS, FLAG], feed={**FEED, "c": np.array(True)}, equal=[IF_HEADS],
    ),
    "a weight captured by a Scan": Case(
        [node("Scan", "start xs", "end steps", num_scan_inputs=1, body=body(
            [node("MatMul", "one A", "m"), node("Add", "m state", "next"), node("Identity", "next", "out")],
            [tensor("A", W)], [value("state", F, [1, D]), value("one", F, [1, D])],
            [value("next", F, [1, D]), value("out", F, [1, D])])),
         node("MatMul", "steps B", "y")],
        [tensor("B", W)], [value("xs", F, [4, 1, D]), value("start", F, [1, D])],
        [value("end", F, [1, D]), value("y", F, [4, 1, D])],
        {"xs": random(4, 1, D), "start": random(1, D, seed=2)},
        equal=[{"B": "as stored", "|end.body|A": "as stored"}],
    ),
    "a weight captured by a Loop": Case(
        [node("Loop", "n - x", "y", body=body(
            [node("MatMul", "state A", "next"), node("Identity", "going", "go")], [tensor("A", W)],
            [value("i", I64, []), value("going", BOOL, []), value("state", F, [1, D])],
            [value("go", BOOL, []), value("next", F, [1, D])])), node("MatMul", "y B", "z")],
        [tensor("B", W), tensor("n", np.array(2))], [X], [value("z", F, [1, D])], GIVEN,
        equal=[{"B": "as stored", "|y.body|A": "as stored"}],
    ),
    "a weight in the body of a SequenceMap": Case(
        [node("SequenceConstruct", "x x", "s"),
         node("SequenceMap", "s", "t", body=body([node("MatMul", "one A", "m")], [tensor("A", W)],
                                                 [value("one", F, [1, D])], [value("m", F, [1, D])])),
         node("ConcatFromSequence", "t", "u", axis=0), node("MatMul", "u B", "y")],
        [tensor("B", W)], [X], [value("y", F, [2, D])], GIVEN,
        equal=[{"B": "as stored", "|t.body|A": "as stored"}],
    ),
    "weights behind optional values": Case(
        [node("Optional", "x", "o"), node("OptionalGetElement", "o", "e"), node("MatMul", "e A", "a"),
         node("MatMul", "a B", "y")],
        [tensor("A", W), tensor("B", W)], [X], [value("y", F, [1, D])], GIVEN, equal=[EQUAL],
    ),
    "a name that a branch has for itself": Case(
        [node("If", "c", "y", name="fork",
              then_branch=body([node("MatMul", "x A", "t")], [tensor("A", W + 1)], [], [value("t")]),
              else_branch=body([node("MatMul", "x A", "m"), node("MatMul", "m B", "u")], [], [], [value("u")]))],
        [tensor("A", W), tensor("B", W)], [X, FLAG], [value("y", F, [1, D])], {**GIVEN, "c": np.array(False)},
        equal=[EQUAL],
    ),
    "sparse tensors": Case(
        [node("Add", "x A", "a"), node("Add", "a B", "y")], [], [X], [value("y", F, [1, D])], GIVEN, equal=[EQUAL],
        sparse=[helper.make_sparse_tensor(tensor(name, random(3)), tensor(f"{name}_at", np.array([0, 3, 9])), [D])
                for name in "AB"], refused="it is sparse",
    ),
    "an old file, whose initializers are inputs": Case(
        [node("MatMul", "x A", "a"), node("MatMul", "a B", "y")], [tensor("A", W), tensor("B", W)],
        [X, value("A", F, [D, D]), value("B", F, [D, D])], [value("y", F, [1, D])], GIVEN, equal=[EQUAL],
        opset=8, ir_version=3,
    ),
    "an old file with Constant nodes": Case(
        [constant("A"), constant("B"), node("MatMul", "x A", "a"), node("MatMul", "a B", "y")], [],
        [X], [value("y", F, [1, D])], GIVEN, equal=[EQUAL], opset=8, ir_version=3,
    ),
    "fused attention": Case(
        [node("Attention", "x A Ab", "a", domain="com.microsoft", num_heads=2),
         node("Attention", "a B Bb", "y", domain="com.microsoft", num_heads=2)],
        [tensor("A", random(D, 3 * D)), tensor("Ab", random(3 * D)), tensor("B", random(D, 3 * D)),
         tensor("Bb", random(3 * D))],
        [value("x", F, ["b", "t", D])], [value("y", F, ["b", "t", D])], {"x": random(2, 3, D, seed=8)},
        equal=[EQUAL, {"Ab": "as stored", "Bb": "as stored"}], domains=["com.microsoft"],
    ),
    "fused layer norms": Case(
        [node("SkipLayerNormalization", "x x A -", "a", domain="com.microsoft"),
         node("SkipLayerNormalization", "a x B -", "y", domain="com.microsoft")],
        [tensor("A", random(D)), tensor("B", random(D))], [value("x", F, ["b", "t", D])],
        [value("y", F, ["b", "t", D])], {"x": random(2, 3, D, seed=8)}, equal=[EQUAL], domains=["com.microsoft"],
    ),
    "a fused embedding, which keeps its layout": Case(
        [node("EmbedLayerNormalization", "ids seg E P S g b", "e m", domain="com.microsoft"),
         node("MatMul", "e H", "logits")],
        [TABLE, tensor("P", random(9, D, seed=2)), tensor("S", random(2, D, seed=3)), tensor("g", random(D, seed=4)),
         tensor("b", random(D, seed=6)), tensor("H", E.T)],
        [value("ids", TensorProto.INT32, ["b", "t"]), value("seg", TensorProto.INT32, ["b", "t"])],
        feed={"ids": FEED["ids"].astype(np.int32), "seg": np.zeros((2, 3), np.int32)}, equal=[TIED],
        domains=["com.microsoft"],
    ),
    "a rotary embedding with two equal caches": Case(
        [node("RotaryEmbedding", "x p cos sin", "a", domain="com.microsoft"),
         node("RotaryEmbedding", "a p cos2 sin2", "y", domain="com.microsoft")],
        [tensor(f"{name}{n}", random(80, 4, seed=seed)) for n in ("", "2") for seed, name in enumerate(("cos", "sin"))],
        [value("x", F, [1, 2, 3, 8]), value("p", I64, [1, 3])], [value("y", F, [1, 2, 3, 8])],
        {"x": random(1, 2, 3, 8), "p": np.array([[0, 1, 2]])},
        equal=[{"cos": "as stored", "cos2": "as stored"}, {"sin": "as stored", "sin2": "as stored"}],
        domains=["com.microsoft"],
    ),
    "a graph without a name, nodes without names": layers(
        node("MatMul", "e A", "a"), node("MatMul", "a B", "b"), name=""
    ),
    "float16 weights behind a Cast": Case(
        [node("Gather", "E ids", "g"), node("Cast", "g", "e", to=F), node("Cast", "H", "h", to=F),
         node("MatMul", "e h", "logits")],
        [tensor("E", E.astype(np.float16)), tensor("H", E.T.astype(np.float16))], equal=[TIED],
    ),
    "float16 weights, both behind a Cast": Case(
        [node("Cast", "E", "w", to=F), node("Gather", "w ids", "e"), node("Cast", "H", "h", to=F),
         node("MatMul", "e h", "logits")],
        [tensor("E", E.astype(np.float16)), tensor("H", E.T.astype(np.float16))], equal=[TIED],
    ),
    "bfloat16 weights behind a Cast": Case(
        [node("Cast", "E", "w", to=F), node("Gather", "w ids", "e"), node("Cast", "H", "h", to=F),
         node("MatMul", "e h", "logits")],
        [tensor("E", E.astype(ml_dtypes.bfloat16)), tensor("H", E.T.astype(ml_dtypes.bfloat16))], equal=[TIED],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_dedup_merges_what_is_equal_or_says_why_not(name: str, tmp_path: Path) -> None:
    assert_merged(CASES[name], tmp_path)


KINDS = (
    "FLOAT DOUBLE FLOAT16 BFLOAT16 FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0 FLOAT4E2M1 "
    "COMPLEX64 COMPLEX128 STRING BOOL INT4 UINT4 INT2 UINT2 INT8 UINT16 INT64"
).split()
CONTENT: dict[str, list[Any]] = {"STRING": [b"a", b"bc", b""] * 5, "BOOL": [False, True, True] * 5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [False, True])
def test_two_equal_tensors_of_any_type_are_one_class_and_become_one(kind: str, raw: bool, tmp_path: Path) -> None:
    # 3 × 5: an odd number of elements, so that sub-byte types end within a byte
    number = getattr(TensorProto, kind)
    if raw and kind == "STRING":
        pytest.skip("strings have no raw form")
    content = CONTENT.get(kind, [0, 1, 1] * 5)
    tensors = [helper.make_tensor(name, number, [3, 5], content) for name in "AB"]
    if raw:  # one typed, one raw: the same value in two encodings
        array = onnx.numpy_helper.to_array(tensors[1])
        tensors[1] = onnx.numpy_helper.from_array(array, "B")
        assert tensors[1].HasField("raw_data")
    outputs = [value(f"y{name}", number, [3, 5]) for name in "AB"]
    nodes = [node("Identity", name, f"y{name}") for name in "AB"]
    case = Case(nodes, tensors, [], outputs, equal=[EQUAL], opset=25, ir_version=13)
    path = case.save(tmp_path / "in")
    assert classes(path) == [EQUAL]
    model = look(load_one(path)).model
    learned = model.by_id["A"].parameter
    assert learned is (False if kind in ("STRING", "BOOL") or "INT" in kind else None)
    if learned is None:  # small tables of integers are left alone, on purpose
        result = rewritten(path, tmp_path / "out")
        assert [weight.name for weight in load_one(result).weights] == ["A"]
        assert load_one(result).by_id["A"].dtype == model.by_id["A"].dtype


@pytest.mark.parametrize("kind", KINDS)
def test_one_element_less_and_they_are_two(kind: str, tmp_path: Path) -> None:
    number = getattr(TensorProto, kind)
    content = CONTENT.get(kind, [0, 1, 1] * 5)
    other = [*content[:-1], content[0]]
    tensors = [helper.make_tensor("A", number, [3, 5], content), helper.make_tensor("B", number, [3, 5], other)]
    outputs = [value(f"y{name}", number, [3, 5]) for name in "AB"]
    nodes = [node("Identity", name, f"y{name}") for name in "AB"]
    assert classes(Case(nodes, tensors, [], outputs, opset=25, ir_version=13).save(tmp_path)) == []


def test_a_function_that_is_called_twice_with_one_weight_is_a_tie_by_its_calls(tmp_path: Path) -> None:
    calls = [node("Linear", "e A", "a", domain="local"), node("Linear", "a A", "b", domain="local")]
    case = Case(chained(*calls), [TABLE, tensor("A", W), HEAD], functions=[LINEAR], **LOCAL)
    path = case.save(tmp_path)
    assert aliased(path) == [["MatMul @ p in a", "MatMul @ p in b"]]
    uses = load_one(path).uses_of["A"]
    assert [(use.scope, use.node, use.slot, use.calls) for use in uses] == [
        ("function:local:Linear", "p", 1, ("a",)),
        ("function:local:Linear", "p", 1, ("b",)),
    ]


def test_a_weight_passed_to_a_function_has_the_role_of_what_reads_it_there(tmp_path: Path) -> None:
    functions = [
        function("Embed", "ids w", "y", node("Gather", "w ids", "y")),
        function("Project", "x w", "y", node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "y")),
    ]
    nodes = [node("Embed", "ids E", "e", domain="local"), node("Tanh", "e", "h"),
             node("Project", "h H", "logits", domain="local")]  # fmt: skip
    path = Case(nodes, [TABLE, tensor("H", random(V, D, seed=9))], functions=functions, **LOCAL).save(tmp_path)
    subject = look(load_one(path))
    assert {id: role.kind for id, role in subject.roles.items()} == {"E": "token_embedding", "H": "output_head"}
    (use,) = subject.model.uses_of["H"]
    assert (str(use.view), use.transposes) == ("transposed", True)


def test_weights_that_training_information_speaks_of_stay_and_others_do_not(tmp_path: Path) -> None:
    case = layers(node("MatMul", "e A", "a"), node("MatMul", "a B", "b"))
    for named, refused in (("A", True), ("head", False)):
        made = case.model()
        info = made.training_info.add()
        info.algorithm.CopyFrom(
            body([node("Sub", f"{named} step", "new")], [tensor("step", np.float32(1))], [], [value("new")])
        )
        info.update_binding.add(key=named, value="new")
        folder = tmp_path / named
        folder.mkdir()
        onnx.save(made, str(folder / "model.onnx"))
        _, found = planned(folder / "model.onnx")
        assert bool(found.refusals) == refused
        assert all("training information in the file speaks of it" in one.because for one in found.refusals)
        if not refused:
            result = rewritten(folder / "model.onnx", folder / "out")
            assert onnx.load(str(result)).training_info[0] == made.training_info[0]
            assert_same(folder / "model.onnx", result, FEED)


def test_duplicates_inside_functions_are_mended_by_hand_and_the_hint_works(tmp_path: Path) -> None:
    case = CASES["constants of two functions"]
    from onnx import inliner

    path = case.save(tmp_path / "in")
    (finding,) = [one for one in scan(load_one(path)).findings if one.code == "TIE201"]
    assert finding.fix is not None
    assert finding.fix.safety == "manual"
    assert "onnx.inliner" in finding.fix.command
    inlined = tmp_path / "inlined.onnx"
    onnx.save(inliner.inline_local_functions(case.model()), str(inlined))
    assert_same(path, rewritten(inlined, tmp_path / "out"), FEED)


@pytest.mark.parametrize("ir_version", range(4, 14))
def test_every_ir_version_with_initializers_of_its_own_is_written(ir_version: int, tmp_path: Path) -> None:
    case = Case(
        [LOOK, node("MatMul", "e H", "logits")], [TABLE, tensor("H", E.T)], equal=[TIED], opset=9, ir_version=ir_version
    )
    result = rewritten(case.save(tmp_path / "in"), tmp_path / "out")
    after = onnx.load(str(result))
    assert after.ir_version == ir_version
    assert [item.name for item in after.graph.initializer if len(item.dims) == 2] == ["E"]
    assert_same(tmp_path / "in" / "model.onnx", result, FEED)


def test_classical_operations_beside_a_tie_stay_as_they_are(tmp_path: Path) -> None:
    # ai.onnx.ml holds its numbers in attributes: they are no weights, and the tie is made around them
    scaler = node("Scaler", "x", "s", domain="ai.onnx.ml", offset=[0.5] * D, scale=[2.0] * D)
    nodes = [scaler, node("MatMul", "s A", "a"), node("MatMul", "a B", "y")]
    case = Case(nodes, [tensor("A", W), tensor("B", W)], [X], [value("y", F, [1, D])], GIVEN, equal=[EQUAL],
                domains=["ai.onnx.ml"])  # fmt: skip
    result = assert_merged(case, tmp_path)
    assert onnx.load(str(result)).graph.node[0] == scaler


def test_a_head_sink_is_learned_and_the_rotary_caches_beside_it_are_not(tmp_path: Path) -> None:
    # the sinks of gpt-oss are the 12th input of GroupQueryAttention; 8th and 9th are tables of cosines and sines
    inputs = [value(name, F, ["b", "t", 8]) for name in "qkv"] + [value(name, F, None) for name in ("pk", "pv")]
    inputs += [value("n", TensorProto.INT32, ["b"]), value("all", TensorProto.INT32, [])]
    made = node("GroupQueryAttention", "q k v pk pv n all cos sin - - sink", "y", num_heads=2, kv_num_heads=2,
                do_rotary=1, domain="com.microsoft")  # fmt: skip
    tensors = [tensor(name, random(9, 2, seed=seed)) for seed, name in enumerate(("cos", "sin"))]
    path = Case([made], [*tensors, tensor("sink", random(2))], inputs, [value("y", F, None)],
                domains=["com.microsoft"]).save(tmp_path)  # fmt: skip
    found = {weight.name: weight.parameter for weight in load_one(path).weights}
    assert found == {"cos": False, "sin": False, "sink": True}


def test_untying_weights_of_quantised_and_cast_readers_gives_each_its_own(tmp_path: Path) -> None:
    nodes = [node("Gather", "E ids", "g"), node("Cast", "g", "e", to=F), node("Cast", "E", "w", to=F),
             node("Transpose", "w", "h", perm=[1, 0]), node("MatMul", "e h", "logits")]  # fmt: skip
    path = Case(nodes, [tensor("E", E.astype(np.float16))], outputs=[LOGITS]).save(tmp_path / "in")
    assert aliased(path) == [["Gather @ g", "MatMul @ logits"]]
    result = rewritten(path, tmp_path / "out", "untie")
    assert [weight.name for weight in load_one(result).weights] == ["E", "E.untied"]
    assert_same(path, result, FEED)
