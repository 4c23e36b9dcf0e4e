"""The proof: what is right is proved, every planted fault is found, and what cannot run says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_cases import D, V, model_of, node, plan, rewritten, saved, table, tensor, tie, value
from verify_cases import broken, case, language_model, share

from tieaudit import running
from tieaudit.change import Proof, Respell
from tieaudit.formats.onnx.patterns import PROVENANCE
from tieaudit.formats.onnx.read import load
from tieaudit.model import Weight
from tieaudit.overlay import Overlay
from tieaudit.storage import MemoryStorage
from tieaudit.verify import compare, prove

pytest.importorskip("onnxruntime")


def outcomes(proof: Proof) -> dict[str, str]:
    return {level.name: level.outcome for level in proof.levels}


def because(proof: Proof, name: str) -> str:
    return next(level.because for level in proof.levels if level.name == name)


HELD = {"structural": "held", "regional": "held", "end to end": "held"}


@pytest.mark.parametrize("style", ["gemm", "gather", "fused"])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_a_faithful_rewrite_holds_on_every_level(tmp_path: Path, kind: str, style: str) -> None:
    proof = prove(*case(tmp_path, language_model(kind), transposed_as=style))
    assert outcomes(proof) == HELD
    assert proof.not_exercised == ()
    # E and W of 96 × 16 and M of 16 × 16: half of 2 × 1536 goes, not half of all 3328 elements
    saved_bytes = proof.facts["n_bytes_stored_before"] - proof.facts["n_bytes_stored_after"]  # type: ignore[operator]
    assert V * D * (4 if kind == "float32" else 2) - 64 < saved_bytes <= V * D * (4 if kind == "float32" else 2)
    assert proof.facts["folded_apart_by_the_runtime"] == "no"


def test_bfloat16_is_proved_regionally_where_the_cpu_cannot_run_the_whole(tmp_path: Path) -> None:
    proof = prove(*case(tmp_path, language_model("bfloat16")), device="cpu")
    assert outcomes(proof) == {"structural": "held", "regional": "held", "end to end": "not run"}
    assert "the original does not load or run either" in because(proof, "end to end")


def test_a_graph_edit_that_is_not_on_the_list_fails_the_structural_level(tmp_path: Path) -> None:
    before, after, made, written = case(tmp_path, language_model())
    invented = tuple(replace(one, pattern="clever_trick") for one in written.rewritten)
    assert invented
    proof = prove(before, after, made, replace(written, rewritten=invented))
    assert outcomes(proof)["structural"] == "failed"
    assert "'clever_trick' is not on the list" in because(proof, "structural")


def test_one_flipped_bit_in_an_untouched_tensor_fails_the_structural_level(tmp_path: Path) -> None:
    before, after, made, written = case(tmp_path, language_model())

    def flip(proto: onnx.ModelProto) -> None:
        middle = next(one for one in proto.graph.initializer if one.name == "M")
        data = bytearray(middle.raw_data)
        data[500] ^= 1
        middle.raw_data = bytes(data)

    proof = prove(before, broken(after, flip), made, written)
    assert outcomes(proof) == {"structural": "failed", "regional": "not run", "end to end": "not run"}
    assert because(proof, "structural") == "M: not named by the plan, but its bytes changed"


def test_one_flipped_bit_in_the_shared_tensor_fails_the_structural_level(tmp_path: Path) -> None:
    before, after, made, written = case(tmp_path, language_model())

    def flip(proto: onnx.ModelProto) -> None:
        data = bytearray(proto.graph.initializer[0].raw_data)
        data[-1] ^= 0x80  # the sign of the last element: −0.0 and 0.0 would pass a comparison of values
        proto.graph.initializer[0].raw_data = bytes(data)

    proof = prove(before, broken(after, flip), made, written)
    assert outcomes(proof)["structural"] == "failed"
    assert "not the planned ones" in because(proof, "structural")


def no_transposition(proto: onnx.ModelProto) -> None:
    gemm = next(one for one in proto.graph.node if one.op_type == "Gemm")
    next(item for item in gemm.attribute if item.name == "transB").i = 0


def another_activation(proto: onnx.ModelProto) -> None:
    next(one for one in proto.graph.node if one.op_type == "Tanh").op_type = "Relu"


def one_more_node(proto: onnx.ModelProto) -> None:
    next(one for one in proto.graph.node if one.op_type == "Tanh").output[0] = "z0"
    proto.graph.node.insert(3, node("Neg", ["z0"], ["z"]))


def one_more_tensor(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(tensor("stowaway", table()))


def other_inputs(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = "tokens"
    proto.graph.node[0].input[1] = "tokens"


def swapped_order(proto: onnx.ModelProto) -> None:
    first, second = proto.graph.node[0], proto.graph.node[1]
    first.output[0], second.output[0] = "y", "x"


@pytest.mark.parametrize(
    "mutate",
    [no_transposition, another_activation, one_more_node, one_more_tensor, other_inputs, swapped_order],
    ids=lambda one: one.__name__,
)
def test_a_wrong_graph_edit_fails_the_structural_level(tmp_path: Path, mutate: Any) -> None:
    before, after, made, written = case(tmp_path, language_model())
    assert outcomes(prove(before, after, made, written))["structural"] == "held"
    proof = prove(before, broken(after, mutate), made, written)
    assert outcomes(proof)["structural"] == "failed"


def scaled(proto: onnx.ModelProto) -> None:
    """Wrong arithmetic inside a tagged pattern: no byte and no view shows it."""
    gemm = next(one for one in proto.graph.node if one.op_type == "Gemm")
    gemm.attribute.append(onnx.helper.make_attribute("alpha", 1.001))


def wrong_axis(proto: onnx.ModelProto) -> None:
    gather = next(one for one in proto.graph.node if one.op_type == "Gather")
    next(item for item in gather.attribute if item.name == "axis").i = 0


@pytest.mark.parametrize(("style", "mutate"), [("gemm", scaled), ("gather", wrong_axis)])
def test_wrong_arithmetic_inside_a_pattern_fails_the_regional_level(tmp_path: Path, style: str, mutate: Any) -> None:
    before, after, made, written = case(tmp_path, language_model(), transposed_as=style)
    proof = prove(before, broken(after, mutate), made, written)
    assert outcomes(proof)["structural"] == "held"
    assert outcomes(proof)["regional"] == "failed"
    assert proof.failed


def test_a_head_that_is_never_read_is_listed_as_not_exercised(tmp_path: Path) -> None:
    embedding = table()
    proto = model_of(
        [
            node("Gather", ["E", "input_ids"], ["x"]),
            node("MatMul", ["x", "W"], ["scores"]),
            node("Constant", [], ["nothing"], value=tensor("", np.zeros(1, np.float32))),
            node("Mul", ["scores", "nothing"], ["muted"]),
            node("ReduceSum", ["muted"], ["total"], keepdims=1),
            node("Add", ["x", "total"], ["y"]),
        ],
        [value("input_ids", 7, ["batch", "sequence"])],
        [value("y", 1, ["batch", "sequence", D])],
        [tensor("E", embedding), tensor("W", embedding.T)],
    )
    proof = prove(*case(tmp_path, proto))
    assert outcomes(proof) == HELD
    assert proof.not_exercised == ("W @ scores",)  # and not E @ x, whose rows move the output


def test_two_models_full_of_nan_prove_nothing(tmp_path: Path) -> None:
    proto = language_model(head=np.full((D, V), np.nan, np.float32))
    one = saved(proto, tmp_path / "a")
    proof = compare(one, saved(proto, tmp_path / "b"))
    assert outcomes(proof)["end to end"] == "not run"
    assert "proves nothing" in because(proof, "end to end")


def test_a_lossy_plan_is_compared_with_its_reference_and_its_drift_is_measured(tmp_path: Path) -> None:
    head = table(seed=5).T
    made = case(tmp_path, language_model(head=head), lossless=False)
    proof = prove(*made)
    assert outcomes(proof) == HELD
    assert proof.drift is not None and proof.drift > 0.1  # two random matrices; parity with the reference is exact
    limited = prove(*made, max_drift=0.01)
    assert outcomes(limited)["end to end"] == "failed"
    assert "more than the limit" in because(limited, "end to end")


def test_merged_values_are_what_the_plan_says(tmp_path: Path) -> None:
    head = table(seed=5).T
    mean = ((table() + head.T) / 2).astype(np.float32)
    edits = (share(values=MemoryStorage(mean.tobytes(), "mean")),)
    before, after, made, written = case(tmp_path, language_model(head=head), lossless=False, edits=edits)
    assert outcomes(prove(before, after, made, written)) == HELD
    other = replace(made, edits=(share(values=MemoryStorage(table(seed=9).tobytes(), "other")),))
    assert outcomes(prove(before, after, other, written))["structural"] == "failed"


def test_a_plan_that_calls_unequal_weights_lossless_fails(tmp_path: Path) -> None:
    before, after, made, written = case(tmp_path, language_model(head=table(seed=5).T), lossless=True)
    proof = prove(before, after, made, written)
    assert outcomes(proof)["structural"] == "failed"
    assert "the plan is lossless" in because(proof, "structural")


def test_a_share_that_calls_itself_lossless_is_held_to_it_whatever_the_rest_of_the_plan_does(tmp_path: Path) -> None:
    edits = (replace(share(), lossless=True),)
    proof = prove(*case(tmp_path, language_model(head=table(seed=5).T), lossless=False, edits=edits))
    assert outcomes(proof)["structural"] == "failed"
    assert "the plan is lossless" in because(proof, "structural")


def test_a_respelled_tie_holds_and_stays_one_tensor(tmp_path: Path) -> None:
    proto = model_of(
        [
            node("Gather", ["E", "input_ids"], ["x"]),
            node("Transpose", ["E"], ["ET"], perm=[1, 0]),
            node("MatMul", ["x", "ET"], ["logits"]),
        ],
        [value("input_ids", 7, ["batch", "sequence"])],
        [value("logits", 1, ["batch", "sequence", V])],
        [tensor("E", table())],
    )
    proof = prove(*case(tmp_path, proto, edits=(Respell("E"),)))
    assert outcomes(proof) == HELD
    assert proof.facts["folded_apart_by_the_runtime"] == "no"
    assert proof.facts["n_bytes_optimised_after"] < proof.facts["n_bytes_optimised_before"]  # type: ignore[operator]


def test_copies_in_two_branches_are_proved(tmp_path: Path) -> None:
    shared = table()

    def body(name: str, weight: str) -> onnx.GraphProto:
        return onnx.helper.make_graph(
            [node("MatMul", ["x", weight], [f"{name}_out"])],
            name,
            [],
            [value(f"{name}_out", 1, ["batch", "sequence", V])],
            [tensor(weight, shared.T)],
        )

    proto = model_of(
        [
            node("Gather", ["E", "input_ids"], ["x"]),
            node("If", ["flag"], ["logits"], then_branch=body("a", "Wa"), else_branch=body("b", "Wb")),
        ],
        [value("input_ids", 7, ["batch", "sequence"]), value("flag", 9, [])],
        [value("logits", 1, ["batch", "sequence", V])],
        [tensor("E", shared)],
    )
    inner = ("|logits.then_branch|Wa", "|logits.else_branch|Wb")
    proof = prove(*case(tmp_path, proto, edits=(tie("E", *inner, turned=inner),)))
    assert outcomes(proof) == HELD
    # the made-up condition is always true, so the other branch never runs: said, not hidden
    assert proof.not_exercised == ("|logits.else_branch|Wb @ b_out",)


def test_without_a_runtime_the_structural_level_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    proof = prove(*case(tmp_path, language_model()))
    assert outcomes(proof) == {"structural": "held", "regional": "not run", "end to end": "not run"}
    expected = "running this model needs the package onnxruntime, which is not installed"
    assert because(proof, "regional") == f"{expected} (pip install 'tieaudit[onnxruntime]')"


def test_external_data_is_proved_too(tmp_path: Path) -> None:
    before = saved(
        language_model(), tmp_path / "before", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (tmp_path / "after").mkdir()
    written, after, _ = rewritten(before, tmp_path / "after", share())
    proof = prove(before, after, plan(before, share()), written)
    assert outcomes(proof) == HELD and proof.not_exercised == ()


def test_equal_models_compare_equal_and_different_ones_differ(tmp_path: Path) -> None:
    one = saved(language_model(), tmp_path / "a")
    assert outcomes(compare(one, saved(language_model(), tmp_path / "b"))) == {**HELD, "regional": "not run"}
    other = saved(language_model(head=table(seed=5).T), tmp_path / "c")
    proof = compare(one, other)
    assert outcomes(proof)["end to end"] == "failed"
    assert outcomes(compare(one, other, max_drift=100.0))["end to end"] == "held"


def test_inputs_and_outputs_with_other_names_are_paired_by_order_and_shape(tmp_path: Path) -> None:
    proto = language_model()
    other = language_model()
    for graph in (other.graph,):
        graph.input[0].name = graph.node[0].input[1] = "tokens"
        graph.output[0].name = graph.node[-1].output[0] = "scores"
    proof = compare(saved(proto, tmp_path / "a"), saved(other, tmp_path / "b"))
    assert outcomes(proof)["end to end"] == "held"


def test_given_inputs_are_used_and_missing_ones_are_named(tmp_path: Path) -> None:
    one, other = (saved(language_model(), tmp_path / name) for name in "ab")
    proof = compare(one, other, inputs={"input_ids": np.array([[1, 2, 3]])})
    assert because(proof, "end to end").startswith("1 input (the given inputs)")
    proof = compare(one, other, inputs={"ids": np.array([[1]])})
    assert because(proof, "end to end") == "the original does not run either: --inputs lacks input_ids"


def test_a_model_without_a_program_says_that_nothing_runs_it(tmp_path: Path) -> None:
    model = replace(saved(language_model(), tmp_path), format="safetensors")
    assert (
        running.runner_for(model) == "nothing runs a model of the format safetensors: it holds weights, but no program"
    )


def test_the_tag_that_the_proof_looks_for_is_the_one_that_the_surgery_writes() -> None:
    from tieaudit.formats.onnx.compare import TAG

    assert TAG == PROVENANCE


def test_a_tie_across_two_files_is_proved_part_by_part(tmp_path: Path) -> None:
    from tieaudit.change import Plan
    from tieaudit.load import load_one
    from tieaudit.rewrite import rewrite

    folder = tmp_path / "before"
    folder.mkdir()
    encoder = model_of(
        [node("Gather", ["E", "input_ids"], ["x"]), node("Tanh", ["x"], ["last_hidden_state"])],
        [value("input_ids", 7, ["batch", "sequence"])],
        [value("last_hidden_state", 1, ["batch", "sequence", D])],
        [tensor("E", table())],
    )
    onnx.save(encoder, str(folder / "encoder_model.onnx"))
    onnx.save(language_model(), str(folder / "decoder_model.onnx"))
    before = load_one(folder)
    ids = ("encoder_model||E", "decoder_model||E", "decoder_model||W")
    made = Plan(before.path, "ort-cpu", ("dedup",), (tie(*ids, turned=ids[2:]),), 0, True)
    (tmp_path / "after").mkdir()
    written, after = rewrite(before, made, tmp_path / "after")
    proof = prove(before, after, made, written)
    assert outcomes(proof) == HELD
    assert proof.not_exercised == ()
    # three copies become one, in a file that both parts read
    stored = [proof.facts[f"n_bytes_stored_{side}"] for side in ("before", "after")]
    assert 2 * V * D * 4 - 64 < stored[0] - stored[1] <= 2 * V * D * 4  # type: ignore[operator]


def test_models_that_take_different_inputs_could_not_be_compared_and_do_not_differ(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from tieaudit.cli import main

    paths = []
    for name, dims in (("free", ["b", 4]), ("fixed", [3, 4]), ("other", ["b", 5])):
        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, dims)
        graph = onnx.helper.make_graph([onnx.helper.make_node("Tanh", ["x"], ["y"])], name, [x], [y])
        model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
        paths.append(str(tmp_path / f"{name}.onnx"))
        onnx.save(model, paths[-1])
    free, fixed, other = paths
    for words, code in (((free, fixed), 0), ((fixed, free), 0), ((free, other), 2)):
        result = CliRunner().invoke(main, ["verify", *words])
        assert result.exit_code == code, result.output
    assert "the input x is ['b', 4] on one side and ['b', 5] on the other" in result.output


def test_a_copy_keeps_every_change_of_large_and_small_weights_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the small vector is decoded when it is read, so its file is written anew, and what is behind it moves
    names = {
        "large": np.ones((64, 40), np.float32),
        "small": np.ones(3, np.float32),
        "last": np.ones((64, 40), np.float32),
    }
    nodes = [node("Add", ["large", "last"], ["a"]), node("ReduceSum", ["a"], ["b"]), node("Add", ["b", "small"], ["y"])]
    tensors = [tensor(name, array) for name, array in names.items()]
    tensors[1].ClearField("raw_data")
    tensors[1].float_data.extend([1.0] * 3)
    saved(model_of(nodes, [], [value("y", 1, [1, 3])], tensors), tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load(Path("model.onnx"), (Path("model.onnx"),))
    with Overlay(model) as overlay:
        for number, name in enumerate(names):
            overlay.change(model.by_id[name], lambda array, number=number: array.fill(number + 2.0))  # type: ignore[misc]
        copy = overlay.as_model()
        for number, (name, array) in enumerate(names.items()):
            expected = np.full_like(array, number + 2.0)
            assert blocks_of(copy.by_id[name]) == expected.tobytes()
            again = load(overlay.path, (overlay.path,)).by_id[name]
            assert blocks_of(again) == expected.tobytes()
        overlay.reset()
        assert overlay.path.read_bytes() == Path("model.onnx").read_bytes()


def blocks_of(weight: Weight) -> bytes:
    assert weight.storage is not None
    return weight.storage.read_ranges([(0, weight.n_bytes)])[0]


def test_files_that_nothing_runs_are_compared_by_their_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from click.testing import CliRunner
    from safetensors.torch import save_file, save_model

    from tieaudit.cli import main

    module = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    module[1].weight = module[0].weight
    apart = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.save(module.state_dict(), tmp_path / "tied.pt")
    torch.save(apart, tmp_path / "copies.pt")
    save_model(module, str(tmp_path / "tied.safetensors"))  # leaves one name out, and notes it
    apart["0.weight"][0, 0] += 1
    save_file(apart, tmp_path / "moved.safetensors")
    save_file({"0.weight": apart["1.weight"]}, tmp_path / "half.safetensors")
    for other, outcome, code in (
        ("copies.pt", "held", 0),
        ("tied.safetensors", "held", 0),
        ("moved.safetensors", "FAILED: 0.weight", 1),
        ("half.safetensors", "FAILED: 1.weight is in the first one only", 1),
    ):
        said = CliRunner().invoke(main, ["verify", str(tmp_path / "tied.pt"), str(tmp_path / other)])
        assert (said.exit_code, f"structural  {outcome}" in said.output) == (code, True), said.output
