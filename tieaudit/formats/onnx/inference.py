"""Types of values as onnx infers them, kept away from models on which the inference would not come back.

onnx's inference runs in this process and walks the body of a model-local function once for every call. Functions that
call each other twice each therefore cost 2^n visits in a file of n functions, and functions that call themselves have
no end. Such calls are counted first; beyond a limit nothing is inferred and only declared types are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieaudit.formats.onnx.scopes import walk_scopes
from tieaudit.formats.onnx.values import DEFAULT_DOMAINS

if TYPE_CHECKING:
    from onnx import ModelProto

N_MOST_NODES = 2_000_000
"""Nodes, those of called functions counted once for each call, that inference may visit."""
_Key = tuple[str, str, str]
_MAIN: _Key = ("", "", "")


def inferred(model: ModelProto) -> ModelProto:
    """The model with inferred types, or the model itself where nothing can be inferred.

    Cost: one shape inference without tensors, of at most `N_MOST_NODES` nodes.
    """
    import onnx

    if model.functions and n_visits(model) > N_MOST_NODES:
        return model
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # inference fails in many ways on models that run; then we know only what the file says
        return model


def n_visits(model: ModelProto) -> int:
    """Nodes of the model with every call of a local function followed; `N_MOST_NODES` + 1 where there is no end."""
    own: dict[_Key, int] = {_MAIN: 0}
    calls: dict[_Key, list[_Key]] = {_MAIN: []}
    named = {_key(one.domain, one.name, getattr(one, "overload", "")) for one in model.functions}
    for scope in walk_scopes(model):
        root = scope
        while root.parent is not None:
            root = root.parent
        function, key = root.function, _MAIN
        if function is not None:
            key = _key(function.domain, function.name, getattr(function, "overload", ""))
        own[key] = own.get(key, 0) + len(scope.nodes)
        called = (_key(node.domain, node.op_type, getattr(node, "overload", "")) for node in scope.nodes)
        calls.setdefault(key, []).extend(one for one in called if one in named)
    total: dict[_Key, int] = {}
    pending, open_ = [_MAIN], set()
    while pending:
        key = pending[-1]
        unknown = {one for one in calls.get(key, ()) if one not in total}
        if not unknown or key in total:
            total[key] = min(own.get(key, 0) + sum(total[one] for one in calls.get(key, ())), N_MOST_NODES + 1)
            pending.pop()
        elif key in open_:  # seen before, and what it calls is still being counted: it calls itself
            return N_MOST_NODES + 1
        else:
            open_.add(key)
            pending.extend(unknown)
    return total[_MAIN]


def _key(domain: str, name: str, overload: str) -> _Key:
    return ("" if domain in DEFAULT_DOMAINS else domain, name, overload)
