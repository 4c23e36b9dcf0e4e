"""More cases of peers on ONNX files, from their issue threads and from what they were measured to do.

OLV: microsoft/Olive, SLIM: inisis/OnnxSlim, IS: issue threads, EQ, EXT and FOLD: behaviour of peers and of ONNX Runtime
that was reproduced by running them. Which test is which case: docs/peer-cases.md.
"""

from __future__ import annotations

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
from peer_models import (
    FLOAT,
    INT64,
    branch,
    codes,
    deduplicated,
    found,
    initializers,
    measured,
    random,
    shared,
    unsure,
    write,
)

from tieaudit.load import load_one
from tieaudit.scan import scan
from tieaudit.view import TRANSPOSED

pytest.importorskip("onnxruntime")

IDS = np.array([[0, 5, 59]], np.int64)
X = random(1, 3, seed=9)
FLAG = {"x": (FLOAT, [1, 3]), "flag": (TensorProto.BOOL, [])}


def pair(path: Path, first: Any, second: Any) -> Path:
    """Two weights of one element type, each a matrix or a row that is added to something."""
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(first).dtype)
    nodes = [node("Identity", ["w1"], ["y1"]), node("Identity", ["w2"], ["y2"])]
    return write(path, nodes, {"w1": first, "w2": second}, {"y1": kind, "y2": kind}, {})


# --- OLV: microsoft/Olive, TieWordEmbeddings -----------------------------------------------------------------------


def quantised(path: Path, *, same: bool = True, zero_points: tuple[bool, bool] = (False, False)) -> Path:
    """GatherBlockQuantized and MatMulNBits over 4-bit blocks with equal payloads, in their two shapes."""
    v, d, block = 32, 32, 16
    data = np.random.default_rng(0).integers(0, 256, (v, d // 2), np.uint8)
    scales = np.abs(random(v, d // block, seed=1)) + 0.1
    weights: dict[str, Any] = {"embed_q": data, "embed_s": scales}
    weights |= {"head_q": (data if same else data[::-1].copy()).reshape(v, d // block, block // 2)}
    weights |= {"head_s": scales if same else scales[::-1].copy()}
    look, head = ["embed_q", "ids", "embed_s"], ["h", "head_q", "head_s"]
    for inputs, name, wanted in ((look, "embed_z", zero_points[0]), (head, "head_z", zero_points[1])):
        if wanted:
            weights[name] = np.full((v, d // block // 2), 0x87, np.uint8)
            weights[name][0] = 0x86  # not one value: a table of zero points, no constant
            inputs.append(name)
    nodes = [
        node("GatherBlockQuantized", look, ["e"], domain="com.microsoft", bits=4, block_size=block),
        node("Tanh", ["e"], ["h"]),
        node("MatMulNBits", head, ["logits"], domain="com.microsoft", K=d, N=v, bits=4, block_size=block),
    ]
    return write(path, nodes, weights, ["logits"], {"ids": (INT64, ["n", "m"])}, shapes={"logits": ["n", "m", v]})


def test_OLV_2_equal_payloads_in_two_packings_become_one_table(tmp_path: Path) -> None:
    # Olive reads the head from a Reshape of the embedding's payload, which a runtime folds into a second table; here
    # the lookup reads the head's
    path = quantised(tmp_path / "m.onnx")
    assert {"embed_q", "head_q"} in measured(path)
    after = load_one(peers.applied(path)).by_id
    assert "embed_q" not in after
    assert after["head_q"].shape == (32, 2, 8)
    peers.assert_same_outputs(path, path.parent / "out" / path.name, {"ids": IDS % 32})


@pytest.mark.parametrize("zero_points", [(True, True), (True, False)])
def test_OLV_6_zero_points_of_half_bytes_keep_the_packings_apart(
    tmp_path: Path, zero_points: tuple[bool, bool]
) -> None:
    # of both they are equal, but a lookup in blocks cannot read them; of one alone they make it another matrix
    path = quantised(tmp_path / "m.onnx", zero_points=zero_points)
    assert ({"embed_q", "head_q"} in measured(path)) == all(zero_points)
    assert (unsure(path) != []) != all(zero_points)
    by_id = load_one(path).by_id
    before = {name: by_id[name].shape for name in ("embed_q", "head_q")}
    result = peers.cli("apply", path, "--to", tmp_path / "out.onnx")
    assert result.exit_code == (2 if all(zero_points) else 0), result.output
    assert ("a lookup in blocks wants a byte for each" in result.output) == all(zero_points)
    if (tmp_path / "out.onnx").exists():  # equal scales are one tensor; the packed tables are as they were
        after = load_one(tmp_path / "out.onnx").by_id
        assert {name: after[name].shape for name in before} == before


def test_OLV_3_a_table_that_is_quantised_beside_a_float_head_stays(tmp_path: Path) -> None:
    v, d, block = 32, 32, 16
    data = np.random.default_rng(0).integers(0, 256, (v, d // 2), np.uint8)
    weights = {"embed_q": data, "embed_s": np.abs(random(v, d // block)) + 0.1, "head": random(d, v, seed=1)}
    look = ["embed_q", "ids", "embed_s"]
    nodes = [
        node("GatherBlockQuantized", look, ["h"], domain="com.microsoft", bits=4, block_size=block),
        node("MatMul", ["h", "head"], ["logits"]),
    ]
    given = {"ids": (INT64, ["n", "m"])}
    path = write(tmp_path / "m.onnx", nodes, weights, ["logits"], given, shapes={"logits": ["n", "m", v]})
    assert measured(path) == []
    assert peers.nothing_to_do(path)


def test_OLV_5_a_lost_tie_is_found_whatever_inputs_and_outputs_are_called(tmp_path: Path) -> None:
    # Olive asks for input_ids and logits
    table = random(60, 8)
    nodes = [node("Gather", ["w0", "in0"], ["a"]), node("MatMul", ["a", "w1"], ["out0"])]
    path = write(tmp_path / "m.onnx", nodes, {"w0": table, "w1": table.T}, ["out0"], {"in0": (INT64, ["n", "m"])})
    assert measured(path) == [{"w0", "w1"}]
    deduplicated(path, {"in0": IDS}, 1e-5)


# --- SLIM: inisis/OnnxSlim -----------------------------------------------------------------------------------------


def test_SLIM_1_equal_layers_on_one_input_come_to_read_one_weight(tmp_path: Path) -> None:
    # that the two MatMul are then one is the work of a common subexpression pass, not of this tool
    nodes = [node("MatMul", ["x", "w1"], ["a"]), node("MatMul", ["x", "w2"], ["b"]), node("Add", ["a", "b"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w1": random(3, 20), "w2": random(3, 20)})
    assert measured(path) == [{"w1", "w2"}]
    after = deduplicated(path, {"x": X})
    assert [one.op_type for one in after.graph.node] == ["MatMul", "MatMul", "Add"]
    assert list(initializers(after)) == ["w1"]


def test_SLIM_gap_matrices_of_more_than_a_thousand_elements_are_tied_and_types_stay_apart(tmp_path: Path) -> None:
    # OnnxSlim ties fewer than 1000 elements, and groups by shape alone
    table = random(64, 64)
    weights = {"w1": table, "w2": table, "i1": table.view(np.int32)}
    nodes = [node("MatMul", ["x", "w1"], ["h"]), node("MatMul", ["h", "w2"], ["y"]), node("Identity", ["i1"], ["z"])]
    kinds = {"y": FLOAT, "z": TensorProto.INT32}
    path = write(tmp_path / "m.onnx", nodes, weights, kinds, {"x": (FLOAT, [1, 64])})
    assert measured(path) == [{"w1", "w2"}]
    assert list(initializers(deduplicated(path, {"x": random(1, 64, seed=9)}))) == ["w1", "i1"]


# --- IS: issue threads ---------------------------------------------------------------------------------------------


def test_IS_1_a_folded_transpose_is_the_lost_tie_and_comes_back_at_half_the_size(tmp_path: Path) -> None:
    path = tiny_onnx.lost(tmp_path / "m.onnx")
    (tie,) = found(path).ties
    assert [member.view for member in tie.members][1] == TRANSPOSED
    assert codes(path) == ["TIE202"]
    after = deduplicated(path, {"ids": IDS}, 1e-5)
    assert sum(len(shape) == 2 for shape in initializers(after).values()) == 1


def test_IS_3_copies_in_both_branches_move_out_and_are_stored_once(tmp_path: Path) -> None:
    w = random(3, 40)
    then = branch([node("MatMul", ["x", "w"], ["t"])], {"w": w}, "t")
    other_body = [node("MatMul", ["x", "v"], ["n"]), node("Neg", ["n"], ["e"])]
    nodes = [node("If", ["flag"], ["y"], name="I", then_branch=then, else_branch=branch(other_body, {"v": w}, "e"))]
    path = write(tmp_path / "m.onnx", nodes, {}, inputs=FLAG)
    assert measured(path) == [{"|I.then_branch|w", "|I.else_branch|v"}]
    to = peers.applied(path)
    for flag in (True, False):
        peers.assert_same_outputs(path, to, {"x": X, "flag": np.array(flag)})
        assert [weight.scope for weight in load_one(to).weights if weight.n_elements == 120] == [""]


def test_IS_4_a_tie_through_a_transpose_node_is_foldable_and_is_respelt(tmp_path: Path) -> None:
    path = tiny_onnx.language_model(tmp_path / "m.onnx", tiny_onnx.table(), None)
    assert shared(path) == [{"wte.weight"}]
    assert codes(path) == ["TIE301"]
    to = peers.applied(path)
    assert codes(to) == []
    cases.run(to, {"ids": IDS}, 1, tmp_path / "optimised.onnx")
    # 60 × 8 elements; what ONNX Runtime makes of the original holds them twice
    assert cases.n_large_copies(tmp_path / "optimised.onnx", 480) == 1
    cases.run(path, {"ids": IDS}, 1, tmp_path / "folded.onnx")
    assert cases.n_large_copies(tmp_path / "folded.onnx", 480) == 2


def test_IS_9_a_subgraph_weight_that_shadows_an_outer_name_is_a_weight_of_its_own(tmp_path: Path) -> None:
    def body(values: Any) -> onnx.GraphProto:
        return branch([node("Add", ["x", "w"], ["t"])], {"w": values}, "t")

    then, other = body(random(1, 3, seed=1)), body(random(1, 3))
    other.output[0].name = other.node[0].output[0] = "e"
    nodes = [node("If", ["flag"], ["i"], name="I", then_branch=then, else_branch=other), node("Add", ["i", "w"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [cases.value(name, *kind) for name, kind in FLAG.items()], [cases.value("y", FLOAT, [1, 3])],
        peers.tensors({"w": random(1, 3)}),
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())  # the checker refuses it
    # the equal one is a copy, the other is not, though all three have one name
    assert measured(path) == [{"w", "|I.else_branch|w"}]


def test_IS_10_equal_names_in_sibling_branches_with_other_data_stay_apart(tmp_path: Path) -> None:
    then = branch([node("MatMul", ["x", "w"], ["t"])], {"w": random(3, 40)}, "t")
    other = branch([node("MatMul", ["x", "w"], ["e"])], {"w": random(3, 40, seed=1)}, "e")
    nodes = [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
    path = write(tmp_path / "m.onnx", nodes, {}, inputs=FLAG)
    assert len({weight.id for weight in load_one(path).weights}) == 2
    assert measured(path) == []
    assert peers.nothing_to_do(path)


def test_IS_10_a_copy_that_is_the_output_of_its_branch_keeps_its_name_there(tmp_path: Path) -> None:
    w = random(1, 3)
    then = branch([], {"kept": w}, "kept")
    then.output[0].CopyFrom(cases.value("kept", FLOAT, [1, 3]))
    other = branch([node("Neg", ["x"], ["e"])], {}, "e")
    nodes = [node("If", ["flag"], ["i"], name="I", then_branch=then, else_branch=other), node("Add", ["i", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": w}, inputs=FLAG, shapes={"y": [1, 3]})
    assert measured(path) == [{"w", "|I.then_branch|kept"}]
    result = peers.cli("apply", path, "--to", tmp_path / "out.onnx")
    assert result.exit_code in (0, 2), result.output
    after = tmp_path / "out.onnx" if (tmp_path / "out.onnx").exists() else path
    for flag in (True, False):
        peers.assert_same_outputs(path, after, {"x": X, "flag": np.array(flag)})
    (conditional,) = (one for one in onnx.load(str(after)).graph.node if one.op_type == "If")
    assert [a.g.output[0].name for a in conditional.attribute if a.name == "then_branch"] == ["kept"]


# --- EQ: which values are one, where measured peers differ from each other ------------------------------------------


def test_EQ_1_bit_equal_matrices_beside_scalars_and_rows_of_indices_are_one(tmp_path: Path) -> None:
    # optimum's remove_duplicate_weights raises KeyError as soon as there is a scalar or a row of integers
    weights = {"w1": random(3, 3), "w2": random(3, 3), "scale": np.float32(2), "shape": np.array([1, 3], np.int64)}
    nodes = [node("MatMul", ["x", "w1"], ["a"]), node("MatMul", ["a", "w2"], ["b"]), node("Mul", ["b", "scale"], ["c"])]
    path = write(tmp_path / "m.onnx", [*nodes, node("Reshape", ["c", "shape"], ["y"])], weights)
    assert measured(path) == [{"w1", "w2"}]
    assert "w2" not in initializers(deduplicated(path, {"x": X}))


NEAR = np.float32(1) + np.float32(1e-6)
MINUS_ZERO = np.array([1, -0.0, 2], np.float32)
APART: dict[str, tuple[Any, Any]] = {
    "zero and minus zero": (np.array([1, 0.0, 2], np.float32), MINUS_ZERO),
    "a relative distance of 1e-6": (random(8, 8), random(8, 8) * NEAR),
    "a transpose at a relative distance of 1e-6": (random(8, 5), np.ascontiguousarray((random(8, 5) * NEAR).T)),
    "int64 100001 and 100002": (np.array([100001, 5], np.int64), np.array([100002, 5], np.int64)),
    "int64 5000000000 and 5000040000": (np.array([5 * 10**9, 5], np.int64), np.array([5000040000, 5], np.int64)),
    "biases of 1e-9 and minus 1e-9": (np.array([1e-9, 2e-9], np.float32), np.array([-1e-9, -2e-9], np.float32)),
    "equal in the first 100 elements": (np.arange(200, dtype="f4"), np.r_[np.arange(199), 0].astype("f4")),
}


@pytest.mark.parametrize("case", APART)
def test_EQ_2_what_is_only_nearly_equal_is_kept_apart(case: str, tmp_path: Path) -> None:
    # onnxoptimizer and OnnxSlim merge the zeros, ONNX Runtime's Python pass all but the last, coremltools the near ones
    path = pair(tmp_path / "m.onnx", *APART[case])
    assert measured(path) == []
    assert peers.nothing_to_do(path)


@pytest.mark.parametrize(("payload", "one"), [(0x7FC00001, True), (0x7FC00002, False)])
def test_EQ_3_a_nan_equals_the_same_payload_and_no_other(tmp_path: Path, payload: int, one: bool) -> None:
    # most peers compare numbers, and NaN never equals itself
    first, second = random(4, 4), random(4, 4)
    first.view(np.uint32)[1, 1], second.view(np.uint32)[1, 1] = 0x7FC00001, payload
    path = pair(tmp_path / "m.onnx", first, second)
    assert measured(path) == ([{"w1", "w2"}] if one else [])


def test_EQ_4_a_transposed_copy_is_one_value_without_asking_the_live_model(tmp_path: Path) -> None:
    table = random(40, 7)
    path = pair(tmp_path / "m.onnx", table, np.ascontiguousarray(table.T))
    (tie,) = found(path).ties
    assert tie.members[1].view == TRANSPOSED
    assert tie.n_bytes_saved == 40 * 7 * 4


# --- EXT: external data --------------------------------------------------------------------------------------------


def aliased(path: Path) -> Path:
    """Two initializers on one byte range of the data file."""
    table = random(40, 16)
    nodes = [node("Gather", ["embed", "ids"], ["e"]), node("Gemm", ["e", "head"], ["y"], transB=1)]
    write(path, nodes, {"embed": table, "head": table}, inputs={"ids": (INT64, ["n"])})
    made = onnx.load(str(path))
    (path.parent / "data.bin").write_bytes(table.tobytes())
    for tensor in made.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "data.bin"), ("offset", "0"), ("length", str(table.nbytes))):
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(made.SerializeToString())
    return path


def test_EXT_1_two_names_of_one_range_are_a_tie_that_a_plain_save_doubles(tmp_path: Path) -> None:
    path = aliased(tmp_path / "m.onnx")
    assert (shared(path), measured(path)) == ([{"embed", "head"}], [])
    assert codes(path) == ["TIE204"]
    assert scan(load_one(path)).summary.n_bytes == 40 * 16 * 4
    # what onnx.load and onnx.save make of it: two copies
    onnx.save(onnx.load(str(path)), str(tmp_path / "again.onnx"), save_as_external_data=True, size_threshold=0)
    assert measured(tmp_path / "again.onnx") == [{"embed", "head"}]


def test_EXT_2_the_repaired_file_survives_a_plain_load_and_save(tmp_path: Path) -> None:
    path = aliased(tmp_path / "m.onnx")
    to = peers.applied(path)
    peers.assert_same_outputs(path, to, {"ids": np.array([0, 39, 7])})
    onnx.save(onnx.load(str(to)), str(tmp_path / "again.onnx"))
    assert (measured(tmp_path / "again.onnx"), shared(tmp_path / "again.onnx")) == ([], [{"embed"}])


# --- FOLD: which spelling of a tie a runtime folds into two copies ---------------------------------------------------

LOOKUP = node("Gather", ["E", "ids"], ["h"])
TURN = node("Transpose", ["E"], ["T"], perm=[1, 0])
ACROSS = [node("Gather", ["E", "ids"], ["g"], axis=1), node("Transpose", ["g"], ["h"], perm=[1, 0])]
HEAD = node("MatMul", ["h", "E"], ["y"])
FUSED = node("FusedMatMul", ["h", "E"], ["y"], domain="com.microsoft", transB=1)
SPELLINGS: dict[str, tuple[list[onnx.NodeProto], bool]] = {
    "Transpose then MatMul": ([LOOKUP, TURN, node("MatMul", ["h", "T"], ["y"])], True),
    "Transpose then Gather": ([TURN, node("Gather", ["T", "ids"], ["h"]), HEAD], True),
    "Gemm transB": ([LOOKUP, node("Gemm", ["h", "E"], ["y"], transB=1)], False),
    "FusedMatMul transB": ([LOOKUP, FUSED], False),
    "Gather along axis 1": ([*ACROSS, HEAD], False),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_FOLD_a_tie_is_foldable_exactly_where_onnx_runtime_stores_it_twice(spelling: str, tmp_path: Path) -> None:
    nodes, foldable = SPELLINGS[spelling]
    turned = spelling in ("Transpose then Gather", "Gather along axis 1")
    table = random(8, 60) if turned else random(60, 8)
    path = write(tmp_path / "m.onnx", nodes, {"E": table}, inputs={"ids": (INT64, ["n"])}, shapes={"y": ["n", 60]})
    cases.run(path, {"ids": IDS[0]}, 99, tmp_path / "optimised.onnx")
    assert cases.n_large_copies(tmp_path / "optimised.onnx", 480) == (2 if foldable else 1)
    assert codes(path) == (["TIE301"] if foldable else [])
    assert peers.nothing_to_do(path) is not foldable
