"""Every tensor message of a model, wherever it is: initializers, attributes, nested graphs, functions, training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor message of a model, wherever it is."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        yield from _in_nodes(function)
        for attribute in function.attribute_proto:
            yield from ([attribute.t] if attribute.HasField("t") else [])
    for info in model.training_info:
        yield from _in_graph(info.initialization)
        yield from _in_graph(info.algorithm)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph)


def _in_nodes(owner: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    for node in owner.node:
        if node.attribute:
            yield from _in_attributes(node)


def _in_attributes(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []:
            yield from (sparse.values, sparse.indices)
        for sparse in attribute.sparse_tensors:
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from _in_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _in_graph(graph)
