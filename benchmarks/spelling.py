"""Matrices → files, streamed: external-data ONNX, inline ONNX, safetensors. Memory: one block of one matrix.

The ONNX graph is made by the library without its weights; these are appended in wire format, in which a message may
be continued by more fields of a repeated one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import onnx
from onnx import TensorProto, helper

ALIGN_BYTES = 4096
"""External data begins at page boundaries, as ONNX Runtime needs it for mapping."""
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer, TensorProto.raw_data (onnx.proto)."""


class Sized(Protocol):
    """A float32 tensor whose contents come in blocks."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def n_bytes(self) -> int: ...

    def blocks(self) -> Iterator[bytes]: ...


def write_safetensors(path: Path, matrices: Sequence[Sized]) -> None:
    """One file; the header padded to 8 bytes, as the library does."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for one in matrices:
        header[one.name] = {"dtype": "F32", "shape": one.shape, "data_offsets": [begin, begin + one.n_bytes]}
        begin += one.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in matrices:
            file.writelines(one.blocks())


def write_external(path: Path, matrices: Sequence[Sized]) -> None:
    """The graph in `path`, all weights in `path`.data."""
    model = graph_of(matrices)
    with path.with_name(path.name + ".data").open("wb") as data:
        for one in matrices:
            begin = data.tell()
            data.writelines(one.blocks())
            tensor = _described(one)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": path.name + ".data", "offset": begin, "length": one.n_bytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
            data.truncate(-(-data.tell() // ALIGN_BYTES) * ALIGN_BYTES)
            data.seek(0, 2)
    path.write_bytes(model.SerializeToString())


def write_inline(path: Path, matrices: Sequence[Sized]) -> None:
    """Everything in one file, the weights as `raw_data`. ValueError above the 2 GiB of a protobuf message."""
    model = graph_of(matrices)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = []
    for one in matrices:
        tensor = _described(one).SerializeToString() + _key(_RAW_DATA) + _varint(one.n_bytes)
        heads.append(_key(_INITIALIZER) + _varint(len(tensor) + one.n_bytes) + tensor)
    n_graph = len(graph) + sum(len(head) + one.n_bytes for head, one in zip(heads, matrices, strict=True))
    if n_graph >= 2**31 - 1024:
        raise ValueError(f"expected less than 2 GiB for one protobuf message, found {n_graph} bytes")
    with path.open("wb") as file:
        file.write(model.SerializeToString() + _key(_GRAPH) + _varint(n_graph) + graph)
        for head, one in zip(heads, matrices, strict=True):
            file.write(head)
            file.writelines(one.blocks())


def graph_of(matrices: Sequence[Sized]) -> onnx.ModelProto:
    """The graph without its weights: a lookup in the first matrix if it is an embedding, then a chain of products."""
    nodes, inputs = [], []
    flowing = "x"
    for index, one in enumerate(matrices):
        last = index == len(matrices) - 1
        output = "y" if last else f"x{index}"
        if index == 0 and one.name.startswith("embed"):
            nodes.append(helper.make_node("Gather", [one.name, "ids"], [output], "embed"))
            inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]))
        else:
            if index == 0:
                inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", one.shape[0]]))
            nodes.append(helper.make_node("MatMul", [flowing, one.name], [output], one.name.removesuffix(".weight")))
        flowing = output
    rank = ["batch", "length"] if inputs[0].name == "ids" else ["batch"]
    y = helper.make_tensor_value_info(flowing, TensorProto.FLOAT, [*rank, matrices[-1].shape[-1]])
    graph = helper.make_graph(nodes, "chain", inputs, [y])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _described(one: Sized) -> TensorProto:
    return TensorProto(name=one.name, dims=one.shape, data_type=TensorProto.FLOAT)


def _key(field: int) -> bytes:
    """The tag of a length-delimited field."""
    return _varint(field << 3 | 2)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
