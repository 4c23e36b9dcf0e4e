"""Calling live modules: sample inputs, outputs as arrays by name, in a mode and arithmetic that can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tieaudit.change import Level, Proof
from tieaudit.errors import UsageError
from tieaudit.floor import difference, limit_of, rounding_bound, says_something
from tieaudit.formats.torch_module.read import held
from tieaudit.formats.torch_module.samples import samples
from tieaudit.formats.torch_module.tensors import locate
from tieaudit.formats.torch_module.uses import arguments
from tieaudit.storage import same_bytes

if TYPE_CHECKING:
    import torch

    from tieaudit.runners import Array


def sample_inputs(module: torch.nn.Module) -> Any:
    """The first made-up inputs with which the module runs: by its class, else by its first layers.

    UsageError if there are none. Cost: a forward pass for each offer that is tried.
    """
    import torch

    said = "none could be made up"
    for sample in samples(module):
        try:
            with comparable(module), torch.no_grad():
                call(module, sample.inputs)
        except Exception as error:  # whatever a foreign forward raises on arguments that do not fit it
            said = f"made-up ones did not fit: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        return sample.inputs
    raise UsageError(f"{type(module).__name__}: expected inputs=…, found none, and {said}")


def call(module: torch.nn.Module, inputs: Any) -> Any:
    """The module's own output for a tuple of arguments, a mapping of keyword arguments, or one value."""
    args, kwargs = arguments(inputs)
    return module(*args, **kwargs)


def outputs(module: torch.nn.Module, inputs: Any) -> dict[str, Array]:
    """All tensors of the output as arrays, in eval mode and without gradients; half precision as float32."""
    import torch

    with comparable(module), torch.no_grad():
        found = tensors_of(call(module, inputs))
    return {name: _array(tensor) for name, tensor in found.items()}


def _array(tensor: torch.Tensor) -> Array:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.float()
    array: Array = tensor.resolve_conj().numpy()
    return array


@contextmanager
def comparable(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode, a fixed seed, full-precision matrix products; everything is put back."""
    import torch

    modes = {one: one.training for one in module.modules()}
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with suppress(NotImplementedError):  # the module of an exported program has only the mode it was traced in
        module.eval()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for one, mode in modes.items():
            one.training = mode


def tensors_of(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested output, by where it is: mappings, sequences, dataclasses and objects with `to_tuple`."""
    import torch

    if isinstance(value, torch.Tensor):
        return {name or "output": value}
    if isinstance(value, Mapping):
        parts: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, (list, tuple)):
        parts = iter(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = iter((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif hasattr(value, "to_legacy_cache") or type(value).__name__.endswith("Cache"):
        return {}  # what a next call would need, not what this one says
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, part in parts:
        found.update(tensors_of(part, f"{name}.{key}" if name else str(key)))
    return found


def compare_modules(
    before: torch.nn.Module, after: torch.nn.Module, inputs: Any = None, max_drift: float | None = None
) -> Proof:
    """Whether two live modules hold the same tensors under the same names, and give the same outputs.

    Equal if no output differs by more than the rounding bound, or than `max_drift` where it is given. They run where
    they are. UsageError if inputs are needed and not given.
    """
    given = sample_inputs(before) if inputs is None else inputs
    first = _same_tensors(before, after)
    second = Level("regional", "not run", "no plan says what was rewritten")
    one, other = outputs(before, given), outputs(after, given)
    if not one:
        return Proof((first, second, Level("end to end", "not run", "the output holds no tensor")))
    found = difference(one, other)
    summed = max((min(p.shape) for p in before.parameters() if p.dim() == 2), default=1)
    limit = limit_of(0.0, rounding_bound(one, summed)) if max_drift is None else max_drift
    failed = bool(found.problem) or found.relative > limit
    said = f"{len(one)} outputs" + (", equal bit for bit" if found.equal else "")
    if failed:
        said = f"{found.problem or f'{found.where} differs by {found.absolute:.3g}'}; {said}"
    elif not says_something(one):
        said += "; they are one value each, so that this says little"
    device = str(next((p.device for p in before.parameters()), "cpu"))
    third = Level("end to end", "failed" if failed else "held", said, found.relative, limit, device)
    return Proof((first, second, third), (), found.relative if max_drift is not None else None)


def _same_tensors(before: torch.nn.Module, after: torch.nn.Module) -> Level:
    ours = {one.name: one.tensor for one in held(before)}
    theirs = {one.name: one.tensor for one in held(after)}
    if ours.keys() != theirs.keys():
        missing = sorted(ours.keys() ^ theirs.keys())
        return Level("structural", "not run", f"no plan is known, and only one of the two holds {missing[0]}")
    pairs = zip(ours, locate(ours.values()), locate(theirs[name] for name in ours), strict=True)
    for name, one, other in pairs:
        if one.no_values or other.no_values:
            return Level("structural", "not run", f"{name} has no values: {one.no_values or other.no_values}")
        same = ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        if not same or not same_bytes(one, other):
            return Level("structural", "not run", f"no plan is known, and the two differ in {name}")
    return Level("structural", "held", f"{len(ours)} tensors equal bit for bit")
