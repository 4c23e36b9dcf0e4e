"""Scopes of an ONNX model: the main graph, the bodies nested in its nodes, and model-local functions.

Reader, surgery and verifier name subgraphs through this file only, so that they always mean the same one. A scope's
name is the '/'-joined path of `<handle>.<attribute>` from the main graph (''), e.g. `If_0.then_branch/loop1.body`;
the i-th member of a GRAPHS attribute is `<attribute>[i]`. A function body is `function:<domain>:<name>` (with
`:<overload>` if it has one). Beyond 2000 characters it is cut to 1900, with … and 32 digits of its sha256 behind them.

It refuses graphs nested more deeply than `MAX_DEPTH`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tieaudit.errors import CorruptFile

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

MAX_DEPTH = 100
"""Levels of subgraphs that are followed; real models use at most three or four."""
_N_MOST_PATH = 2000
"""Characters of a scope's name: every weight's id holds it, so a name of a megabyte would be stored for each weight."""


OVERRIDES_SINCE = 4
"""IR version from which listing an initializer as an input is a choice, which lets a caller replace it.

Before, every initializer had to be listed (onnx.checker still says so), and ONNX Runtime
takes no value for one (Graph::CanOverrideInitializer).
"""


@dataclass(frozen=True, eq=False)
class Scope:
    """One namespace of values: a graph or a function body."""

    name: str
    """Path from the main graph; '' for the main graph itself."""
    nodes: Sequence[NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graph: GraphProto | None
    """None for a function body."""
    function: FunctionProto | None = None
    parent: Scope | None = None
    """The scope that encloses it; None for the main graph and for functions, which see no outer names."""
    owner: NodeProto | None = None
    """The node of the parent whose attribute holds this graph."""
    attribute: str = ""
    """Name of that attribute, with `[i]` for a member of a GRAPHS attribute."""
    depth: int = 0
    handles: tuple[str, ...] = field(default=(), repr=False)
    """`node_handle` of each node."""

    @cached_property
    def own_names(self) -> frozenset[str]:
        """Every value name that this scope defines itself and that therefore hides an outer one."""
        names = set(self.inputs)
        names.update(output for node in self.nodes for output in node.output)
        if self.graph is not None:
            names.update(tensor.name for tensor in self.graph.initializer)
            names.update(tensor.values.name for tensor in self.graph.sparse_initializer)
        names.discard("")
        return frozenset(names)

    @cached_property
    def input_slots(self) -> dict[str, int]:
        """Input name → its number; old exporters list thousands of initializers as inputs."""
        return {name: slot for slot, name in enumerate(self.inputs)}

    @cached_property
    def output_names(self) -> frozenset[str]:
        """The outputs as a set."""
        return frozenset(self.outputs)

    def owner_of(self, name: str) -> Scope | None:
        """The innermost scope from here outwards that defines `name`, or None if nobody does."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.own_names:
                return scope
            scope = scope.parent
        return None


def first_output(node: NodeProto) -> str:
    """The first non-empty output name of a node, or ''."""
    return str(next((name for name in node.output if name), ""))


def node_handle(node: NodeProto, index: int, unique_names: frozenset[str] | set[str]) -> str:
    """How a node is named in a scope path: its name where unique in its graph, else its first output, else op#index."""
    if node.name and node.name in unique_names:
        return str(node.name)
    return first_output(node) or f"{node.op_type}#{index}"


def node_handles(nodes: Sequence[NodeProto]) -> tuple[str, ...]:
    """`node_handle` of every node of one graph. Cost: linear."""
    counts = Counter(node.name for node in nodes if node.name)
    unique = {name for name, count in counts.items() if count == 1}
    return tuple(node_handle(node, index, unique) for index, node in enumerate(nodes))


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """(attribute, graph) of every body of a node, in the order of the attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for index, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}[{index}]", graph


def function_scope(function: FunctionProto) -> str:
    """The scope name of a model-local function's body."""
    overload = getattr(function, "overload", "")  # the field exists from IR version 10 on
    return f"function:{function.domain}:{function.name}" + (f":{overload}" if overload else "")


def walk_scopes(model: ModelProto, where: str = "") -> list[Scope]:
    """All scopes of a model, a scope always before those nested in it, functions last.

    Two bodies whose paths would be equal (odd node names) are told apart by `~2`, `~3` … at the end.
    Raises CorruptFile (prefixed by `where`, the file) beyond `MAX_DEPTH`. Cost: linear in the nodes.
    """
    taken: Counter[str] = Counter()
    found: list[Scope] = []
    main = _graph_scope("", model.graph, None, None, "", taken)
    _descend([main], found, taken, where)
    for function in model.functions:
        scope = Scope(
            _unique(function_scope(function), taken),
            function.node,
            tuple(function.input),
            tuple(function.output),
            None,
            function,
            handles=node_handles(function.node),
        )
        _descend([scope], found, taken, where)
    return found


def _descend(pending: list[Scope], found: list[Scope], taken: Counter[str], where: str) -> None:
    while pending:
        scope = pending.pop()
        found.append(scope)
        nested = []
        for node, handle in zip(scope.nodes, scope.handles, strict=True):
            if not node.attribute:
                continue
            for attribute, graph in subgraphs(node):
                if scope.depth + 1 > MAX_DEPTH:
                    raise CorruptFile(
                        f"{where}: expected at most {MAX_DEPTH} levels of nested graphs, found more, in node {handle!r}"
                    )
                step = f"{handle}.{attribute}"
                path = f"{scope.name}/{step}" if scope.name else step
                nested.append(_graph_scope(path, graph, scope, node, attribute, taken))
        pending.extend(reversed(nested))


def _graph_scope(
    path: str, graph: GraphProto, parent: Scope | None, owner: NodeProto | None, attribute: str, taken: Counter[str]
) -> Scope:
    return Scope(
        _unique(path, taken),
        graph.node,
        tuple(value.name for value in graph.input),
        tuple(value.name for value in graph.output),
        graph,
        None,
        parent,
        owner,
        attribute,
        parent.depth + 1 if parent is not None else 0,
        node_handles(graph.node),
    )


def _unique(path: str, taken: Counter[str]) -> str:
    if len(path) > _N_MOST_PATH:
        digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        path = f"{path[: _N_MOST_PATH - 100]}…{digest}"
    taken[path] += 1
    return path if taken[path] == 1 else _unique(f"{path}~{taken[path]}", taken)


def scope_named(scopes: Iterable[Scope], name: str) -> Scope | None:
    """The scope called `name`, or None."""
    return next((scope for scope in scopes if scope.name == name), None)
