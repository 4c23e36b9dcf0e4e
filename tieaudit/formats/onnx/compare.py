"""Node by node: that a rewritten ONNX model differs from the original only where the plan allows it.

Compared without the tensors' bytes (those are the structural proof's business). A node counts as the same if its
serialized form is, once the names of planned weights are replaced by the name of what serves them. Everything that is
new must carry the tag `tieaudit.pattern`; everything that vanished must be the consumer, or a view node on the way to
the consumer, that a reported pattern replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.formats.onnx.read import parse
from tieaudit.formats.onnx.scopes import OVERRIDES_SINCE, Scope, first_output, subgraphs, walk_scopes
from tieaudit.formats.onnx.wire import Skeleton
from tieaudit.model import Model, make_id
from tieaudit.storage import FileStorage, blocks

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

TAG = "tieaudit.pattern"
"""Key of `NodeProto.metadata_props` on every node that a rewrite adds; the value names the pattern."""
BYPASS = "transpose_bypass"
"""The pattern that leaves the consumer as it is and takes the Transpose in front of it away."""
_EXTERNAL = 1  # TensorProto.DataLocation
_NEW_DOMAINS = frozenset({"com.microsoft"})
_N_MOST_PROBLEMS = 20

Place = tuple[str, str, str]
"""Part, scope and node of a consumer."""


@dataclass(frozen=True)
class Allowed:
    """What the plan and the format say may differ."""

    serving: Mapping[str, str]
    """Id of a planned weight → id of what serves it."""
    replaced: Mapping[Place, str] = field(default_factory=dict)
    """Consumers that a pattern replaced or changed → the pattern."""
    new_nodes: frozenset[Place] = frozenset()
    """Consumers that took their place."""
    vanished: frozenset[Place] = frozenset()
    """View nodes on the way to them, which may be gone or read something else."""
    new_weights: frozenset[str] = frozenset()
    """Ids that may appear."""
    moved: Mapping[tuple[str, str, str, int], str] = field(default_factory=dict)
    """Part, scope, node and slot of a use → id of the copy that it reads now."""


@dataclass(frozen=True)
class Side:
    """One file, parsed without its large tensors."""

    part: str
    path: Path
    model: ModelProto
    skeleton: Skeleton | None
    ids: frozenset[str]
    """Ids of the model's weights."""

    def id_of(self, scope: Scope, name: str) -> str | None:
        """The id of the weight that a name means in a scope, or None if it means something else."""
        owner = scope.owner_of(name)
        if owner is None:
            return None
        id = make_id(name, self.part, owner.name)
        return id if id in self.ids else None


def side_of(model: Model, part: str) -> Side:
    """The main file of one part. CorruptFile if it does not parse."""
    path = Path(next(one.paths[0] for one in model.parts if one.name == part))
    proto, source = parse(path)
    return Side(part, path, proto, source.skeleton, frozenset(model.by_id))


def differences(before: Model, after: Model, allowed: Allowed) -> list[str]:
    """What differs and may not, in sentences; at most a screenful. Cost: linear in the nodes of both models."""
    names = [part.name for part in before.parts]
    if names != [part.name for part in after.parts]:
        return [f"expected the parts {names}, found {[part.name for part in after.parts]}"]
    found: list[str] = []
    for name in names:
        found.extend(_part(side_of(before, name), side_of(after, name), allowed))
    return found[:_N_MOST_PROBLEMS]


def _part(one: Side, other: Side, allowed: Allowed) -> Iterator[str]:
    where = f"{one.part}: " if one.part else ""
    yield from (f"{where}{problem}" for problem in _model_fields(one, other))
    before, after = ({scope.name: scope for scope in walk_scopes(side.model)} for side in (one, other))
    for name in {**before, **after}:
        if name not in before or name not in after:
            yield f"{where}the graph {name!r} exists only {'before' if name in before else 'afterwards'}"
            continue
        for problem in _scope(_Pair(one, other, before[name], after[name], allowed)):
            yield f"{where}{f'in {name}: ' if name else ''}{problem}"


def _model_fields(one: Side, other: Side) -> Iterator[str]:
    a, b = one.model, other.model
    for field_name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if getattr(a, field_name) != getattr(b, field_name):
            yield f"the field {field_name} changed"
    if b.ir_version < a.ir_version:
        yield f"the IR version fell from {a.ir_version} to {b.ir_version}"
    versions = {entry.domain: entry.version for entry in a.opset_import}
    for entry in b.opset_import:
        if entry.domain not in versions and entry.domain not in _NEW_DOMAINS:
            yield f"the operator set {entry.domain!r} was added"
        elif versions.pop(entry.domain, entry.version) != entry.version:
            yield f"the version of the operator set {entry.domain!r} changed"
    yield from (f"the operator set {domain!r} was removed" for domain in versions)
    notes = [{p.key: p.value for p in m.metadata_props if not p.key.startswith("tieaudit.")} for m in (a, b)]
    if notes[0] != notes[1]:
        yield "the model's metadata changed"
    if [t.SerializeToString() for t in a.training_info] != [t.SerializeToString() for t in b.training_info]:
        yield "the training information changed"
    for f, g in zip(a.functions, b.functions, strict=False):
        if (f.domain, f.name, list(f.input), list(f.output)) != (g.domain, g.name, list(g.input), list(g.output)):
            yield f"the signature of the function {f.domain}:{f.name} changed"


@dataclass(frozen=True)
class _Pair:
    one: Side
    other: Side
    before: Scope
    after: Scope
    allowed: Allowed

    def place(self, node: NodeProto) -> Place:
        return (self.one.part, self.before.name, first_output(node))


def _scope(pair: _Pair) -> Iterator[str]:
    if pair.before.graph is not None and pair.after.graph is not None:
        listed = pair.before.parent is None and pair.one.model.ir_version < OVERRIDES_SINCE
        yield from _graph_fields(pair.before.graph, pair.after.graph, listed)
        yield from _weights(pair)
    yield from _nodes(pair)


def _graph_fields(a: GraphProto, b: GraphProto, listed: bool) -> Iterator[str]:
    """`listed`: the inputs name every initializer too, and those of initializers that are gone go with them."""
    gone = {tensor.name for tensor in a.initializer} - {tensor.name for tensor in b.initializer} if listed else set()
    for side, before in (("input", [v for v in a.input if v.name not in gone]), ("output", list(a.output))):
        if [v.SerializeToString() for v in before] != [v.SerializeToString() for v in getattr(b, side)]:
            yield f"the graph's {side}s changed"
    types = {value.name: value for value in b.value_info}
    for value in a.value_info:
        if value.name in types and types[value.name] != value:
            yield f"the type of the value {value.name} changed"
    if a.name != b.name or a.doc_string != b.doc_string:
        yield "the graph's name or description changed"


def _weights(pair: _Pair) -> Iterator[str]:
    """Initializers that came or went without leave."""
    names = []
    for side, scope in ((pair.one, pair.before), (pair.other, pair.after)):
        assert scope.graph is not None
        tensors = [*scope.graph.initializer, *(sparse.values for sparse in scope.graph.sparse_initializer)]
        names.append({make_id(tensor.name, side.part, scope.name): tensor.name for tensor in tensors})
    for id in names[0].keys() - names[1].keys() - pair.allowed.serving.keys():
        yield f"the initializer {id} is gone"
    for id in names[1].keys() - names[0].keys() - pair.allowed.new_weights - set(pair.allowed.serving.values()):
        if not _only_for_patterns(pair.after, names[1][id]):
            yield f"the initializer {id} is new and not only read by a pattern"


def _only_for_patterns(scope: Scope, name: str) -> bool:
    readers = [node for node in _all_nodes(scope.nodes) if name in node.input]
    return bool(readers) and all(tag(node) for node in readers) and name not in scope.outputs


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for _, graph in subgraphs(node):
            yield from _all_nodes(graph.node)


def tag(node: NodeProto) -> str:
    """The pattern that made a node, or ''. Before IR version 10 nodes have no metadata: then the doc string says it."""
    if node.doc_string.startswith(f"{TAG}="):
        return node.doc_string.removeprefix(f"{TAG}=")
    return next((entry.value for entry in node.metadata_props if entry.key == TAG), "")


def _nodes(pair: _Pair) -> Iterator[str]:
    """The nodes that are the same must also be in the same order."""
    allowed = pair.allowed
    makers = {first_output(node): node for node in pair.after.nodes}
    makers_before = {first_output(node): node for node in pair.before.nodes}
    constants = allowed.serving.keys() | set(allowed.serving.values()) | allowed.new_weights
    bypassed = {place for place, pattern in allowed.replaced.items() if pattern == BYPASS}
    kept, loose = [], set()
    for node in pair.before.nodes:
        place, now = pair.place(node), makers.get(first_output(node))
        if place in allowed.vanished or place in bypassed:
            if now is None or now.op_type != node.op_type:
                continue
            loose.add(first_output(node))
        elif place in allowed.replaced or (now is not None and _turned_into_identity(node, now)):
            continue
        if not _holds(pair.one, pair.before, node, constants):
            kept.append(node)
    stayed = []
    for node in pair.after.nodes:
        place, was = pair.place(node), makers_before.get(first_output(node))
        # a tag alone is no leave: it may be from an earlier time, on a node that must not change now
        added = tag(node) and (was is None or place in allowed.replaced or _turned_into_identity(was, node))
        replacement = (added or place in allowed.new_nodes) and first_output(node) not in loose
        if not (replacement or _holds(pair.other, pair.after, node, constants)):
            stayed.append(node)
    yield from _sequence(pair, kept, stayed, loose)


def _turned_into_identity(was: NodeProto, now: NodeProto) -> bool:
    """A Transpose of a weight that is a graph output too; that it shows the same is compared through its view."""
    return was.op_type == "Transpose" and now.op_type == "Identity" and tag(now) == BYPASS


def _holds(side: Side, scope: Scope, node: NodeProto, ids: Iterable[str]) -> bool:
    """Whether the node is a Constant for one of these weights: its bytes are compared elsewhere."""
    return node.op_type == "Constant" and make_id(first_output(node), side.part, scope.name) in ids


def _sequence(pair: _Pair, kept: Sequence[NodeProto], stayed: Sequence[NodeProto], loose: set[str]) -> Iterator[str]:
    """`loose`: nodes whose inputs may differ, because the structural proof has compared what they see."""
    served = pair.allowed.serving

    def name_before(name: str, node: NodeProto, slot: int) -> str:
        if first_output(node) in loose:
            return ""
        id = pair.one.id_of(pair.before, name)
        copy = pair.allowed.moved.get((*pair.place(node), slot))
        return name if id is None else f"weight {copy or served.get(id, id)}"

    def name_after(name: str, node: NodeProto, slot: int) -> str:
        if first_output(node) in loose:
            return ""
        id = pair.other.id_of(pair.after, name)
        return name if id is None else f"weight {id}"

    for a, b in zip(kept, stayed, strict=False):
        if first_output(a) != first_output(b):
            yield f"expected the node that makes {first_output(a)}, found the one that makes {first_output(b)}"
            return
        if _form(a, pair.one, name_before) != _form(b, pair.other, name_after):
            yield f"the node {a.op_type} that makes {first_output(a)} changed"
    for node in kept[len(stayed) :]:
        yield f"the node {node.op_type} that makes {first_output(node)} is gone"
    for node in stayed[len(kept) :]:
        yield f"the node {node.op_type} that makes {first_output(node)} is new and carries no pattern's tag"


def _form(node: NodeProto, side: Side, rename: Callable[[str, NodeProto, int], str]) -> bytes:
    """A node's serialized form, with weights by id, without subgraphs (compared by themselves), tensors by digest."""
    import onnx

    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    del plain.input[:]
    plain.input.extend(rename(name, node, slot) if name else "" for slot, name in enumerate(node.input))
    for attribute in plain.attribute:
        if attribute.HasField("g"):
            attribute.g.Clear()
        for graph in attribute.graphs:
            graph.Clear()
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            _digest_in_place(tensor, side)
    return bytes(plain.SerializeToString(deterministic=True))


def _digest_in_place(tensor: TensorProto, side: Side) -> None:
    """Stand a digest of the bytes for a left-out raw_data, whose token differs from file to file."""
    if tensor.data_location == _EXTERNAL:
        return
    place = side.skeleton.place(tensor.raw_data) if side.skeleton is not None else None
    if place is not None:
        running = hashlib.sha256()
        for block in blocks(FileStorage(str(side.path), *place)):
            running.update(block)
        tensor.raw_data = running.digest()
