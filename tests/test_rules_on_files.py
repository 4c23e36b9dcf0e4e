"""The rules on real ONNX files: what loaders and finder hand over is what the rules expect."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tieaudit.cli import main as cli
from tieaudit.errors import TieAuditError
from tieaudit.load import load_one
from tieaudit.scan import scan
from tieaudit.toy import ramp
from tieaudit.verdict import Report

V, H = 64, 16
E = ramp(V, H)


def save(path: Path, nodes: list[Any], weights: dict[str, np.ndarray[Any, Any]], **external: tuple[int, int]) -> Path:
    """Token ids → logits; `external` puts a weight at (offset, length) of model.onnx.data."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = []
    for name, values in weights.items():
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        if name in external:
            offset, length = external[name]
            with (path.parent / "model.onnx.data").open(
                "r+b" if (path.parent / "model.onnx.data").exists() else "wb"
            ) as f:
                f.seek(offset)
                f.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", V])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model) if not external else None
    path.write_bytes(model.SerializeToString())
    return path


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)


def scanned(path: Path) -> Report:
    report = scan(load_one(path))
    assert report.crashed == ()
    return report


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


LOOKUP = ("Gather", ["E", "ids"], "x")


def test_a_head_stored_transposed_is_a_transposed_copy(tmp_path: Path) -> None:
    nodes = [node(*LOOKUP), node("MatMul", ["x", "onnx::MatMul_11"], "logits")]
    report = scanned(save(tmp_path / "model.onnx", nodes, {"E": E, "onnx::MatMul_11": E.T}))
    assert codes(report) == ["TIE202"]
    assert report.findings[0].n_bytes == V * H * 4
    assert report.summary.n_parameters == V * H  # not 2 * V * H: the class counts once


def test_one_different_element_makes_it_a_candidate_and_no_finding(tmp_path: Path) -> None:
    other = E.T.copy()
    other[3, 4] += 1
    nodes = [node(*LOOKUP), node("MatMul", ["x", "onnx::MatMul_11"], "logits")]
    report = scanned(save(tmp_path / "model.onnx", nodes, {"E": E, "onnx::MatMul_11": other}))
    assert codes(report) == []
    assert report.summary.n_parameters == 2 * V * H
    assert [candidate.scheme for candidate in report.candidates] == ["io"]


def test_an_exporter_s_transpose_of_the_embedding_is_a_foldable_tie(tmp_path: Path) -> None:
    nodes = [node(*LOOKUP), node("Transpose", ["E"], "Et", perm=[1, 0]), node("MatMul", ["x", "Et"], "logits")]
    assert codes(scanned(save(tmp_path / "model.onnx", nodes, {"E": E}))) == ["TIE301"]


@pytest.mark.parametrize("between", [[], [("Identity", ["E"], "Ei")]])
def test_a_head_by_trans_b_survives_the_runtime_and_is_silent(tmp_path: Path, between: list[Any]) -> None:
    head = "Ei" if between else "E"
    nodes = [node(*LOOKUP), *(node(*one) for one in between), node("Gemm", ["x", head], "logits", transB=1)]
    assert codes(scanned(save(tmp_path / "model.onnx", nodes, {"E": E}))) == []


def test_two_initializers_on_one_external_range_are_an_alias_that_a_save_doubles(tmp_path: Path) -> None:
    nodes = [node(*LOOKUP), node("Gemm", ["x", "head"], "logits", transB=1)]
    where = (0, V * H * 4)
    report = scanned(save(tmp_path / "model.onnx", nodes, {"E": E, "head": E}, E=where, head=where))
    assert codes(report) == ["TIE204"]
    assert (report.summary.n_bytes, report.summary.n_parameters) == (V * H * 4, V * H)


def test_equal_initializers_are_duplicates(tmp_path: Path) -> None:
    nodes = [node(*LOOKUP), node("Gemm", ["x", "head"], "logits", transB=1)]
    assert codes(scanned(save(tmp_path / "model.onnx", nodes, {"E": E, "head": E}))) == ["TIE201"]


def test_external_data_that_ends_too_early_is_refused_and_not_clean(tmp_path: Path) -> None:
    nodes = [node(*LOOKUP), node("Gemm", ["x", "head"], "logits", transB=1)]
    length = V * H * 4
    path = save(tmp_path / "model.onnx", nodes, {"E": E, "head": E}, E=(0, length), head=(length, length))
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        file.truncate(length + 10)
    with pytest.raises(TieAuditError, match=r"model\.onnx\.data"):  # the loader refuses before any rule could be silent
        scanned(path)


def broken_models(folder: Path) -> dict[str, Path]:
    """One file per defect that a command mends."""
    plain_head, gemm = node("MatMul", ["x", "head"], "logits"), node("Gemm", ["x", "head"], "logits", transB=1)
    folded = [node("Transpose", ["E"], "Et", perm=[1, 0]), node("MatMul", ["x", "Et"], "logits")]
    return {
        code: save(make_folder(folder / code) / "model.onnx", [node(*LOOKUP), *nodes], weights)
        for code, nodes, weights in (
            ("TIE201", [gemm], {"E": E, "head": E}),
            ("TIE202", [plain_head], {"E": E, "head": E.T}),
            ("TIE301", folded, {"E": E}),
        )
    }


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("code", ["TIE201", "TIE202", "TIE301"])
def test_the_command_of_a_finding_mends_it_when_it_is_run(code: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    report = scanned(broken_models(tmp_path)[code])
    assert codes(report) == [code]
    fix = report.findings[0].fix
    assert fix is not None
    out = tmp_path / "OUT.onnx"
    words = [str(out) if word == "OUT" else word for word in shlex.split(fix.command)]
    run = CliRunner().invoke(cli, words[1:])
    assert run.exit_code == 0, run.output
    mended = scanned(out)
    assert codes(mended) == []
    assert mended.summary.n_bytes <= report.summary.n_bytes
    assert mended.summary.n_bytes_duplicate == 0


def refusing_models(folder: Path) -> dict[str, Path]:
    """Duplicates that `apply` refuses to share, by what stands in the way."""
    from onnx import TensorProto, helper, numpy_helper

    def written(name: str, nodes: list[Any], weights: dict[str, Any], outputs: tuple[str, ...], **more: Any) -> Path:
        tensors = [numpy_helper.from_array(np.ascontiguousarray(values), key) for key, values in weights.items()]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", H])
        made = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in outputs]
        graph = helper.make_graph(nodes, "g", [x], made, tensors)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)
        path = make_folder(folder / name) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    product = [node("MatMul", ["x", "a"], "h"), node("MatMul", ["h", "b"], "y")]
    square = ramp(H, H)
    bodies = [
        helper.make_function(
            "mine",
            f"f{index}",
            ["x"],
            ["y"],
            [
                helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(square, "w")),
                helper.make_node("MatMul", ["x", "w"], ["y"]),
            ],
            [helper.make_opsetid("", 17)],
        )
        for index in range(2)
    ]
    calls = [
        helper.make_node("f0", ["x"], ["h"], domain="mine"),
        helper.make_node("f1", ["h"], ["y"], domain="mine"),
    ]
    return {
        "both are outputs": written("outputs", product, {"a": square, "b": square}, ("y", "a", "b")),
        "one is an output": written("output", product, {"a": square, "b": square}, ("y", "a")),
        "inside functions": written("functions", calls, {}, ("y",), functions=bodies),
    }


@pytest.mark.parametrize("case", ["both are outputs", "one is an output", "inside functions"])
def test_a_finding_recommends_apply_exactly_where_apply_will_do_it(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = refusing_models(tmp_path)[case]
    (finding,) = scanned(path).findings
    assert finding.code == "TIE201"
    assert finding.fix is not None
    run = CliRunner().invoke(cli, ["apply", str(path), "--scheme", "dedup", "--to", str(tmp_path / "OUT.onnx")])
    assert (finding.fix.safety, run.exit_code) == (("safe", 0) if case == "one is an output" else ("manual", 2)), (
        run.output
    )
    if case == "both are outputs":
        assert finding.fix.command == ("no automatic fix: a and b are both outputs of a graph, so both names must stay")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"architectures": ["NobodyKnowsItForCausalLM"], "model_type": "nobody_knows_it"},
            "config.json:tie_word_embeddings is not in the file, and the class is not known here, nor what it does "
            "without, but ",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "config.json:tie_word_embeddings is not in the file, the class default is false, but ",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
            "config.json:tie_word_embeddings says untied, but ",
        ),
    ],
    ids=["a class that nobody knows", "the key is not written", "the key is written"],
)
def test_a_key_that_the_configuration_lacks_is_not_said_to_say_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], expected: str
) -> None:
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    # the data files answer at once, and do not change with what is installed
    monkeypatch.setattr("tieaudit.formats.huggingface.asking.installed", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": E, "lm_head.weight": E.copy()}, tmp_path / "model.safetensors")
    (finding,) = (one for one in scanned(tmp_path).findings if one.code == "TIE104")
    assert finding.message.startswith(expected)
