"""Operations on a module in memory: copies, conversions, state dicts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tieaudit.formats.torch_module.read import held
from tieaudit.survival.ties import NotRun, Operation, Outcome, Trial, judged_module

if TYPE_CHECKING:
    import torch

_RETIE = "tie again afterwards: tieaudit.tie(module), or the class's own tie_weights()"


def _deepcopy(trial: Trial) -> tuple[Outcome, str]:
    return judged_module(trial, copy.deepcopy(trial.module))


def _to_dtype(trial: Trial) -> tuple[Outcome, str]:
    twin = trial.twin()
    return judged_module(trial, twin.to(_another_dtype(twin)))


def _another_dtype(module: torch.nn.Module) -> torch.dtype:
    """A type that every floating-point or complex tensor of the module must really be converted to."""
    import torch

    found = {one.tensor.dtype for one in held(module)}
    if any(kind.is_complex for kind in found):
        return torch.complex128 if torch.complex128 not in found else torch.complex64
    return torch.float64 if torch.float64 not in found else torch.float32


def _to_dtype_anew(trial: Trial) -> tuple[Outcome, str]:
    import torch

    twin = trial.twin()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return judged_module(trial, twin.to(_another_dtype(twin)))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _to_cuda(trial: Trial) -> tuple[Outcome, str]:
    if not _has_cuda():
        raise NotRun("no CUDA device here")
    return judged_module(trial, trial.twin().to("cuda"))


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _to_meta(trial: Trial) -> tuple[Outcome, str]:
    return judged_module(trial, trial.twin().to("meta"))


def _to_empty(trial: Trial) -> tuple[Outcome, str]:
    """As large models are loaded: built on the meta device with its ties, then given memory."""
    twin = trial.twin()
    _move_to_meta(twin)
    before = judged_module(trial, twin)
    if before[0] != "kept":
        raise NotRun("no copy on the meta device keeps these ties to begin with")
    return judged_module(trial, twin.to_empty(device="cpu"))


def _move_to_meta(module: torch.nn.Module) -> None:
    """One meta tensor for each tensor object, under all its names."""
    import torch

    made: dict[int, torch.Tensor] = {}
    slots = dict(module.named_modules(remove_duplicate=False))
    for one in held(module):
        if id(one.tensor) not in made:
            empty = torch.empty_like(one.tensor, device="meta")
            made[id(one.tensor)] = torch.nn.Parameter(empty, one.tensor.requires_grad) if one.parameter else empty
    for owner in slots.values():
        for place in (owner._parameters, owner._buffers):
            for name, tensor in place.items():
                if tensor is not None and id(tensor) in made:
                    place[name] = made[id(tensor)]


def _load(trial: Trial) -> tuple[Outcome, str]:
    twin = trial.twin()
    twin.load_state_dict({name: value.clone() for name, value in trial.module.state_dict().items()})
    return judged_module(trial, twin)


def _load_assign_own(trial: Trial) -> tuple[Outcome, str]:
    twin = trial.twin()
    twin.load_state_dict(trial.twin().state_dict(), assign=True)
    return judged_module(trial, twin)


def _load_assign_clones(trial: Trial) -> tuple[Outcome, str]:
    twin = trial.twin()
    clones = {name: value.clone() for name, value in trial.module.state_dict().items()}
    twin.load_state_dict(clones, assign=True)
    return judged_module(trial, twin)


_NO_COPY = "build a second module with its constructor and load the state dict into that"
_NO_CONVERSION = "convert the state dict instead, and load it into a module that was built in the other type"
_NO_VALUES = "load the values first: a module on the meta device has none"

OPERATIONS = (
    Operation("copy.deepcopy(module)", _deepcopy, _RETIE, _NO_COPY),
    Operation("module.to(dtype)", _to_dtype, _RETIE, _NO_CONVERSION),
    Operation(
        "module.to(dtype), overwriting parameters",
        _to_dtype_anew,
        "leave torch.__future__.set_overwrite_module_params_on_conversion off, or tie again: tieaudit.tie(module)",
        _NO_CONVERSION,
    ),
    Operation("module.to('cuda')", _to_cuda, _RETIE, _NO_VALUES, here=_has_cuda),
    Operation(
        "module.to('meta')",
        _to_meta,
        "build the module under torch.device('meta') instead of moving it",
        "build the module under torch.device('meta') instead of moving it",
    ),
    Operation(
        "module.to_empty() from meta",
        _to_empty,
        "tie after to_empty, before the values are loaded: the class's tie_weights(), or assign the Parameter by hand",
        "build the module on its device instead of on meta",
    ),
    Operation("load_state_dict(state)", _load, _RETIE, _NO_VALUES),
    Operation(
        "load_state_dict(state, assign=True)",
        _load_assign_own,
        "tie again before the optimizer is made: tieaudit.tie(module) makes one memory one Parameter",
        "load without assign",
    ),
    Operation(
        "load_state_dict(copies, assign=True)",
        _load_assign_clones,
        "load without assign, or tie again before the optimizer is made: tieaudit.tie(module)",
        "load without assign",
    ),
)
