"""Tensors that step through the bytes of another storage: transposes, slices and expansions that were never copied.

A row-major tensor needs none of this: it is a range of bytes. The terms are PyTorch's: sizes, strides in elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tieaudit.storage import BLOCK_BYTES, FileStorage, Region, Storage
from tieaudit.view import AS_STORED, Reshape, Shape, Transpose, View

if TYPE_CHECKING:  # only what really is strided, and really is read, needs it
    import numpy as np
    from numpy.typing import NDArray

    Items = NDArray[np.generic]

Axis = tuple[int, int]
"""Size and stride, in elements."""
_DENSE = 4
"""A box is read in one piece, gaps included, if that is at most so many times its own bytes."""
_SHORT_BYTES = 256
"""Elements further apart than this are read one by one."""


@dataclass(frozen=True)
class Strided:
    """A tensor of `shape` whose element i begins `offset + Σ index·stride` elements into `source`.

    Its bytes are those of the row-major, little-endian tensor. `region` spans from its first to its last byte there.
    Cost of a read: what is asked for where it lies together, up to 64 times that where it is scattered; memory: the
    request and one block.
    """

    source: Storage
    offset: int
    """Elements."""
    shape: Shape
    strides: tuple[int, ...]
    """Elements, none negative."""
    n_item_bytes: int
    n_swapped: int = 0
    """Bytes of each number to be reversed, where the source is big-endian; else 0."""

    @property
    def n_elements(self) -> int:
        return _product(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.n_item_bytes

    @property
    def region(self) -> Region:
        container, begin, _ = self.source.region
        first = begin + self.offset * self.n_item_bytes
        return (container, first, first + span(self.shape, self.strides) * self.n_item_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._range(begin, length) for begin, length in ranges]

    def stretch(self, begin: int, end: int) -> Storage | None:
        """See `strided.stretch`."""
        _, first, last = self.source.region
        if not self.n_swapped:
            return stretch(self.source, begin, end)
        item, n_items = self.n_item_bytes, (end - begin) // self.n_item_bytes
        if begin < first or end > last or (begin - first) % item or (end - begin) % item:
            return None
        return Strided(self.source, (begin - first) // item, (n_items,), (1,), item, self.n_swapped)

    def _range(self, begin: int, length: int) -> bytes:
        if length <= 0:
            return b""
        first, last = begin // self.n_item_bytes, -(-(begin + length) // self.n_item_bytes)
        found = b"".join(self._elements(self.offset, self.shape, self.strides, first, last))
        return found[begin - first * self.n_item_bytes :][:length]

    def _elements(self, offset: int, shape: Shape, strides: tuple[int, ...], first: int, last: int) -> Iterable[bytes]:
        """Elements first … last in row-major order: parts of rows at both ends, whole rows between them."""
        if not shape:
            yield self._bytes(self._box(offset, (1,), (0,)))
            return
        row = _product(shape[1:])
        while first < last:
            index, inside = divmod(first, row)
            n_rows = (last - first) // row if not inside else 0
            here = offset + index * strides[0]
            if n_rows:
                yield self._bytes(self._box(here, (n_rows, *shape[1:]), strides))
                first += n_rows * row
                continue
            end = min(last - index * row, row)
            yield from self._elements(here, shape[1:], strides[1:], inside, end)
            first = index * row + end

    def _bytes(self, items: Items) -> bytes:
        import numpy as np

        if self.n_swapped > 1:
            items = np.ascontiguousarray(items).view(f"u{self.n_swapped}").byteswap()
        return items.tobytes()

    def _box(self, offset: int, shape: Shape, strides: Sequence[int]) -> Items:
        """All elements of a box, axes in their order."""
        import numpy as np

        item = self.n_item_bytes
        kind = np.dtype(f"u{item}") if item in (1, 2, 4, 8) else np.dtype((np.void, item))
        n_span = span(shape, strides)
        if n_span * item <= max(_DENSE * _product(shape) * item, BLOCK_BYTES // 4):
            (block,) = self.source.read_ranges([(offset * item, n_span * item)])
            return np.ndarray(shape, kind, block, strides=tuple(stride * item for stride in strides))
        axis = max(range(len(shape)), key=lambda one: strides[one] if shape[one] > 1 else -1)
        step, size = strides[axis], shape[axis]
        if _product(shape) == size:
            return self._line(offset, size, step, kind).reshape(shape)
        rest = (*shape[:axis], *shape[axis + 1 :]), (*strides[:axis], *strides[axis + 1 :])
        return np.stack([self._box(offset + index * step, *rest) for index in range(size)], axis)

    def _line(self, offset: int, size: int, step: int, kind: np.dtype[np.generic]) -> Items:
        """Elements that lie `step` apart."""
        import numpy as np

        item = self.n_item_bytes
        if step * item > _SHORT_BYTES:
            return np.frombuffer(
                b"".join(self.source.read_ranges([((offset + n * step) * item, item) for n in range(size)])), kind
            )
        pieces, n_most = [], max(BLOCK_BYTES // (step * item), 1)
        for begin in range(0, size, n_most):
            count = min(n_most, size - begin)
            (block,) = self.source.read_ranges([((offset + begin * step) * item, ((count - 1) * step + 1) * item)])
            pieces.append(np.frombuffer(block, kind)[::step])
        return np.concatenate(pieces)


def row_major(shape: Shape) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie one behind the other."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_row_major(shape: Shape, strides: Sequence[int]) -> bool:
    """Whether the elements lie one behind the other; the stride of an axis of one does not matter."""
    return all(size == 1 or one == other for size, one, other in zip(shape, strides, row_major(shape), strict=True))


def own_strides(storage: Storage) -> tuple[int, ...] | None:
    """The `strides` of a storage that steps through its region (`Strided`, live tensors); None: it lies row by row."""
    found: tuple[int, ...] | None = getattr(storage, "strides", None)
    return found


def strides_of(storage: Storage, shape: Shape) -> tuple[int, ...]:
    """How a tensor steps through its region."""
    found = own_strides(storage)
    return row_major(shape) if found is None else found


def stretch(storage: Storage, begin: int, end: int) -> Storage | None:
    """The bytes from `begin` to `end` of what a storage is a part of, as they lie there; None where it cannot say.

    Both as in its `region`, of which the stretch may be more. Of big-endian numbers, the bytes in the other order.
    """
    own: Callable[[int, int], Storage | None] | None = getattr(storage, "stretch", None)
    if own is not None:
        return own(begin, end)
    if isinstance(storage, FileStorage):
        return FileStorage(storage.path, begin, end - begin)
    first = storage.region[1]
    if own_strides(storage) is not None:  # its bytes can be had row by row only, not as they lie
        return None
    if begin < first or end > storage.region[2]:
        return None
    return Strided(storage, begin - first, (end - begin,), (1,), 1)


def span(shape: Shape, strides: Sequence[int]) -> int:
    """Elements from the first to the last one, both included; 0 for an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def merged(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The same steps with as few axes as possible: axes of one vanish, neighbours that continue each other join."""
    found: list[Axis] = []
    for size, stride in axes:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def footprint(shape: Shape, strides: Sequence[int]) -> tuple[Axis, ...]:
    """What is visited, in whatever order: tensors that are permutations of each other have the same one."""
    return merged(sorted(zip(shape, strides, strict=True), key=lambda axis: (-axis[1], -axis[0])))


def view_between(shape: Shape, strides: Sequence[int], to_shape: Shape, to_strides: Sequence[int]) -> View | None:
    """The view through which one tensor becomes another that visits the same elements; None for other elements.

    >>> print(view_between((2, 3), (3, 1), (3, 2), (1, 3)))
    transposed
    >>> print(view_between((2, 3), (3, 1), (6,), (1,)))
    reshaped to [6]
    """
    axes, wanted = list(zip(shape, strides, strict=True)), list(zip(to_shape, to_strides, strict=True))
    if merged(axes) == merged(wanted):
        return AS_STORED if shape == to_shape else View((Reshape(to_shape),))
    if footprint(shape, strides) != footprint(to_shape, to_strides):
        return None
    perm = _permutation(axes, wanted)
    if perm is not None:
        return AS_STORED.then(Transpose(perm))
    # in the order of the bytes both are one sequence, which a reshape cuts in the other way
    order, back = _by_bytes(axes), _by_bytes(wanted)
    cut = tuple(to_shape[axis] for axis in back)
    view = AS_STORED.then(Transpose(order))
    if view.shape(shape) != cut:
        view = view.then(Reshape(cut))
    return view.then(Transpose(back).inverse(cut))


def _by_bytes(axes: Sequence[Axis]) -> tuple[int, ...]:
    """Axes from the one with the longest steps to that with the shortest."""
    return tuple(sorted(range(len(axes)), key=lambda n: (-axes[n][1], -axes[n][0])))


def _permutation(axes: Sequence[Axis], wanted: Sequence[Axis]) -> tuple[int, ...] | None:
    """Which axis stands where; an axis of one may have any stride."""
    left = list(range(len(axes)))
    perm = []
    for size, stride in wanted:
        at = next((n for n in left if axes[n][0] == size and (size == 1 or axes[n][1] == stride)), None)
        if at is None:
            return None
        left.remove(at)
        perm.append(at)
    return None if left else tuple(perm)


def runs(
    begin: int, shape: Shape, strides: Sequence[int], n_item_bytes: int, most: int
) -> list[tuple[int, int]] | None:
    """Begin and end of every stretch of bytes that is visited, from `begin` on; None if there are more than `most`."""
    axes = list(footprint(shape, strides))
    if 0 in shape:
        return []
    while axes and axes[-1][1] == 0:
        axes.pop()
    length = axes.pop()[0] if axes and axes[-1][1] == 1 else 1
    if _product([size for size, _ in axes]) > most:
        return None
    begins = [begin]
    for size, stride in axes:
        begins = [one + index * stride * n_item_bytes for one in begins for index in range(size)]
    return [(one, one + length * n_item_bytes) for one in begins]


def _product(sizes: Iterable[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
