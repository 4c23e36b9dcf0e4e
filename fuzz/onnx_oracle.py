"""A second, plain reading of an ONNX model with the library: what ours is compared with.

It shares no code with tieaudit. Scopes are named as the documentation says; functions are not entered by uses.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, NamedTuple

VIEWS = frozenset("Identity Transpose Cast Reshape Squeeze Unsqueeze Flatten DequantizeLinear".split())
Use = tuple[str, str, str, str, str, int]
"""(scope and name of the weight, scope, operation and node of the consumer, slot)."""


class Graph(NamedTuple):
    """One namespace of the model."""

    name: str
    body: Any
    parent: Graph | None
    is_function: bool


def graphs(model: Any) -> list[Graph]:
    """The main graph, every body inside it, then the functions, each before what it holds."""
    found: list[Graph] = []
    taken: Counter[str] = Counter()

    def unique(name: str) -> str:
        if len(name) > 2000:
            name = f"{name[:1900]}…{hashlib.sha256(name.encode()).hexdigest()[:32]}"
        taken[name] += 1
        return name if taken[name] == 1 else unique(f"{name}~{taken[name]}")

    def visit(graph: Graph) -> None:
        found.append(graph)
        names = Counter(node.name for node in graph.body.node if node.name)
        inner = []
        for index, node in enumerate(graph.body.node):
            outputs = [name for name in node.output if name]
            handle = node.name if names[node.name] == 1 else outputs[0] if outputs else f"{node.op_type}#{index}"
            for attribute in node.attribute:
                bodies = [(attribute.name, attribute.g)] if attribute.HasField("g") else []
                bodies += [(f"{attribute.name}[{i}]", body) for i, body in enumerate(attribute.graphs)]
                for step, body in bodies:
                    name = unique(f"{graph.name}/{handle}.{step}" if graph.name else f"{handle}.{step}")
                    inner.append(Graph(name, body, graph, False))
        for one in inner:
            visit(one)

    visit(Graph(unique(""), model.graph, None, False))
    for function in model.functions:
        overload = f":{function.overload}" if function.overload else ""
        visit(Graph(unique(f"function:{function.domain}:{function.name}{overload}"), function, None, True))
    return found


def tensors(found: list[Graph]) -> dict[tuple[str, str], Any]:
    """(scope, name) → TensorProto or SparseTensorProto; the last of one name wins."""
    held: dict[tuple[str, str], Any] = {}
    for graph in found:
        if not graph.is_function:
            held.update({(graph.name, tensor.name): tensor for tensor in graph.body.initializer})
            held.update({(graph.name, sparse.values.name): sparse for sparse in graph.body.sparse_initializer})
        for node in graph.body.node:
            outputs = [name for name in node.output if name]
            if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or not outputs:
                continue
            by_name: dict[str, Any] = {}
            for attribute in node.attribute:
                by_name.setdefault(attribute.name, attribute)
            value = by_name.get("value", by_name.get("sparse_value"))
            if value is not None and not value.ref_attr_name:
                is_sparse = value.HasField("sparse_tensor")
                held[graph.name, outputs[0]] = value.sparse_tensor if is_sparse else value.t
    return {key: tensor for key, tensor in held.items() if key[1]}


def uses(found: list[Graph], weights: set[tuple[str, str]]) -> set[Use]:
    """Every consumption of every weight, behind the nodes that only re-arrange it."""
    readers: dict[tuple[str, str], list[tuple[Graph, Any, int]]] = {}
    returned: dict[tuple[str, str], list[tuple[Graph, str]]] = {}
    own = {graph.name: _own_names(graph) for graph in found}

    def resolve(graph: Graph | None, name: str) -> tuple[str, str] | None:
        while graph is not None and name:
            if name in own[graph.name]:
                return graph.name, name
            graph = graph.parent
        return None

    for graph in found:
        for node in graph.body.node:
            for slot, name in enumerate(node.input):
                if (value := resolve(graph, name)) is not None:
                    readers.setdefault(value, []).append((graph, node, slot))
        for item in graph.body.output:
            name = item if graph.is_function else item.name
            if (value := resolve(graph, name)) is not None:
                returned.setdefault(value, []).append((graph, name))
    result: set[Use] = set()
    for weight in weights:
        pending, met = [weight], set()
        while pending:
            value = pending.pop()
            if value in met:
                continue
            met.add(value)
            for graph, name in returned.get(value, ()):
                result.add((*weight, graph.name, "output", f"@{name}", 0))
            for graph, node, slot in readers.get(value, ()):
                default = node.domain in ("", "ai.onnx")
                op = node.op_type if default else f"{node.domain}.{node.op_type}"
                outputs = [name for name in node.output if name]
                passes = default and node.op_type in VIEWS or op == "com.microsoft.DequantizeLinear"
                if passes and slot == 0 and outputs:
                    pending.append((graph.name, outputs[0]))
                else:
                    result.add((*weight, graph.name, op, outputs[0] if outputs else node.op_type, slot))
    return result


def _own_names(graph: Graph) -> set[str]:
    names = {name for node in graph.body.node for name in node.output}
    if graph.is_function:
        return names | set(graph.body.input) - {""}
    names |= {info.name for info in graph.body.input} | {tensor.name for tensor in graph.body.initializer}
    return (names | {sparse.values.name for sparse in graph.body.sparse_initializer}) - {""}
