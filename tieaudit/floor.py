"""How far two runs differ, and how far they may.

The floor is not *run it twice*: that is 0.0 on a CPU. It is the spread of the original under changes that may not
matter (threads, optimisation, prepacking, batch split), plus a stated bound where the kernel itself changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tieaudit.runners import Array

_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next number, by element type."""
K = 8.0
"""Factor of the rounding bound: room for the largest of some millions of errors and for a few layers after it."""
_SPREAD_FACTOR = 2.0
"""Two runs of one distribution of rounding errors may lie on opposite sides of the original."""


@dataclass(frozen=True)
class Difference:
    """How far `b` is from `a`, over all outputs."""

    relative: float
    """max |a − b| / max(1, rms(a)), the largest over the floating-point outputs."""
    absolute: float
    """max |a − b|."""
    where: str
    """The output with the largest relative difference."""
    problem: str = ""
    """What differs and has no size: names, shapes, NaN positions, integers."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs at all."""
        return not self.problem and self.absolute == 0.0


def is_float(array: Array) -> bool:
    """Whether differences in this array have a size."""
    return array.dtype.kind in "fc" or array.dtype.type.__module__ == "ml_dtypes" and "int" not in array.dtype.name


def difference(
    a: Mapping[str, Array], b: Mapping[str, Array], unstable: Mapping[str, Array] | None = None
) -> Difference:
    """Compare outputs by name. `unstable` marks integer elements that the original itself does not reproduce."""
    if a.keys() != b.keys():
        missing = sorted(a.keys() ^ b.keys())
        return Difference(math.inf, math.inf, missing[0], f"the outputs {', '.join(missing)} are on one side only")
    worst = Difference(0.0, 0.0, next(iter(a), ""))
    for name, one in a.items():
        found = _one(name, one, b[name], None if unstable is None else unstable.get(name))
        if found.problem:
            return found
        if found.relative > worst.relative:
            worst = found
    return worst


def _one(name: str, a: Array, b: Array, unstable: Array | None) -> Difference:
    if a.shape != b.shape:
        return Difference(math.inf, math.inf, name, f"{name}: shape {list(a.shape)} before, {list(b.shape)} after")
    if not (is_float(a) and is_float(b)):
        differs = a != b
        if unstable is not None and unstable.shape == a.shape:
            differs = differs & ~unstable
        count = int(np.count_nonzero(differs))
        problem = f"{name}: {count} of {a.size} {a.dtype.name} elements differ" if count else ""
        return Difference(math.inf if count else 0.0, math.inf if count else 0.0, name, problem)
    kind = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    x, y = a.astype(kind), b.astype(kind)
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        return Difference(math.inf, math.inf, name, f"{name}: NaN at other positions")
    finite = np.isfinite(x) & np.isfinite(y)
    if not np.array_equal(x[~finite & ~np.isnan(x)], y[~finite & ~np.isnan(x)]):
        return Difference(math.inf, math.inf, name, f"{name}: infinite at other positions")
    if not finite.any():
        return Difference(0.0, 0.0, name)
    gap = float(np.max(np.abs(x[finite] - y[finite])))
    return Difference(gap / scale(a), gap, name)


def scale(a: Array) -> float:
    """max(1, root mean square of the finite elements)."""
    x = np.abs(a.astype(np.complex128 if a.dtype.kind == "c" else np.float64))
    x = x[np.isfinite(x)]
    return max(1.0, float(np.sqrt(np.mean(x**2)))) if x.size else 1.0


def says_something(outputs: Mapping[str, Array]) -> bool:
    """Whether agreeing with these outputs proves anything: not if all of them are empty, NaN, or one value."""
    for array in outputs.values():
        if array.dtype.kind in "US" and array.size:
            return True
        values = array.astype(np.float64) if array.size and array.dtype.kind != "c" else array
        values = values[np.isfinite(values)] if values.size else values
        if values.size and (values.size == 1 or values.min() != values.max() if values.dtype.kind != "c" else True):
            return True
    return False


def unstable_elements(original: Mapping[str, Array], variants: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """Integer elements in which the original differs from itself under changes that may not matter: ties of floats."""
    found: dict[str, Array] = {}
    for variant in variants:
        for name, one in original.items():
            other = variant.get(name)
            if other is not None and not is_float(one) and other.shape == one.shape:
                found[name] = found.get(name, np.zeros(one.shape, bool)) | (one != other)
    return {name: mask for name, mask in found.items() if mask.any()}


def rounding_bound(outputs: Mapping[str, Array], n_summed: int, rounded: str = "") -> float:
    """The stated bound where the kernel changes, relative like `Difference.relative`.

    K × eps(fp32) × √n_summed, and for outputs of half precision 2 × eps(output) × peak on top: a sum of `n_summed`
    products is accumulated in fp32 (fp64 for fp64) in another order, and the difference grows like the root of their
    number, in units of the result's size; then both are rounded, to numbers that may be neighbours (`peak`: the
    largest element, in the same units). Measured on ONNX Runtime 1.32: 9e-8 … 1.7e-6 for sums of 512 in fp32, where
    this bound is 2.2e-5.

    `rounded`: an element type to which one side rounded a table that the other one computes as it goes: where it is of
    half precision, 2 × eps(rounded) × peak come on top, half a unit for each number and the same for factors of a sum.
    """
    bound = 0.0
    for array in outputs.values():
        if not is_float(array) or not array.size:
            continue
        eps = _EPS.get(array.dtype.name, _EPS["float32"])
        limit = K * min(eps, _EPS["float32"]) * math.sqrt(max(n_summed, 1))
        if eps > _EPS["float32"]:
            limit += 2 * eps * _peak(array)
        if _EPS.get(rounded, 0.0) > _EPS["float32"]:
            limit += 2 * _EPS[rounded] * _peak(array)
        bound = max(bound, limit)
    return bound


def _peak(array: Array) -> float:
    """The largest finite element in units of the size of all."""
    values = np.abs(array.astype(np.float64))
    finite = values[np.isfinite(values)]
    return float(finite.max()) / scale(array) if finite.size else 1.0


def limit_of(spread: float, bound: float) -> float:
    """The largest difference that counts as noise."""
    return max(_SPREAD_FACTOR * spread, bound)
