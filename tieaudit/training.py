"""Training parity: what a tied parameter learns is what its untied slots would learn together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tieaudit.calling import call, comparable, tensors_of
from tieaudit.errors import UsageError
from tieaudit.formats.torch_module.read import held
from tieaudit.formats.torch_module.tensors import identity
from tieaudit.live import untie

if TYPE_CHECKING:
    import torch

LIMIT = 1e-10
"""Largest difference of a float64 gradient, relative to its own largest element: sums in another order, no more."""
N_STEPS = 2
_ORIGINAL = ".original"
_BOX = "parametrizations."


@dataclass(frozen=True)
class TiedGradient:
    """One tied parameter against the slots that it serves."""

    name: str
    slots: tuple[str, ...]
    """Every name of it, itself first."""
    difference: float
    """Largest difference between its gradient and the sum over the untied slots, relative to its largest element."""
    reached: tuple[str, ...]
    """Slots with a gradient other than zero: with fewer than two of them the sum proves nothing."""

    @property
    def held(self) -> bool:
        return self.difference <= LIMIT


@dataclass(frozen=True)
class GradientParity:
    """What training makes of the ties of a module."""

    tied: tuple[TiedGradient, ...]
    updated_twice: tuple[tuple[str, ...], ...]
    """Names of one memory in separate `Parameter` objects: an optimizer moves it once for each of them."""
    kept: Mapping[str, bool]
    """By optimizer: whether every tie was still one tensor after two steps."""

    @property
    def held(self) -> bool:
        """Whether all gradients are the sums, no memory is updated twice, and every optimizer keeps the ties."""
        return all(one.held for one in self.tied) and not self.updated_twice and all(self.kept.values())


def gradients(
    module: torch.nn.Module, inputs: Any, *, loss: Callable[[Any], torch.Tensor] | None = None
) -> GradientParity:
    """Compare the module's tied gradients with those of an untied copy, both in float64 on the same data.

    `loss` maps the output to a number; without it, all floating-point outputs are weighted by fixed random numbers.
    The module itself is not changed: two copies of it are made. UsageError where nothing has a gradient.
    """
    with comparable(module):
        tied = _in_float64(module)
        apart = _in_float64(module)
    groups = _groups(tied)
    untie(apart)
    data = _floats_in_float64(inputs)
    loss = loss or _weighted
    _backward(tied, data, loss)
    _backward(apart, data, loss)
    ours, theirs = _named(tied), _named(apart)
    found = tuple(_against(names, ours, theirs) for names in groups if ours[names[0]].requires_grad)
    return GradientParity(found, _updated_twice(module), _steps(module, data, loss))


def _in_float64(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes in float64 with the same ties."""
    return copy.deepcopy(module).double()


def _named(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


def _groups(module: torch.nn.Module) -> list[tuple[str, ...]]:
    """Names of each parameter that has several."""
    by_place: dict[object, list[str]] = {}
    for one in held(module):
        if one.parameter:
            by_place.setdefault(identity(one.tensor), []).append(one.name)
    return [tuple(names) for names in by_place.values() if len(names) > 1]


def _updated_twice(module: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    parameters = _named(module)
    return tuple(
        names for names in _groups(module)
        if len({id(parameters[name]) for name in names}) > 1 and parameters[names[0]].requires_grad
    )  # fmt: skip


def _floats_in_float64(value: Any) -> Any:
    import torch
    from torch.utils import _pytree

    def convert(item: Any) -> Any:
        floating = isinstance(item, torch.Tensor) and item.is_floating_point()
        return item.detach().double() if floating else item

    return _pytree.tree_map(convert, value)


def _weighted(output: Any) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    terms = []
    for tensor in tensors_of(output).values():
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            terms.append((tensor * weights).sum())
    if not terms:
        raise UsageError("expected an output with a gradient, found none; give loss=…")
    return torch.stack(terms).sum()


def _backward(module: torch.nn.Module, inputs: Any, loss: Callable[[Any], torch.Tensor]) -> None:
    import torch

    module.zero_grad(set_to_none=True)
    with comparable(module), torch.enable_grad():
        number = loss(call(module, inputs))
        number.backward()


def _against(
    names: tuple[str, ...], ours: Mapping[str, torch.nn.Parameter], theirs: Mapping[str, torch.nn.Parameter]
) -> TiedGradient:
    import torch

    total = torch.zeros_like(ours[names[0]])
    reached = []
    for name in names:
        slot, transposed = _slot(name, theirs)
        if slot.grad is None:
            continue
        total = total + (slot.grad.mT if transposed else slot.grad).to_dense()
        if bool(slot.grad.to_dense().any()):
            reached.append(name)
    held_by = {id(ours[name]): ours[name] for name in names}  # separate objects over one memory each have a part
    mine = sum((one.grad.to_dense() for one in held_by.values() if one.grad is not None), torch.zeros_like(total))
    size = max(float(total.abs().max()), float(mine.abs().max())) if total.numel() else 0.0
    gap = float((total - mine).abs().max()) / size if size else 0.0
    return TiedGradient(names[0], names, gap, tuple(reached))


def _slot(name: str, parameters: Mapping[str, torch.nn.Parameter]) -> tuple[torch.nn.Parameter, bool]:
    """The untied slot of a name, and whether it lies transposed: a tie behind a `Transposition` has its plain name."""
    if name in parameters:
        return parameters[name], False
    return parameters[name.replace(_BOX, "").removesuffix(_ORIGINAL)], True


def _steps(module: torch.nn.Module, inputs: Any, loss: Callable[[Any], torch.Tensor]) -> dict[str, bool]:
    """Two steps of each optimizer: are the names that were one tensor still one, with a value that moved?"""
    import torch

    kept = {}
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        copied = _in_float64(module)
        before = _groups(copied)
        optimizer = kind(copied.parameters(), lr=1e-3)
        for _ in range(N_STEPS):
            _backward(copied, inputs, loss)
            optimizer.step()
        kept[kind.__name__] = _groups(copied) == before
    return kept
