"""Small ONNX models made by hand, for tests of the stages after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

V, D = 60, 8


def table(seed: int = 0, shape: tuple[int, ...] = (V, D)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def language_model(path: Path, embedding: np.ndarray, head: np.ndarray | None, *, external: bool = False) -> Path:
    """ids → Gather(embedding) → tanh → MatMul(head) → logits. No head: the embedding is read through a Transpose."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    n_rows = len(embedding)
    initializers = [numpy_helper.from_array(embedding, "wte.weight")]
    nodes = [helper.make_node("Gather", ["wte.weight", "ids"], ["x"]), helper.make_node("Tanh", ["x"], ["h"])]
    if head is None:
        nodes.append(helper.make_node("Transpose", ["wte.weight"], ["wte_T"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["h", "wte_T"], ["logits"]))
    else:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(head), "lm_head.weight_T"))
        nodes.append(helper.make_node("MatMul", ["h", "lm_head.weight_T"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", n_rows])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options: dict[str, Any] = {}
    if external:
        options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 0}
    onnx.save(model, str(path), **options)
    return path


def lost(path: Path, **options: Any) -> Path:
    """A tie that got lost: the head is a transposed copy of the embedding."""
    return language_model(path, table(), table().T, **options)


def untied(path: Path, **options: Any) -> Path:
    """Never tied: the head is another matrix."""
    return language_model(path, table(), table(1).T, **options)
