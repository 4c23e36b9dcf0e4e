"""ONNX files → a `Model`: weights, their uses, and which of them are parameters. Tensors stay on disk.

External data is never loaded to look, and large inline tensors are only located (see `wire.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tieaudit.errors import CorruptFile
from tieaudit.formats.onnx.discover import alternative_of, not_a_model
from tieaudit.formats.onnx.lookups import Lookups
from tieaudit.formats.onnx.messages import model_proto
from tieaudit.formats.onnx.operations import OfParts, Operations
from tieaudit.formats.onnx.parameters import NOT_USED, Parameters
from tieaudit.formats.onnx.quantised import find_quantised
from tieaudit.formats.onnx.scopes import OVERRIDES_SINCE, Scope, first_output, walk_scopes
from tieaudit.formats.onnx.tensors import Source, check_claims, locate, locate_sparse, text
from tieaudit.formats.onnx.uses import find_uses
from tieaudit.formats.onnx.values import DEFAULT_DOMAINS, Value, Values, attribute
from tieaudit.formats.onnx.wire import Malformed, skeleton
from tieaudit.model import Model, Part, Quantised, Use, Weight, make_id
from tieaudit.storage import Storage

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

HeldAs = Literal["initializer", "constant_node", "sparse_initializer"]
_N_MOST_BYTES_RETRY = 256 * 1024 * 1024
"""A file that the walk over its records refuses is given to the library for a second opinion up to this size."""
_N_MOST_PAIRS = 20_000_000
"""Inputs times outputs of each node, added up: the most of 439 real files are 6,102."""


@dataclass
class _Read:
    """What one file gave."""

    part: Part
    weights: list[Weight] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    operations: Operations | None = None
    quantised: tuple[Quantised, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(path: Path, files: tuple[Path, ...]) -> Model:
    """The model at `path`, whose main files are `files`; several files are parts of one model.

    Raises CorruptFile, in one line, for whatever is not a readable ONNX model.
    Cost: time linear in the graphs; memory: the files less their large tensors.
    """
    stems = [file.stem for file in files]
    parts = [
        read_file(file, ("" if len(files) == 1 else file.stem if stems.count(file.stem) == 1 else file.name))
        for file in files
    ]
    metadata = dict(parts[0].metadata) if len(parts) == 1 else _joined(parts)
    if (stem := alternative_of(files)) is not None:
        metadata["alternative_of"] = stem
    return Model(
        path=str(path),
        format="onnx",
        parts=tuple(read.part for read in parts),
        weights=tuple(weight for read in parts for weight in read.weights),
        uses=tuple(use for read in parts for use in read.uses),
        operations=OfParts([read.operations for read in parts if read.operations is not None]),
        quantised=tuple(one for read in parts for one in read.quantised),
        metadata=metadata,
        notes=tuple(note for read in parts for note in read.notes),
        has_graph=True,
    )


def _joined(parts: list[_Read]) -> dict[str, str]:
    keys = dict.fromkeys(key for read in parts for key in read.metadata)
    return {key: ", ".join(dict.fromkeys(read.metadata.get(key, "") for read in parts)) for key in keys}


def read_file(file: Path, part: str) -> _Read:
    """One ONNX file as part `part`. Raises CorruptFile."""
    proto, source = parse(file)
    scopes = walk_scopes(proto, str(file))
    _check_names(scopes, file)
    notes: list[str] = []
    again: dict[str, None] = {}
    weights: dict[Value, Weight] = {}
    for scope in scopes:
        for value, weight in _weights_of(scope, source, part):
            if value in weights:
                again[weight.name] = None
            weights[value] = weight if proto.ir_version >= OVERRIDES_SINCE else replace(weight, overridable=False)
    check_claims(source)
    if again:
        which = f"{next(iter(again))!r}" if len(again) == 1 else f"{len(again)} names ({next(iter(again))!r} the first)"
        notes.append(f"{file}: {which} stored more than once in one graph; the last tensor of a name is used")
    values = Values(scopes, weights)
    lookups = Lookups(values)
    parameters = Parameters(values, lookups)
    for value, weight in weights.items():
        verdict, because = parameters.verdict(value, weight)
        weights[value] = replace(weight, parameter=verdict, because=because)
    read = _Read(Part(part, (str(file), *sorted(str(path) for path, _ in source.data_files.values()))))
    read.weights = list(weights.values())
    read.uses = list(find_uses(values, part, lookups))
    read.operations = Operations(file, part, scopes)
    read.quantised = find_quantised(values)
    read.metadata = _metadata(proto, scopes, source)
    unsure = [weight for weight in read.weights if weight.parameter is None and weight.because != NOT_USED]
    if unsure:
        notes.append(
            f"{file}: cannot tell whether {len(unsure)} tensors are parameters, "
            f"the first is {unsure[0].name!r}: {unsure[0].because}"
        )
    if proto.training_info:
        notes.append(f"{file}: holds training graphs, which were not read")
    read.notes = notes
    return read


def parse(file: Path) -> tuple[ModelProto, Source]:
    """The model without its large tensors, and where those are. Raises CorruptFile."""
    from google.protobuf.message import DecodeError

    try:
        reason = not_a_model(file)
        if reason is not None:
            raise CorruptFile(f"{file}: expected an ONNX model, found {reason}")
        n_bytes = file.stat().st_size
        why = ""
        try:
            with file.open("rb", buffering=0) as stream:
                found = skeleton(stream, n_bytes)
            data, source = found.data, Source(file, found)
        except Malformed as error:
            if n_bytes > _N_MOST_BYTES_RETRY:
                raise CorruptFile(f"{file}: expected an ONNX model, found a file that breaks off: {error}") from error
            data, source, why = file.read_bytes(), Source(file), str(error)
    except OSError as error:
        raise CorruptFile(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        proto = model_proto().FromString(data)
    except (DecodeError, ValueError, RuntimeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        if "MaxDepth" in reason or "recursion" in reason.lower():
            reason = "its graphs are nested more deeply than protobuf allows (100 messages, some 30 graphs)"
        raise CorruptFile(
            f"{file}: expected an ONNX model, found a file that is truncated or is no protobuf message: {why or reason}"
        ) from error
    if not proto.HasField("graph"):
        raise CorruptFile(f"{file}: expected an ONNX model, found no graph in it ({n_bytes} bytes)")
    return proto, source


def _check_names(scopes: list[Scope], file: Path) -> None:
    """CorruptFile for a name that is not UTF-8 (the library gives bytes then); runtimes refuse such a file too.

    Also for nodes so wide that every question about them, asked of each input and each output, would take minutes.
    """
    n_pairs = 0
    for scope in scopes:
        n_pairs += sum(len(node.input) * len(node.output) for node in scope.nodes)
        if n_pairs > _N_MOST_PAIRS:
            raise CorruptFile(f"{file}: expected nodes of few inputs and outputs, found nodes of thousands of both")
        names: list[object] = [scope.name, *scope.own_names, *scope.outputs]
        for node in scope.nodes:
            names += [node.op_type, node.domain, node.name, *node.input]
            names += [item.name for item in node.attribute]
        for name in names:
            if not isinstance(name, str):
                raise CorruptFile(f"{file}: expected names in UTF-8, found {name!r} in the graph {scope.name!r}")


def _weights_of(scope: Scope, source: Source, part: str) -> Iterator[tuple[Value, Weight]]:
    """Initializers, sparse initializers and tensor-valued Constant nodes of one scope."""
    tensors = scope.graph.initializer if scope.graph is not None else ()
    sparse_tensors = scope.graph.sparse_initializer if scope.graph is not None else ()
    for index, tensor in enumerate(tensors):
        found = locate(tensor, source, _place(scope, tensor.name or f"initializer#{index}"))
        yield from _weight(scope, part, tensor.name, found, "initializer")
    for index, sparse in enumerate(sparse_tensors):
        name = sparse.values.name
        found = locate_sparse(sparse, source, _place(scope, name or f"sparse_initializer#{index}"))
        yield from _weight(scope, part, name, found, "sparse_initializer")
    for node in scope.nodes:
        if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS and first_output(node):
            name = first_output(node)
            value = _constant(node, source, _place(scope, name))
            if value is not None:
                yield from _weight(scope, part, name, value, "constant_node")


def _constant(node: NodeProto, source: Source, place: str) -> tuple[tuple[int, ...], str, Storage] | None:
    """The tensor of a Constant node; None for numbers written into the attribute itself."""
    found = attribute(node, "value") or attribute(node, "sparse_value")
    if found is None or found.ref_attr_name:
        return None
    if found.HasField("sparse_tensor"):
        return locate_sparse(found.sparse_tensor, source, place)
    if not found.HasField("t"):
        raise CorruptFile(f"{source.path}, Constant node {place!r}: expected a tensor as its value, found none")
    return locate(found.t, source, place)


def _weight(
    scope: Scope, part: str, name: str, found: tuple[tuple[int, ...], str, Storage], held_as: HeldAs
) -> Iterator[tuple[Value, Weight]]:
    if not name:  # checked like any other tensor, but nothing can use it
        return
    shape, kind, storage = found
    yield (
        Value(scope.name, name),
        Weight(
            id=make_id(name, part, scope.name),
            name=name,
            shape=shape,
            dtype=kind,
            storage=storage,
            part=part,
            scope=scope.name,
            held_as=held_as,
            overridable=held_as != "constant_node" and not scope.name and name in scope.input_slots,
            graph_output=name in scope.output_names,
        ),
    )


def _place(scope: Scope, name: str) -> str:
    """A name for messages and for memory regions, unique in the file."""
    return f"{scope.name}|{name}" if scope.name else name


def _metadata(proto: ModelProto, scopes: list[Scope], source: Source) -> dict[str, str]:
    opsets = ", ".join(f"{text(item.domain) or 'ai.onnx'} {item.version}" for item in proto.opset_import)
    found = {
        "ir_version": str(proto.ir_version),
        "opset": opsets,
        "producer": f"{text(proto.producer_name)} {text(proto.producer_version)}".strip(),
        "n_nodes": str(sum(len(scope.nodes) for scope in scopes)),
        "n_subgraphs": str(sum(scope.parent is not None for scope in scopes)),
        "n_functions": str(sum(scope.function is not None for scope in scopes)),
        "graph": text(proto.graph.name),
        "external_data": ", ".join(sorted(path.name for path, _ in source.data_files.values())),
    }
    found.update((f"onnx.{text(item.key)}", text(item.value)[:200]) for item in proto.metadata_props)
    return {key: value for key, value in found.items() if value}
