"""An `nn.Module` in memory → Model: every name of every parameter and buffer, held while it is looked at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tieaudit.errors import UnreadableModel
from tieaudit.formats.torch_module.tensors import dtype_name, locate
from tieaudit.formats.torch_module.uses import hints, uses_by_export, uses_by_type
from tieaudit.model import Model, Part, Use, Weight, make_id

if TYPE_CHECKING:
    import torch

    from tieaudit.formats.torch_module.tensors import TensorStorage

_N_NAMED = 3


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
        raise UnreadableModel(f"{type(module).__name__}: expected a tree of modules, found one inside itself") from None
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
        if name not in getattr(one, "_non_persistent_buffers_set", ())
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


def read_module(module: torch.nn.Module, inputs: Any = None, *, path: str = "") -> Model:
    """The parameter graph of a live module. Nothing is copied: bytes are read from its tensors when they are needed.

    `inputs`: a tuple of positional arguments, a mapping of keyword arguments, or one tensor. With them the uses of
    every parameter come from torch.export, how often a module is called included; without them from the types of
    the modules. `metadata["uses"]` says which, and why an export failed.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UnreadableModel(f"{path or 'input'}: expected an nn.Module, found a {type(module).__name__}")
    members = held(module)
    storages = locate(one.tensor for one in members)
    weights = tuple(_weight(one, storage) for one, storage in zip(members, storages, strict=True))
    uses, source = _uses(module, inputs, frozenset(weight.name for weight in weights))
    kind = type(module)
    live = live_count(module)
    kinds, because = hints(module, members)
    return Model(
        path=path or f"{kind.__module__}.{kind.__qualname__} in memory",
        format="torch_module",
        parts=(Part("", ()),),
        weights=weights,
        uses=uses,
        hints=kinds,
        metadata={
            "architecture": kind.__qualname__,
            "torch": str(torch.__version__),
            "uses": source,
            "roles": because,
            **({"n_parameters_live": str(live)} if live is not None else {}),
        },
        notes=tuple(_notes(module, weights, storages)),
    )


def _weight(one: Held, storage: TensorStorage) -> Weight:
    name, remark = dtype_name(one.tensor.dtype)
    because = f"{one.because}; {remark}" if remark else one.because
    return Weight(
        make_id(one.name), one.name, tuple(one.tensor.shape), name, storage, parameter=one.parameter, because=because
    )


def _uses(module: torch.nn.Module, inputs: Any, names: frozenset[str]) -> tuple[tuple[Use, ...], str]:
    if inputs is None:
        said = "from the types of the modules: how often a module is called is not known without sample inputs"
        return uses_by_type(module, names), said
    found = uses_by_export(module, inputs, names)
    if isinstance(found, str):
        return uses_by_type(module, names), f"from the types of the modules: torch.export could not be used: {found}"
    return found, "from torch.export with the given inputs"


def _notes(module: torch.nn.Module, weights: Sequence[Weight], storages: Sequence[TensorStorage]) -> Iterator[str]:
    """What cannot be told about this module."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for weight, storage in zip(weights, storages, strict=True):
        if storage.no_values:
            by_reason[storage.no_values].append(weight.name)
    for reason, names in by_reason.items():
        what = f"{names[0]} has" if len(names) == 1 else f"{len(names):,} tensors ({_some(names)}) have"
        yield (f"{what} no values to compare ({reason}): ties by identity are known, equal copies cannot be told")
    lazy = lazy_names(module)
    if lazy:
        yield f"{_some(lazy)}: not made before the lazy module is called once, so not counted"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_N_NAMED])
    return f"{shown} …" if len(names) > _N_NAMED else shown
