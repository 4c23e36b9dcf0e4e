"""The ties of a live module, a copy with the very same ties, and the judgement whether they are still there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tieaudit.errors import TieAuditError
from tieaudit.formats.torch_module.read import held
from tieaudit.formats.torch_module.tensors import TensorStorage, identity, locate

if TYPE_CHECKING:
    import torch

Outcome = Literal["kept", "lost", "error", "not run"]
_N_NAMED = 2


@dataclass(frozen=True)
class TiedNames:
    """Names of one memory."""

    names: tuple[str, ...]
    one_object: bool
    """Whether they are also one tensor object."""
    identical: bool
    """Whether all see it alike; else some see it transposed."""


@dataclass(frozen=True)
class Survived:
    """What one operation made of the ties."""

    operation: str
    outcome: Outcome
    because: str
    remedy: str = ""


@dataclass(frozen=True)
class Survival:
    """The table: one row for each operation that was tried."""

    ties: tuple[tuple[str, ...], ...]
    """Names of each tie of the module."""
    rows: tuple[Survived, ...]

    def __str__(self) -> str:
        """One line for each operation, and the remedy below where a tie did not survive."""
        width = max((len(row.operation) for row in self.rows), default=0)
        lines = [" = ".join(names) for names in self.ties] + [""]
        for row in self.rows:
            lines.append(f"{row.operation:<{width}}  {row.outcome:<7}  {row.because}")
            lines += [f"{'':<{width}}           remedy: {row.remedy}"] if row.remedy else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Trial:
    """What one operation may work with."""

    module: torch.nn.Module
    """The user's own: to be looked at only."""
    inputs: Any
    ties: tuple[TiedNames, ...]
    folder: Path
    """Empty, removed afterwards."""

    def twin(self, *, distinct: bool = False) -> torch.nn.Module:
        """A copy with the same ties; `distinct`: its floating-point values are random, so that no two are equal."""
        made = copy.deepcopy(self.module)
        _tie_alike(self.module, made)
        if distinct:
            _randomise(made)
        return made


@dataclass(frozen=True)
class Operation:
    """An everyday operation; `run` answers with an outcome and why, or raises what the library raises."""

    name: str
    run: Callable[[Trial], tuple[Outcome, str]]
    remedy: str


class NotRun(TieAuditError):
    """The operation does not apply here; the message says why."""


def tied_names(module: torch.nn.Module) -> tuple[TiedNames, ...]:
    """Every class of names over the very same bytes, in the order of the module."""
    return _tied({one.name: one.tensor for one in held(module)})


def _tied(tensors: Mapping[str, torch.Tensor]) -> tuple[TiedNames, ...]:
    by_place: dict[object, list[str]] = {}
    for (name, tensor), storage in zip(tensors.items(), locate(tensors.values()), strict=True):
        if tensor.numel():
            by_place.setdefault(_place(tensor, storage), []).append(name)
    return tuple(
        TiedNames(
            tuple(names),
            len({id(tensors[name]) for name in names}) == 1,
            len({identity(tensors[name]) for name in names}) == 1,
        )
        for names in by_place.values()
        if len(names) > 1
    )


def _place(tensor: torch.Tensor, storage: TensorStorage) -> tuple[object, ...]:
    return (storage.region, str(tensor.dtype), tensor.numel())


def judged(ties: tuple[TiedNames, ...], tensors: Mapping[str, torch.Tensor], *, objects: bool) -> tuple[Outcome, str]:
    """Whether names that were one are one among `tensors`.

    `objects`: these are the tensors of a module, so that one object has to stay one object.
    """
    now = {name: group for group in _tied(tensors) for name in group.names}
    missing = [name for tie in ties for name in tie.names if name not in tensors]
    if missing:
        return "lost", f"{missing[0]} is not there any more"
    apart = [tie for tie in ties if tie.names[0] not in now or not set(tie.names) <= set(now[tie.names[0]].names)]
    if apart:
        what = " and ".join(apart[0].names[:_N_NAMED])
        return "lost", f"{what} are separate tensors now" + _further(apart, ties)
    split = [tie for tie in ties if objects and tie.one_object and len({id(tensors[name]) for name in tie.names}) > 1]
    if split:
        what = " and ".join(split[0].names[:_N_NAMED])
        return "lost", f"{what} are one memory in separate Parameter objects, which an optimizer moves twice"
    return "kept", f"{len(ties)} of {len(ties)} ties"


def _further(apart: list[TiedNames], ties: tuple[TiedNames, ...]) -> str:
    return f" ({len(apart)} of {len(ties)} ties lost)" if len(ties) > 1 else ""


def judged_module(trial: Trial, module: torch.nn.Module) -> tuple[Outcome, str]:
    """`judged` for a module that has the same names."""
    return judged(trial.ties, {one.name: one.tensor for one in held(module)}, objects=True)


def _tie_alike(module: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Give the copy the original's sharing of memory, where separate objects share it: a deep copy separates them."""
    import torch

    storages: dict[int, Any] = {}
    theirs = {one.name: one.tensor for one in held(twin)}
    shared: dict[int, set[int]] = {}
    ours = held(module)
    plain = [one for one in ours if type(one.tensor.data) is torch.Tensor and one.tensor.layout == torch.strided]
    for one in plain:
        shared.setdefault(one.tensor.untyped_storage()._cdata, set()).add(id(one.tensor))
    for one in plain:
        tensor = one.tensor
        key = tensor.untyped_storage()._cdata
        if len(shared[key]) < 2:
            continue
        if key not in storages:
            storages[key] = tensor.untyped_storage().clone()
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        view.set_(storages[key], tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        theirs[one.name].data = view


def _randomise(module: torch.nn.Module) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in held(module):
            if one.parameter and one.tensor.is_floating_point() and one.tensor.device.type != "meta":
                values = torch.randn(one.tensor.shape, generator=generator) * 0.02
                one.tensor.copy_(values)
