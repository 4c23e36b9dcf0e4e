"""How many ids a model's integer inputs may hold: the rows of the tables that they index. For making valid inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.errors import CorruptFile
from tieaudit.formats.onnx.read import parse
from tieaudit.formats.onnx.scopes import Scope, subgraphs, walk_scopes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SAME_IDS = frozenset(
    {
        "Identity",
        "Cast",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Transpose",
        "Expand",
        "Slice",
        "Tile",
        "Split",
        "Gather",
    }
)
"""Operations whose result holds only ids of their first input."""
_SAME_TABLE = frozenset({"Identity", "Cast", "DequantizeLinear"})
"""Operations whose result has as many rows as their first input."""
_TABLES_OF = {"EmbedLayerNormalization": ((0, 2), (1, 4), (8, 3)), "GatherBlockQuantized": ((1, 0),)}
"""Contrib operation → (slot of the ids, slot of the table). Source: ONNX Runtime's ContribOperators.md."""
_GENERATORS = frozenset({"BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"})

Roots = frozenset[str]
_NONE: Roots = frozenset()


def id_limits(path: Path) -> Mapping[str, int]:
    """Input name → smallest number of rows among the tables that it indexes; nothing for other inputs.

    Follows ids through shape operations, If / Loop / Scan bodies and the bodies of generation nodes. Cost: linear in
    the nodes; tensors are not read. A file that cannot be walked gives no limits.
    """
    try:
        return _walk(parse(path)[0])
    except CorruptFile:
        return {}


def _walk(model: ModelProto) -> dict[str, int]:
    scopes = walk_scopes(model)
    initializers = {tensor.name for tensor in model.graph.initializer}
    ids: dict[str, dict[str, Roots]] = {scope.name: {} for scope in scopes}
    rows: dict[str, dict[str, tuple[int, ...]]] = {scope.name: _shapes(scope) for scope in scopes}
    ids[""] = {value.name: frozenset({value.name}) for value in model.graph.input if value.name not in initializers}
    children = {id(scope.graph): scope for scope in scopes if scope.graph is not None}
    found: dict[str, int] = {}
    for scope in scopes:
        for node in scope.nodes:
            _visit(node, scope, ids, rows, found)
            for _, graph in subgraphs(node):
                if id(graph) in children:
                    _enter(node, children[id(graph)], scope, ids)
    return found


def _shapes(scope: Scope) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    if scope.graph is not None:
        found.update({tensor.name: tuple(tensor.dims) for tensor in scope.graph.initializer})
    for node in scope.nodes:
        if node.op_type == "Constant" and node.output:
            found.update((node.output[0], tuple(a.t.dims)) for a in node.attribute if a.name == "value")
    return found


def _ids_of(name: str, scope: Scope | None, ids: Mapping[str, Mapping[str, Roots]]) -> Roots:
    while scope is not None:
        if name in ids[scope.name]:
            return ids[scope.name][name]
        if name in scope.own_names:
            return _NONE
        scope = scope.parent
    return _NONE


def _shape_of(
    name: str, scope: Scope | None, rows: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> tuple[int, ...] | None:
    while scope is not None:
        if name in rows[scope.name]:
            return rows[scope.name][name]
        if name in scope.own_names:
            return None
        scope = scope.parent
    return None


def _visit(
    node: NodeProto,
    scope: Scope,
    ids: dict[str, dict[str, Roots]],
    rows: dict[str, dict[str, tuple[int, ...]]],
    found: dict[str, int],
) -> None:
    inputs: Sequence[str] = node.input
    if not inputs or not node.output:
        return
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    pairs = _TABLES_OF.get(node.op_type, ((1, 0),) if node.op_type == "Gather" else ())
    for ids_slot, table_slot in pairs:
        if max(ids_slot, table_slot) < len(inputs):
            shape = _shape_of(inputs[table_slot], scope, rows)
            roots = _ids_of(inputs[ids_slot], scope, ids)
            if shape and -len(shape) <= axis < len(shape):
                for root in roots:
                    found[root] = min(found.get(root, shape[axis]), shape[axis])
    first = _shape_of(inputs[0], scope, rows)
    if first is not None and node.op_type in _SAME_TABLE:
        rows[scope.name][node.output[0]] = first
    elif first is not None and node.op_type == "Transpose":
        perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), tuple(reversed(range(len(first)))))
        if sorted(perm) == list(range(len(first))):
            rows[scope.name][node.output[0]] = tuple(first[i] for i in perm)
    merged = _ids_of(inputs[0], scope, ids) if node.op_type in _SAME_IDS else _NONE
    if node.op_type in ("Concat", "Where", "Max", "Min"):
        merged = frozenset().union(*(_ids_of(name, scope, ids) for name in inputs))
    if merged:
        ids[scope.name].update({output: merged for output in node.output if output})


def _enter(node: NodeProto, inner: Scope, outer: Scope, ids: dict[str, dict[str, Roots]]) -> None:
    """Give the formal inputs of a body the ids of what the node passes in."""
    passed = list(node.input)
    formal = list(inner.inputs)
    if node.op_type in _GENERATORS:
        passed, formal = passed[:1], formal[:1]  # the body's first input is the tokens
    elif node.op_type not in ("Loop", "Scan"):
        return
    for name, value in zip(formal, passed, strict=False):
        roots = _ids_of(value, outer, ids)
        if roots:
            ids[inner.name][name] = roots
