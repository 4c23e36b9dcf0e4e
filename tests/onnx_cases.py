"""Small ONNX graphs with planted ties, and how to edit and run them: for the tests of the surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tieaudit.change import Edit, Plan, Share, Written
from tieaudit.formats.onnx.edit import edit
from tieaudit.formats.onnx.read import load
from tieaudit.model import Member, Model
from tieaudit.view import AS_STORED, TRANSPOSED

V, D = 96, 16
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def table(kind: str = "float32", seed: int = 0, shape: tuple[int, int] = (V, D)) -> Any:
    """A random matrix."""
    values = np.random.default_rng(seed).standard_normal(shape) / 4
    return values.astype(NUMPY[kind])


def tensor(name: str, values: Any) -> TensorProto:
    """An initializer with the bytes of an array."""
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def value(name: str, kind: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), **attributes)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    tensors: Sequence[TensorProto] = (),
    *,
    opset: int = 18,
    ir_version: int = 10,
    check: bool = True,
) -> onnx.ModelProto:
    """A model that the checker accepts, com.microsoft imported if a node needs it."""
    domains = [helper.make_opsetid("", opset)]
    if any(item.domain == "com.microsoft" for item in nodes):
        domains.append(helper.make_opsetid("com.microsoft", 1))
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(tensors))
    made = helper.make_model(graph, opset_imports=domains, ir_version=ir_version)
    if check:
        onnx.checker.check_model(made)
    return made


def saved(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx", **options: Any) -> Model:
    """The model as tieaudit reads it from a file."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(folder / name), **options)
    return load(folder / name, (folder / name,))


def tie(*ids: str, turned: Sequence[str] = (), **more: Any) -> Share:
    """These weights are one; `turned` names those that are its transpose."""
    return Share(tuple(Member(id, TRANSPOSED if id in turned else AS_STORED) for id in ids), **more)


def plan(model: Model, *edits: Edit, **more: Any) -> Plan:
    settings: dict[str, Any] = {"target": "ort-cpu", "schemes": ("dedup",), "n_bytes_saved": 0, "lossless": True}
    return Plan(model.path, edits=tuple(edits), **(settings | more))


def rewritten(model: Model, dest: Path, *edits: Edit, **more: Any) -> tuple[Written, Model, onnx.ModelProto]:
    """Edit and read back; the checker and strict shape inference must accept the result."""
    written = edit(model, plan(model, *edits, **more), dest)
    files = tuple(dest / Path(part.paths[0]).name for part in model.parts)
    again = load(dest if len(files) > 1 else files[0], files)
    for file in files:
        onnx.checker.check_model(str(file))
        onnx.shape_inference.infer_shapes(onnx.load(str(file)), check_type=True, strict_mode=True)
    return written, again, onnx.load(str(files[0]))


def run(source: onnx.ModelProto | Path, feeds: Mapping[str, Any], level: int = 0, optimised: Path | None = None) -> Any:
    """Outputs under ONNX Runtime at an optimisation level (0 disable, 1 basic, 2 extended, 99 all)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    what = str(source) if isinstance(source, Path) else source.SerializeToString()
    session = onnxruntime.InferenceSession(what, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def n_large_copies(path: Path, n_elements: int = V * D) -> int:
    """How many tensors of a matrix's size a model file holds, in any graph."""
    return sum(weight.n_elements == n_elements for weight in load(path, (path,)).weights)
