"""`models/<name>.json`: the graph of one exported program as a `Flow`, and what its inputs and outputs are for.

Source: torch/_export/serde/schema.py (`ExportedProgram`, `GraphSignature`), SCHEMA_VERSION 8.20 of PyTorch 2.13.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tieaudit.errors import CorruptFile
from tieaudit.formats.torch_export.expressions import readable
from tieaudit.formats.torch_export.fields import Fields
from tieaudit.formats.torch_export.flow import Call, Flow, Value

SCALARS: Mapping[int, str] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn",
    30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
"""`ScalarType` of the schema → canonical element type."""
_ATEN = "torch.ops.aten."
_MAX_SCOPES = 1000
_MAX_AXES = 64
_MAX_DEPTH = 100

Sort = Literal["parameter", "buffer", "tensor_constant", "user_input", "custom_obj", "token", "constant_input"]


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One input of the program: a weight under its name in the module, or something that a caller gives."""

    sort: Sort
    value: str
    """Name in the graph; empty where it is no tensor."""
    target: str = ""
    """Name of the parameter, buffer or constant."""


@dataclass(frozen=True)
class Port:
    """A tensor that the caller gives."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]
    """Sizes; an expression of symbols where they are free."""


@dataclass
class Program:
    """One graph with its signature."""

    where: str
    json: Fields
    flow: Flow = field(default_factory=Flow)
    placeholders: list[Placeholder] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    mutated: dict[str, str] = field(default_factory=dict)
    """Name of a parameter or buffer that the program writes → what writes it."""
    ranges: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Symbol → least and largest size."""
    torch_version: str = ""

    @property
    def user_inputs(self) -> frozenset[str]:
        return frozenset(one.value for one in self.placeholders if one.sort == "user_input" and one.value)

    @property
    def weights(self) -> dict[str, str]:
        """Name of a weight in the module → its value in the graph."""
        return {one.target: one.value for one in self.placeholders if one.target and one.value}


def read_program(document: Fields) -> Program:
    """The program that a JSON document describes. CorruptFile where it is not as the schema says."""
    module = document.object("graph_module")
    program = Program(document.where, document)
    version = document.value.get("torch_version")
    program.torch_version = version[:40] if isinstance(version, str) else ""
    _graph(program.flow, module.object("graph"), "")
    program.flow.index()
    _signature(program, module.object("signature"))
    for symbol, limits in document.mapping("range_constraints", optional=True):
        bounds = [limits.value.get(name) for name in ("min_val", "max_val")]
        least, most = (one if isinstance(one, int) and not isinstance(one, bool) else None for one in bounds)
        program.ranges[symbol] = (least, most)
    metas = dict(module.object("graph").mapping("tensor_values"))
    for one in program.placeholders:
        if one.sort == "user_input" and one.value:
            meta = metas.get(one.value)
            if meta is None:
                raise CorruptFile(f"{document.where}: expected the type of the input {one.value[:80]!r}, found none")
            program.ports.append(
                Port(one.value, scalar(meta), tuple(dimension(size) for size in meta.objects("sizes")))
            )
    return program


def scalar(meta: Fields) -> str:
    """Canonical element type of a tensor. CorruptFile for one that is not known."""
    number = meta.size("dtype")
    if number not in SCALARS:
        raise meta.wrong("dtype", "an element type of the schema", number)
    return SCALARS[number]


def dimension(size: Fields) -> int | str:
    """A size, or the expression of a free one."""
    tag, value = size.union()
    if tag == "as_int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if tag == "as_expr":
        return readable(Fields(value, f"{size.where}.as_expr").text("expr_str"))
    raise CorruptFile(f"{size.where}: expected a size, found {tag[:40]!r}")


def number(size: Fields) -> int:
    """A size that is fixed and not negative. CorruptFile otherwise."""
    found = dimension(size)
    if not isinstance(found, int) or found < 0:
        raise CorruptFile(f"{size.where}: expected a number of at least 0, found {str(found)[:80]!r}")
    return found


def shape_and_strides(meta: Fields) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes, strides and offset of a stored tensor, in elements."""
    sizes = tuple(number(one) for one in meta.objects("sizes"))
    strides = tuple(number(one) for one in meta.objects("strides"))
    if len(sizes) != len(strides) or len(sizes) > _MAX_AXES:
        raise CorruptFile(f"{meta.where}: expected one stride for each of {len(sizes)} sizes, found {len(strides)}")
    return sizes, strides, number(meta.object("storage_offset"))


def _graph(flow: Flow, graph: Fields, scope: str) -> None:
    """One graph, and those that its calls run, into `flow`."""
    if len(flow.inputs) >= _MAX_SCOPES:
        raise CorruptFile(f"{graph.where}: expected at most {_MAX_SCOPES} nested graphs, found more")
    flow.inputs[scope] = tuple(name for one in graph.objects("inputs") for name in _names(one))
    flow.outputs[scope] = tuple(name for one in graph.objects("outputs") for name in _names(one))
    for name, meta in graph.mapping("tensor_values"):
        sizes = [dimension(size) for size in meta.objects("sizes")]
        if len(sizes) <= _MAX_AXES and all(isinstance(size, int) and size >= 0 for size in sizes):
            flow.shapes[Value(scope, name)] = tuple(size for size in sizes if isinstance(size, int))
        flow.dtypes[Value(scope, name)] = SCALARS.get(meta.size("dtype"), "")
    for index, node in enumerate(graph.objects("nodes")):
        _node(flow, node, scope, index)


def _node(flow: Flow, node: Fields, scope: str, index: int) -> None:
    op = node.text("target")
    outputs = tuple(name for one in node.objects("outputs") for name in _names(one))
    named = node.value.get("name")
    name = named if isinstance(named, str) and named else outputs[0] if outputs else f"{op.rpartition('.')[2]}#{index}"
    args: list[Any] = []
    bodies: list[str] = []
    for one in node.objects("inputs"):
        args.append(_operand(flow, one.object("arg"), scope, bodies, name))
    flow.calls.append(
        Call(op_name(op), outputs[0] if outputs else name, tuple(args), outputs, scope, calls_of(node), tuple(bodies))
    )


def op_name(target: str) -> str:
    """`embedding` of `torch.ops.aten.embedding.default`; other namespaces keep theirs."""
    if target.startswith(_ATEN):
        return target.removeprefix(_ATEN).partition(".")[0]
    if target.startswith("torch.ops."):
        pieces = target.removeprefix("torch.ops.").split(".")
        return pieces[-1] if pieces[0] == "higher_order" else ".".join(pieces[:2])
    return target.removeprefix("torch.").removeprefix("_operator.")


def calls_of(node: Fields) -> tuple[str, ...]:
    """The calls of modules in which a node runs, as `Use.call`.

    `nn_module_stack` is `key,path,type;…` from the outside in; torch.export numbers repeated calls in the key:
    `L__self__layer@2`.
    """
    metadata = node.value.get("metadata")
    stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
    found = []
    for entry in stack.split(";")[:_MAX_DEPTH] if isinstance(stack, str) and stack else ():
        key, _, rest = entry.partition(",")
        number = key.rpartition("@")[2] if "@" in key else ""
        found.append(f"{rest.partition(',')[0]}@{number if number.isdigit() else 0}")
    return tuple(found)


def _operand(flow: Flow, argument: Fields, scope: str, bodies: list[str], node: str) -> Any:
    """One argument of a call: a `Value`, a number, a text, None, or a list of those."""
    tag, value = argument.union()
    if tag == "as_graph":
        graph = Fields(value, f"{argument.where}.as_graph")
        body = "/".join(filter(None, (scope, f"{node}.{graph.text('name')}")))
        while body in flow.inputs:
            body += "'"
        _graph(flow, graph.object("graph"), body)
        bodies.append(body)
        return None
    if tag == "as_none":
        return None
    names = list(_values(tag, value, argument.where))
    if tag in ("as_tensors", "as_optional_tensors", "as_sym_ints", "as_nested_tensors"):
        return [_of(one, scope) for one in names]
    if tag in ("as_tensor", "as_sym_int", "as_optional_tensor"):
        return _of(names[0], scope) if names else None
    return value


def _of(one: str | int | None, scope: str) -> Any:
    return Value(scope, one) if isinstance(one, str) else one


def _values(tag: str, value: Any, where: str) -> Iterator[str | int | None]:
    """Names of the values inside an argument, numbers and None between them."""
    if tag in ("as_tensor", "as_token"):
        yield Fields(value, where).text("name")
    elif tag in ("as_tensors", "as_optional_tensors", "as_sym_ints", "as_nested_tensors"):
        if not isinstance(value, list):
            raise CorruptFile(f"{where}.{tag}: expected a list, found another value")
        inner = {"as_tensors": "as_tensor", "as_optional_tensors": "as_optional_tensor", "as_sym_ints": "as_sym_int"}
        for one in value:
            yield from _values(inner.get(tag, "as_tensors"), one, where)
    elif tag == "as_optional_tensor":
        kind, inside = Fields(value, where).union()
        yield Fields(inside, where).text("name") if kind == "as_tensor" else None
    elif tag in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        kind, inside = Fields(value, where).union()
        yield inside if isinstance(inside, (str, int)) else None


def _names(argument: Fields) -> Iterator[str]:
    """Names of what an input or output of a graph or node is; nothing for a constant."""
    tag, value = argument.union()
    yield from (one for one in _values(tag, value, argument.where) if isinstance(one, str))


def _signature(program: Program, signature: Fields) -> None:
    for spec in signature.objects("input_specs"):
        program.placeholders.append(_placeholder(spec))
    for spec in signature.objects("output_specs"):
        tag, value = spec.union()
        if tag in ("buffer_mutation", "parameter_mutation"):
            inside = Fields(value, f"{spec.where}.{tag}")
            program.mutated[inside.text(tag.replace("mutation", "name"))] = inside.object("arg").text("name")
    values = {value: name for name, value in program.weights.items()}
    for call in program.flow.calls:  # what is not made functional writes into its first operand
        if call.op.endswith("_") and not call.op.endswith("__") and call.op != "detach_" and call.args:
            written = call.args[0]
            if isinstance(written, Value) and not written.scope and written.name in values:
                program.mutated[values[written.name]] = call.name


_NAMED = {
    "parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name",
    "custom_obj": "custom_obj_name",
}  # fmt: skip


def _placeholder(spec: Fields) -> Placeholder:
    tag, value = spec.union()
    inside = Fields(value, f"{spec.where}.{tag}")
    if tag in ("parameter", "buffer", "tensor_constant", "custom_obj"):
        return Placeholder(tag, inside.object("arg").text("name"), inside.text(_NAMED[tag]))  # type: ignore[arg-type]
    if tag == "user_input":
        kind, held = inside.object("arg").union()
        name = Fields(held, inside.where).text("name") if kind == "as_tensor" else ""
        return Placeholder("user_input", name)
    if tag in ("token", "constant_input"):
        return Placeholder(tag, "")  # type: ignore[arg-type]
    raise CorruptFile(f"{spec.where}: expected an input of a known sort, found {tag[:40]!r}")


def spec_of(text: object) -> Any:
    """A tree specification, which is JSON in a text; None if it is none."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
