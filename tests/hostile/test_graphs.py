"""ONNX graphs that no exporter writes: cycles, calls without end, nodes without inputs, sizes beyond any memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto


def run(*words: object) -> Result:
    """The command as a user runs it; nothing but its own exit may come out."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "a fault in tieaudit" not in result.output
    return result


def changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The lost tie of `tiny_onnx` with something odd about it."""
    model = onnx.load(str(tiny_onnx.lost(path)))
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_an_identity_that_reads_its_own_result_is_no_endless_walk(tmp_path: Path) -> None:
    path = changed(
        tmp_path / "m.onnx",
        lambda model: model.graph.node.append(helper.make_node("Identity", ["wte.weight"], ["wte.weight"])),
    )
    for words in (["scan"], ["plan"], ["plan", "--scheme", "io"], ["plan", "--scheme", "untie"]):
        assert run(*words, path).exit_code in (0, 2)


def test_a_chain_of_thousands_of_identities_is_refused_or_read_in_one_line(tmp_path: Path) -> None:
    def lengthen(model: onnx.ModelProto) -> None:
        before = "wte.weight"
        for index in range(2000):
            model.graph.node.append(helper.make_node("Identity", [before], [f"i{index}"]))
            model.graph.node.append(helper.make_node("Neg", [f"i{index}"], [f"n{index}"]))
            before = f"i{index}"

    path = changed(tmp_path / "m.onnx", lengthen)
    assert run("scan", path).exit_code == 0
    result = run("plan", path, "--scheme", "untie")
    assert result.exit_code in (0, 2)
    if result.exit_code == 2:
        assert "too deeply" in result.output
        assert str(path) in result.output


def _functions(model: onnx.ModelProto, calls: dict[str, str]) -> None:
    """Functions that each call another twice."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for name, called in calls.items():
        twice = [helper.make_node(called, ["a"], ["c"], domain="f"), helper.make_node(called, ["c"], ["b"], domain="f")]
        model.functions.append(helper.make_function("f", name, ["a"], ["b"], twice, opsets))
    last = [helper.make_node("Identity", ["a"], ["b"])]
    model.functions.append(helper.make_function("f", "Last", ["a"], ["b"], last, opsets))
    model.graph.node.append(helper.make_node("F0", ["wte.weight"], ["called"], domain="f"))
    model.opset_import.append(helper.make_opsetid("f", 1))


def test_functions_that_call_each_other_twice_each_cost_no_exponential_time(tmp_path: Path) -> None:
    # 40 functions of two calls each: 2^40 visits for whoever follows every call
    calls = {f"F{index}": f"F{index + 1}" for index in range(39)} | {"F39": "Last"}
    path = changed(tmp_path / "m.onnx", lambda model: _functions(model, calls))
    began = time.process_time()
    assert run("plan", path).exit_code == 0
    assert time.process_time() - began < 20


def test_visits_are_counted_with_every_call_followed_and_a_function_that_calls_itself_has_no_end() -> None:
    from tieaudit.formats.onnx.inference import N_MOST_NODES, n_visits

    def visits(calls: dict[str, str]) -> int:
        model = helper.make_model(helper.make_graph([], "g", [], []))
        _functions(model, calls)
        return n_visits(model)

    # the main graph has 1 node; F0 has 2 and calls F1 twice, which has 2 and calls Last twice, which has 1:
    # 1 + (2 + 2·(2 + 2·1)) = 11; counting each function once would give 1 + 2 + 2 + 1 = 6
    assert visits({"F0": "F1", "F1": "Last"}) == 11
    assert visits({"F0": "F0"}) == N_MOST_NODES + 1
    assert visits({"F0": "F1", "F1": "F0"}) == N_MOST_NODES + 1


def test_nodes_without_inputs_results_or_types_are_lived_with(tmp_path: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        weight = "lm_head.weight_T"
        model.graph.node.extend(
            [
                helper.make_node("MatMul", [weight], ["alone"]),
                helper.make_node("Identity", [weight], []),
                helper.make_node("Gemm", ["", weight, ""], [""]),
                helper.make_node("Transpose", [weight], ["t"], perm=[5, 5, 5]),
                helper.make_node("Reshape", [weight], ["r"]),
                helper.make_node("If", [weight], ["i"]),
                helper.make_node("Constant", [], []),
                helper.make_node("Constant", [], ["nothing"]),
                onnx.NodeProto(),
            ]
        )

    path = changed(tmp_path / "m.onnx", add)
    assert run("scan", path).exit_code == 0
    for scheme in ("dedup", "io", "untie"):
        assert run("plan", path, "--scheme", scheme).exit_code in (0, 2)


@pytest.mark.parametrize(
    "sizes",
    [(100_000, 100_000), (2**62, 2**62), (-5, 0), ("9" * 5000 + " + 1", "b"), ("99999999999 + 1", "b"), ("a + ²", "b")],
    ids=["80 GB", "2^124", "negative", "5000 digits", "a sum of 10^11", "a digit that is no number"],
)
def test_inputs_declared_with_any_size_never_exhaust_the_memory(tmp_path: Path, sizes: tuple[object, object]) -> None:
    def resize(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("ids", TensorProto.INT64, list(sizes)))
        model.graph.output[0].type.tensor_type.ClearField("shape")

    pytest.importorskip("onnxruntime")
    path, to = changed(tmp_path / "m.onnx", resize), tmp_path / "out.onnx"
    result = run("apply", path, "--to", to, "--device", "cpu")
    assert result.exit_code in (0, 2)
    assert to.exists() == (result.exit_code == 0)
    assert sorted(one.name for one in tmp_path.iterdir() if one.name.startswith(".")) == []


def test_a_location_with_dots_is_written_as_the_file_it_means(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    home = tmp_path / "in"
    (home / "sub").mkdir(parents=True)
    path = tiny_onnx.lost(home / "m.onnx", external=True)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"sub/../{entry.value}"
    path.write_bytes(model.SerializeToString())
    result = run("apply", path, "--to", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    # `sub` does not exist there, so `sub/../m.onnx.data` would name nothing
    kept = onnx.load(str(tmp_path / "out" / "m.onnx"))
    assert np.array_equal(
        numpy_helper.to_array(kept.graph.initializer[0]).ravel()[:3], tiny_onnx.table().ravel()[:3]
    ) or (np.array_equal(numpy_helper.to_array(kept.graph.initializer[0]).T.ravel()[:3], tiny_onnx.table().ravel()[:3]))


def test_names_that_two_nodes_each_make_cost_no_exponential_time(tmp_path: Path) -> None:
    # 60 steps of two nodes each, all from one name to the next: 2^60 ways for whoever follows every one
    def double(model: onnx.ModelProto) -> None:
        for step in range(60):
            before = f"i{step}" if step else "wte.weight"
            model.graph.node.extend([helper.make_node("Identity", [before], [f"i{step + 1}"])] * 2)
        model.graph.node.append(helper.make_node("Transpose", ["i60"], ["t"], perm=[1, 0]))
        model.graph.node.append(helper.make_node("MatMul", ["h", "t"], ["second"]))

    path = changed(tmp_path / "m.onnx", double)
    began = time.process_time()
    for scheme in ("dedup", "io", "untie"):
        assert run("plan", path, "--scheme", scheme).exit_code in (0, 2)
    assert time.process_time() - began < 20
