"""Cut the neighbourhood of one rewritten operation out of a model, so that it can be run alone.

A region is the operation that makes one named value, the nodes that a pattern put around it, and the view nodes
between weights and it; what else flows in becomes an input. bfloat16 is widened to fp32, because ONNX Runtime's CPU
provider has no matrix product for it: the values are exact, and the arithmetic is what is being compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tieaudit.errors import CorruptFile
from tieaudit.formats.onnx.compare import Side, side_of, tag
from tieaudit.formats.onnx.inference import inferred
from tieaudit.formats.onnx.scopes import Scope, scope_named, walk_scopes
from tieaudit.formats.onnx.tensors import DTYPES
from tieaudit.formats.onnx.uses import VIEW_OPS
from tieaudit.formats.onnx.values import op_name
from tieaudit.model import Model, Weight
from tieaudit.storage import blocks

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto, TypeProto

_NUMBERS = {name: number for number, name in DTYPES.items()}
_BFLOAT16, _FLOAT = 16, 1


@dataclass(frozen=True)
class Region:
    """Nodes in order, and what flows in."""

    nodes: tuple[NodeProto, ...]
    weights: Mapping[str, Weight]
    """By the name under which the nodes read them."""
    inputs: tuple[str, ...]
    """Other values that flow in, in order of first use."""


class Cutter:
    """Cuts regions out of one part of a model; parses it once."""

    def __init__(self, model: Model, part: str) -> None:
        self.model = model
        self.side: Side = side_of(model, part)
        self._scopes = walk_scopes(self.side.model)

    @cached_property
    def types(self) -> Mapping[tuple[str, str], TypeProto]:
        """Types of values by (scope, name), as declared or as onnx infers them without the tensors' values."""
        model = inferred(self.side.model)
        return {
            (scope.name, value.name): value.type
            for scope in walk_scopes(model)
            if scope.graph is not None
            for value in (*scope.graph.input, *scope.graph.output, *scope.graph.value_info)
        }

    def type_of(self, scope: str, name: str) -> tuple[str, tuple[int | None, ...] | None] | None:
        """(element type, sizes or None) of a value as seen in a scope, None if nothing is known."""
        owner = self._scope(scope).owner_of(name)
        found = self.types.get((owner.name, name)) if owner is not None else None
        if found is None or not found.HasField("tensor_type") or found.tensor_type.elem_type not in DTYPES:
            return None
        tensor = found.tensor_type
        sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        return DTYPES[tensor.elem_type], sizes if tensor.HasField("shape") else None

    def cut(self, scope_name: str, output: str, through: frozenset[str] = frozenset()) -> Region:
        """The region that makes `output`, with the nodes that make `through`. CorruptFile if nothing makes it."""
        scope = self._scope(scope_name)
        makers = {name: node for node in scope.nodes for name in node.output if name}
        if output not in makers:
            raise CorruptFile(f"{self.side.path}: no node makes {output!r} in the graph {scope_name!r}")
        taken: dict[int, NodeProto] = {}
        weights: dict[str, Weight] = {}
        inputs: dict[str, None] = {}
        pending = [makers[output]]
        while pending:
            node = pending.pop()
            if id(node) in taken:
                continue
            taken[id(node)] = node
            for name in node.input:
                maker = makers.get(name)
                weight = self._weight(scope, name)
                if weight is not None:
                    weights[name] = weight
                elif maker is not None and (
                    name in through
                    or tag(maker)
                    or maker.op_type == "Constant"
                    or self._re_arranges(scope, maker, makers)
                ):
                    pending.append(maker)
                elif maker is None and (outer := self._outer_view(scope, name)) is not None:
                    taken.update({id(one): one for one in outer[0]})
                    weights.update(outer[1])
                elif name:
                    inputs[name] = None
        order = [*(node for node in taken.values() if not self._in(scope, node)), *scope.nodes]
        return Region(tuple(node for node in order if id(node) in taken), weights, tuple(inputs))

    def _in(self, scope: Scope, node: NodeProto) -> bool:
        return any(node is one for one in scope.nodes)

    def _scope(self, name: str) -> Scope:
        scope = scope_named(self._scopes, name)
        if scope is None:
            raise CorruptFile(f"{self.side.path}: expected a graph called {name!r}, found none")
        return scope

    def _weight(self, scope: Scope, name: str) -> Weight | None:
        found = self.side.id_of(scope, name) if name else None
        return self.model.by_id[found] if found is not None else None

    def _re_arranges(self, scope: Scope, node: NodeProto, makers: Mapping[str, NodeProto]) -> bool:
        """Whether the node is a view of weights only."""
        while op_name(node) in VIEW_OPS:
            if all(self._weight(scope, name) is not None or not name for name in node.input):
                return True
            maker = makers.get(node.input[0])
            others = all(self._weight(scope, name) is not None or not name for name in node.input[1:])
            if maker is None or not others:
                return False
            node = maker
        return False

    def _outer_view(self, scope: Scope, name: str) -> tuple[list[NodeProto], dict[str, Weight]] | None:
        """View nodes of an enclosing graph, inner ones last, between a weight and a captured value."""
        owner = scope.owner_of(name)
        if owner is None or owner is scope:
            return None
        makers = {one: node for node in owner.nodes for one in node.output if one}
        nodes: list[NodeProto] = []
        while name in makers and op_name(makers[name]) in VIEW_OPS:
            nodes.insert(0, makers[name])
            name = makers[name].input[0]
        weights = {one: w for node in nodes for one in node.input if (w := self._weight(owner, one)) is not None}
        return (nodes, weights) if nodes and name in weights else None

    def write(
        self, region: Region, output: str, inputs: Mapping[str, tuple[str, int]], kind: str, folder: Path
    ) -> Path:
        """A model file of the region: `inputs` gives the element type and rank of each input, `kind` the output's.

        Cost: one copy of the region's weights.
        """
        import onnx
        from onnx import helper

        folder.mkdir(parents=True, exist_ok=True)
        graph = helper.make_graph(
            [_widened(node) for node in region.nodes],
            "region",
            [helper.make_tensor_value_info(n, _number(k), [None] * rank) for n, (k, rank) in inputs.items()],
            [helper.make_tensor_value_info(output, _number(kind), None)],
        )
        for index, (name, weight) in enumerate(region.weights.items()):
            graph.initializer.append(_stored(name, weight, folder / f"weight{index}.bin"))
        model = helper.make_model(graph)
        model.ir_version = self.side.model.ir_version
        del model.opset_import[:]
        model.opset_import.extend(self.side.model.opset_import)
        path = folder / "region.onnx"
        onnx.save_model(model, str(path))
        return path


def _number(kind: str) -> int:
    number = _NUMBERS[kind]
    return _FLOAT if number == _BFLOAT16 else number


def _widened(node: NodeProto) -> NodeProto:
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _BFLOAT16:
            attribute.i = _FLOAT
        if attribute.name == "value" and attribute.t.data_type == _BFLOAT16:
            values = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(values, attribute.t.name))
    return copy


def _stored(name: str, weight: Weight, file: Path) -> TensorProto:
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=_number(weight.dtype), dims=weight.shape)
    n_bytes = 0
    with file.open("wb") as stream:
        for block in _widened_blocks(weight):
            n_bytes += stream.write(block)
    if n_bytes < 1024:  # small ones inline: constant folding and shape inference want to see them
        tensor.raw_data = file.read_bytes()
        return tensor
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file.name), ("offset", "0"), ("length", str(n_bytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _widened_blocks(weight: Weight) -> Iterator[bytes]:
    if weight.storage is None:
        raise CorruptFile(f"{weight.id}: expected a stored tensor, found none")
    for block in blocks(weight.storage):
        if weight.dtype == "bfloat16":  # the upper half of an fp32
            yield (np.frombuffer(block, "<u2").astype("<u4") << 16).tobytes()
        else:
            yield block
