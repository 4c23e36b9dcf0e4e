"""The law of a shared transposed pair: the same outputs, one stored copy, at every level of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_cases import TYPES, D, V, model_of, n_large_copies, node, rewritten, run, saved, table, tensor, tie, value

LEVELS = {"disable": 0, "basic": 1, "extended": 2, "all": 99}
IDS = np.array([[1, 5, 0], [V - 1, -1, -V]], np.int64)


def inner_nodes(follows: str, kind: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """ids → lookup → what follows → head → y."""
    dtype = {1: "float32", 10: "float16", 16: "bfloat16"}[kind]
    nodes = [node("Gather", ["E", "ids"], ["x"])]
    if follows == "norm":
        nodes.append(node("LayerNormalization", ["x", "scale"], ["h"], axis=-1))
        extra = [tensor("scale", table(dtype, 3, (1, D))[0])]
    else:
        nodes.append(node("MatMul", ["x", "P"], ["h"]))
        extra = [tensor("P", table(dtype, 4, (D, D)))]
    return [*nodes, node("MatMul", ["h", "W"], ["y"])], extra


def lost_tie(dtype: str, place: str, follows: str) -> onnx.ModelProto:
    """A lookup table E [V,d] and a head W = Eᵀ, in the main graph, an If branch or a Loop body."""
    kind = TYPES[dtype]
    nodes, tensors = inner_nodes(follows, kind)
    tensors += [tensor("E", table(dtype)), tensor("W", table(dtype).T)]
    ids = value("ids", TensorProto.INT64, ["b", "t"])
    y = value("y", kind, ["b", "t", V])
    if place == "main":
        return model_of(nodes, [ids], [y], tensors)
    condition = value("c", TensorProto.BOOL, [])
    result = value("out", kind, ["n0", "n1", V] if place == "if" else ["n", "n0", "n1", V])
    if place == "if":
        then = onnx.helper.make_graph(nodes, "then", [], [value("y", kind, None)], tensors)
        zero = tensor("z", np.zeros((1, 1, V), table(dtype).dtype))
        other = onnx.helper.make_graph([node("Identity", ["z"], ["o"])], "else", [], [value("o", kind, None)], [zero])
        branch = node("If", ["c"], ["out"], name="branch", then_branch=then, else_branch=other)
        return model_of([branch], [ids, condition], [result])
    body = onnx.helper.make_graph(
        [*nodes, node("Identity", ["on"], ["go"])], "body",
        [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, [])],
        [value("go", TensorProto.BOOL, []), value("y", kind, None)], tensors,
    )  # fmt: skip
    loop = node("Loop", ["n", "c"], ["out"], name="loop", body=body)
    return model_of([loop], [ids, condition, value("n", TensorProto.INT64, [])], [result])


def feeds(place: str) -> dict[str, Any]:
    more = {"main": {}, "if": {"c": np.array(True)}, "loop": {"c": np.array(True), "n": np.array(2)}}
    return {"ids": IDS, **more[place]}


SCOPES = {"main": "", "if": "branch.then_branch", "loop": "loop.body"}


def ids_of(place: str) -> tuple[str, str]:
    scope = SCOPES[place]
    return ("E", "W") if not scope else (f"|{scope}|E", f"|{scope}|W")


@pytest.mark.parametrize("style", ["auto", "gather", "fused"])
@pytest.mark.parametrize("follows", ["norm", "matmul"])
@pytest.mark.parametrize("place", list(SCOPES))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_outputs_stay_at_every_level(dtype: str, place: str, follows: str, style: str, tmp_path: Path) -> None:
    proto = lost_tie(dtype, place, follows)
    embedding, head = ids_of(place)
    model = saved(proto, tmp_path / "in")
    written, again, _ = rewritten(model, tmp_path / "out", tie(embedding, head, turned=[head]), transposed_as=style)
    expected_pattern = {"auto": "matmul_to_gemm", "gather": "gather_axis1", "fused": "matmul_to_fused"}[style]
    assert [item.pattern for item in written.rewritten] == [expected_pattern]
    assert dict(written.renamed) == ({embedding: head} if style == "gather" else {head: embedding})
    assert sum(weight.n_elements == V * D for weight in again.weights) == 1
    before = run(proto, feeds(place))[0]
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    for level in LEVELS.values():
        after = run(tmp_path / "out" / "model.onnx", feeds(place), level)[0]
        np.testing.assert_allclose(after.astype(np.float32), before.astype(np.float32), atol=tolerance, rtol=tolerance)
        if style == "gather" and level == 0:
            assert after.tobytes() == before.tobytes()


@pytest.mark.parametrize("style", ["auto", "gather", "fused"])
@pytest.mark.parametrize("follows", ["norm", "matmul"])
def test_the_runtime_keeps_one_copy_where_it_would_fold_a_transpose(follows: str, style: str, tmp_path: Path) -> None:
    model = saved(lost_tie("float32", "main", follows), tmp_path / "in")
    rewritten(model, tmp_path / "out", tie("E", "W", turned=["W"]), transposed_as=style)
    kept = tmp_path / "optimised.onnx"
    run(tmp_path / "out" / "model.onnx", feeds("main"), 2, kept)
    assert n_large_copies(kept) == 1
    run(tmp_path / "out" / "model.onnx", feeds("main"), 99, tmp_path / "all.onnx")
    assert n_large_copies(tmp_path / "all.onnx") == 1


@pytest.mark.parametrize("style", ["auto", "gather"])
@pytest.mark.parametrize("place", list(SCOPES))
def test_bfloat16_agrees_with_the_reference_evaluator(place: str, style: str, tmp_path: Path) -> None:
    # ONNX Runtime's CPU provider has no bfloat16 MatMul; onnx's own evaluator has, in the main graph and in bodies
    from onnx.reference import ReferenceEvaluator

    proto = lost_tie("bfloat16", place, "matmul")
    embedding, head = ids_of(place)
    model = saved(proto, tmp_path / "in")
    _, again, after = rewritten(model, tmp_path / "out", tie(embedding, head, turned=[head]), transposed_as=style)
    assert sum(weight.n_elements == V * D for weight in again.weights) == 1
    one, other = (np.asarray(ReferenceEvaluator(item).run(None, feeds(place))[0]) for item in (proto, after))
    np.testing.assert_allclose(other.astype(np.float32), one.astype(np.float32), atol=2e-2)


@pytest.mark.parametrize("external", [False, True])
def test_unnamed_weights_keep_their_bytes(external: bool, tmp_path: Path) -> None:
    proto = lost_tie("float32", "main", "matmul")
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0} if external else {}
    model = saved(proto, tmp_path / "in", **options)
    _, again, after = rewritten(model, tmp_path / "out", tie("E", "W", turned=["W"]))
    # E: 96 × 16 × 4 = 6144 bytes, P: 16 × 16 × 4 = 1024; W's 6144 are gone (13312 would be all three)
    if external:
        assert (tmp_path / "out" / "w.bin").stat().st_size == 6144 + 1024
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "w.bin"]
    for name, values in (("E", table()), ("P", table("float32", 4, (D, D)))):
        stored = next(item for item in after.graph.initializer if item.name == name)
        assert onnx.numpy_helper.to_array(stored).tobytes() == values.tobytes()
        storage = again.by_id[name].storage
        assert storage is not None
        assert storage.read_ranges([(0, storage.n_bytes)])[0] == values.tobytes()
