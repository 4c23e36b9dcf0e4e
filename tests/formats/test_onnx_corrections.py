"""The law of a correction: each member reads the common value adjusted, by ordinary operations and no second table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_cases import (
    NUMPY,
    TYPES,
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
from verify_cases import broken, language_model

from tieaudit.adjusting import adjusted
from tieaudit.change import Adjustment, Plan, Share, Written
from tieaudit.cli import main as cli
from tieaudit.errors import RewriteRefused
from tieaudit.formats.onnx.correct import PATTERNS
from tieaudit.formats.onnx.edit import can_realise
from tieaudit.merge import common_value
from tieaudit.model import Member, Model
from tieaudit.storage import MemoryStorage
from tieaudit.structural import check
from tieaudit.untouched import differences
from tieaudit.verify import prove
from tieaudit.view import AS_STORED, TRANSPOSED

IDS = np.array([[1, 5, 0], [V - 1, 2, 7]], np.int64)
RANK = 3
KINDS = ("scale", "linear", "low-rank")
EPS = {"float32": 2e-5, "float16": 2e-2}


def main(arguments: list[str]) -> tuple[int, str]:
    """The command line: its exit code and what it printed."""
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.stdout


def adjustment(kind: Any, dtype: str) -> Adjustment:
    shapes = {"scale": (D,), "linear": (D, D), "low-rank": (RANK, D)}
    rng = np.random.default_rng(11)
    right = rng.standard_normal(shapes[kind]).astype(NUMPY[dtype])
    left = (rng.standard_normal((V, RANK)) / 4).astype(NUMPY[dtype]) if kind == "low-rank" else None
    return Adjustment(
        kind, dtype, MemoryStorage(right.tobytes(), "right"), right.shape,
        MemoryStorage(left.tobytes(), "left") if left is not None else None, left.shape if left is not None else (),
    )  # fmt: skip


def consumer(form: str, dtype: str) -> tuple[list[onnx.NodeProto], bool]:
    """How X is read, and whether it is stored as the transpose of the common value."""
    bias = ["bias_v"]
    forms: dict[str, tuple[list[onnx.NodeProto], bool]] = {
        "lookup": ([node("Gather", ["X", "ids"], ["y"])], False),
        "head": ([node("MatMul", ["hidden", "X"], ["y"])], True),
        "head behind a transpose": (
            [node("Transpose", ["X"], ["Xt"], perm=[1, 0]), node("MatMul", ["hidden", "Xt"], ["y"])],
            False,
        ),
        "gemm head": ([node("Gemm", ["hidden", "X", *bias], ["y"])], True),
        "gemm head, transB": ([node("Gemm", ["hidden", "X", *bias], ["y"], transB=1)], False),
        "fused head": ([node("FusedMatMul", ["hidden", "X"], ["y"], transB=1, domain="com.microsoft")], False),
        "projection": ([node("MatMul", ["wide", "X"], ["y"])], False),
        "projection from a transposed one": ([node("Gemm", ["wide", "X"], ["y"], transB=1, alpha=1.0)], True),
        "head behind a cast": (
            [node("Cast", ["X"], ["Xc"], to=1), node("Cast", ["hidden"], ["hc"], to=1),
             node("MatMul", ["hc", "Xc"], ["yc"]), node("Cast", ["yc"], ["y"], to=TYPES[dtype])],
            True,
        ),
        "two readers": (
            [node("Gather", ["X", "ids"], ["y"]), node("MatMul", ["wide", "X"], ["y2"])],
            False,
        ),
    }  # fmt: skip
    return forms[form]


FORMS = ["lookup", "head", "head behind a transpose", "gemm head", "gemm head, transB", "fused head", "projection",
         "projection from a transposed one", "head behind a cast", "two readers"]  # fmt: skip


def proto_of(form: str, dtype: str, seen: Any = None, common: Any = None, ir: int = 10) -> onnx.ModelProto:
    """E is looked up, X is read as `form` says; their values, in the layout of E, may be given."""
    nodes, turned = consumer(form, dtype)
    kind = TYPES[dtype]
    x = table(dtype, 8) if seen is None else seen
    tensors = [
        tensor("E", table(dtype) if common is None else common),
        tensor("X", x.T if turned else x),
        tensor("bias_v", table(dtype, 4, (1, V))[0]),
    ]
    used = {name for one in nodes for name in one.input}
    lookup = form in ("lookup", "two readers")
    y: list[int | str] = ["b", "t", D] if lookup else ["n", D if "projection" in form else V]
    outputs = [value("e", kind, ["b", "t", D]), value("y", kind, y)]
    if form == "two readers":
        outputs.append(value("y2", kind, ["n", D]))
    inputs = [value("ids", 7, ["b", "t"]), value("hidden", kind, ["n", D]), value("wide", kind, ["n", V])]
    inputs = [one for one in inputs if one.name in used | {"ids"}]
    tensors = [one for one in tensors if one.name in used | {"E"}]
    return model_of([node("Gather", ["E", "ids"], ["e"]), *nodes], inputs, outputs, tensors, ir_version=ir)


def feeds(proto: onnx.ModelProto, dtype: str) -> dict[str, Any]:
    known = {"ids": IDS, "hidden": table(dtype, 5, (4, D)), "wide": table(dtype, 6, (4, V))}
    return {one.name: known[one.name] for one in proto.graph.input}


def share(form: str, dtype: str, kind: str) -> Share:
    turned = consumer(form, dtype)[1]
    common = np.ascontiguousarray(table(dtype, 9))
    return tie("E", "X", turned=["X"] if turned else [], values=MemoryStorage(common.tobytes(), "common"),
               adjustments={"X": adjustment(kind, dtype)})  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_outputs_are_those_of_the_original_with_the_planned_values(
    form: str, kind: str, dtype: str, tmp_path: Path
) -> None:
    edit = share(form, dtype, kind)
    model = saved(proto_of(form, dtype), tmp_path / "in")
    written, again, _ = rewritten(model, tmp_path / "out", edit, lossless=False)
    common = table(dtype, 9)
    reference = proto_of(form, dtype, adjusted(common, edit.adjustments["X"]), common)
    assert n_large_copies(tmp_path / "out" / "model.onnx") == 1
    assert {one.pattern for one in written.rewritten if one.node in ("y", "y2", "yc") and one.slot < 2} <= set(PATTERNS)
    planned = plan(model, edit, lossless=False)
    proof = check(model, again, planned, written)
    assert proof.problems == []
    assert differences(model, again, planned, written, proof) == []
    for level in (0, 99):
        expected = run(reference, feeds(reference, dtype))
        found = run(tmp_path / "out" / "model.onnx", feeds(reference, dtype), level)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(
                other.astype(np.float64), one.astype(np.float64), atol=EPS[dtype] * max(1.0, float(np.abs(one).max()))
            )


@pytest.mark.parametrize(
    ("form", "kind"), [("two readers", "low-rank"), ("gemm head", "scale"), ("projection", "linear")]
)
def test_every_level_of_the_proof_holds_for_products_in_either_layout(form: str, kind: str, tmp_path: Path) -> None:
    edit = share(form, "float32", kind)
    model = saved(proto_of(form, "float32"), tmp_path / "in")
    written, again, _ = rewritten(model, tmp_path / "out", edit, lossless=False)
    levels = prove(model, again, plan(model, edit, lossless=False), written).levels
    assert [level.outcome for level in levels] == ["held"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_correction_makes_is_numpys_rounded_once(kind: str) -> None:
    common, one = table("float16", 9), adjustment(kind, "float16")
    right = np.frombuffer(one.right.read_ranges([(0, one.right.n_bytes)])[0], np.float16).reshape(one.right_shape)
    wide = common.astype(np.float64)
    if kind == "scale":
        expected = wide @ np.diag(right.astype(np.float64))
    elif kind == "linear":
        expected = wide @ right.astype(np.float64)
    else:
        assert one.left is not None
        left = np.frombuffer(one.left.read_ranges([(0, one.left.n_bytes)])[0], np.float16).reshape(V, RANK)
        expected = wide + left.astype(np.float64) @ right.astype(np.float64)
    found = adjusted(common, one)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=2**-10, atol=1e-7)


# ---------------------------------------------------------------- refusals, each by the consumer's name


def refused(
    nodes: list[onnx.NodeProto], tmp_path: Path, kind: str = "low-rank", turned: bool = False, **more: Any
) -> str:
    x = table().T if turned else table()
    tensors = [
        tensor("E", table()),
        tensor("X", x),
        tensor("bias", table("float32", 4, (1, D))[0]),
        tensor("square", table("float32", 4, (D, D))),
    ]
    tensors = [one for one in tensors if one.name == "E" or any(one.name in item.input for item in nodes)]
    inputs = [value("ids", 7, ["b"]), value("wide", 1, ["n", V])]
    inputs = [one for one in inputs if one.name == "ids" or any(one.name in item.input for item in nodes)]
    proto = model_of(
        [node("Gather", ["E", "ids"], ["e"]), *nodes],
        inputs,
        [value("e", 1, ["b", D]), value("y", 1, ["p", "q"])],
        tensors,
        **more,
    )
    model = saved(proto, tmp_path / "in")
    edit = tie("E", "X", turned=["X"] if turned else [], adjustments={"X": adjustment(kind, "float32")},
               values=MemoryStorage(table().tobytes(), "c"))  # fmt: skip
    return can_realise(model, edit, "ort-cpu") or "possible"


def test_consumers_that_cannot_be_corrected_are_named(tmp_path: Path) -> None:
    said = refused([node("Relu", ["X"], ["y"])], tmp_path / "a")
    assert said == (
        "X cannot be corrected: its consumer 'y' (Relu) can read only what is stored; corrections are written at "
        "Gather, MatMul and Gemm"
    )
    said = refused([node("MatMul", ["X", "square"], ["y"])], tmp_path / "b")
    assert "its consumer 'y' (MatMul) reads it as its input 0" in said
    said = refused([node("Gather", ["X", "ids"], ["y"], axis=1)], tmp_path / "c", turned=True)
    assert "its consumer 'y' (Gather) does not look up whole rows of it" in said
    said = refused([node("Gemm", ["wide", "X", "bias"], ["y"])], tmp_path / "d", kind="scale")
    assert "its consumer 'y' (Gemm) adds a bias to what would have to be corrected first" in said
    said = refused([node("Gemm", ["wide", "X"], ["y"], alpha=0.5)], tmp_path / "e")
    assert "multiplies its result with another number than 1" in said
    assert refused([node("Gemm", ["wide", "X", "bias"], ["y"])], tmp_path / "f") == "possible"


def test_a_format_of_weights_alone_refuses_corrections_and_names_the_policy(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pair = {"model.embed_tokens.weight": table(), "lm_head.weight": table("float32", 2)}
    torch.save({name: torch.from_numpy(one) for name, one in pair.items()}, tmp_path / "model.pt")
    code, said = main(["plan", str(tmp_path / "model.pt"), "--scheme", "io", "--allow-lossy", "--merge", "low-rank:2"])
    assert code == 2
    assert "--merge low-rank:2: the correction of" in said and "holds weights only" in said


def test_a_correction_that_costs_more_than_the_tie_saves_is_refused(tmp_path: Path) -> None:
    # [8, 16]: a table takes 512 bytes, a map of 16 × 16 takes 1024
    tensors = [tensor("E", table("float32", 1, (8, 16))), tensor("W", table("float32", 2, (16, 8)))]
    nodes = [node("Gather", ["E", "ids"], ["x"]), node("Tanh", ["x"], ["h"]), node("MatMul", ["h", "W"], ["y"])]
    path = tmp_path / "m.onnx"
    onnx.save(model_of(nodes, [value("ids", 7, ["b", "t"])], [value("y", 1, ["b", "t", 8])], tensors), str(path))
    code, said = main(["plan", str(path), "--scheme", "io", "--allow-lossy", "--merge", "linear"])
    assert code == 2
    assert "its corrections would take 1,024 bytes, and the tie saves only 512" in said


# ---------------------------------------------------------------- the whole way, and proofs that can fail


def unequal_head(dtype: str) -> Any:
    return (table(dtype).astype(np.float64) * 1.2 + table("float32", 7) / 4).astype(NUMPY[dtype]).T


@pytest.mark.parametrize("policy", ["low-rank:4", "linear", "scaled"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_apply_delivers_every_corrected_policy_with_its_proof(policy: str, dtype: str, tmp_path: Path) -> None:
    source, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    proto = language_model(dtype, head=unequal_head(dtype))
    onnx.save(proto, str(source))
    arguments = ["apply", str(source), "--scheme", "io", "--allow-lossy", "--merge", policy, "--to", str(out)]
    code, said = main([*arguments, "--format", "json"])
    assert code == 0
    receipt = json.loads(said)
    levels = {one["name"]: one["outcome"] for one in receipt["proof"]["levels"]}
    ran = "not run" if dtype == "bfloat16" else "held"  # ONNX Runtime's CPU has no bfloat16 MatMul
    assert levels == {"structural": "held", "regional": "held", "end to end": ran}
    sizes = [
        sum(weight.n_bytes for weight in saved(onnx.load(str(p)), tmp_path / p.stem).weights) for p in (source, out)
    ]
    item = 4 if dtype == "float32" else 2
    added = {"low-rank:4": 4 * (V + D), "linear": D * D, "scaled": D}[policy]
    assert receipt["plan"]["n_bytes_saved"] == (V * D - added) * item == sizes[0] - sizes[1] + n_index_bytes(out)
    if dtype == "bfloat16":
        return
    seen = what_members_see(saved(proto, tmp_path / "in"), policy)
    reference = language_model(dtype, head=seen["W"].T)
    reference.graph.initializer[0].CopyFrom(tensor("E", seen["E"]))
    one, other = (run(item, {"input_ids": IDS})[0].astype(np.float64) for item in (reference, out))
    np.testing.assert_allclose(other, one, atol=EPS[dtype] / 4 * np.abs(one).max())


def n_index_bytes(path: Path) -> int:
    """Bytes of the shapes that a flattened product brings along."""
    model = saved(onnx.load(str(path)), path.parent / "index")
    return sum(weight.n_bytes for weight in model.weights if weight.dtype == "int64")


def what_members_see(model: Model, policy: str) -> dict[str, Any]:
    """By numpy, from the policy's own word: C, C·diag(g), C·M or C + B·A, in the layout of E."""
    pairs = [(model.by_id["E"], Member("E", AS_STORED)), (model.by_id["W"], Member("W", TRANSPOSED))]
    common = common_value(pairs, {"E": "token_embedding", "W": "output_head"}, policy)
    assert common.values is not None
    kind = NUMPY[model.by_id["E"].dtype]
    c = np.frombuffer(common.values.read_ranges([(0, common.values.n_bytes)])[0], kind).reshape(V, D)
    found = {"E": c, "W": c}
    for id, one in common.adjustments.items():
        right = np.frombuffer(one.right.read_ranges([(0, one.right.n_bytes)])[0], kind).reshape(one.right_shape)
        if one.left is not None:
            left = np.frombuffer(one.left.read_ranges([(0, one.left.n_bytes)])[0], kind).reshape(one.left_shape)
            found[id] = (c + left.astype(np.float64) @ right.astype(np.float64)).astype(kind)
        else:
            found[id] = (c * right if one.kind == "scale" else c.astype(np.float64) @ right).astype(kind)
    return found


def test_a_residual_of_every_difference_restores_the_outputs(tmp_path: Path) -> None:
    # a difference of rank 4 is held completely by a residual of rank 4
    rng = np.random.default_rng(3)
    head = (table().astype(np.float64) + rng.standard_normal((V, 4)) @ rng.standard_normal((4, D)) / 9).astype(
        np.float32
    )
    proto, source, out = language_model(head=head.T), tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(proto, str(source))
    assert (
        main(["apply", str(source), "--scheme", "io", "--allow-lossy", "--merge", "low-rank:4", "--to", str(out)])[0]
        == 0
    )
    one, other = (run(item, {"input_ids": IDS})[0] for item in (proto, out))
    np.testing.assert_allclose(other, one, atol=2e-6)


def corrected(tmp_path: Path) -> tuple[Model, Model, Plan, Written]:
    """A rewritten model with a residual beside its lookup, and what it was made by."""
    model = saved(proto_of("lookup", "float32"), tmp_path / "in")
    edit = share("lookup", "float32", "low-rank")
    written, again, _ = rewritten(model, tmp_path / "out", edit, lossless=False)
    return model, again, plan(model, edit, lossless=False), written


def test_a_factor_with_other_bytes_fails_the_structural_proof(tmp_path: Path) -> None:
    before, after, planned, written = corrected(tmp_path)

    def damage(proto: onnx.ModelProto) -> None:
        found = next(one for one in proto.graph.initializer if one.name.endswith("left"))
        found.raw_data = b"\0\0\0\0" + found.raw_data[4:]

    level = prove(before, broken(after, damage), planned, written).levels[0]
    assert (level.name, level.outcome) == ("structural", "failed")
    assert "its bytes are not those of the left factor of X" in level.because


def test_a_correction_that_computes_something_else_fails_the_regional_proof(tmp_path: Path) -> None:
    before, after, planned, written = corrected(tmp_path)

    def damage(proto: onnx.ModelProto) -> None:
        found = next(one for one in proto.graph.node if one.op_type == "Add")
        found.op_type = "Sub"

    levels = prove(before, broken(after, damage), planned, written).levels
    assert [level.outcome for level in levels[:2]] == ["held", "failed"]


def test_a_use_that_was_not_corrected_fails_the_structural_proof(tmp_path: Path) -> None:
    before, after, planned, written = corrected(tmp_path)
    level = prove(before, after, planned, replace(written, adjusted=())).levels[0]
    assert (level.outcome, level.because) == ("failed", "Gather @ y (input 0): expected X corrected, it is not")
    edit = planned.edits[0]
    assert isinstance(edit, Share)
    other = replace(planned, edits=(replace(edit, adjustments={}),))
    assert "X: corrected at y, which the plan does not say" in prove(before, after, other, written).levels[0].because


def test_an_old_file_keeps_its_provenance_in_the_doc_string(tmp_path: Path) -> None:
    model = saved(proto_of("lookup", "float32", ir=8), tmp_path / "in")
    edit = share("lookup", "float32", "low-rank")
    written, again, proto = rewritten(model, tmp_path / "out", edit, lossless=False)
    made = [one.doc_string for one in proto.graph.node if "tieaudit" in one.doc_string]
    assert made == ["tieaudit.pattern=residual_lookup"] * 4
    levels = prove(model, again, plan(model, edit, lossless=False), written).levels
    assert [level.outcome for level in levels] == ["held"] * 3


def test_numbers_that_a_half_cannot_hold_are_refused(tmp_path: Path) -> None:
    huge = np.full((V, D), 60000.0, np.float16)
    huge[::2] = -60000.0
    model = saved(language_model("float16", head=huge.T), tmp_path / "in")
    pairs = [(model.by_id["E"], Member("E", AS_STORED)), (model.by_id["W"], Member("W", TRANSPOSED))]
    with pytest.raises(RewriteRefused, match="E: its correction has numbers that float16 cannot hold"):
        common_value(pairs, {"E": "token_embedding", "W": "output_head"}, "low-rank:2")
