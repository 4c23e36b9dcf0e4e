"""Calling live modules: sample inputs, outputs as arrays by name, in a mode and arithmetic that can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tieaudit.arithmetic import attempt, device_name, device_of, exact, held_bytes, timed
from tieaudit.backward import across, floats_in_float64, in_float64
from tieaudit.change import Level, Proof
from tieaudit.cost import N_ROUNDS, N_RUNS, SECONDS_OF_RUNS, Cost, costs, merged
from tieaudit.errors import UsageError
from tieaudit.floor import difference, limit_of, rounding_bound, says_something
from tieaudit.formats.torch_module.read import held
from tieaudit.formats.torch_module.samples import samples
from tieaudit.formats.torch_module.tensors import locate
from tieaudit.formats.torch_module.uses import arguments
from tieaudit.levels import label, training_level
from tieaudit.nested import arrays_of, tensors_of
from tieaudit.printable import counted
from tieaudit.storage import same_bytes
from tieaudit.torch_session import on_device

if TYPE_CHECKING:
    import torch

    from tieaudit.runners import Array

__all__ = ["call", "comparable", "compare_modules", "outputs", "sample_inputs", "tensors_of"]


def sample_inputs(module: torch.nn.Module) -> Any:
    """The first made-up inputs with which the module runs: by its class, by its first layers, else by trial.

    UsageError if there are none. Cost: a forward pass, in eval mode, for each offer that is tried.
    """
    import torch

    for sample in samples(module):
        try:
            with comparable(module), torch.no_grad():
                call(module, sample.inputs)
        except Exception:  # whatever a foreign forward raises on arguments that do not fit it
            continue
        return sample.inputs
    return _by_trial(module)


def _by_trial(module: torch.nn.Module) -> dict[str, Any]:
    from tieaudit.inputs import made_up
    from tieaudit.nested import tensor_of
    from tieaudit.runners.torch_module import taken_by

    with comparable(module):
        taken = taken_by(module)
    feed = next((feed for _, feed in made_up(taken.signature)), None)
    if feed is None or not feed.arrays:
        said = f": {taken.because}" if taken.because else ""
        raise UsageError(f"{type(module).__name__}: expected inputs=…, found none{said}")
    return {name: tensor_of(array) for name, array in feed.arrays.items()}


def call(module: torch.nn.Module, inputs: Any) -> Any:
    """The module's own output for a tuple of arguments, a mapping of keyword arguments, or one value."""
    args, kwargs = arguments(inputs)
    return module(*args, **kwargs)


def outputs(module: torch.nn.Module, inputs: Any) -> dict[str, Array]:
    """All tensors and numbers of the output as arrays, in eval mode and without gradients.

    Inputs are moved to where the module is.
    """
    return _outputs(module, inputs, set())


def _outputs(module: torch.nn.Module, inputs: Any, noted: set[str]) -> dict[str, Array]:
    placed = on_device(inputs, device_of(module))
    with comparable(module):
        return arrays_of(attempt(lambda: _forward(module, placed), noted))


def _forward(module: torch.nn.Module, inputs: Any) -> Any:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return call(module, inputs)


@contextmanager
def comparable(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode, a fixed seed, full-precision matrix products, deterministic algorithms; everything is put back."""
    import torch

    modes = {one: one.training for one in module.modules()}
    device = device_of(module)
    with exact(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with suppress(NotImplementedError):  # the module of an exported program has only the mode it was traced in
            module.eval()
        try:
            torch.manual_seed(0)
            yield
        finally:
            for one, mode in modes.items():
                one.training = mode


def compare_modules(
    before: torch.nn.Module,
    after: torch.nn.Module,
    inputs: Any = None,
    max_drift: float | None = None,
    *,
    gradients: bool = False,
) -> Proof:
    """Whether two live modules hold the same tensors under the same names, and give the same outputs.

    Equal if no output differs by more than the rounding bound, or than `max_drift` where it is given. They run where
    they are; inputs are moved there. `gradients`: a fourth level, training parity. UsageError if inputs are needed
    and not given. Cost: some twenty runs of each; for gradients, a float64 copy of each.
    """
    given = sample_inputs(before) if inputs is None else inputs
    first = _same_tensors(before, after)
    second = Level("regional", "not run", "no plan says what was rewritten")
    noted: set[str] = set()
    one, other = _outputs(before, given, noted), _outputs(after, given, noted)
    if not one:
        return Proof((first, second, Level("end to end", "not run", "the output holds no tensor")))
    third = _end_to_end(before, after, one, other, max_drift)
    levels = (first, second, third)
    if gradients:
        levels += (_training(before, after, given, noted),)  # type: ignore[assignment]
    rounds = [(_cost(before, given), _cost(after, given)) for _ in range(N_ROUNDS)]
    facts = costs(*(merged([pair[side] for pair in rounds]) for side in (0, 1)))
    if noted:
        facts["not_deterministic"] = sorted(noted)
    return Proof(levels, (), third.max_difference if max_drift is not None else None, facts)


def _end_to_end(
    before: torch.nn.Module, after: torch.nn.Module, one: dict[str, Array], other: dict[str, Array],
    max_drift: float | None,
) -> Level:  # fmt: skip
    found = difference(one, other)
    summed = max((min(p.shape) for p in before.parameters() if p.dim() == 2), default=1)
    limit = limit_of(0.0, rounding_bound(one, summed)) if max_drift is None else max_drift
    failed = bool(found.problem) or found.relative > limit
    said = counted(len(one), "output") + (", equal bit for bit" if found.equal else "")
    if failed:
        apart = f"{found.where} differs by {found.absolute:.3g}, {found.relative:.3g} of its size"
        said = f"{found.problem or apart}; {said}"
    elif not says_something(one):
        said += "; they are one value each, so that this says little"
    devices = dict.fromkeys(_label(module) for module in (before, after))
    return Level("end to end", "failed" if failed else "held", said, found.relative, limit, " and ".join(devices))


def _training(before: torch.nn.Module, after: torch.nn.Module, inputs: Any, noted: set[str]) -> Level:
    data = floats_in_float64(arguments(inputs))
    with exact():
        try:
            found = across(
                in_float64(before), in_float64(after), lambda: on_device(data, device_of(before)),
                lambda: on_device(data, device_of(after)), noted,
            )  # fmt: skip
        except UsageError as error:
            return Level("training", "not run", error.message)
    return training_level(found, _label(after))


def _label(module: torch.nn.Module) -> str:
    device = device_of(module)
    return label(device.type, device_name(device))


def _cost(module: torch.nn.Module, inputs: Any) -> Cost:
    """One round of runs of a live module where it is."""
    device = device_of(module)
    placed = on_device(inputs, device)
    with comparable(module):
        found = timed(lambda: _forward(module, placed), device, N_RUNS, SECONDS_OF_RUNS)
    n_bytes = held_bytes(module)
    peak = None if found.n_bytes_peak is None else n_bytes + found.n_bytes_peak
    return Cost(found.seconds, device_name(device), n_bytes, peak, device.type == "cuda")


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
