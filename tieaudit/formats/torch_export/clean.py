"""The same program in an archive that holds nothing to be executed: what is handed to `torch.export.load`.

`torch.export.load` unpickles (sample inputs, subclasses, objects), evaluates (the expressions of free sizes go through
`sympy.sympify`, which is `eval`), compiles (names and guards become Python source) and builds calls of whatever a node
names below `torch`, `torch.os.system` among others. So the document is written anew from what was read: graph,
signature and weights, every name a plain identifier, every expression arithmetic, every operation of a known
namespace; guards, metadata, sample inputs and tree specifications left out. What does not fit is refused with a reason.
Source: torch/_export/serde/serialize.py and torch/export/_unlift.py, version 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tieaudit.errors import UnreadableModel
from tieaudit.formats.torch_export.expressions import checked
from tieaudit.formats.torch_export.fields import Fields
from tieaudit.formats.torch_export.program import scalar

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_OPERATION = re.compile(r"torch\.ops\.(aten|prims)\.([a-zA-Z0-9_]+)\.([a-zA-Z0-9_]+)")
_TOUCH_FILES = frozenset({"from_file", "save", "_print", "warn"})
"""Operations of ATen that read or write files, or print."""
_NESTED = frozenset(
    "wrap_with_set_grad_enabled wrap_with_autocast cond while_loop map_impl scan invoke_subgraph "
    "associative_scan tag_activation_checkpoint".split()
)
"""Higher-order operations, whose graphs are cleaned as the main one is."""
_ARITHMETIC = frozenset(
    "add sub mul floordiv truediv mod pow neg pos eq ne lt le gt ge and_ or_ not_ xor getitem".split()
)
_OTHERS = frozenset(
    "math.ceil math.floor math.trunc torch.sym_int torch.sym_float torch.sym_ite torch.sym_max torch.sym_min "
    "torch.sym_not torch.sym_sum torch.sym_sqrt torch._sym_sqrt".split()
)
_OPSETS = frozenset("aten prims".split())


class Cleaner:
    """Writes a document anew for one device (`cpu` or `cuda`)."""

    def __init__(self, device: str) -> None:
        self._device = {"type": device, "index": 0 if device == "cuda" else None}

    def document(self, source: Fields, n_inputs: int, n_outputs: int) -> dict[str, Any]:
        """The whole program; it takes `n_inputs` positional arguments and gives a tuple of `n_outputs`.

        UnreadableModel for what may not be handed on.
        """
        module = source.object("graph_module")
        version = source.object("schema_version")
        opsets = source.object("opset_version").value
        calling: dict[str, Any] = {
            "inputs": [], "outputs": [], "in_spec": _positional(n_inputs), "out_spec": _tuple(n_outputs),
            "forward_arg_names": None,
        }  # fmt: skip
        return {
            "graph_module": {
                "graph": self.graph(module.object("graph")),
                "signature": self.signature(module.object("signature")),
                "module_call_graph": [{"fqn": "", "signature": calling}],
                "metadata": {},
                "treespec_namedtuple_fields": {},
            },
            "opset_version": {name: int(opsets[name]) for name in _OPSETS if isinstance(opsets.get(name), int)},
            "range_constraints": {
                checked(symbol, held.where): {name: _limit(held, name) for name in ("min_val", "max_val")}
                for symbol, held in source.mapping("range_constraints", optional=True)
            },
            "schema_version": {"major": version.size("major"), "minor": version.size("minor")},
            "verifiers": ["TRAINING"],
            "torch_version": "",
            "guards_code": [],
        }

    def graph(self, source: Fields) -> dict[str, Any]:
        """One graph and those inside it."""
        if source.value.get("custom_obj_values"):
            raise _refused(source, "it holds objects of Python or C++ classes, which only unpickling would make")
        single = source.value.get("is_single_tensor_return", False)
        return {
            "inputs": [self.argument(one) for one in source.objects("inputs")],
            "outputs": [self.argument(one) for one in source.objects("outputs")],
            "nodes": [self.node(one) for one in source.objects("nodes")],
            "tensor_values": {
                identifier(name, meta.where): self.tensor(meta) for name, meta in source.mapping("tensor_values")
            },
            "sym_int_values": self._symbols(source, "sym_int_values", "as_int", int),
            "sym_bool_values": self._symbols(source, "sym_bool_values", "as_bool", bool),
            "sym_float_values": self._symbols(source, "sym_float_values", "as_float", float),
            "is_single_tensor_return": bool(single),
            "custom_obj_values": {},
        }

    def node(self, source: Fields) -> dict[str, Any]:
        named = source.value.get("name")
        single = source.value.get("is_hop_single_tensor_return")
        return {
            "target": operation(source.text("target"), source.where),
            "inputs": [
                {
                    "name": identifier(one.text("name"), one.where) if one.text("name") else "",
                    "arg": self.argument(one.object("arg")),
                    "kind": one.value.get("kind") if one.value.get("kind") in (0, 1, 2) else None,
                }
                for one in source.objects("inputs")
            ],
            "outputs": [self.argument(one) for one in source.objects("outputs")],
            "metadata": {},
            "is_hop_single_tensor_return": single if isinstance(single, bool) else None,
            "name": identifier(named, source.where) if named else None,
        }

    def argument(self, source: Fields) -> dict[str, Any]:
        """A tagged argument with its content checked."""
        tag, value = source.union()
        known = _PLAIN.get(tag)
        if known is not None:
            return {tag: _checked(known, value, source)}
        if tag in ("as_tensor", "as_token"):
            return {tag: {"name": identifier(value.get("name") if isinstance(value, dict) else None, source.where)}}
        if tag in ("as_tensors", "as_sym_ints", "as_sym_bools", "as_sym_floats", "as_optional_tensors"):
            inner = tag.removesuffix("s")
            return {tag: [self.argument(Fields({inner: one}, source.where))[inner] for one in _items(value, source)]}
        if tag == "as_nested_tensors":
            return {tag: [self.argument(Fields({"as_tensors": one}, source.where))["as_tensors"] for one in value]}
        if tag == "as_optional_tensor":
            return {tag: self.argument(Fields(value, source.where))}
        if tag in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            inside, held = Fields(value, source.where).union()
            if inside == "as_name":
                return {tag: {inside: identifier(held, source.where)}}
            return {tag: {inside: _checked({"as_int": int, "as_bool": bool, "as_float": float}[inside], held, source)}}
        if tag == "as_device":
            return {tag: self._device}
        if tag == "as_operator":
            return {tag: operation(str(value), source.where)}
        if tag == "as_graph":
            graph = Fields(value, source.where)
            inside = identifier(graph.text("name"), source.where)
            return {tag: {"name": inside, "graph": self.graph(graph.object("graph"))}}
        raise _refused(source, f"it passes {tag[:40].removeprefix('as_')}, which is not handed on")

    def tensor(self, source: Fields) -> dict[str, Any]:
        """The type of a tensor."""
        scalar(source)
        return {
            "dtype": source.size("dtype"),
            "sizes": [self.size(one) for one in source.objects("sizes")],
            "requires_grad": source.flag("requires_grad"),
            "device": self._device,
            "strides": [self.size(one) for one in source.objects("strides")],
            "storage_offset": self.size(source.object("storage_offset")),
            "layout": source.size("layout"),
        }

    def size(self, source: Fields) -> dict[str, Any]:
        return _symbolic(source, "as_int", int)

    def signature(self, source: Fields) -> dict[str, Any]:
        return {
            "input_specs": [self._spec(one) for one in source.objects("input_specs")],
            "output_specs": [self._spec(one) for one in source.objects("output_specs")],
        }

    def _spec(self, source: Fields) -> dict[str, Any]:
        """One input or output of the signature: names, and what they are for."""
        tag, value = source.union()
        if tag == "custom_obj":
            raise _refused(source, "it takes an object of a Python or C++ class, which only unpickling would make")
        held = Fields(value, f"{source.where}.{tag}")
        cleaned: dict[str, Any] = {}
        for name, item in held.value.items():
            if name == "arg":
                kind = tag in ("user_input", "user_output")
                cleaned[name] = (
                    self.argument(held.object("arg"))
                    if kind
                    else {"name": identifier(held.object("arg").value.get("name"), held.where)}
                )
            elif name == "value":
                inside, constant = held.object("value").union()
                cleaned[name] = {inside: _checked(_PLAIN[inside], constant, held)}
            elif isinstance(item, bool):
                cleaned[name] = item
            else:
                cleaned[name] = path(item, held.where)
        return {tag: cleaned}

    def _symbols(self, source: Fields, name: str, tag: str, kind: Callable[..., Any]) -> dict[str, Any]:
        return {
            identifier(key, held.where): _symbolic(held, tag, kind) for key, held in source.mapping(name, optional=True)
        }


def _list(kind: type) -> Callable[[Any], Any]:
    def all_of(value: Any) -> list[Any]:
        return [_one(kind, item) for item in value]

    return all_of


def _lists(kind: type) -> Callable[[Any], Any]:
    def all_of(value: Any) -> list[Any]:
        return [[_one(kind, item) for item in one] for one in value]

    return all_of


def _one(kind: type, value: Any) -> Any:
    """A plain value of a kind. JSON has no infinity: torch writes it as a text."""
    if kind is float and value in ("Infinity", "-Infinity", "NaN"):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError
    return value


_PLAIN: Mapping[str, Any] = {
    "as_none": bool, "as_int": int, "as_float": float, "as_bool": bool, "as_string": str, "as_ints": _list(int),
    "as_floats": _list(float), "as_bools": _list(bool), "as_strings": _list(str), "as_scalar_type": int,
    "as_memory_format": int, "as_layout": int, "as_int_lists": _lists(int), "as_float_lists": _lists(float),
}  # fmt: skip


def _checked(kind: Any, value: Any, source: Fields) -> Any:
    try:
        return _one(kind, value) if isinstance(kind, type) else kind(value)
    except (TypeError, ValueError):
        raise _refused(source, f"expected {getattr(kind, '__name__', 'a list')}, found another value") from None


def _items(value: Any, source: Fields) -> list[Any]:
    if not isinstance(value, list):
        raise _refused(source, "expected a list, found another value")
    return value


def _symbolic(source: Fields, tag: str, kind: Any) -> dict[str, Any]:
    """A number, or an expression of symbols with a hint."""
    found, value = source.union()
    if found == tag:
        return {tag: _checked(kind, value, source)}
    if found != "as_expr":
        raise _refused(source, f"expected a size, found {found[:40]}")
    held = Fields(value, source.where)
    hint = held.value.get("hint")
    if hint is not None:
        inside, number = Fields(hint, source.where).union()
        hint = {inside: _checked(_PLAIN[inside], number, source)} if inside in _PLAIN else None
    return {"as_expr": {"expr_str": checked(held.text("expr_str"), source.where), "hint": hint}}


def _limit(source: Fields, name: str) -> int | None:
    value = source.value.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def identifier(value: object, where: str) -> str:
    """A name that becomes one of Python's. UnreadableModel for any other."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or len(value) > 1000:
        raise UnreadableModel(f"{where}: {str(value)[:80]!r} is no plain name, and it would become source code")
    return value


def path(value: object, where: str) -> str:
    """A dotted name of a parameter. UnreadableModel for any other."""
    if not isinstance(value, str) or not _PATH.fullmatch(value) or len(value) > 2000:
        raise UnreadableModel(f"{where}: {str(value)[:80]!r} is no plain name, and it would become source code")
    return value


def operation(target: str, where: str) -> str:
    """An operation that computes. UnreadableModel for others: a target may name any function below `torch`."""
    found = _OPERATION.fullmatch(target)
    if found is not None and found[2] not in _TOUCH_FILES:
        return target
    if target.startswith("torch.ops.higher_order.") and target.removeprefix("torch.ops.higher_order.") in _NESTED:
        return target
    if target.startswith("_operator.") and target.removeprefix("_operator.") in _ARITHMETIC or target in _OTHERS:
        return target
    raise UnreadableModel(f"{where}: the operation {target[:80]!r} is none that is run here: it may be anything")


def _refused(source: Fields, because: str) -> UnreadableModel:
    return UnreadableModel(f"{source.where}: {because}")


def _tuple(n_leaves: int) -> str:
    """A tuple as torch.utils._pytree writes it, protocol 1."""
    return f"[1, {_node('builtins.tuple', 'null', n_leaves)}]"


def _positional(n_leaves: int) -> str:
    """(positional arguments, no keyword arguments)."""
    arguments, none = _node("builtins.tuple", "null", n_leaves), _node("builtins.dict", "[]", 0)
    return f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{arguments}, {none}]}}]'


def _node(kind: str, context: str, n_leaves: int) -> str:
    leaves = ", ".join(['{"type": null, "context": null, "children_spec": []}'] * n_leaves)
    return f'{{"type": "{kind}", "context": "{context}", "children_spec": [{leaves}]}}'
