"""Who uses which parameter of a live module: from an exported graph where there are inputs, else from module types."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tieaudit.model import Use, make_id
from tieaudit.view import AS_STORED, Transpose, View

if TYPE_CHECKING:
    import torch

_PASSES = ("detach", "alias", "contiguous", "clone", "to", "_to_copy", "lift_fresh_copy")
"""Operations behind which a tensor is still itself."""


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sample inputs as positional and keyword arguments: a tuple or list, a mapping, or one value."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def uses_by_type(module: torch.nn.Module, names: frozenset[str]) -> tuple[Use, ...]:
    """One use for every name: the module that owns it. What a module calls, and how often, its type does not say."""
    found = []
    for path, one in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = (one.named_parameters, one.named_buffers)
        for slot, (name, _) in enumerate(one for named in own for one in named(recurse=False, remove_duplicate=False)):
            if prefix + name in names:
                found.append(Use(make_id(prefix + name), type(one).__name__, path or "@module", slot))
    return tuple(found)


def uses_by_export(
    module: torch.nn.Module, inputs: Any, names: frozenset[str], *, until: float | None = None
) -> tuple[Use, ...] | str:
    """Every operation that reads a parameter or buffer, in the graph of torch.export; or why there is none.

    The module is traced on fake tensors in eval mode: nothing is computed, and everything that its modules hold is
    put back afterwards. `until`: a time of `time.monotonic` after which no further module is entered.
    """
    import torch

    args, kwargs = arguments(inputs)
    try:
        with _unchanged(module), _until(until), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.eval()
            program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # whatever a foreign forward raises while it is traced
        said = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {said}"
    signature = program.graph_signature
    places = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: list[Use] = []
    for node in program.graph.nodes:
        name = places.get(node.name) if node.op == "placeholder" else None
        if name in names:
            _follow(node, make_id(str(name)), AS_STORED, (), found)
    return tuple(found)


@contextmanager
def _unchanged(module: torch.nn.Module) -> Iterator[None]:
    """Put back what a traced forward leaves in its modules: an attribute that it sets would be a fake tensor."""
    kept = [
        (one, dict(vars(one)), [dict(place) for place in (one._parameters, one._buffers, one._modules)])
        for one in module.modules()
        if not isinstance(one, _torch_script())
    ]
    modes = {one: one.training for one in module.modules()}
    try:
        yield
    finally:
        for one, attributes, contents in kept:
            for place, content in zip((one._parameters, one._buffers, one._modules), contents, strict=True):
                place.clear()
                place.update(content)
            vars(one).clear()
            vars(one).update(attributes)
        for one, mode in modes.items():
            one.training = mode


def _torch_script() -> type:
    """The class of modules that live in TorchScript's own memory and have no attributes of Python's."""
    import torch

    found: type = torch.jit.ScriptModule
    return found


@contextmanager
def _until(deadline: float | None) -> Iterator[None]:
    """Stop a forward pass at its next module once it is late."""
    import torch

    if deadline is None:
        yield
        return

    def look(module: Any, arguments: Any) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError("tracing took too long")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _calls(user: Any) -> tuple[str, ...]:
    """The calls of modules in which a node runs. torch.export numbers repeated ones: `L__self__layer@2`."""
    stack: dict[str, tuple[str, Any]] = user.meta.get("nn_module_stack") or {}
    found = []
    for key, (path, _) in stack.items():
        _, at, number = key.rpartition("@")
        found.append(f"{path}@{number if at and number.isdigit() else 0}")
    return tuple(found)


def _follow(node: Any, weight: str, view: View, chain: tuple[str, ...], found: list[Use]) -> None:
    """Uses of a node's value, through transposes and copies."""
    for user in node.users:
        if user.op == "output":
            continue
        op = getattr(user.target, "_opname", None) or str(user.target)
        op = str(getattr(user.target, "__name__", op)).partition(".")[0]
        passed = _through(op, user, view)
        if passed is not None:
            _follow(user, weight, passed, (*chain, user.name), found)
            continue
        for slot in _slots(user.args, node) or [len(user.args)]:
            found.append(
                Use(weight, op, user.name, slot, view, chain=chain, transposes=view != AS_STORED, call=_calls(user))
            )


def _through(op: str, user: Any, view: View) -> View | None:
    if op in _PASSES and user.args:
        return view
    if op in ("t", "numpy_T"):
        return view.then(Transpose((1, 0)))
    if op == "permute" and len(user.args) > 1:
        return view.then(Transpose(tuple(user.args[1])))
    return None


def _slots(args: Sequence[Any], node: Any) -> list[int]:
    """Positions of a node among the arguments, counted through nested lists."""
    flat: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            flat.append(value)

    walk(args)
    return [index for index, value in enumerate(flat) if value is node]


def _biases_around(module: torch.nn.Module, head: Any, prefix: Mapping[int, str]) -> list[Any]:
    """The bias of the module that holds the head, if it has one for each score: BERT's `cls.predictions.bias`."""
    path = prefix.get(id(head), "")
    weight = getattr(head, "weight", None)
    if weight is None or "." not in path:
        return []
    around = module.get_submodule(path.rpartition(".")[0])._parameters.get("bias")
    return [around] if around is not None and around.shape == weight.shape[:1] else []


def hints(module: torch.nn.Module, members: Sequence[Any]) -> tuple[dict[str, str], str]:
    """Role kinds that the class tells, by weight id, and how it told: by what it calls its embeddings, or by shapes.

    Without the class's word an `nn.Linear` with one output for every row of an `nn.Embedding` is its head.
    """
    names: dict[int, list[str]] = {}
    for one in members:
        names.setdefault(id(one.tensor), []).append(one.name)
    table, head = _asked(module, "get_input_embeddings"), _asked(module, "get_output_embeddings")
    because = f"the class {type(module).__name__} says so"
    if table is None and head is None:
        table, head = _by_shape(module)
        because = "an embedding, and a linear map with one output for each of its rows"
    found: dict[str, str] = {}
    for kind, owner in (("output_head", head), ("token_embedding", table)):
        weight = getattr(owner, "weight", None)
        for name in names.get(id(weight), ()):
            found[make_id(name)] = kind
    prefix = {id(one): path for path, one in module.named_modules()}
    for kind, owner in (("token_embedding", table), ("output_head", head)):
        if owner is not None and id(owner) in prefix:
            name = f"{prefix[id(owner)]}.weight".lstrip(".")
            if make_id(name) in found:
                found[make_id(name)] = kind
    bias = getattr(head, "bias", None)
    biases = [bias, *_biases_around(module, head, prefix)]
    found.update({make_id(name): "output_head_bias" for one in biases for name in names.get(id(one), ())})
    return found, because


def _asked(module: Any, question: str) -> Any:
    """What a transformers class answers, or None."""
    try:
        answer = getattr(module, question)()
    except Exception:  # not every class has an answer, and some raise
        return None
    return answer if hasattr(answer, "weight") else None


def _by_shape(module: torch.nn.Module) -> tuple[Any, Any]:
    """The first embedding, and the last linear map with an output for each of its rows."""
    import torch

    tables = [one for one in module.modules() if isinstance(one, torch.nn.Embedding)]
    linear = [one for one in module.modules() if isinstance(one, torch.nn.Linear)]
    for table in tables:
        for head in reversed(linear):
            if head.out_features == table.num_embeddings and head.in_features == table.embedding_dim:
                return table, head
    return None, None
