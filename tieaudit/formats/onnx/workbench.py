"""The files of a model taken apart, so that nodes and names can move while everything else stays as it was.

A `Piece` is one file without its large tensors (they stay in the file and are known by a token, see `wire.py`); a
`Body` is one graph of it with an index of who reads which name; an `Op` is one node. Nothing here decides what to
change, and nothing is written: `flush` only puts the changed lists back into the protobuf message.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tieaudit.formats.onnx.everywhere import all_tensors
from tieaudit.formats.onnx.inference import inferred
from tieaudit.formats.onnx.read import parse
from tieaudit.formats.onnx.scopes import Scope, first_output, walk_scopes
from tieaudit.formats.onnx.tensors import locate
from tieaudit.formats.onnx.values import DEFAULT_DOMAINS, op_name
from tieaudit.formats.onnx.wire import N_BYTES_INLINE
from tieaudit.storage import FileStorage, Storage

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

    from tieaudit.model import Part

EXTERNAL = 1  # TensorProto.DataLocation


class Op:
    """One node, with an identity that survives moving it."""

    __slots__ = ("body", "proto")

    def __init__(self, proto: NodeProto, body: Body) -> None:
        self.proto = proto
        self.body = body

    @property
    def type(self) -> str:
        return op_name(self.proto)

    @property
    def handle(self) -> str:
        """The name under which uses speak of it."""
        return first_output(self.proto)


class Site(NamedTuple):
    """One input slot of one node."""

    op: Op
    slot: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.op.body.name, self.op.handle, self.slot


class Body:
    """One graph: its nodes and initializers in order, and who reads what."""

    def __init__(self, scope: Scope, graph: GraphProto, parent: Body | None, owner: Op | None) -> None:
        self.name = scope.name
        self.graph = graph
        self.parent = parent
        self.owner = owner
        self.children: list[Body] = []
        self.ops = [Op(proto, self) for proto in scope.nodes]
        self.tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = frozenset(scope.inputs)
        self.outputs = frozenset(scope.outputs)
        self.sparse = frozenset(tensor.values.name for tensor in graph.sparse_initializer)
        self.reads: dict[str, list[Site]] = {}
        self.makers: dict[str, Op] = {}
        self.gone: set[str] = set()
        """Names whose value_info goes with them."""
        self.new_types: list[ValueInfoProto] = []
        self.changed = False
        for op in self.ops:
            self._index(op)

    def _index(self, op: Op) -> None:
        for slot, name in enumerate(op.proto.input):
            if name:
                self.reads.setdefault(name, []).append(Site(op, slot))
        for name in op.proto.output:
            if name:
                self.makers[name] = op
                self.gone.discard(name)

    def _forget(self, op: Op) -> None:
        for name in set(op.proto.input):
            if name:
                self.reads[name] = [site for site in self.reads[name] if site.op is not op]
        for name in op.proto.output:
            if name and self.makers.pop(name, None) is not None:
                self.gone.add(name)

    def defines(self, name: str) -> bool:
        """Whether the name means a value of this graph itself, so that it hides an outer one."""
        return name in self.tensors or name in self.makers or name in self.inputs or name in self.sparse

    def owner_of(self, name: str) -> Body | None:
        """The body whose value the name means here."""
        body: Body | None = self
        while body is not None and not body.defines(name):
            body = body.parent
        return body

    def ancestors(self) -> Iterator[Body]:
        """This body and those around it, inside out."""
        body: Body | None = self
        while body is not None:
            yield body
            body = body.parent

    def inner(self) -> Iterator[Body]:
        """All bodies nested in this one."""
        for child in self.children:
            yield child
            yield from child.inner()

    def _seeing(self, name: str) -> Iterator[Body]:
        yield self
        for child in self.children:
            if not child.defines(name):
                yield from child._seeing(name)

    def readers(self, name: str) -> list[Site]:
        """Every slot that reads this body's value of that name, here and in nested bodies."""
        return [site for body in self._seeing(name) for site in body.reads.get(name, ())]

    def returned(self, name: str) -> bool:
        """Whether this body, or one that sees the value, has it as a graph output."""
        return any(name in body.outputs for body in self._seeing(name))

    def set_input(self, site: Site, name: str) -> None:
        """Let one slot read another value."""
        op = site.op
        old = op.proto.input[site.slot]
        op.proto.input[site.slot] = name
        op.body.reads[old] = [other for other in op.body.reads[old] if other != site]
        op.body.reads.setdefault(name, []).append(site)

    def replace(self, op: Op, protos: Sequence[NodeProto]) -> list[Op]:
        """Put nodes in the place of one node; an empty sequence removes it."""
        at = next(index for index, other in enumerate(self.ops) if other is op)
        new = [Op(proto, self) for proto in protos]
        self._forget(op)
        self.ops[at : at + 1] = new
        for item in new:
            self._index(item)
        self.changed = True
        return new

    def insert_after(self, op: Op | None, proto: NodeProto) -> Op:
        """Add a node behind another one, or in front of all."""
        at = -1 if op is None else next(index for index, other in enumerate(self.ops) if other is op)
        new = Op(proto, self)
        self.ops.insert(at + 1, new)
        self._index(new)
        self.changed = True
        return new

    def add_tensor(self, tensor: TensorProto) -> None:
        """Add an initializer."""
        self.tensors[tensor.name] = tensor
        self.gone.discard(tensor.name)
        self.changed = True

    def drop_tensor(self, name: str) -> None:
        """Remove an initializer and what the graph says about it."""
        del self.tensors[name]
        self.gone.add(name)
        self.changed = True

    def sweep(self, name: str) -> None:
        """Remove the view nodes that made a value which nobody reads any more, and theirs."""
        op = self.makers.get(name)
        if op is None or op.type not in SWEPT or self.readers(name) or self.returned(name):
            return
        before = [source for source in op.proto.input if source]
        self.replace(op, ())
        for source in before:
            owner = self.owner_of(source)
            if owner is not None:
                owner.sweep(source)

    def flush(self) -> None:
        """Write the lists back into the graph. Nested bodies must be flushed first: this copies them."""
        if not self.changed:
            return
        ops = [op.proto for op in self.ops]
        del self.graph.node[:]
        self.graph.node.extend(ops)
        tensors = list(self.tensors.values())
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)
        kept = [value for value in self.graph.value_info if value.name not in self.gone]
        del self.graph.value_info[:]
        self.graph.value_info.extend([*kept, *self.new_types])
        if self.parent is None and any(value.name in self.gone for value in self.graph.input):
            # an initializer that had to be an input too, before IR version 4: see scopes.OVERRIDES_SINCE
            inputs = [value for value in self.graph.input if value.name not in self.gone]
            del self.graph.input[:]
            self.graph.input.extend(inputs)


SWEPT = frozenset({"Identity", "Transpose", "Cast", "Reshape"})


class Piece:
    """One ONNX file of the model."""

    def __init__(self, part: Part) -> None:
        self.part = part.name
        self.path = Path(part.paths[0])
        self.proto, self.source = parse(self.path)
        self._original = self.proto.SerializeToString()
        left_out = self.source.skeleton
        self.token = left_out.token if left_out is not None else os.urandom(24)
        resolved = str(self.path.resolve())
        places = left_out.places if left_out is not None else ()
        self.stored: list[Storage] = [FileStorage(resolved, at, size) for at, size in places]
        """What each token stands for, by its number."""
        self.outside: dict[int, str] = {}
        """Token number → external data file, relative to the file's folder, that it will be written to."""
        self.data_files = self._find_data_files()
        """(resolved path, location as written) of the data files that the part has before any edit."""
        self.bodies = _bodies(self.proto, str(self.path))
        self.names = _all_names(self.bodies.values())
        self.casts: dict[tuple[Op, str], str] = {}
        self.touched = False

    def _find_data_files(self) -> tuple[tuple[Path, str], ...]:
        for tensor in all_tensors(self.proto):
            if tensor.data_location == EXTERNAL:
                self.external(tensor)
        return tuple((path, location) for location, (path, _) in self.source.data_files.items())

    @cached_property
    def opset(self) -> int:
        """Version of the default operator set, 0 if it is not imported."""
        return max((item.version for item in self.proto.opset_import if item.domain in DEFAULT_DOMAINS), default=0)

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names that training information speaks of."""
        found: set[str] = set()
        for info in self.proto.training_info:
            for binding in (*info.initialization_binding, *info.update_binding):
                found.update((binding.key, binding.value))
            for graph in (info.initialization, info.algorithm):
                found.update(name for node in graph.node for name in (*node.input, *node.output))
        return frozenset(found)

    def fresh(self, wish: str) -> str:
        """A name that nothing in this file has, near the wished one."""
        name, count = wish, 1
        while name in self.names:
            name, count = f"{wish}_{count}", count + 1
        self.names.add(name)
        return name

    def import_domain(self, domain: str) -> None:
        """Import version 1 of an operator set, unless the model imports one."""
        if all(item.domain != domain for item in self.proto.opset_import):
            self.proto.opset_import.add(domain=domain, version=1)

    def put(self, tensor: TensorProto, storage: Storage, location: str | None = None) -> None:
        """Let a tensor hold other bytes: in the file, or in the external data file `location`."""
        for field in ("raw_data", "data_location"):
            tensor.ClearField(field)
        for field in ("external_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            del getattr(tensor, field)[:]
        if location is None and storage.n_bytes < N_BYTES_INLINE:
            tensor.raw_data = storage.read_ranges([(0, storage.n_bytes)])[0]
            return
        if location is not None:
            self.outside[len(self.stored)] = location
        tensor.raw_data = self.token + len(self.stored).to_bytes(8, "little")
        self.stored.append(storage)

    def token_number(self, raw: bytes) -> int | None:
        """The number of a token, or None for bytes that are data."""
        if len(raw) != len(self.token) + 8 or not raw.startswith(self.token):
            return None
        return int.from_bytes(raw[len(self.token) :], "little")

    def location_of(self, tensor: TensorProto) -> str | None:
        """The external data file of a tensor, as written, or None if it is inline."""
        if tensor.data_location == EXTERNAL:
            return str(next((item.value for item in tensor.external_data if item.key == "location"), ""))
        number = self.token_number(tensor.raw_data)
        return self.outside.get(number) if number is not None else None

    def external(self, tensor: TensorProto) -> Storage:
        """Where the bytes of a tensor with external data are. CorruptFile if they are not there."""
        return locate(tensor, self.source, tensor.name)[2]

    @cached_property
    def _types(self) -> dict[tuple[str, str], ValueInfoProto]:
        """Types of values: what the file says, else what onnx infers. Cost: one shape inference without tensors."""
        import onnx

        model = inferred(onnx.ModelProto.FromString(self._original))
        found: dict[tuple[str, str], ValueInfoProto] = {}
        for scope in walk_scopes(model):
            if scope.graph is not None:
                for value in (*scope.graph.value_info, *scope.graph.input, *scope.graph.output):
                    found[scope.name, value.name] = value
        return found

    def type_of(self, body: Body, name: str) -> ValueInfoProto | None:
        """What is known about the type of a value as seen from a body."""
        owner = body.owner_of(name)
        return self._types.get((owner.name, name)) if owner is not None else None

    def rank(self, body: Body, name: str) -> int | None:
        """Number of axes of a value, None if it cannot be told."""
        owner = body.owner_of(name)
        if owner is not None and name in owner.tensors:
            return len(owner.tensors[name].dims)
        value = self.type_of(body, name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        return len(value.type.tensor_type.shape.dim)

    def flush(self) -> None:
        """Put every changed list back into `proto`; afterwards the bodies must not be edited any more."""
        for body in reversed(self.bodies.values()):
            body.flush()


def _bodies(proto: ModelProto, where: str) -> dict[str, Body]:
    """Every graph by scope name, an outer one before those inside it."""
    found: dict[str, Body] = {}
    ops: dict[int, Op] = {}
    for scope in walk_scopes(proto, where):
        if scope.graph is None or (scope.parent is not None and scope.parent.name not in found):
            continue  # a function body, or nested in one: it sees no outer names and holds no initializer
        parent = found[scope.parent.name] if scope.parent is not None else None
        owner = ops[id(scope.owner)] if scope.owner is not None else None
        body = found[scope.name] = Body(scope, scope.graph, parent, owner)
        ops.update((id(op.proto), op) for op in body.ops)
        if parent is not None:
            parent.children.append(body)
    return found


def _all_names(bodies: Iterable[Body]) -> set[str]:
    names: set[str] = set()
    for body in bodies:
        names.update(body.tensors, body.inputs, body.outputs, body.sparse, body.makers, body.reads)
        names.update(op.proto.name for op in body.ops)
        names.update(value.name for value in body.graph.value_info)
    return names
