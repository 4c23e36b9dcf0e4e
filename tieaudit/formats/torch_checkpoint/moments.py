"""What the optimizer entries of parameters that become one add up to: which moments are linear in the gradient.

The gradient of a tied parameter is g = g₁ + g₂. A moving average of g is the sum of the averages; one of g² is not, as
it has the term 2·g₁·g₂. Which entries an optimizer keeps says which it is; an entry that is not listed is not adjusted.
Source: torch/optim/{sgd,adam,nadam,radam,rmsprop,adagrad,_muon}.py, 2.13; lion-pytorch, timm (Lion).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tieaudit.dtypes import TABLE
from tieaudit.formats.torch_checkpoint.rebuild import Tensor


@dataclass(frozen=True)
class _Kind:
    """Optimizers that keep the same things for a parameter."""

    linear: frozenset[str]
    """Moving averages of the gradient: they add exactly."""
    squared: frozenset[str]
    """Averages, sums or maxima of its square or size: the sum is an estimate."""
    optional: frozenset[str]
    """Of all of these, those that are not always there; the counts may be missing too."""
    settings: frozenset[str]
    """What the groups of such an optimizer say."""


def _kind(linear: str = "", squared: str = "", optional: str = "", settings: str = "") -> _Kind:
    return _Kind(*(frozenset(words.split()) for words in (linear, squared, optional, settings)))


_KINDS = (
    _kind("exp_avg", "exp_avg_sq max_exp_avg_sq", "max_exp_avg_sq", "betas weight_decay"),
    _kind("exp_avg", "", "", "betas weight_decay"),
    _kind("momentum_buffer", "", "", "momentum"),
    _kind("", "square_avg", "", "alpha"),
    _kind("", "sum", "", "lr_decay"),
)
_COUNTS = frozenset({"step", "mu_product"})
"""What must agree: both moved on at every step, whatever the gradients were."""
_AVERAGING = (
    "betas momentum dampening alpha momentum_decay amsgrad maximize nesterov lr_decay initial_accumulator_value "
    "ns_coefficients step"
).split()
"""Settings that say how a moment is made; of two groups they must agree."""


@dataclass(frozen=True)
class Sums:
    """What is to be summed."""

    linear: tuple[str, ...] = ()
    squared: tuple[str, ...] = ()
    decayed: bool = False
    """Whether weight decay may be part of the averages, which the sum then counts twice."""

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.linear, *self.squared)


def sums(
    entries: Sequence[object], groups: Sequence[Mapping[str, object]], shapes: Sequence[tuple[int, ...]]
) -> Sums | str:
    """What adds up of the entries of parameters that become one, or why they cannot be added.

    `entries`: what the state holds for each, None for nothing; `groups`, `shapes`: the group and shape of each.
    That the counts of steps agree is left to `counts`, as it takes reading.
    """
    if all(entry is None or entry == {} for entry in entries):
        return Sums()
    if not all(isinstance(entry, dict) and entry for entry in entries):
        return "one of the parameters that become one has no entry: it never had a gradient, which can mean two things"
    held = [entry for entry in entries if isinstance(entry, dict)]
    if any(entry.keys() != held[0].keys() for entry in held):
        return "the parameters that become one have entries of two kinds"
    present = {name for name in held[0] if any(entry[name] is not None for entry in held)}
    for group in groups[1:]:
        for setting in _AVERAGING:
            if _plain(group.get(setting)) != _plain(groups[0].get(setting)):
                return f"the parameters that become one are in two groups with different {setting}"
    if not present:
        return Sums()
    kind = next((kind for kind in _KINDS if _is(kind, present, groups[0])), None)
    if kind is None:
        return f"how {', '.join(sorted(map(str, present)))} add up is not known for this optimizer"
    found = Sums(
        tuple(sorted(kind.linear & present)),
        tuple(sorted(kind.squared & present)),
        any(group.get("weight_decay") not in (0, None) and not group.get("decoupled_weight_decay") for group in groups),
    )
    for name in found.all:
        for entry, shape in zip(held, shapes, strict=True):
            if not _is_moment(entry[name], shape) or entry[name].dtype != held[0][name].dtype:
                return f"{name} is no floating-point tensor of the shape of its parameter"
    return found


def _plain(value: object) -> object:
    """A setting as it can be compared: a number, or a few; what else a file may hold equals only itself."""
    if isinstance(value, (tuple, list)):
        return tuple(one if isinstance(one, (int, float)) else id(one) for one in value)
    return value if value is None or isinstance(value, (int, float, str)) else id(value)


def _is(kind: _Kind, present: set[object], group: Mapping[str, object]) -> bool:
    moments = kind.linear | kind.squared
    counted = not kind.squared or "step" in present or "step" in group
    scaled = any(str(key).startswith("trust") or key == "eta" for key in group)  # LARS: no average of the gradient
    return (
        moments - kind.optional <= present <= moments | _COUNTS
        and kind.settings <= group.keys()
        and (counted and not scaled)
    )


def _is_moment(value: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Tensor) or value.stored is None or value.odd or value.spelt:
        return False
    known = TABLE.get(value.dtype)
    return known is not None and known.family == "float" and known.n_bits >= 16 and value.shape == shape


def counts(entry: object) -> dict[str, object]:
    """The counts in one entry that must agree with those of another."""
    return {name: value for name, value in entry.items() if name in _COUNTS} if isinstance(entry, dict) else {}
