"""An `nn.Module` in memory → Model: every name of every parameter and buffer, held while it is looked at."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tieaudit.errors import UnreadableModel
from tieaudit.formats.torch_module.declared import Declared, declared
from tieaudit.formats.torch_module.samples import samples
from tieaudit.formats.torch_module.tensors import dtype_name, locate
from tieaudit.formats.torch_module.uses import hints, uses_by_export, uses_by_type
from tieaudit.model import Model, Part, Use, Weight, make_id
from tieaudit.printable import counted

if TYPE_CHECKING:
    import torch

    from tieaudit.formats.torch_module.tensors import TensorStorage

_N_NAMED = 3
SECONDS = 10.0
"""For tracing a module with generated inputs, looked at whenever a module is entered: GPT-2 xl (48 layers) takes 8."""
_BY_TYPE = "from the types of the modules"
_DISTRIBUTED = ("torch.nn.parallel.", "torch.distributed.")


@dataclass(frozen=True)
class Held:
    """One name of one tensor of a module."""

    name: str
    tensor: torch.Tensor
    parameter: bool
    because: str


def held(module: torch.nn.Module) -> list[Held]:
    """Parameters and buffers under every name they have, a module that is registered at several paths included.

    Tensors that are not made yet (lazy modules) are left out. UnreadableModel if a module contains itself.
    """
    from torch.nn.parameter import is_lazy

    try:
        saved = _saved_buffers(module)
        parameters = list(module.named_parameters(remove_duplicate=False))
        buffers = list(module.named_buffers(remove_duplicate=False))
    except RecursionError:
        raise UnreadableModel(
            f"{type(module).__name__}: expected a tree of modules that Python can walk, found one inside itself or "
            "more levels than that"
        ) from None
    found = [Held(name, one, True, _parameter_because(name)) for name, one in parameters if not is_lazy(one)]
    for name, one in buffers:
        if not is_lazy(one):
            found.append(Held(name, one, False, "a buffer" if name in saved else "a buffer that is not saved"))
    return found


def _parameter_because(name: str) -> str:
    if ".parametrizations." in f".{name}":
        return "a parameter of the module, seen through a parametrization"
    return "a parameter of the module"


def _saved_buffers(module: torch.nn.Module) -> frozenset[str]:
    """Names of buffers that a state dict would hold."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, one in module.named_modules(remove_duplicate=False)
        for name, _ in one.named_buffers(recurse=False, remove_duplicate=False)
        if name not in getattr(one, "_non_persistent_buffers_set", ())  # TorchScript saves all of them
    )


def lazy_names(module: torch.nn.Module) -> list[str]:
    """Names of parameters and buffers that a lazy module makes only when it is first called."""
    from torch.nn.parameter import is_lazy

    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [name for name, one in named if is_lazy(one)]


def live_count(module: torch.nn.Module) -> int | None:
    """What `sum(p.numel() for p in module.parameters())` says; None where a parameter has no shape yet."""
    from torch.nn.parameter import is_lazy

    parameters = list(module.parameters())
    return None if any(is_lazy(one) for one in parameters) else sum(one.numel() for one in parameters)


def read_module(
    module: torch.nn.Module, inputs: Any = None, *, path: str = "", whole: bool = False, traced: bool = True
) -> Model:
    """The parameter graph of a live module. Nothing is copied: bytes are read from its tensors when they are needed.

    `inputs`: a tuple of positional arguments, a mapping of keyword arguments, or one tensor. With them the uses of
    every parameter come from torch.export, how often a module is called included; without them from the types of
    the modules. `metadata["uses"]` says which, and why an export failed. `whole`: generate inputs where none are
    given, for at most `SECONDS`, and ask a transformers class which ties it declares. Not `traced`: uses by types, and
    the module's forward is left alone.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UnreadableModel(f"{path or 'input'}: expected an nn.Module, found a {type(module).__name__}")
    members = held(module)
    storages = locate(one.tensor for one in members)
    weights = tuple(_weight(one, storage) for one, storage in zip(members, storages, strict=True))
    names = frozenset(weight.name for weight in weights)
    uses, source = _uses(module, inputs if traced else None, names, whole and traced)
    kind = type(module)
    said = declared(module, {weight.id: weight for weight in weights}) if whole else Declared()
    live = live_count(module)
    kinds, because = hints(module, members)
    return Model(
        path=path or f"{kind.__module__}.{kind.__qualname__} in memory",
        format="torch_module",
        parts=(Part("", ()),),
        weights=weights,
        uses=uses,
        declarations=said.declarations,
        hints=kinds,
        metadata={
            "architecture": kind.__qualname__,
            "torch": str(torch.__version__),
            "uses": source,
            "roles": because,
            **({"transformers": said.version} if said.version else {}),
            **({"n_parameters_live": str(live)} if live is not None else {}),
        },
        notes=(*said.notes, *_notes(module, weights, storages)),
    )


def _weight(one: Held, storage: TensorStorage) -> Weight:
    name, remark = dtype_name(one.tensor.dtype)
    because = f"{one.because}; {remark}" if remark else one.because
    return Weight(
        make_id(one.name), one.name, tuple(one.tensor.shape), name, storage, parameter=one.parameter, because=because
    )


def _uses(module: torch.nn.Module, inputs: Any, names: frozenset[str], generate: bool) -> tuple[tuple[Use, ...], str]:
    if inputs is None:
        made, why = _generated(module, names) if generate else (None, "without sample inputs")
        if made is not None:
            return made, why
        return uses_by_type(module, names), f"{_BY_TYPE}: how often a module is called is not known {why}"
    found = uses_by_export(module, inputs, names)
    if isinstance(found, str):
        return uses_by_type(module, names), f"{_BY_TYPE}: torch.export could not be used: {found}"
    return found, "from torch.export with the given inputs"


def _generated(module: torch.nn.Module, names: frozenset[str]) -> tuple[tuple[Use, ...] | None, str]:
    """Uses from the first made-up inputs that the module takes, and which; or None, and why."""
    apart = _not_traced(module)
    if apart:
        return None, f"without sample inputs: it holds {apart}, which is not traced unasked"
    until = time.monotonic() + SECONDS
    n_tried, found = 0, "none could be made up"
    try:
        for sample in samples(module):
            if time.monotonic() > until:
                break
            n_tried += 1
            answer = uses_by_export(module, sample.inputs, names, until=until)
            if not isinstance(answer, str):
                return answer, f"from torch.export with generated inputs: {sample.said}"
            found = answer if n_tried == 1 else found
    except Exception as error:  # a class whose configuration does not say what it takes
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if time.monotonic() > until:
        return None, f"without sample inputs: tracing with generated ones takes more than {SECONDS:g} s"
    return None, f"without sample inputs: {counted(n_tried, 'generated one')} did not fit: {found}" if n_tried else (
        f"without sample inputs: {found}"
    )


def _not_traced(module: torch.nn.Module) -> str:
    """What would talk to other processes in a forward pass, and so wait for them; or what torch.export never takes."""
    import torch

    for one in module.modules():
        if isinstance(one, torch.jit.ScriptModule):
            return "TorchScript"
        if type(one).__module__.startswith(_DISTRIBUTED):
            return f"a {type(one).__name__}"
    return "a DTensor" if any(type(one).__name__ == "DTensor" for one in module.parameters()) else ""


def _notes(module: torch.nn.Module, weights: Sequence[Weight], storages: Sequence[TensorStorage]) -> Iterator[str]:
    """What cannot be told about this module."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for weight, storage in zip(weights, storages, strict=True):
        if storage.no_values:
            by_reason[storage.no_values].append(weight.name)
    for reason, names in by_reason.items():
        what = f"{names[0]} has" if len(names) == 1 else f"{len(names):,} tensors ({_some(names)}) have"
        yield (f"{what} no values to compare ({reason}): ties by identity are known, equal copies cannot be told")
    packed = [path for path, one in module.named_modules() if _holds_packed(one)]
    if packed:
        yield f"{_some(packed)}: weights packed for a kernel are no tensors, so neither compared nor counted"
    lazy = lazy_names(module)
    if lazy:
        yield f"{_some(lazy)}: not made before the lazy module is called once, so not counted"


def _holds_packed(module: torch.nn.Module) -> bool:
    """Whether an attribute is an object of TorchScript's: how quantised modules hold weights and biases together."""
    import torch

    return not isinstance(module, torch.jit.ScriptModule) and any(
        isinstance(value, torch.ScriptObject) for value in vars(module).values()
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_N_NAMED])
    return f"{shown} …" if len(names) > _N_NAMED else shown
