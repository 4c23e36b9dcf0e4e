"""Every allowed graph edit by itself: a consumer of W that must read Wᵀ gives what it gave before."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_cases import model_of, node, rewritten, run, saved, table, tensor, tie, value

from tieaudit.change import Share
from tieaudit.find import find
from tieaudit.formats.onnx.edit import can_realise
from tieaudit.formats.onnx.patterns import ALLOWED

F, I64 = TensorProto.FLOAT, TensorProto.INT64
R, C = 24, 8  # rows and columns of W
MS = {"domain": "com.microsoft"}


def pinned(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    rank: int,
    extra: Sequence[Any] = (),
    dtype: str = "float32",
    **more: Any,
) -> onnx.ModelProto:
    """W [R,C] beside its transpose E, whose consumer (Neg) has no other form: so W's consumers must change."""
    kind = {"float32": F, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}[dtype]
    values = table(shape=(R, C)).astype(dtype)
    tensors = [tensor("E", values.T), tensor("W", values), *extra]
    outputs = [value("pin", kind, [C, R]), value("y", kind, [f"y{i}" for i in range(rank)])]
    return model_of([node("Neg", ["E"], ["pin"]), *nodes], inputs, outputs, tensors, **more)


def check(proto: onnx.ModelProto, folder: Path, pattern: str, *feeds: dict[str, Any], **more: Any) -> onnx.ModelProto:
    """Edit, and compare the outputs for each feed; only this pattern may have been used."""
    model = saved(proto, folder / "in")
    written, again, after = rewritten(model, folder / "out", tie("E", "W", turned=["W"]), **more)
    assert {item.pattern for item in written.rewritten} == {pattern}
    assert dict(written.renamed) == {"W": "E"}
    assert "W" not in again.by_id
    for feed in feeds:
        for one, other in zip(run(proto, feed), run(after, feed), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(other, one, atol=1e-5 if one.dtype != np.float16 else 5e-3)
    return after


def x(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("already", [0, 1])
@pytest.mark.parametrize("slot", [0, 1])
def test_gemm_toggles_its_flag_in_either_slot(slot: int, already: int, tmp_path: Path) -> None:
    flag = "transB" if slot else "transA"
    inner = (C if already else R) if slot else (R if already else C)
    other = (5, inner) if slot else (inner, 5)
    inputs = ["x", "W"] if slot else ["W", "x"]
    proto = pinned([node("Gemm", inputs, ["y"], alpha=0.5, **{flag: already})], [value("x", F, other)], 2)
    after = check(proto, tmp_path, "gemm_flip", {"x": x(*other)})
    flags = {item.name: item.i for item in after.graph.node[-1].attribute if item.name != "alpha"}
    assert flags == {flag: 1 - already}


def test_gemm_with_one_weight_in_both_slots(tmp_path: Path) -> None:
    proto = pinned([node("Gemm", ["W", "W"], ["y"], transB=1)], [], 2)
    after = check(proto, tmp_path, "gemm_flip", {})
    assert list(after.graph.node[-1].input) == ["E", "E"]


@pytest.mark.parametrize("slot", [0, 1])
def test_fusedmatmul_toggles_its_flag(slot: int, tmp_path: Path) -> None:
    inputs, shape = (["x", "W"], (2, 3, R)) if slot else (["W", "x"], (2, C, 3))
    fused = node("FusedMatMul", inputs, ["y"], alpha=2.0, **MS)
    check(pinned([fused], [value("x", F, shape)], 3), tmp_path, "fusedmatmul_flip", {"x": x(*shape)})


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 14, 15, 18, 21])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_matmul_becomes_a_gemm_in_every_operator_set(rank: int, opset: int, tmp_path: Path) -> None:
    shape = (2, 4, 3, R)[-rank:]
    names = [*[f"n{i}" for i in range(rank - 1)], R]
    proto = pinned([node("MatMul", ["x", "W"], ["y"])], [value("x", F, names)], rank, opset=opset, ir_version=8)
    check(proto, tmp_path, "matmul_to_gemm", {"x": x(*shape)}, {"x": x(*(1,) * (rank - 1), R)})


@pytest.mark.parametrize("shape", [(0, 4, R), (2, 0, R)])
def test_matmul_on_an_empty_batch_keeps_its_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    # without allowzero the second shape would become (2, R, …): a 0 in Reshape means "as the input's axis"
    proto = pinned([node("MatMul", ["x", "W"], ["y"])], [value("x", F, ["b", "t", R])], 3)
    check(proto, tmp_path, "matmul_to_gemm", {"x": x(*shape)})


def test_matmul_of_unknown_rank(tmp_path: Path) -> None:
    # a runtime Reshape hides the rank from shape inference
    nodes = [node("Reshape", ["x", "s"], ["r"]), node("MatMul", ["r", "W"], ["y"])]
    proto = pinned(nodes, [value("x", F, ["n"]), value("s", I64, ["k"])], 3)
    feed = {"x": x(2 * 3 * R), "s": np.array([2, 3, R])}
    check(proto, tmp_path, "matmul_to_gemm", feed)


def test_left_factor_of_a_matrix_product(tmp_path: Path) -> None:
    proto = pinned([node("MatMul", ["W", "x"], ["y"])], [value("x", F, [C, "n"])], 2)
    check(proto, tmp_path, "matmul_to_gemm", {"x": x(C, 5)})


def test_left_factor_of_a_stack_of_matrices_is_refused(tmp_path: Path) -> None:
    proto = pinned([node("MatMul", ["W", "x"], ["y"])], [value("x", F, ["b", C, "n"])], 3)
    reason = can_realise(saved(proto, tmp_path), tie("E", "W", turned=["W"]), "ort-cpu")
    assert reason is not None
    assert "left factor" in reason


def test_left_factor_of_a_stack_where_the_runtime_s_domain_is_imported(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["W", "x"], ["h"]), node("Gelu", ["h"], ["y"], **MS)]
    proto = pinned(nodes, [value("x", F, ["b", C, "n"])], 3)
    check(proto, tmp_path, "matmul_to_fused", {"x": x(2, C, 5)})


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_matmul_in_other_types(dtype: str, tmp_path: Path) -> None:
    kind = {"float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16}[dtype]
    for opset in (10, 18):
        proto = pinned([node("MatMul", ["x", "W"], ["y"])], [value("x", kind, ["n", "m", R])], 3,
                       dtype=dtype, opset=opset)  # fmt: skip
        check(proto, tmp_path / str(opset), "matmul_to_gemm", {"x": x(2, 3, R).astype(dtype)})


def test_matmul_with_both_factors_one_weight(tmp_path: Path) -> None:
    values = table(shape=(C, C))
    proto = model_of(
        [node("Neg", ["E"], ["pin"]), node("MatMul", ["W", "W"], ["y"])], [],
        [value("pin", F, [C, C]), value("y", F, [C, C])], [tensor("E", values.T), tensor("W", values)],
    )  # fmt: skip
    written, _, after = rewritten(saved(proto, tmp_path / "in"), tmp_path / "out", tie("E", "W", turned=["W"]))
    assert {(item.slot, item.new_slot) for item in written.rewritten} == {(0, 0), (1, 1)}
    np.testing.assert_allclose(run(after, {})[1], values @ values, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_matmul_becomes_a_fused_one_where_asked(rank: int, tmp_path: Path) -> None:
    names = [*[f"n{i}" for i in range(rank - 1)], R]
    proto = pinned([node("MatMul", ["x", "W"], ["y"])], [value("x", F, names)], rank)
    after = check(proto, tmp_path, "matmul_to_fused", {"x": x(*(2, 3, R)[-rank:])}, transposed_as="fused")
    assert {item.domain: item.version for item in after.opset_import}["com.microsoft"] == 1


IDS = {
    "scalar": np.array(5),
    "vector": np.array([0, R - 1, -1, -R]),
    "matrix": np.array([[1, 2, 3], [-2, 0, 7]]),
    "cube": np.array([[[1], [2]]]),
    "empty": np.zeros((2, 0), np.int64),
}


@pytest.mark.parametrize("opset", [7, 11, 13, 14, 18])
@pytest.mark.parametrize("ids", list(IDS))
def test_lookup_goes_along_the_other_axis_bit_for_bit(ids: str, opset: int, tmp_path: Path) -> None:
    # negative ids are legal from operator set 11 on; before 14 Reshape cannot make (2, 0, C) from an empty list
    array = np.asarray(IDS[ids] if opset >= 11 else np.abs(IDS[ids]) % R)
    if ids == "empty" and opset < 14:
        pytest.skip("Reshape has no allowzero before operator set 14")
    names = [f"n{i}" for i in range(array.ndim)]
    proto = pinned([node("Gather", ["W", "ids"], ["y"])], [value("ids", I64, names)], array.ndim + 1,
                   opset=opset, ir_version=8)  # fmt: skip
    after = check(proto, tmp_path, "gather_axis1", {"ids": array})
    for level in (0, 99):
        one, other = run(proto, {"ids": array}, level)[1], run(after, {"ids": array}, level)[1]
        assert one.tobytes() == other.tobytes()
        assert one.shape == other.shape == (*array.shape, C)


@pytest.mark.parametrize("axis", [1, -1, -2])
def test_lookup_along_a_named_axis(axis: int, tmp_path: Path) -> None:
    proto = pinned([node("Gather", ["W", "ids"], ["y"], axis=axis)], [value("ids", TensorProto.INT32, ["a", "b"])], 3)
    check(proto, tmp_path, "gather_axis1", {"ids": np.array([[1, 2, -1], [0, 0, 3]], np.int32)})


def test_transpose_before_the_consumer_disappears(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["W"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    after = check(pinned(nodes, [value("x", F, ["n", C])], 2), tmp_path, "transpose_bypass", {"x": x(3, C)})
    assert [item.op_type for item in after.graph.node] == ["Neg", "MatMul"]


def test_transpose_whose_result_is_an_output_becomes_an_identity(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["W"], ["y"])]
    _, _, after = rewritten(saved(pinned(nodes, [], 2), tmp_path / "in"), tmp_path / "out", tie("E", "W", turned=["W"]))
    assert run(after, {})[1].tobytes() == np.ascontiguousarray(table(shape=(R, C)).T).tobytes()


@pytest.mark.parametrize("equation", ["abr,rc->abc", "abr, rc -> cba", "rc,abr->abc", "kr,rc->k"])
def test_einsum_swaps_its_letters(equation: str, tmp_path: Path) -> None:
    terms = [term.strip() for term in equation.split("->")[0].split(",")]
    result = equation.split("->")[1].strip()
    shape = tuple(R if letter == "r" else 3 for letter in next(term for term in terms if term != "rc"))
    inputs = ["W" if term == "rc" else "x" for term in terms]
    proto = pinned([node("Einsum", inputs, ["y"], equation=equation)], [value("x", F, shape)], len(result))
    check(proto, tmp_path, "einsum_flip", {"x": x(*shape)})


@pytest.mark.parametrize("equation", ["ar,rc", "...r,rc->...c"])
def test_einsum_without_a_named_result_is_refused_or_kept_right(equation: str, tmp_path: Path) -> None:
    proto = pinned([node("Einsum", ["x", "W"], ["y"], equation=equation)], [value("x", F, [3, R])], 2)
    reason = can_realise(saved(proto, tmp_path / "in"), tie("E", "W", turned=["W"]), "ort-cpu")
    if "->" not in equation:
        assert reason is not None
        assert "order of the letters" in reason
    else:
        check(proto, tmp_path, "einsum_flip", {"x": x(3, R)})


def test_identity_and_reshape_to_the_same_shape_are_passed(tmp_path: Path) -> None:
    nodes = [
        node("Identity", ["W"], ["a"]), node("Reshape", ["a", "shape"], ["b"]), node("MatMul", ["x", "b"], ["y"]),
    ]  # fmt: skip
    shape = tensor("shape", np.array([R, -1]))
    after = check(pinned(nodes, [value("x", F, ["n", R])], 2, [shape]), tmp_path, "matmul_to_gemm", {"x": x(3, R)})
    assert [item.op_type for item in after.graph.node] == ["Neg", "Gemm"]


def test_a_cast_on_the_way_is_repeated_once(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["W"], ["w"], to=TensorProto.DOUBLE), node("MatMul", ["x", "w"], ["p"]),
        node("Gather", ["w", "ids"], ["q"]), node("Add", ["p", "q"], ["s"]), node("Cast", ["s"], ["y"], to=F),
    ]  # fmt: skip
    inputs = [value("x", TensorProto.DOUBLE, ["n", R]), value("ids", I64, ["n"])]
    model = saved(pinned(nodes, inputs, 2), tmp_path / "in")
    written, _, after = rewritten(model, tmp_path / "out", tie("E", "W", turned=["W"]))
    assert {item.pattern for item in written.rewritten} == {"matmul_to_gemm", "gather_axis1"}
    assert [item.op_type for item in after.graph.node].count("Cast") == 2  # one of the weight, one of the sum
    feed = {"x": x(3, R).astype(np.float64), "ids": np.array([0, 4, -1])}
    before = run(pinned(nodes, inputs, 2), feed)[1]
    np.testing.assert_allclose(run(after, feed)[1], before, atol=1e-6)


def test_a_consumer_without_another_form_is_refused_by_name(tmp_path: Path) -> None:
    proto = pinned([node("Tanh", ["W"], ["y"], name="odd")], [], 2)
    reason = can_realise(saved(proto, tmp_path), tie("E", "W", turned=["W"]), "ort-cpu")
    assert reason is not None
    assert "'y' (Tanh)" in reason
    assert "'pin' (Neg)" in reason
    assert "no runtime-proof form exists" in reason


def test_integers_are_never_given_to_a_gemm(tmp_path: Path) -> None:
    values = np.arange(R * C).reshape(R, C)
    proto = model_of(
        [node("Neg", ["E"], ["pin"]), node("MatMul", ["x", "W"], ["y"])], [value("x", I64, ["n", R])],
        [value("pin", I64, [C, R]), value("y", I64, ["n", C])], [tensor("E", values.T), tensor("W", values)],
    )  # fmt: skip
    reason = can_realise(saved(proto, tmp_path), tie("E", "W", turned=["W"]), "ort-cpu")
    assert reason is not None
    assert "no runtime has a Gemm" in reason


@pytest.mark.parametrize(("ir_version", "field"), [(9, "doc_string"), (10, "metadata_props")])
def test_new_nodes_say_which_pattern_made_them(ir_version: int, field: str, tmp_path: Path) -> None:
    proto = pinned([node("MatMul", ["x", "W"], ["y"])], [value("x", F, ["b", "n", R])], 3, ir_version=ir_version)
    after = check(proto, tmp_path, "matmul_to_gemm", {"x": x(2, 3, R)})
    for item in after.graph.node[1:]:
        if field == "doc_string":
            assert item.doc_string == "tieaudit.pattern=matmul_to_gemm"
        else:
            assert [(entry.key, entry.value) for entry in item.metadata_props] == [
                ("tieaudit.pattern", "matmul_to_gemm")
            ]


def test_results_inside_the_graph_keep_their_known_type(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "W"], ["h"]), node("Tanh", ["h"], ["y"])]
    after = check(pinned(nodes, [value("x", F, ["b", 3, R])], 3), tmp_path, "matmul_to_gemm", {"x": x(2, 3, R)})
    (kept,) = [item for item in after.graph.value_info if item.name == "h"]
    assert [axis.dim_param or axis.dim_value for axis in kept.type.tensor_type.shape.dim] == ["b", 3, C]


@pytest.mark.parametrize("ids", list(IDS))
@pytest.mark.parametrize("scale", ["float32", "float16"])
def test_packed_lookup_reads_the_codes_of_a_product_bit_for_bit(ids: str, scale: str, tmp_path: Path) -> None:
    rows, columns, block = R, 64, 16
    codes = np.random.default_rng(0).integers(0, 256, (rows, columns // 2), np.uint8)
    scales = (np.random.default_rng(1).random((rows, columns // block)) + 0.1).astype(scale)
    feed = IDS[ids]
    kind = F if scale == "float32" else TensorProto.FLOAT16
    nodes = [
        node("GatherBlockQuantized", ["E", "ids", "s"], ["y"], bits=4, block_size=block, **MS),
        node("MatMulNBits", ["x", "H", "s"], ["z"], K=columns, N=rows, bits=4, block_size=block, **MS),
    ]
    inputs = [value("ids", I64, [f"i{n}" for n in range(feed.ndim)]), value("x", kind, [1, columns])]
    outputs = [value("y", kind, [f"y{n}" for n in range(feed.ndim + 1)]), value("z", kind, [1, rows])]
    tensors = [tensor("E", codes), tensor("H", codes.reshape(rows, columns // block, -1)), tensor("s", scales)]
    proto = model_of(nodes, inputs, outputs, tensors, check=False)
    model = saved(proto, tmp_path / "in")
    (found,) = [one for one in find(model).ties if set(one.ids) == {"E", "H"}]
    written, again, after = rewritten(model, tmp_path / "out", Share(found.members))
    assert ({item.pattern for item in written.rewritten}, dict(written.renamed)) == ({"packed_lookup"}, {"E": "H"})
    assert "E" not in again.by_id
    feeds = {"ids": feed, "x": np.ones((1, columns), scale)}
    for level in (0, 99):
        for one, other in zip(run(proto, feeds, level), run(after, feeds, level), strict=True):
            assert one.shape == other.shape
            assert (one == other).all()


def test_every_allowed_pattern_has_its_law_test() -> None:
    """`check` asserts that the pattern a test names is the one that was used; here, that each one is named."""
    named = {one.value for one in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(one, ast.Constant)}
    assert set(ALLOWED) <= named
