"""Matrices that are stored as codes: whether two packings hold the same codes, and how far apart two matrices are.

Numbers are compared as what the codes mean, (code - zero point) · scale in float64, which is exact for codes up to 8
bits and scales up to float32. Two quantisers give one matrix different codes; then only the distance can be told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tieaudit.dtypes import dtype
from tieaudit.errors import UnreadableModel
from tieaudit.model import Member, Model, Quantised, Tie, Weight, storage_of
from tieaudit.storage import BLOCK_BYTES, Storage, blocks
from tieaudit.verdict import Apart
from tieaudit.view import AS_STORED, TRANSPOSED, Repack, View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

_N_WINDOWS, _WINDOW = 12, 16
"""Squares of numbers that are looked at, and their side."""
_N_MOST_PAIRS = 64
_TOP_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}
"""Bits of a byte that differ between a signed code and the same code as an offset from the lowest one."""


@dataclass(frozen=True)
class _Matrix:
    """Numbers by rows and columns; `how` is None for a matrix of floating point."""

    model: Model
    weight: Weight
    shape: tuple[int, int]
    how: Quantised | None

    def tile(self, top: int, bottom: int, left: int, right: int) -> tuple[Numbers, Numbers]:
        """(numbers, steps) of a rectangle, both [bottom - top, right - left]; the step of floating point is 0."""
        import numpy as np

        runs = [(row * self.shape[1] + left, right - left) for row in range(top, bottom)]
        if self.how is None:
            numbers = _elements(self.weight, runs)
            return numbers, np.zeros_like(numbers)
        how = self.how
        found = _codes(storage_of(self.weight), how.bits, runs).astype(np.float64)
        if how.signed:
            found = np.where(found >= 1 << how.bits - 1, found - (1 << how.bits), found)
        scales = self._spread(how.scales, False, top, bottom, left, right)
        numbers = found - how.zero
        if how.zeros is not None:
            numbers = found - self._spread(how.zeros, how.packed_zeros, top, bottom, left, right)
        return numbers * scales, np.broadcast_to(np.abs(scales), found.shape)

    def _spread(self, id: str, packed: bool, top: int, bottom: int, left: int, right: int) -> Numbers:
        """Scales or zero points of a rectangle, as an array that broadcasts to it."""
        import numpy as np

        how, weight = self.how, self.model.by_id[id]
        assert how is not None
        if how.along == "one":
            return _elements(weight, [(0, 1)])
        if how.along == "rows":
            return _elements(weight, [(top, bottom - top)]).T
        if how.along == "columns":
            return _elements(weight, [(left, right - left)])
        first, last = left // how.block, -(-right // how.block)
        n_blocks = -(-self.shape[1] // how.block)
        if packed:
            row = -(-n_blocks * how.bits // 8) * 8 // how.bits
            runs = [(one * row + first, last - first) for one in range(top, bottom)]
            found = _codes(storage_of(weight), how.bits, runs).astype(np.float64)
        else:
            found = _elements(weight, [(one * n_blocks + first, last - first) for one in range(top, bottom)])
        return np.repeat(found, how.block, axis=1)[:, left - first * how.block :][:, : right - left]


def repacked(model: Model) -> Iterator[Tie]:
    """Classes of matrices quantised alike, in blocks, whose codes are the same in two packings.

    The whole triple must agree: codes, scales and zero points. Cost: what collides is read once, in blocks.
    """
    crowds: dict[tuple[object, ...], list[Quantised]] = defaultdict(list)
    for one in model.quantised:
        if one.along == "blocks":
            crowds[one.shape, one.bits, one.block, model.by_id[one.scales].dtype].append(one)
    for crowd in crowds.values():
        homes: list[list[tuple[Quantised, View]]] = []
        for one in crowd[:_N_MOST_PAIRS]:
            for home in homes:
                try:
                    view = _packing(model, home[0][0], one)
                except (UnreadableModel, OSError):
                    continue  # said where the bytes of each weight are compared
                if view is not None:
                    home.append((one, view))
                    break
            else:
                homes.append([(one, AS_STORED)])
        for home in homes:
            if any(view != AS_STORED for _, view in home):
                members = tuple(Member(one.codes, view) for one, view in home)
                saved = sum(model.by_id[one.codes].n_bytes for one, _ in home[1:])
                yield Tie(members, "measured", f"{len(home)} packings of the same codes, with equal scales", saved)


def _packing(model: Model, one: Quantised, other: Quantised) -> View | None:
    """The view through which the codes of one are those of the other; None if they are not."""
    a, b = model.by_id[one.codes], model.by_id[other.codes]
    if storage_of(a).region == storage_of(b).region or a.n_bytes != b.n_bytes or not _alike(model, one, other):
        return None
    flip = _TOP_BITS[one.bits] if one.signed != other.signed else 0
    if not _same_flipped(storage_of(a), storage_of(b), flip):
        return None
    if (a.dtype, a.shape) == (b.dtype, b.shape):
        return AS_STORED
    return View((Repack((a.dtype, a.shape), (b.dtype, b.shape), flip),))


def _same_flipped(one: Storage, other: Storage, flip: int) -> bool:
    import numpy as np

    for size in (min(4096, one.n_bytes), BLOCK_BYTES):
        for a, b in zip(blocks(one, size), blocks(other, size), strict=True):
            if not np.array_equal(np.frombuffer(a, np.uint8) ^ np.uint8(flip), np.frombuffer(b, np.uint8)):
                return False
            if size != BLOCK_BYTES:
                break
    return True


def _alike(model: Model, one: Quantised, other: Quantised) -> bool:
    """Whether scales and zero points mean the same, block for block."""
    import numpy as np

    a, b = (storage_of(model.by_id[item.scales]) for item in (one, other))
    if a.region != b.region and (a.n_bytes != b.n_bytes or not _same_flipped(a, b, 0)):
        return False
    n_rows, n_blocks = one.shape[0], -(-one.shape[1] // one.block)
    zeros = []
    for item in (one, other):
        offset = 1 << item.bits - 1 if item.signed else 0
        if item.zeros is None:
            zeros.append(np.full((1, 1), item.zero + offset, np.float64))
            continue
        matrix = _Matrix(model, model.by_id[item.codes], item.shape, item)
        found = matrix._spread(item.zeros, item.packed_zeros, 0, n_rows, 0, n_blocks * item.block)[:, :: item.block]
        zeros.append(np.where(found >= offset, found - 2 * offset, found) + offset if offset else found)
    return bool((zeros[0] == zeros[1]).all())


def apart(model: Model, class_of: Mapping[str, int]) -> Iterator[Apart]:
    """Tables that are read by ids, against matrices of their shape where one of the two is stored as codes.

    `class_of`: the class of those ids that are known to be one value.
    Cost: a few hundred small reads per pair; both in full where everything that was looked at is equal.
    """
    how = {one.codes: one for one in model.quantised}
    tables = [id for id in dict.fromkeys(use.weight for use in model.uses if use.reads_ids)]
    matrices = list(dict.fromkeys([*how, *(use.weight for use in model.uses if use.slot == 1 and not use.reads_ids)]))
    n_pairs = 0
    for table in tables:
        for id in matrices:
            one_value = id == table or (id in class_of and class_of[id] == class_of.get(table))
            if one_value or id in tables or not ({table, id} & how.keys()):
                continue
            one, other = (_matrix(model, how, name) for name in (table, id))
            if one is None or other is None or sorted(one.shape) != sorted(other.shape) or n_pairs >= _N_MOST_PAIRS:
                continue
            n_pairs += 1
            try:
                yield _distance(one, other)
            except (UnreadableModel, OSError):
                continue  # said where the bytes of each weight are compared


def _matrix(model: Model, how: dict[str, Quantised], id: str) -> _Matrix | None:
    weight = model.by_id[id]
    if id in how:
        if min(how[id].shape) < 2:
            return None
        return _Matrix(model, weight, how[id].shape, how[id])
    readable = weight.dtype in ("float32", "float16", "bfloat16", "float64") and not weight.absent
    if len(weight.shape) != 2 or not readable or min(weight.shape) < 2:
        return None
    return _Matrix(model, weight, (weight.shape[0], weight.shape[1]), None)


def _distance(one: _Matrix, other: _Matrix) -> Apart:
    import numpy as np

    view = AS_STORED if one.shape == other.shape else TRANSPOSED
    n_rows, n_columns = one.shape
    high, wide = min(_WINDOW, n_rows), min(_WINDOW, n_columns)
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(_N_WINDOWS):
        top, left = int(rng.integers(n_rows - high + 1)), int(rng.integers(n_columns - wide + 1))
        numbers, step = one.tile(top, top + high, left, left + wide)
        others, step_too = _seen(other, view, top, top + high, left, left + wide)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.abs(numbers - others) / np.where(step + step_too > 0, (step + step_too) / 2, 1)
        steps.append(np.where(numbers == others, 0.0, distance).ravel())
    every = np.concatenate(steps)
    equal = not every.any() and _all_equal(one, other, view)
    return Apart(one.weight.id, other.weight.id, view, equal, float(np.median(every)), float(every.max()), every.size)


def _seen(matrix: _Matrix, view: View, top: int, bottom: int, left: int, right: int) -> tuple[Numbers, Numbers]:
    if view == AS_STORED:
        return matrix.tile(top, bottom, left, right)
    numbers, steps = matrix.tile(left, right, top, bottom)
    return numbers.T, steps.T


def _all_equal(one: _Matrix, other: _Matrix, view: View) -> bool:
    n_rows, n_columns = one.shape
    count = max(4 * BLOCK_BYTES // (8 * n_columns), 1)
    for top in range(0, n_rows, count):
        bottom = min(top + count, n_rows)
        numbers, _ = one.tile(top, bottom, 0, n_columns)
        if not (numbers == _seen(other, view, top, bottom, 0, n_columns)[0]).all():
            return False
    return True


def _codes(storage: Storage, bits: int, runs: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """Codes, one to a byte, of runs (first code, how many) that are equally long: [n runs, length]."""
    import numpy as np

    per_byte = 8 // bits
    spans = [(first // per_byte, -(-(first + count) // per_byte) - first // per_byte) for first, count in runs]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found = []
    for (first, count), held in zip(runs, storage.read_ranges(spans), strict=True):
        unpacked = (np.frombuffer(held, np.uint8)[:, None] >> shifts & ((1 << bits) - 1)).reshape(-1)
        found.append(unpacked[first % per_byte :][:count])
    return np.stack(found)


def _elements(weight: Weight, runs: list[tuple[int, int]]) -> Numbers:
    """Elements of a weight as float64, of runs (first element, how many) that are equally long: [n runs, length]."""
    import numpy as np

    kind = dtype(weight.dtype)
    if kind.item_bytes is None:
        found = _codes(storage_of(weight), kind.n_bits, runs).astype(np.float64)
        if not kind.name.startswith("u"):
            found = np.where(found >= 1 << kind.n_bits - 1, found - (1 << kind.n_bits), found)
        return found
    item = kind.item_bytes
    held = storage_of(weight).read_ranges([(first * item, count * item) for first, count in runs])
    numbers: Numbers = np.stack([np.frombuffer(block, kind.numpy()) for block in held]).astype(np.float64)
    return numbers
