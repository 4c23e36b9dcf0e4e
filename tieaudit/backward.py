"""Backward passes in float64, and the gradient of a tie as the sum over its slots: two modules against each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tieaudit.arithmetic import attempt
from tieaudit.errors import UsageError
from tieaudit.formats.torch_module.tensors import identity
from tieaudit.nested import tensors_of

if TYPE_CHECKING:
    import torch

LIMIT = 1e-10
"""Largest difference of a float64 gradient, relative to its own largest element: sums in another order, no more."""
_SMALL, _SMALL_IN_PART = 1e-3, 0.3
"""A gradient whose largest element is below this part of the largest of all is measured by that part of it: one that
is zero but for rounding (the bias of a key) has no size of its own. The second where the module itself rounds."""
_ROUNDING = 8.0
_ORIGINAL = ".original"
_BOX = "parametrizations."
Loss = Callable[[Any], "torch.Tensor"]
Arguments = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Summed:
    """The gradient of one tie of either module, in both."""

    name: str
    slots: tuple[str, ...]
    """Every name of it, itself first."""
    difference: float
    """Largest difference between the two sums, relative to the largest element."""
    reached: tuple[str, ...]
    """Slots with a gradient other than zero of their own, in the module that has more of them."""
    n_separate: int
    """Separate parameters that the class has in that module: with one, both modules tie it and no sum was formed."""
    unread: tuple[str, ...] = ()
    """Slots that no operation of that module gets for these inputs: there is nothing to be learnt through them."""


@dataclass(frozen=True)
class Across:
    """Two modules' gradients on the same data."""

    summed: tuple[Summed, ...]
    left: tuple[str, ...]
    """Parameters of one module whose name the other one has not."""
    limit: float
    """The largest difference that counts as rounding."""

    @property
    def held(self) -> bool:
        return all(one.difference <= self.limit for one in self.summed)


@dataclass(frozen=True)
class _Slot:
    """One name of one parameter: the plain name, and whether the parameter lies transposed to what the name shows."""

    name: str
    tensor: torch.nn.Parameter
    turned: bool


def in_float64(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes in float64 with the same ties, in a mode with a gradient and without chance.

    Eval mode, but recurrent layers in training mode without dropout: cuDNN has no other backward pass. UsageError for
    a module that cannot be copied or converted.
    """
    import torch

    try:
        made = copy.deepcopy(module).double().eval()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"{type(module).__name__}: no copy of it in float64 can be made: {said}") from error
    _share_buffers(module, made)
    for one in made.modules():
        if isinstance(one, torch.nn.RNNBase):
            one.train()
            one.dropout = 0.0
    return made


def _share_buffers(module: torch.nn.Module, made: torch.nn.Module) -> None:
    """Tie the copy's buffers as the module's are: a conversion makes a buffer anew under each of its names."""
    owners = dict(made.named_modules(remove_duplicate=False))
    first: dict[object, torch.Tensor] = {}
    for name, buffer in module.named_buffers(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        owners[path]._buffers[leaf] = first.setdefault(identity(buffer), owners[path]._buffers[leaf])


def floats_in_float64(value: Any) -> Any:
    """Nested inputs with their floating-point tensors in float64, detached."""
    import torch
    from torch.utils import _pytree

    def convert(item: Any) -> Any:
        floating = isinstance(item, torch.Tensor) and item.is_floating_point()
        return item.detach().double().requires_grad_(item.requires_grad) if floating else item

    return _pytree.tree_map(convert, value)


def own_loss(output: Any) -> torch.Tensor:
    """The output's own `loss` where it has one, else all floating-point outputs weighted by fixed random numbers.

    UsageError where no output has a gradient.
    """
    import torch

    tensors = tensors_of(output)
    given = tensors.get("loss")
    if given is not None and given.numel() == 1 and given.requires_grad:
        return given.reshape(())
    generator = torch.Generator().manual_seed(0)
    terms = []
    for tensor in tensors.values():
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            terms.append((tensor * weights).sum().double())
    if not terms:
        raise UsageError("expected an output with a gradient, found none; give loss=…")
    return torch.stack(terms).sum()


@dataclass
class Watched:
    """What was seen of the operations of a forward pass."""

    widths: set[torch.dtype] = field(default_factory=set)
    """The floating-point types that they gave: a module may round to float32 whatever its parameters are."""
    read: set[int] = field(default_factory=set)
    """`id` of every tensor that one of them got."""


def backward(module: torch.nn.Module, arguments: Arguments, loss: Loss, noted: set[str]) -> tuple[float, set[int]]:
    """One backward pass; gradients stay in the parameters. Inside `arithmetic.exact`.

    The distance from 1 to the next number of the narrowest floating-point type that the forward pass made, and the `id`
    of each parameter that it read.
    """
    import torch

    def once() -> tuple[float, set[int]]:
        module.zero_grad(set_to_none=True)
        args, kwargs = arguments()
        with torch.random.fork_rng(devices=_devices(module)), torch.enable_grad(), _watching() as seen:
            torch.manual_seed(0)
            number = loss(module(*args, **kwargs))
        number.backward()
        known = {id(parameter) for parameter in module.parameters()}
        return max((float(torch.finfo(kind).eps) for kind in seen.widths), default=2.0**-52), seen.read & known

    return attempt(once, noted)


def _devices(module: torch.nn.Module) -> list[int]:
    found = {one.device.index for one in module.parameters() if one.device.type == "cuda"}
    return sorted(index for index in found if index is not None)


@contextmanager
def _watching() -> Iterator[Watched]:
    import torch
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = Watched()

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.read.update(id(one) for one in _pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor))
            result = func(*args, **(kwargs or {}))
            for leaf in _pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim:
                    seen.widths.add(leaf.dtype)
            return result

    with Watch():
        yield seen


def across(
    one: torch.nn.Module, other: torch.nn.Module, arguments: Arguments, others: Arguments, noted: set[str],
    loss: Loss = own_loss,
) -> Across:  # fmt: skip
    """Compare the gradients of two modules that `in_float64` made, on the same data.

    Names that either module ties are one class; in each module the gradients of its parameters of that class are
    summed, transposed where a tie is. A tied module and its untied twin thus agree exactly if the tie is trained right.
    """
    passes = backward(one, arguments, loss, noted), backward(other, others, loss, noted)
    widest, read = max(width for width, _ in passes), passes[0][1] | passes[1][1]
    ours, theirs = _slots(one), _slots(other)
    left = sorted(ours.keys() ^ theirs.keys())
    rounds = widest > 1e-15
    n_summed = max((max(slot.tensor.shape, default=1) for slot in ours.values()), default=1)
    limit = _ROUNDING * widest * math.sqrt(n_summed) if rounds else LIMIT
    largest = max((_size(slot.tensor.grad) for slot in (*ours.values(), *theirs.values())), default=0.0)
    floor = largest * (_SMALL_IN_PART if rounds else _SMALL)
    own_names = {slot.name: name for name, slot in _named_slots(one)}
    found = []
    for turns in _classes(ours, theirs):
        names = list(turns)
        known = [[(turns[n], side[n]) for n in names if n in side] for side in (ours, theirs)]
        if not all(known) or not any(slot.tensor.requires_grad for side in known for _, slot in side):
            continue
        mine, twin = (_total(side) for side in known)
        twin = twin.to(mine.device)
        most = max(known, key=lambda side: len({id(slot.tensor) for _, slot in side}))
        n_separate, reached = len({id(slot.tensor) for _, slot in most}), _reached(most)
        size = max(_size(mine), _size(twin), floor)
        gap = float((mine - twin).abs().max()) / size if size and mine.numel() else 0.0
        shown = tuple(own_names.get(name, name) for name in names)
        reached = [own_names.get(name, name) for name in reached]
        unread = tuple(own_names.get(slot.name, slot.name) for _, slot in most if id(slot.tensor) not in read)
        found.append(Summed(shown[0], shown, gap, tuple(reached), n_separate, unread))
    return Across(tuple(found), tuple(left), limit)


def _named_slots(module: torch.nn.Module) -> Iterator[tuple[str, _Slot]]:
    """A tie behind a `Transposition` has its plain name here."""
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, tensor in module.named_parameters(remove_duplicate=False):
        turned = name.endswith(_ORIGINAL) and _is_transposition(modules.get(name.removesuffix(_ORIGINAL)))
        plain = name.replace(_BOX, "").removesuffix(_ORIGINAL) if turned else name
        yield name, _Slot(plain, tensor, turned)


def _is_transposition(steps: Any) -> bool:
    from tieaudit.transposition import Transposition

    return steps is not None and [type(step) for step in steps] == [Transposition]


def _slots(module: torch.nn.Module) -> dict[str, _Slot]:
    return {slot.name: slot for _, slot in _named_slots(module)}


def _classes(*modules: Mapping[str, _Slot]) -> list[dict[str, bool]]:
    """Names that are one tensor in any of the modules, with whether each lies transposed to the first of them."""
    nodes = list(dict.fromkeys(name for slots in modules for name in slots))
    edges: dict[str, list[tuple[str, bool]]] = {name: [] for name in nodes}
    for slots in modules:
        first: dict[object, _Slot] = {}
        for slot in slots.values():
            kept = first.setdefault(identity(slot.tensor), slot)
            if kept is not slot:
                turned = kept.turned != slot.turned
                edges[kept.name].append((slot.name, turned))
                edges[slot.name].append((kept.name, turned))
    found, done = [], set[str]()
    for start in nodes:
        if start in done:
            continue
        group, queue = {start: False}, [start]
        while queue:
            name = queue.pop(0)
            for near, turned in edges[name]:
                if near not in group:
                    group[near] = group[name] != turned
                    queue.append(near)
        done.update(group)
        found.append(group)
    return found


def _total(slots: list[tuple[bool, _Slot]]) -> torch.Tensor:
    """Σ of the gradients of the separate parameters, in the layout that the first name of the class shows."""
    import torch

    total: torch.Tensor | None = None
    seen: set[int] = set()
    for turned, slot in slots:
        if id(slot.tensor) in seen:
            continue
        seen.add(id(slot.tensor))
        grad = torch.zeros_like(slot.tensor) if slot.tensor.grad is None else slot.tensor.grad.detach().to_dense()
        grad = grad.mT if turned != slot.turned else grad
        total = grad if total is None else total + grad
    assert total is not None  # asked for non-empty sides only
    return total


def _reached(slots: list[tuple[bool, _Slot]]) -> list[str]:
    separate = {id(slot.tensor): slot for _, slot in reversed(slots)}
    names = [slot.name for _, slot in slots if separate[id(slot.tensor)] is slot and _size(slot.tensor.grad) > 0]
    return names


def _size(tensor: torch.Tensor | None) -> float:
    return float(tensor.detach().to_dense().abs().max()) if tensor is not None and tensor.numel() else 0.0
