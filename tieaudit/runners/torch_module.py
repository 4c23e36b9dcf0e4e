"""Live PyTorch modules by `package.module:factory`, CPU and CUDA. The user's own code is run, in the child.

Inputs by name: those of `forward`, and where the factory gave nested sample inputs, `mask`, `batch.ids`, `pair[0]`.
Without sample inputs they are made up: a transformers class says what it takes; else every layer of the module says
what *it* takes (ids for an embedding, `[batch, in_features]` for a matrix …), and what the module accepts is kept.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tieaudit.runners import Answer, Array, Params, Port, Runner, Signature, Verb
from tieaudit.runners.torch import arguments_of, signature_of

if TYPE_CHECKING:
    import torch

    from tieaudit.torch_session import Arguments

_N_MOST_TRIALS = 60
_SECONDS_OF_TRIALS = 60.0
_N_MOST_KINDS = 6
_N_MOST_PARAMETERS = 4
_SIDES = (32, 64, 224)
_FRAMES = 64


@dataclass(frozen=True)
class Taken:
    """What a module takes, and how arrays become its arguments."""

    signature: Signature
    arguments: Callable[[Mapping[str, Array]], Arguments]
    sample: Mapping[str, Array]
    because: str = ""
    """Why nothing is known, for a module without any input."""


def _start(device: str) -> Mapping[str, Verb]:
    from tieaudit.torch_session import Session

    session = Session(device)

    def open_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        from tieaudit.formats.torch_module.answer import built

        began = time.perf_counter()
        module, inputs = built(params["path"])
        module.eval()
        taken = taken_by(module, inputs)
        handle, facts = session.hold(module, taken.arguments)
        seconds = time.perf_counter() - began
        told = {"signature": taken.signature.to_json(), "no_inputs": taken.because, "seconds": seconds}
        return {"handle": handle, **told, **facts}, dict(taken.sample)

    return session.verbs(open_)


def taken_by(module: torch.nn.Module, inputs: Any = None) -> Taken:
    """From sample inputs, from a transformers class, or found by trial. Runs the module, in the last case."""
    if inputs is not None:
        return _by_sample(module, inputs)
    if hasattr(module, "main_input_name") and hasattr(module, "config"):
        return Taken(signature_of(module), lambda given: ((), arguments_of(module, given)), {})
    found = _by_trial(module)
    if isinstance(found, Signature):
        return Taken(found, lambda given: _by_parameter(module, given), {})
    return Taken(Signature((), ()), lambda given: _by_parameter(module, given), {}, found)


def _by_sample(module: torch.nn.Module, inputs: Any) -> Taken:
    """Sample inputs of any nesting: their tensors are the inputs, everything else stays what it is."""
    import torch
    from torch.utils import _pytree

    from tieaudit.formats.torch_module.uses import arguments
    from tieaudit.nested import array_of

    rows, spec = _pytree.tree_flatten_with_path(arguments(inputs))
    names = [_name_of(module, path) for path, _ in rows]
    leaves = [leaf for _, leaf in rows]
    places = {name: index for index, name in enumerate(names) if isinstance(leaves[index], torch.Tensor)}

    def rebuilt(given: Mapping[str, Array]) -> Arguments:
        new = [
            _like(given[name], leaf) if name in given and name in places else leaf
            for name, leaf in zip(names, leaves, strict=True)
        ]
        args, kwargs = _pytree.tree_unflatten(new, spec)
        return args, kwargs

    sample = {name: array_of(leaves[index], name) for name, index in places.items()}
    return Taken(Signature(tuple(_port(name, array) for name, array in sample.items()), ()), rebuilt, sample)


def _name_of(module: torch.nn.Module, path: Sequence[Any]) -> str:
    """The parameter of `forward` that a leaf belongs to, and where it is inside."""
    from torch.utils import _pytree

    side, first, *rest = path
    inside = "".join(f".{step.key}" if _is_plain(step) else str(step) for step in rest)
    if side.idx == 1:  # keyword arguments
        return f"{first.key}{inside}"
    taken = list(inspect.signature(module.forward).parameters.values())
    for index, one in enumerate(taken):
        if one.kind is one.VAR_POSITIONAL:
            return f"{one.name}[{first.idx - index}]{inside}"
        if index == first.idx:
            return f"{one.name}{inside}"
    return f"{_pytree.keystr((first,))}{inside}"


def _is_plain(step: Any) -> bool:
    key = getattr(step, "key", None)
    return isinstance(key, str) and key.isidentifier()


def _port(name: str, array: Array) -> Port:
    limit = max(int(array.max()) + 1, 1) if array.dtype.kind in "iu" and array.size else None
    return Port(name, array.dtype.name, tuple(array.shape), limit)


def _like(array: Array, leaf: torch.Tensor) -> torch.Tensor:
    """The array as the kind of tensor that was there."""
    from tieaudit.nested import tensor_of

    tensor = tensor_of(array)
    if tensor.is_floating_point() == leaf.is_floating_point():
        tensor = tensor.to(leaf.dtype)
    return tensor.requires_grad_(leaf.requires_grad and tensor.is_floating_point())


def _by_parameter(module: torch.nn.Module, given: Mapping[str, Array]) -> Arguments:
    """Arrays by the name of a parameter of `forward`; numbers and anything unknown by their order."""
    from tieaudit.nested import tensor_of

    kind = _float_of(module)
    tensors = {}
    for name, array in given.items():
        tensor = tensor_of(array)
        tensors[name] = tensor.to(kind) if tensor.is_floating_point() and kind is not None else tensor
    taken = inspect.signature(module.forward).parameters
    if all(name in taken and taken[name].kind is not inspect.Parameter.POSITIONAL_ONLY for name in tensors):
        return (), tensors
    return tuple(tensors.values()), {}


def _float_of(module: torch.nn.Module) -> torch.dtype | None:
    """The one floating-point type of all parameters; None where they have several or none."""
    kinds = {one.dtype for one in module.parameters() if one.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None


def _by_trial(module: torch.nn.Module) -> Signature | str:
    """The first signature that the module runs with, or why there is none."""
    import torch

    from tieaudit.arithmetic import attempt, device_of
    from tieaudit.inputs import made_up
    from tieaudit.nested import tensors_of
    from tieaudit.torch_session import on_device

    names = _required(module)
    where = f"forward({', '.join(names)})"
    advice = "let the factory return (module, sample inputs), or give inputs"
    if not names or len(names) > _N_MOST_PARAMETERS:
        return f"no inputs could be made up for {where}; {advice}"
    began, said = time.perf_counter(), "no layer says what it takes"
    for signature in itertools.islice(_offers(module, names), _N_MOST_TRIALS):
        if time.perf_counter() - began > _SECONDS_OF_TRIALS:
            break
        feed = next((feed for _, feed in made_up(signature)), None)
        if feed is None:
            continue
        args, kwargs = on_device(_by_parameter(module, feed.arrays), device_of(module))
        try:
            with torch.no_grad():
                result = attempt(functools.partial(module, *args, **kwargs), set())
        except Exception as error:  # it is not our code
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if tensors_of(result):
            return signature
        said = "its output holds no tensor"
    return f"no inputs could be made up for {where} ({said}); {advice}"


def _required(module: torch.nn.Module) -> list[str]:
    """Parameters of `forward` that have no default; for `*args` alone, one."""
    taken = list(inspect.signature(module.forward).parameters.values())
    names = [
        one.name for one in taken
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]  # fmt: skip
    return names or [one.name for one in taken if one.kind is not one.VAR_KEYWORD][:1]


def _offers(module: torch.nn.Module, names: Sequence[str]) -> Iterator[Signature]:
    """Every parameter the same kind of input first, then all combinations; masks are masks of the first one."""
    kinds = list(dict.fromkeys(_kinds(module)))[:_N_MOST_KINDS]
    if any(sign in names[0].lower() for sign in ("id", "token", "word", "index", "text")):
        kinds.sort(key=lambda port: not port.dtype.startswith("int"))
    combinations = itertools.chain(
        ((kind,) * len(names) for kind in kinds), itertools.product(kinds, repeat=len(names)) if len(names) > 1 else ()
    )
    for combination in combinations:
        ports = [replace(kind, name=name) for kind, name in zip(combination, names, strict=True)]
        yield Signature(tuple(_masked(port, ports[0]) for port in ports), ())


def _masked(port: Port, first: Port) -> Port:
    return Port(port.name, "bool", first.dims[:2]) if "mask" in port.name.lower() else port


def _kinds(module: torch.nn.Module) -> Iterator[Port]:
    """What the layers take, in order, as ports without a name."""
    import torch
    from torch import nn

    kind = str(_float_of(module) or torch.float32).removeprefix("torch.")
    for one in module.modules():
        if isinstance(one, (nn.Embedding, nn.EmbeddingBag)):
            yield Port("", "int64", ("batch", "sequence"), one.num_embeddings)
        elif isinstance(one, nn.RNNBase):
            front = ("batch", "sequence") if one.batch_first else ("sequence", "batch")
            yield Port("", kind, (*front, one.input_size))
        elif isinstance(one, nn.Linear):
            yield Port("", kind, ("batch", one.in_features))
            yield Port("", kind, ("batch", "sequence", one.in_features))
        elif isinstance(one, nn.Bilinear):
            yield Port("", kind, ("batch", one.in1_features))
            yield Port("", kind, ("batch", one.in2_features))
        elif isinstance(one, nn.Conv1d):
            yield Port("", kind, ("batch", one.in_channels, _FRAMES))
        elif isinstance(one, nn.Conv2d):
            yield from (Port("", kind, ("batch", one.in_channels, side, side)) for side in _SIDES)
        elif isinstance(one, nn.Conv3d):
            yield Port("", kind, ("batch", one.in_channels, 16, 16, 16))
        elif isinstance(one, nn.MultiheadAttention):
            yield Port("", kind, ("batch", "sequence", one.embed_dim))
        elif isinstance(one, nn.LayerNorm):
            yield Port("", kind, ("batch", "sequence", *one.normalized_shape))
        elif isinstance(one, (nn.BatchNorm1d, nn.BatchNorm2d)):
            sides = (_SIDES[0], _SIDES[0]) if isinstance(one, nn.BatchNorm2d) else ()
            yield Port("", kind, ("batch", one.num_features, *sides))
        for matrix in one._parameters.values():  # of a layer of the user's own
            if matrix is not None and matrix.ndim == 2 and type(one).__module__.split(".")[0] != "torch":
                yield Port("", "int64", ("batch", "sequence"), matrix.shape[0])
                yield from (Port("", kind, ("batch", size)) for size in matrix.shape)


RUNNER = Runner(
    name="torch_module",
    title="PyTorch",
    formats=("torch_module",),
    packages=("torch",),
    extra="torch",
    start=_start,
)
