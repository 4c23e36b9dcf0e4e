"""Pooled heads: fewer are stored, all are seen, and equal ones cost nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_cases import NUMPY, TYPES, model_of, node, plan, rewritten, run, saved, tensor, value
from verify_cases import broken

from tieaudit.change import Plan, Pool, Pooled, Written
from tieaudit.cli import main
from tieaudit.formats.onnx.pool import plan_of
from tieaudit.model import Model
from tieaudit.pooling import PooledStorage, pooled, repeated
from tieaudit.storage import MemoryStorage
from tieaudit.verify import prove

V, D, HEADS, SIZE = 40, 24, 4, 6
IDS = np.array([[1, 5, 0], [V - 1, 2, 7]], np.int64)


def matrix(dtype: str, seed: int, *shape: int) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(NUMPY[dtype])


def same_heads(weight: Any) -> Any:
    """The heads of each pair are equal."""
    heads = weight.reshape(*weight.shape[:-1], HEADS // 2, 2, -1)
    heads[..., 1, :] = heads[..., 0, :]
    return heads.reshape(weight.shape)


def attention(
    dtype: str = "float32", *, bias: bool = True, shape: str = "computed", gemm: bool = False, equal: bool = False,
    change: Any = None, **options: Any,
) -> onnx.ModelProto:  # fmt: skip
    """One layer of attention as exporters write it: ids → embedding → q, k, v → heads → scores → o → logits."""
    kind = TYPES[dtype]
    nodes = [node("Gather", ["E", "input_ids"], ["x"])]
    tensors = [tensor("E", matrix(dtype, 0, V, D)), tensor("o.weight", matrix(dtype, 9, D, D))]
    tensors += [tensor("head.weight", matrix(dtype, 8, D, V))]
    nodes += [node("Shape", ["x"], ["dims"])]
    if shape == "computed":
        nodes += [node("Gather", ["dims", name], [f"n_{name}"]) for name in ("zero", "one")]
        nodes += [node("Unsqueeze", [f"n_{name}", "axes"], [f"u_{name}"]) for name in ("zero", "one")]
        tensors += [onnx.helper.make_tensor(name, 7, [], [at]) for at, name in enumerate(("zero", "one"))]
        tensors.append(tensor("axes", np.array([0])))
        tensors += [tensor("n_heads", np.array([HEADS])), tensor("size", np.array([SIZE]))]
        nodes += [node("Concat", ["u_zero", "u_one", "n_heads", "size"], ["target"], axis=0)]
    else:
        tensors.append(tensor("target", np.array([0, 0, HEADS if shape == "constant" else -1, SIZE])))
    for number, name in enumerate("qkv"):
        weight, vector = matrix(dtype, number + 1, D, HEADS * SIZE), matrix(dtype, number + 4, HEADS * SIZE)
        if equal and name != "q":
            weight, vector = same_heads(weight), same_heads(vector)
        tensors.append(tensor(f"{name}.weight", weight.T if gemm else weight))
        made = f"{name}_flat"
        if gemm:
            tensors.append(tensor(f"{name}.bias", vector))
            nodes += [node("Reshape", ["x", "rows"], [f"{name}_rows"])]
            nodes += [node("Gemm", [f"{name}_rows", f"{name}.weight", f"{name}.bias"], [f"{name}_2d"], transB=1)]
            nodes += [node("Reshape", [f"{name}_2d", "back"], [made])]
        elif bias:
            tensors.append(tensor(f"{name}.bias", vector))
            nodes += [node("MatMul", ["x", f"{name}.weight"], [f"{name}_raw"])]
            nodes += [node("Add", [f"{name}.bias", f"{name}_raw"], [made])]
        else:
            nodes += [node("MatMul", ["x", f"{name}.weight"], [made])]
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes += [node("Reshape", [made, "target"], [f"{name}_cut"])]
        nodes += [node("Transpose", [f"{name}_cut"], [f"{name}_heads"], perm=perm)]
    if gemm:
        tensors += [tensor("rows", np.array([-1, D]))]
        nodes.insert(2, node("Concat", ["front", "wide"], ["back"], axis=0))
        nodes.insert(2, node("Slice", ["dims", "begin", "end"], ["front"]))
        tensors += [tensor("begin", np.array([0])), tensor("end", np.array([2])), tensor("wide", np.array([D]))]
    nodes += [
        node("MatMul", ["q_heads", "k_heads"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v_heads"], ["mixed"]),
        node("Transpose", ["mixed"], ["mixed_t"], perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed_t", "flat"], ["mixed_flat"]),
        node("MatMul", ["mixed_flat", "o.weight"], ["attended"]),
        node("MatMul", ["attended", "head.weight"], ["logits"]),
    ]
    tensors.append(tensor("flat", np.array([0, 0, D])))
    if change is not None:
        change(nodes, tensors)
    return model_of(
        nodes, [value("input_ids", 7, ["b", "t"])], [value("logits", kind, ["b", "t", V])], tensors, **options
    )


def pooled_by_hand(proto: onnx.ModelProto, groups: int) -> onnx.ModelProto:
    """The original with each key and value head replaced by the mean of its group, by plain loops."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for one in made.graph.initializer:
        if one.name in ("k.weight", "v.weight", "k.bias", "v.bias"):
            values = onnx.numpy_helper.to_array(one)
            gemm = (
                one.dims[0] == HEADS * SIZE and len(one.dims) == 2 and any(n.op_type == "Gemm" for n in made.graph.node)
            )
            heads = values.T if gemm else values
            found = heads.astype(np.float64)
            for head in range(HEADS):
                group = head * groups // HEADS
                mine = [h for h in range(HEADS) if h * groups // HEADS == group]
                mean = sum(heads[..., h * SIZE : (h + 1) * SIZE].astype(np.float64) for h in mine) / len(mine)
                found[..., head * SIZE : (head + 1) * SIZE] = mean
            found = found.astype(values.dtype)
            one.CopyFrom(tensor(one.name, found.T if gemm else found))
    return made


def command(*words: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.stdout


def applied(proto: onnx.ModelProto, folder: Path, scheme: str) -> tuple[Any, Path]:
    folder.mkdir(exist_ok=True)
    onnx.save(proto, str(folder / "m.onnx"))
    out = folder / "out.onnx"
    code, said = command(
        "apply", folder / "m.onnx", "--scheme", scheme, "--allow-lossy", "--to", out, "--format", "json"
    )
    assert code == 0, said
    return json.loads(said), out


@pytest.mark.parametrize(
    ("scheme", "groups", "bias", "gemm", "shape"),
    [
        ("gqa:2", 2, True, False, "computed"),
        ("mqa", 1, False, False, "constant"),
        ("gqa:2", 2, True, True, "computed"),
        ("mqa", 1, True, False, "minus one"),
    ],
)
def test_the_outputs_are_those_of_the_original_with_pooled_heads(
    scheme: str, groups: int, bias: bool, gemm: bool, shape: str, tmp_path: Path
) -> None:
    proto = attention(bias=bias, gemm=gemm, shape=shape)
    said, out = applied(proto, tmp_path, scheme)
    assert {one["outcome"] for one in said["proof"]["levels"]} == {"held"}
    # k and v, each [D, heads · size] and perhaps a bias: of it 1 − G/heads goes, 4 bytes a number
    gone = 2 * (D + bias) * (HEADS - groups) * SIZE
    assert said["plan"]["n_bytes_saved"] == gone * 4
    sizes = {one.name: list(one.dims) for one in onnx.load(str(out)).graph.initializer}
    assert sizes["k.weight"] == sizes["v.weight"] == ([groups * SIZE, D] if gemm else [D, groups * SIZE])
    assert sizes["q.weight"] == [D, D]
    expected, found = (run(one, {"input_ids": IDS})[0] for one in (pooled_by_hand(proto, groups), out))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(found - run(proto, {"input_ids": IDS})[0]).max() > 1e-3  # pooling changed something
    onnx.shape_inference.infer_shapes(onnx.load(str(out)), check_type=True, strict_mode=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_heads_cost_nothing_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    proto = attention(dtype, equal=True)
    said, out = applied(proto, tmp_path, "gqa:2")
    assert said["plan"]["n_bytes_saved"] > 0
    kept = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(out)).graph.initializer}
    before = {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}
    for name in ("k.weight", "v.weight", "k.bias", "v.bias"):
        heads = kept[name].reshape(*kept[name].shape[:-1], 2, 1, SIZE)
        wide = np.concatenate([heads, heads], axis=-2).reshape(before[name].shape)
        assert wide.tobytes() == before[name].tobytes()
    expected, found = (run(one, {"input_ids": IDS})[0] for one in (proto, out))
    np.testing.assert_allclose(
        found.astype(np.float32), expected.astype(np.float32), atol=1e-6 if dtype == "float32" else 2e-3
    )
    assert said["proof"]["drift"] <= (1e-6 if dtype == "float32" else 2e-3)


@pytest.mark.parametrize(("axis", "shape"), [(1, (5, 12)), (0, (12, 5)), (0, (12,))])
@pytest.mark.parametrize(("n_heads", "groups"), [(6, 2), (6, 3), (3, 1), (4, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_any_range_of_pooled_heads_is_numpys(
    dtype: str, n_heads: int, groups: int, axis: int, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(NUMPY.get(dtype, np.float64))
    whole = pooled(values, axis, n_heads, groups)
    size = 12 // n_heads
    heads = np.moveaxis(values, axis, 0).astype(np.float64).reshape(n_heads, size, -1)
    for group in range(groups):
        mine = [heads[h] for h in range(n_heads) if h * groups // n_heads == group]
        expected = np.mean(mine, axis=0).astype(values.dtype)
        found = np.moveaxis(whole, axis, 0).reshape(groups, size, -1)[group]
        assert np.allclose(
            found.astype(np.float64), expected.astype(np.float64), rtol=1e-2 if dtype == "bfloat16" else 1e-3
        )
    storage = PooledStorage(MemoryStorage(values.tobytes(), "w"), shape, dtype, axis, n_heads, groups)
    assert storage.read_ranges([(0, storage.n_bytes)])[0] == whole.tobytes()
    assert storage.n_bytes == whole.nbytes
    for begin, length in ((0, 0), (1, 3), (whole.nbytes // 2, whole.nbytes - whole.nbytes // 2), (3, 5)):
        assert storage.read_ranges([(begin, length)])[0] == whole.tobytes()[begin : begin + length]
    wide = np.moveaxis(repeated(whole, axis, n_heads, groups), axis, 0).reshape(n_heads, size, -1)
    small = np.moveaxis(whole, axis, 0).reshape(groups, size, -1)
    assert all(np.array_equal(wide[h], small[h * groups // n_heads]) for h in range(n_heads))


def test_three_equal_heads_give_their_own_numbers() -> None:
    # 0.1 + 0.1 + 0.1 is not 3 · 0.1 in float64
    assert pooled(np.array([0.1, 0.1, 0.1]), 0, 3, 1).tolist() == [0.1]


# ---------------------------------------------------------------- refusals


def reason(proto: onnx.ModelProto, tmp_path: Path, groups: int = 2, id: str = "k.weight") -> str:
    found = plan_of(saved(proto, tmp_path), id, groups)
    return found if isinstance(found, str) else "possible"


def test_groups_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    assert reason(attention(), tmp_path, 3) == "k.weight has 4 heads, which 3 groups do not divide"
    assert reason(attention(), tmp_path, 4) == "k.weight has 4 heads, no more than the 4 asked for"
    assert reason(attention(), tmp_path, 8) == "k.weight has 4 heads, no more than the 8 asked for"


def test_heads_that_the_graph_does_not_tell_are_refused(tmp_path: Path) -> None:
    def normalise(nodes: list[onnx.NodeProto], tensors: list[Any]) -> None:
        at = next(index for index, one in enumerate(nodes) if one.output[0] == "k_cut")
        nodes[at].input[0] = "k_normed"
        nodes.insert(at, node("LpNormalization", ["k_flat"], ["k_normed"]))

    assert reason(attention(change=normalise), tmp_path / "a") == (
        "the heads of k.weight cannot be pooled: 'k_normed' (LpNormalization) reads its result before any Reshape "
        "tells the heads apart"
    )

    def five(nodes: list[onnx.NodeProto], tensors: list[Any]) -> None:
        at = next(index for index, one in enumerate(nodes) if one.output[0] == "k_cut")
        nodes[at].input[1] = "pairs"
        nodes.insert(at + 1, node("Reshape", ["k_cut", "target"], ["k_again"]))
        nodes[at + 2].input[0] = "k_again"
        tensors.append(tensor("pairs", np.array([0, 0, HEADS, 2, SIZE // 2])))

    assert "does not cut its result into heads" in reason(attention(change=five), tmp_path / "b")

    def twice(nodes: list[onnx.NodeProto], tensors: list[Any]) -> None:
        next(one for one in nodes if one.output[0] == "v_raw").input[1] = "k.weight"

    assert "2 operations read it, expected one product" in reason(attention(change=twice), tmp_path / "c")

    def bias_twice(nodes: list[onnx.NodeProto], tensors: list[Any]) -> None:
        next(one for one in nodes if one.output[0] == "v_flat").input[0] = "k.bias"

    assert "its bias 'k.bias' is read by other operations too" in reason(attention(change=bias_twice), tmp_path / "d")


def test_without_leave_nothing_is_pooled_and_other_formats_say_why(tmp_path: Path) -> None:
    onnx.save(attention(), str(tmp_path / "m.onnx"))
    code, said = command("plan", tmp_path / "m.onnx", "--scheme", "gqa:2")
    assert code == 2 and "4 heads would become 2, each the mean of 2" in said
    code, said = command("plan", tmp_path / "m.onnx", "--scheme", "gqa:2", "--allow-lossy", "--merge", "keep:first")
    assert code == 2 and "--merge keep:first: heads are pooled by their mean" in said
    for text in ("gqa", "gqa:0", "gqa:x", "mqa:2"):
        assert command("plan", tmp_path / "m.onnx", "--scheme", text)[0] == 2
    torch = pytest.importorskip("torch")
    names = [f"model.layers.0.self_attn.{one}_proj.weight" for one in "qkvo"]
    torch.save({name: torch.zeros(D, D) for name in names}, tmp_path / "m.pt")
    code, said = command("plan", tmp_path / "m.pt", "--scheme", "mqa", "--allow-lossy")
    assert code == 2 and "a checkpoint says nowhere how many heads there are" in said


# ---------------------------------------------------------------- proofs that can fail


def case(tmp_path: Path) -> tuple[Model, Model, Plan, Written]:
    model = saved(attention(), tmp_path / "in")
    edit = plan_of(model, "k.weight", 2)
    assert edit == Pool((Pooled("k.weight", 1), Pooled("k.bias", 0)), 4, 2, "4 heads behind k_flat")
    written, again, _ = rewritten(model, tmp_path / "out", edit, lossless=False)
    return model, again, plan(model, edit, lossless=False), written


def test_a_pooled_head_with_other_bytes_fails_the_structural_proof(tmp_path: Path) -> None:
    before, after, planned, written = case(tmp_path)

    def damage(proto: onnx.ModelProto) -> None:
        found = next(one for one in proto.graph.initializer if one.name == "k.weight")
        found.raw_data = found.raw_data[:-4] + b"\0\0\0\0"

    assert [one.outcome for one in prove(before, after, planned, written).levels] == ["held"] * 3
    level = prove(before, after, planned, replace(written, repeated=())).levels[0]
    assert "MatMul @ k_raw (input 1): expected its heads repeated, they are not" in level.because
    level = prove(before, broken(after, damage), planned, written).levels[0]
    assert (level.outcome, level.because) == ("failed", "k.weight: its bytes are not the means of its heads")


def test_heads_repeated_in_another_order_fail_the_regional_proof(tmp_path: Path) -> None:
    before, after, planned, written = case(tmp_path)

    def damage(proto: onnx.ModelProto) -> None:
        for one in proto.graph.node:
            if one.op_type == "Constant" and list(onnx.numpy_helper.to_array(one.attribute[0].t)) == [-1, 2, 1, SIZE]:
                one.attribute[0].t.CopyFrom(tensor("", np.array([-1, 1, 2, SIZE])))
            elif one.op_type == "Constant" and list(onnx.numpy_helper.to_array(one.attribute[0].t)) == [1, 1, 2, 1]:
                one.attribute[0].t.CopyFrom(tensor("", np.array([1, 2, 1, 1])))

    levels = prove(before, broken(after, damage), planned, written).levels
    assert [level.outcome for level in levels[:2]] == ["held", "failed"]
