"""Replace the bytes of one small tensor inside an ONNX file: for tensors that are not a plain range of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.formats.onnx.scopes import Scope, walk_scopes

if TYPE_CHECKING:
    from onnx import TensorProto

_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def put_bytes(path: Path, scope: str, name: str, data: bytes) -> None:
    """Write `data` (canonical: row-major, little-endian) as the value of an initializer or Constant tensor.

    KeyError if the graph `scope` has no such tensor. Cost: reads and writes the whole file; external data stays.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    tensors = [t for one in walk_scopes(model, str(path)) if one.name == scope for t in _called(one, name)]
    if not tensors:
        raise KeyError(f"{path}: no tensor {name!r} in the graph {scope!r}")
    for field in _TYPED_FIELDS:
        tensors[0].ClearField(field)
    tensors[0].raw_data = data
    path.write_bytes(model.SerializeToString())


def _called(scope: Scope, name: str) -> Iterator[TensorProto]:
    if scope.graph is not None:
        yield from (tensor for tensor in scope.graph.initializer if tensor.name == name)
    for node in scope.nodes:
        if node.op_type == "Constant" and name in node.output:
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")
