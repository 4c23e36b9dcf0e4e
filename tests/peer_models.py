"""What the tests of peers' cases share: small graphs written to a file, what is found in them, and a proved dedup."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from tieaudit.cli import main
from tieaudit.equality import of_buffers
from tieaudit.find import find
from tieaudit.load import load_one
from tieaudit.scan import scan
from tieaudit.verdict import Found

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def random(*shape: int, seed: int = 0, kind: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(kind)


def tensors(weights: Mapping[str, Any]) -> list[TensorProto]:
    return [numpy_helper.from_array(np.array(values, order="C"), name) for name, values in weights.items()]


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Any],
    outputs: Sequence[str] | Mapping[str, int] = ("y",),
    inputs: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    **options: Any,
) -> Path:
    """A checked model at `path`; `inputs` gives element type and shape by name, default one row of three."""
    given = {"x": (FLOAT, [1, 3])} if inputs is None else inputs
    known = {name: np.shape(values) for name, values in weights.items()} | dict(shapes or {})
    kinds = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, FLOAT)
    made = cases.model_of(
        nodes,
        [cases.value(name, kind, shape) for name, (kind, shape) in given.items()],
        [cases.value(name, kind, known.get(name)) for name, kind in kinds.items()],
        tensors(weights),
        check=False,
        **options,
    )
    made = onnx.shape_inference.infer_shapes(made)  # the outputs' shapes, which the checker wants
    onnx.checker.check_model(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(made, str(path))
    return path


def branch(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Any], *outputs: str) -> onnx.GraphProto:
    """A body without inputs, for If."""
    return helper.make_graph(
        list(nodes), "body", [], [cases.value(name, FLOAT, None) for name in outputs], tensors(weights)
    )


def found(path: Path) -> Found:
    result = find(load_one(path))
    assert result.unreadable == {}
    return result


def measured(path: Path) -> list[set[str]]:
    """Ids of every class that is equal byte for byte, but stored apart."""
    return [set(tie.ids) for tie in found(path).ties if tie.origin == "measured"]


def shared(path: Path) -> list[set[str]]:
    """Ids of every class that is one stored tensor."""
    return [set(tie.ids) for tie in found(path).ties if tie.origin == "aliased"]


def codes(path: Path) -> list[str]:
    report = scan(load_one(path))
    assert report.crashed == ()
    return sorted({finding.code for finding in report.findings})


def unsure(path: Path) -> list[str]:
    report = scan(load_one(path))
    return sorted({one.code for one in report.cannot_tell})


def cli(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def applied(source: Path, *words: object, name: str = "") -> Path:
    """Where `apply --scheme dedup` delivered, proved by the tool itself."""
    to = source.parent / "out" / (name or source.name)
    result = cli("apply", source, "--scheme", "dedup", "--to", to, *words)
    assert result.exit_code == 0, result.output
    assert to.exists(), result.output
    return to


def nothing_to_do(source: Path) -> bool:
    result = cli("apply", source, "--scheme", "dedup", "--format", "json")
    assert result.exit_code == 0, result.output
    return not json.loads(result.output)["plan"]["edits"]


def assert_same_outputs(one: Path, other: Path, feeds: Mapping[str, Any], atol: float = 0.0) -> None:
    """Under ONNX Runtime, without optimisation and with all of it; by default to the bit."""
    for level in (0, 99):
        before, after = cases.run(one, feeds, level), cases.run(other, feeds, level)
        assert len(before) == len(after)
        for left, right in zip(before, after, strict=True):
            np.testing.assert_allclose(right, left, rtol=0, atol=atol)


def deduplicated(source: Path, feeds: Mapping[str, Any], atol: float = 0.0) -> onnx.ModelProto:
    """The delivered model: valid, with the same outputs, nothing left to do."""
    to = applied(source)
    onnx.checker.check_model(str(to))
    assert_same_outputs(source, to, feeds, atol)
    model = load_one(to)
    assert [tie for tie in find(model).ties if tie.origin == "measured" and not of_buffers(model, tie)] == []
    assert nothing_to_do(to)
    return onnx.load(str(to))


def initializers(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
