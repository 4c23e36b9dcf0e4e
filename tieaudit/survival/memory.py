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
    import torch

    return judged_module(trial, trial.twin().to(torch.float64))


def _to_dtype_anew(trial: Trial) -> tuple[Outcome, str]:
    import torch

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return judged_module(trial, trial.twin().to(torch.float64))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _to_cuda(trial: Trial) -> tuple[Outcome, str]:
    import torch

    if not torch.cuda.is_available():
        raise NotRun("no CUDA device here")
    return judged_module(trial, trial.twin().to("cuda"))


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
    for path, owner in slots.items():
        del path
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


OPERATIONS = (
    Operation("copy.deepcopy(module)", _deepcopy, _RETIE),
    Operation("module.to(dtype)", _to_dtype, _RETIE),
    Operation(
        "module.to(dtype), overwriting parameters",
        _to_dtype_anew,
        "leave torch.__future__.set_overwrite_module_params_on_conversion off, or tie again: tieaudit.tie(module)",
    ),
    Operation("module.to('cuda')", _to_cuda, _RETIE),
    Operation("module.to('meta')", _to_meta, "build the module under torch.device('meta') instead of moving it"),
    Operation(
        "module.to_empty() from meta",
        _to_empty,
        "tie after to_empty, before the values are loaded: the class's tie_weights(), or assign the Parameter by hand",
    ),
    Operation("load_state_dict(state)", _load, _RETIE),
    Operation(
        "load_state_dict(state, assign=True)",
        _load_assign_own,
        "tie again before the optimizer is made: tieaudit.tie(module) makes one memory one Parameter",
    ),
    Operation(
        "load_state_dict(copies, assign=True)",
        _load_assign_clones,
        "load without assign, or tie again before the optimizer is made: tieaudit.tie(module)",
    ),
)
