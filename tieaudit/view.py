"""How a tensor is seen: a chain of steps, invertible where possible. One type for weights, uses and ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from tieaudit.dtypes import dtype

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.generic]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transpose:
    """Axis permutation, numpy's `transpose(perm)`."""

    perm: tuple[int, ...]

    def shape(self, shape: Shape) -> Shape:
        return tuple(shape[axis] for axis in self.perm)

    def apply(self, array: Array) -> Array:
        return array.transpose(self.perm)

    def inverse(self, shape: Shape) -> Transpose:
        return Transpose(tuple(sorted(range(len(self.perm)), key=self.perm.__getitem__)))

    def __str__(self) -> str:
        return "transposed" if self.perm == (1, 0) else f"permuted {list(self.perm)}"


@dataclass(frozen=True)
class Reshape:
    """Row-major reshape to a known shape."""

    to: Shape

    def shape(self, shape: Shape) -> Shape:
        return self.to

    def apply(self, array: Array) -> Array:
        return array.reshape(self.to)

    def inverse(self, shape: Shape) -> Reshape:
        return Reshape(shape)

    def __str__(self) -> str:
        return f"reshaped to {list(self.to)}"


@dataclass(frozen=True)
class Cast:
    """Conversion to another element type, rounding to nearest even; not invertible in general."""

    to: str

    def shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, array: Array) -> Array:
        return array.astype(dtype(self.to).numpy())

    def inverse(self, shape: Shape) -> None:
        return None

    def __str__(self) -> str:
        return f"cast to {self.to}"


@dataclass(frozen=True)
class Dequantise:
    """Codes to numbers, (code - zero point) · scale: one scale for all, or one for each index of an axis."""

    axis: int | None = None

    def shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, array: Array) -> Array:
        raise ValueError("a view that is dequantized needs its scales and cannot be computed alone")

    def inverse(self, shape: Shape) -> None:
        return None

    def __str__(self) -> str:
        return "dequantized" if self.axis is None else f"dequantized along axis {self.axis}"


@dataclass(frozen=True)
class Repack:
    """The same packed codes under another element type and shape, row by row in the same order of bits."""

    before: tuple[str, Shape]
    """Element type and shape of what is seen so."""
    after: tuple[str, Shape]
    flip: int = 0
    """Bits of each byte that differ: the top bit of each code where signed codes become unsigned ones."""

    def shape(self, shape: Shape) -> Shape:
        return self.after[1]

    def apply(self, array: Array) -> Array:
        raise ValueError("packed codes are compared as bytes and never unpacked")

    def inverse(self, shape: Shape) -> Repack:
        return Repack(self.after, self.before, self.flip)

    def __str__(self) -> str:
        return f"packed as {self.after[0]} {list(self.after[1])}"


@dataclass(frozen=True)
class Opaque:
    """A step that is recognised but not computed here (dequantisation in blocks, slicing by a computed index)."""

    what: str

    def shape(self, shape: Shape) -> Shape:
        return shape

    def apply(self, array: Array) -> Array:
        raise ValueError(f"a view that is {self.what} cannot be computed")

    def inverse(self, shape: Shape) -> None:
        return None

    def __str__(self) -> str:
        return self.what


Step = Transpose | Reshape | Cast | Dequantise | Repack | Opaque


@dataclass(frozen=True)
class View:
    """A chain of steps from the stored tensor to what is seen; the empty chain is *as stored*."""

    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> View:
        """This view followed by one more step; two transposes become one, a transpose that moves nothing vanishes."""
        steps = self.steps
        if isinstance(step, Transpose):
            if steps and isinstance(steps[-1], Transpose):
                step = Transpose(tuple(steps[-1].perm[axis] for axis in step.perm))
                steps = steps[:-1]
            if step.perm == tuple(range(len(step.perm))):
                return View(steps)
        if isinstance(step, Repack) and steps and steps[-1] == step.inverse(()):
            return View(steps[:-1])
        if isinstance(step, Reshape) and steps and isinstance(steps[-1], Reshape):
            steps = steps[:-1]
        return View((*steps, step))

    def compose(self, after: View) -> View:
        """This view, then another."""
        result = self
        for step in after.steps:
            result = result.then(step)
        return result

    def inverse(self, shape: Shape) -> View | None:
        """The view that undoes this one on a tensor of `shape`, or None where information is lost."""
        shapes = [shape]
        for step in self.steps:
            shapes.append(step.shape(shapes[-1]))
        result = View()
        for step, before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            undone = step.inverse(before)
            if undone is None:
                return None
            result = result.then(undone)
        return result

    def shape(self, shape: Shape) -> Shape:
        """The shape that is seen."""
        for step in self.steps:
            shape = step.shape(shape)
        return shape

    def apply(self, array: Array) -> Array:
        """The array that is seen. ValueError if a step is opaque."""
        for step in self.steps:
            array = step.apply(array)
        return array

    def values_first(self) -> tuple[tuple[Step, ...], View] | None:
        """The same view as conversions of single elements, then moves of elements: the two kinds commute.

        None where that cannot be said: an opaque step, or scales along an axis that a reshape took apart.
        """
        conversions: list[Step] = []
        moves = View()
        for step in self.steps:
            if isinstance(step, (Transpose, Reshape)):
                moves = moves.then(step)
                continue
            if isinstance(step, Dequantise) and step.axis is not None:
                axis = step.axis
                for move in reversed(moves.steps):
                    if not isinstance(move, Transpose):
                        return None
                    axis = move.perm[axis]
                step = Dequantise(axis)
            if isinstance(step, (Opaque, Repack)):
                return None
            conversions.append(step)
        return tuple(conversions), moves

    @property
    def transposes(self) -> bool:
        """Whether this is exactly one two-dimensional transpose."""
        return self.steps == (Transpose((1, 0)),)

    def __str__(self) -> str:
        return ", ".join(str(step) for step in self.steps) or "as stored"


AS_STORED = View()
TRANSPOSED = View((Transpose((1, 0)),))
