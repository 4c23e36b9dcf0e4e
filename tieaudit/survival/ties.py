"""The ties of a live module, a copy with the very same ties, and the judgement whether they are still there."""

from __future__ import annotations

import copy
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tieaudit.errors import TieAuditError, UsageError
from tieaudit.formats.torch_module.read import held
from tieaudit.formats.torch_module.tensors import dtype_name, identity, locate
from tieaudit.model import Weight, make_id
from tieaudit.printable import counted
from tieaudit.regions import aliases, overlaps
from tieaudit.survival.travelling import pack, unpack

if TYPE_CHECKING:
    import torch

Outcome = Literal["kept", "lost", "error", "not run"]
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_N_NAMED = 2
_N_MOST_TIES = 12
_N_MOST_SAID = 240


@dataclass(frozen=True)
class TiedNames:
    """Names of one memory, all of it or, `partial`, parts of it that meet."""

    names: tuple[str, ...]
    one_object: bool
    """Whether they are also one tensor object."""
    identical: bool
    """Whether all see it alike; else some see it transposed, or only a part of it."""
    parameter: bool = True
    """Whether an optimizer moves any of these. Two buffers of one memory need not be one object."""
    partial: bool = False


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
        lines = [" = ".join(names) for names in self.ties[:_N_MOST_TIES]]
        if len(self.ties) > _N_MOST_TIES:
            lines.append(f"… and {len(self.ties) - _N_MOST_TIES} more ties")
        lines.append("")
        for row in self.rows:
            lines.append(f"{row.operation:<{width}}  {row.outcome:<7}  {row.because}")
            lines += [f"{'':<{width}}           remedy: {row.remedy}"] if row.remedy else []
        tally = Counter(row.outcome for row in self.rows)
        return "\n".join([*lines, "", " · ".join(f"{tally[one]} {one}" for one in get_args(Outcome))])


NO_INPUTS = "sample inputs are needed: give inputs=…, or let the factory return (module, inputs)"


@dataclass(frozen=True)
class Trial:
    """What one operation may work with."""

    module: torch.nn.Module
    """The user's own: to be looked at only."""
    inputs: Any
    ties: tuple[TiedNames, ...]
    folder: Path
    """Empty, removed afterwards."""

    def sample(self) -> Any:
        """The sample inputs that were given, else made-up ones with which a copy of the module runs. NotRun."""
        if self.inputs is not None:
            return self.inputs
        from tieaudit.calling import sample_inputs

        try:
            return sample_inputs(self.twin())
        except UsageError as error:
            raise NotRun(f"{NO_INPUTS} ({error.message})") from error

    def twin(self, *, distinct: bool = False) -> torch.nn.Module:
        """A copy with the same ties; `distinct`: its floating-point values are random, so that no two are equal.

        Made by a deep copy, or through a pickle where the module cannot be copied. NotRun if neither can be had.
        """
        try:
            made = copy.deepcopy(self.module)
        except Exception as error:  # a class says what it likes
            made = self._through_a_pickle(error)
        _tie_alike(self.module, made)
        if tied_names(made) != self.ties:
            raise NotRun("no copy of this module with the same ties can be made to try it on")
        if distinct:
            randomise(made)
        return made

    def _through_a_pickle(self, refused: Exception) -> Any:
        file = io.BytesIO()
        try:
            pack(self.module, file)
            file.seek(0)
            return unpack(file)
        except Exception:
            raise NotRun(f"no copy of this module can be made to try it on: {said(refused)}") from refused


@dataclass(frozen=True)
class Operation:
    """An everyday operation; `run` answers with an outcome and why, or raises what the library raises."""

    name: str
    run: Callable[[Trial], tuple[Outcome, str]]
    remedy: str
    """What to do where a tie is lost."""
    on_error: str
    """What to do where the operation fails."""
    here: Callable[[], bool] = lambda: True
    """Whether this machine can try it at all; otherwise the table is without it."""


class NotRun(TieAuditError):
    """The operation does not apply here; the message says why."""


def said(error: BaseException) -> str:
    """What was raised, in one line; what this tool itself says needs no name of a class before it."""
    text = " ".join(_COLORS.sub("", str(error)).split())[:_N_MOST_SAID]
    if isinstance(error, TieAuditError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tied_names(module: torch.nn.Module) -> tuple[TiedNames, ...]:
    """Every class of names over the very same bytes, and of names that share some bytes, in the order of the module."""
    members = held(module)
    parameters = frozenset(one.name for one in members if one.parameter)
    return _tied({one.name: one.tensor for one in members}, parameters)


def _tied(tensors: Mapping[str, torch.Tensor], parameters: frozenset[str] | None = None) -> tuple[TiedNames, ...]:
    shared = aliases(_weights(tensors))
    groups = [(tuple(weight.name for weight, _ in names), False) for names in shared if len(names) > 1]
    names_of = {make_id(name): name for name in tensors}
    groups += [(tuple(names_of[id] for id in one.ids), True) for one in overlaps(shared)]
    return tuple(
        TiedNames(
            names,
            len({id(tensors[name]) for name in names}) == 1,
            len({identity(tensors[name]) for name in names}) == 1,
            parameters is None or not parameters.isdisjoint(names),
            partial,
        )
        for names, partial in groups
    )


def _weights(tensors: Mapping[str, torch.Tensor]) -> list[Weight]:
    storages = zip(tensors.items(), locate(tensors.values()), strict=True)
    return [
        Weight(make_id(name), name, tuple(tensor.shape), dtype_name(tensor.dtype)[0], storage)
        for (name, tensor), storage in storages
        if tensor.numel()
    ]


def judged(ties: tuple[TiedNames, ...], tensors: Mapping[str, torch.Tensor], *, objects: bool) -> tuple[Outcome, str]:
    """Whether names that were one are one among `tensors`.

    `objects`: these are the tensors of a module, so that one object has to stay one object.
    """
    missing = [name for tie in ties for name in tie.names if name not in tensors]
    if missing:
        return "lost", f"{missing[0]} is not there any more"
    now = {(name, group.partial): group for group in _tied(tensors) for name in group.names}
    apart = [tie for tie in ties if not _together(tie, now)]
    if apart:
        what = " and ".join(apart[0].names[:_N_NAMED])
        return "lost", f"{what} are separate tensors now" + _further(apart, ties)
    moved = [tie for tie in ties if objects and tie.one_object and tie.parameter]
    split = [tie for tie in moved if len({id(tensors[name]) for name in tie.names}) > 1]
    if split:
        what = " and ".join(split[0].names[:_N_NAMED])
        because = f"{what} are one memory in separate Parameter objects, which an optimizer moves twice"
        return "lost", because + _further(split, ties)
    return "kept", f"{len(ties)} of {counted(len(ties), 'tie')}"


def _together(tie: TiedNames, now: Mapping[tuple[str, bool], TiedNames]) -> bool:
    group = now.get((tie.names[0], tie.partial))
    return group is not None and set(tie.names) <= set(group.names)


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


def randomise(module: torch.nn.Module) -> None:
    """Floating-point values of their own for every tensor, in place, so that no two are equal but by a tie."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in held(module):
            if one.tensor.is_floating_point() and one.tensor.device.type != "meta":
                values = torch.randn(one.tensor.shape, generator=generator) * 0.02
                one.tensor.copy_(values if one.parameter else values.abs())  # a variance, a frequency
