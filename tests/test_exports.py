"""Real architectures, as torch.onnx.export writes them and as ONNX Runtime optimises them: the lost tie is repaired.

The oracle is the live model: its own parameter count, and ONNX Runtime's own outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tieaudit.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
import tiny_exports  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("plain", "basic", "torchscript")


@pytest.fixture(scope="module", params=tiny_exports.ARCHITECTURES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """One architecture: dynamo's export, what ONNX Runtime makes of it, and the TorchScript exporter's file."""
    arch, home = request.param, tmp_path_factory.mktemp(request.param)
    plain = tiny_exports.export(arch, home / "plain.onnx")
    basic = tiny_exports.optimised(plain, home / "basic.onnx")
    script = tiny_exports.export(arch, home / "torchscript.onnx", dynamo=False)
    return arch, {"plain": plain, "basic": basic, "torchscript": script}


def feeds(arch: str) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tiny_exports.inputs(arch).items()}


def run(path: Path, given: dict[str, np.ndarray], level: Any, optimised: Path | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    result: np.ndarray = session.run(["logits"], {name: value for name, value in given.items() if name in names})[0]
    return result


def scan(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["scan", str(path), "--format", "json"])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.output)["models"][0]
    return answer


def big_tables(path: Path) -> list[str]:
    """Initializers of the embedding's size, counted with the library and not with our own reader."""
    import onnx

    found = onnx.load(str(path)).graph.initializer
    return [tensor.name for tensor in found if sorted(tensor.dims) == [32, 300]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lost_tie_is_found_repaired_and_stays_one_tensor(
    exported: tuple[str, dict[str, Path]], kind: str, tmp_path: Path
) -> None:
    arch, files = exported
    source, to = files[kind], tmp_path / "tied.onnx"
    before = scan(source)
    codes = {finding["code"] for finding in before["findings"]}
    assert codes & ({"TIE301"} if kind == "plain" else {"TIE202", "TIE201"}), before["findings"]
    if kind != "plain":
        assert before["summary"]["n_bytes_duplicate"] >= 300 * 32 * 4
        assert len(big_tables(source)) == 2
    result = CliRunner().invoke(main, ["apply", str(source), "--scheme", "dedup", "--to", str(to)])
    assert result.exit_code == 0, result.output

    given, levels = feeds(arch), ort.GraphOptimizationLevel
    expected = run(source, given, levels.ORT_ENABLE_ALL)
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED):
        np.testing.assert_allclose(run(to, given, level), expected, rtol=0, atol=2e-5)
    after_runtime = tmp_path / "optimised.onnx"
    np.testing.assert_allclose(run(to, given, levels.ORT_ENABLE_ALL, after_runtime), expected, rtol=0, atol=2e-5)
    assert len(big_tables(to)) == 1
    assert len(big_tables(after_runtime)) == 1  # two where a Transpose(W) was left to be folded

    after = scan(to)
    assert after["summary"]["n_bytes_duplicate"] < 300 * 32 * 4  # shapes of a few integers may repeat
    assert not {finding["code"] for finding in after["findings"]} & {"TIE201", "TIE202", "TIE301"}


def test_parameters_are_counted_once_in_every_form(exported: tuple[str, dict[str, Path]]) -> None:
    """The forms agree with each other; the live count differs only by what exporters trim (masks, unused biases)."""
    arch, files = exported
    counts = {kind: scan(path)["summary"]["n_parameters"] for kind, path in files.items()}
    model = tiny_exports.live(arch)
    live = sum(parameter.numel() for parameter in model.parameters())
    assert counts["plain"] == counts["basic"] == counts["torchscript"], counts
    assert counts["plain"] <= live + 2 * 32 * 64, (counts, live)
