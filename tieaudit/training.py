"""Training parity: what a tied parameter learns is what its untied slots would learn together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tieaudit.arithmetic import device_of, exact
from tieaudit.backward import LIMIT, across, backward, floats_in_float64, in_float64, own_loss
from tieaudit.formats.torch_module.read import held
from tieaudit.formats.torch_module.tensors import extent, identity
from tieaudit.formats.torch_module.uses import arguments
from tieaudit.live import untie
from tieaudit.printable import listed
from tieaudit.regions import overlapping
from tieaudit.torch_session import on_device

if TYPE_CHECKING:
    import torch

N_STEPS = 2
_N_MOST_MARKED = 1 << 28
"""Elements of one block of memory that are marked to see whether strided parameters meet; beyond it they count as
meeting."""


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
    unread: tuple[str, ...] = ()
    """Slots that no operation reads: the sum is without them, and right."""
    limit: float = LIMIT
    """The largest difference that counts as rounding: more where the module itself rounds to a narrower type."""

    @property
    def held(self) -> bool:
        return self.difference <= self.limit

    @property
    def cut_off(self) -> tuple[str, ...]:
        """Slots through which nothing is learnt: detached, or not used for these inputs."""
        return tuple(name for name in self.slots if name not in (*self.reached, *self.unread))

    @property
    def proved(self) -> bool:
        """Whether the sum has two parts or more, or one because nothing else is read."""
        return len(self.reached) > 1 or bool(self.reached) and not self.cut_off


@dataclass(frozen=True)
class GradientParity:
    """What training makes of the ties of a module."""

    tied: tuple[TiedGradient, ...]
    updated_twice: tuple[tuple[str, ...], ...]
    """Names whose separate `Parameter` objects share memory: an optimizer moves it once for each of them."""
    kept: Mapping[str, bool]
    """By optimizer: whether every tie, of buffers too, was still one tensor after two steps."""
    not_deterministic: tuple[str, ...] = ()
    """Operations without a deterministic version, whose rounding may differ from run to run."""

    @property
    def held(self) -> bool:
        """Whether all gradients are the sums, no memory is updated twice, and every optimizer keeps the ties.

        A sum of one part holds, too, and proves nothing: see `proved`.
        """
        return all(one.held for one in self.tied) and not self.updated_twice and all(self.kept.values())

    @property
    def proved(self) -> bool:
        """Whether it holds and every tied gradient is a sum of at least two parts, or of all that is read."""
        return self.held and bool(self.tied) and all(one.proved for one in self.tied)

    def __str__(self) -> str:
        lines = [_line(one) for one in self.tied] or ["no parameter of this module has several names"]
        lines += [f"updated twice: {listed(names)} share memory in separate Parameters" for names in self.updated_twice]
        lines += [f"two steps of {name}: ties {'kept' if kept else 'LOST'}" for name, kept in self.kept.items()]
        if self.not_deterministic:
            lines.append(f"not deterministic: {', '.join(self.not_deterministic)}")
        return "\n".join(lines)


def _line(one: TiedGradient) -> str:
    verdict = "is" if one.held else "is NOT"
    said = f"{one.name}: its gradient {verdict} the sum over {len(one.slots)} slots"
    said += f" (difference {one.difference:.3g}, limit {one.limit:.3g})"
    if one.unread:
        said += f", of which no operation reads {listed(one.unread)}"
    if not one.proved:
        said += ", which proves nothing"
    return f"{said}; nothing is learnt through {listed(one.cut_off)}" if one.cut_off else said


def gradients(
    module: torch.nn.Module, inputs: Any, *, loss: Callable[[Any], torch.Tensor] | None = None
) -> GradientParity:
    """Compare the module's tied gradients with those of an untied copy, both in float64 on the same data.

    `loss` maps the output to a number; without it the output's own `loss` counts (transformers, given labels), else
    all floating-point outputs weighted by fixed random numbers. Inputs move to where the module is. The module itself
    is not changed: up to four copies of it are made. UsageError where nothing has a gradient.
    """
    data = floats_in_float64(on_device(arguments(inputs), device_of(module)))
    noted: set[str] = set()
    with exact():
        tied, apart = in_float64(module), in_float64(module)
        untie(apart)
        found = across(tied, apart, lambda: data, lambda: data, noted, loss or own_loss)
        rows = tuple(
            TiedGradient(one.name, one.slots, one.difference, one.reached, one.unread, found.limit)
            for one in found.summed if len(one.slots) > 1
        )  # fmt: skip
        del tied, apart
        kept = _steps(module, data, loss or own_loss, noted)
    return GradientParity(rows, _updated_twice(module), kept, tuple(sorted(noted)))


def _groups(module: torch.nn.Module) -> list[tuple[str, ...]]:
    """Names of each parameter or buffer that has several."""
    by_place: dict[object, list[str]] = defaultdict(list)
    for one in held(module):
        by_place[identity(one.tensor)].append(one.name)
    return [tuple(names) for names in by_place.values() if len(names) > 1]


def _updated_twice(module: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Separate trained `Parameter` objects over one memory, the same elements, transposed, or slices of it."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = list(parameters)
    places = [_place(parameters[name]) for name in names]
    found = []
    for group in overlapping(places):
        together = [names[index] for index in sorted(group)]
        separate = {id(parameters[name]): parameters[name] for name in together if parameters[name].requires_grad}
        if len(separate) > 1 and _meet(list(separate.values())):
            found.append(tuple(together))
    return tuple(found)


def _meet(tensors: list[torch.nn.Parameter]) -> bool:
    """Whether tensors whose spans of memory overlap have an element in common: columns of one matrix may have none."""
    import torch

    begin = min(one.data_ptr() for one in tensors)
    n_items = max(-(-(one.data_ptr() - begin + extent(one)) // one.element_size()) for one in tensors)
    plain = all(one.is_contiguous() for one in tensors)
    if plain or n_items > _N_MOST_MARKED or len({one.dtype for one in tensors}) > 1:
        return True
    marks = torch.zeros(n_items, dtype=torch.uint8)
    for one in tensors:
        place = marks.as_strided(one.shape, one.stride(), (one.data_ptr() - begin) // one.element_size())
        if bool(place.any()):
            return True
        place.fill_(1)
    return False


def _place(tensor: torch.nn.Parameter) -> tuple[str, int, int]:
    """(device, begin, end) of a parameter in memory; of one without an address, a place that only its object has."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return f"object {id(tensor)}", 0, 1
    try:
        begin = tensor.data_ptr()
    except RuntimeError:
        begin = 0
    return (str(tensor.device), begin, begin + extent(tensor)) if begin else (f"object {id(tensor)}", 0, 1)


def _steps(module: torch.nn.Module, data: Any, loss: Callable[[Any], Any], noted: set[str]) -> dict[str, bool]:
    """Two steps of each optimizer in training mode: are the names that were one tensor still one?

    In eval mode where the module does not run in the other one on these inputs (BatchNorm and a batch of one).
    """
    import torch

    kept = {}
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        for mode in (True, False):
            copied = in_float64(module)
            if mode:
                copied.train()
            before = _groups(copied)
            optimizer = kind(copied.parameters(), lr=1e-3)
            try:
                for _ in range(N_STEPS):
                    backward(copied, lambda: data, loss, noted)
                    optimizer.step()
            except (RuntimeError, ValueError):
                if not mode:
                    raise
                continue
            kept[kind.__name__] = _groups(copied) == before
            break
    return kept
