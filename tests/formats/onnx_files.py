"""ONNX files by hand for the tests of the ONNX reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tieaudit.formats.onnx.read import load
from tieaudit.model import Model, Use, Weight


def tensor(name: str, array: Any, kind: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array, kind), name)


def rows(name: str, *shape: int) -> TensorProto:
    """Random float32 numbers, different for every name."""
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**32
    return tensor(name, np.random.default_rng(seed).standard_normal(shape))


def info(name: str, kind: int = TensorProto.FLOAT, rank: int = 2) -> Any:
    return helper.make_tensor_value_info(name, kind, [None] * rank)


def graph(
    nodes: Sequence[NodeProto],
    tensors: Sequence[TensorProto] = (),
    inputs: Sequence[Any] = (),
    outputs: Sequence[str] = ("y",),
) -> Any:
    made = [info(item) if isinstance(item, str) else item for item in inputs]
    return helper.make_graph(list(nodes), "g", made, [info(name) for name in outputs], list(tensors))


def save(path: Path, body: Any, functions: Sequence[Any] = ()) -> Path:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("mine", 1)]
    path.write_bytes(helper.make_model(body, opset_imports=opsets, functions=list(functions)).SerializeToString())
    return path


def read(path: Path) -> Model:
    return load(path, (path,))


def stored(weight: Weight) -> bytes:
    assert weight.storage is not None
    return weight.storage.read_ranges([(0, weight.n_bytes)])[0]


def the_use(model: Model, weight: str) -> Use:
    (use,) = model.uses_of[weight]
    return use


def ids(name: str = "ids") -> Any:
    return helper.make_tensor_value_info(name, TensorProto.INT64, [None, None])


__all__ = ["graph", "helper", "ids", "info", "onnx", "read", "rows", "save", "stored", "tensor", "the_use"]
