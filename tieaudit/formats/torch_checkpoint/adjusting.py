"""An adjustment on its way into a pickle: numbers of parameters, entries that go, and tensors that are sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tieaudit.dtypes import dtype
from tieaudit.errors import RewriteRefused
from tieaudit.formats.torch_checkpoint.adjustment import Adjustment, Join
from tieaudit.formats.torch_checkpoint.optimizer_states import NAMES, PARAMS, State, states_in
from tieaudit.formats.torch_checkpoint.read import Collected, weight_of
from tieaudit.formats.torch_checkpoint.rebuild import Tensor
from tieaudit.formats.torch_checkpoint.splicing import Splice, integer, spelled_list, text
from tieaudit.formats.torch_checkpoint.tracing import Place, Tracer
from tieaudit.storage import BLOCK_BYTES, Region, Storage


@dataclass(frozen=True)
class Summed:
    """The bytes of a sum of tensors of one floating type, computed when they are read: in float64, rounded once."""

    parts: tuple[Storage, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        return self.parts[0].n_bytes

    @property
    def region(self) -> Region:
        return ("sum of " + ", ".join(str(part.region) for part in self.parts), 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._range(begin, begin + length) for begin, length in ranges]

    def _range(self, begin: int, end: int) -> bytes:
        item = dtype(self.dtype).n_bits // 8
        first, last = begin // item * item, -(-end // item) * item
        pieces = [self._sum(at, min(at + BLOCK_BYTES, last)) for at in range(first, last, BLOCK_BYTES)]
        return b"".join(pieces)[begin - first : end - first]

    def _sum(self, begin: int, end: int) -> bytes:
        import numpy as np

        kind = dtype(self.dtype).numpy()
        blocks = [np.frombuffer(part.read_ranges([(begin, end - begin)])[0], kind) for part in self.parts]
        with np.errstate(all="ignore"):
            total = blocks[0].astype(np.float64)
            for block in blocks[1:]:
                total += block
            return total.astype(kind).tobytes()


Fresh = Callable[[Tensor, Storage], bytes]
"""(tensor, new content) → the opcodes of its storage, offset, sizes and strides in a new storage."""


def splice(made: Splice, trace: Tracer, found: Collected, adjustments: Iterable[Adjustment], fresh: Fresh) -> None:
    """Put adjustments into a pickle. RewriteRefused where it is spelled in a way that cannot be changed."""
    states = {state.where: state for state in states_in(found.opened.value)}
    for adjustment in adjustments:
        _Splicing(made, trace, found, states[adjustment.where], fresh).carry_out(adjustment)


class _Splicing:
    def __init__(self, made: Splice, trace: Tracer, found: Collected, state: State, fresh: Fresh) -> None:
        self._made, self._trace, self._found, self._state, self._fresh = made, trace, found, state, fresh

    def carry_out(self, adjustment: Adjustment) -> None:
        for group in self._state.groups:
            numbers, names = group[PARAMS], group.get(NAMES)
            assert isinstance(numbers, list)  # states_in looked
            renumbered = adjustment.renumbered(numbers)
            if renumbered != numbers:
                self._list(group, PARAMS, map(integer, renumbered))
            if isinstance(names, list) and len(names) == len(numbers) != len(renumbered):
                self._list(group, NAMES, (text(str(name)) for name in adjustment.named(names, numbers)))
        for number in self._state.entries:
            assert isinstance(number, int)  # decide looked
            place = self._place(self._state.entries, number)
            new = adjustment.new_numbers.get(number)
            if new is None:
                self._made.replace(place.begin, place.end + place.alone, b"")
            elif new != number:
                self._made.replace(place.begin, place.value, integer(new))
        for join in adjustment.joins:
            for name in join.sums.all:
                self._add(join, name)

    def _list(self, group: Mapping[str, object], key: str, spelled: Iterable[bytes]) -> None:
        place = self._place(group, key)
        self._made.replace(place.value, place.end, spelled_list(spelled))

    def _add(self, join: Join, name: str) -> None:
        """The moment of the parameter that stays becomes the sum."""
        entries = [self._state.entries[number] for number in (join.kept, *(number for number, _ in join.others))]
        tensors = [entry[name] for entry in entries if isinstance(entry, dict)]
        parts = [self._stored(tensors[0], False)]
        parts += [self._stored(one, turned) for one, (_, turned) in zip(tensors[1:], join.others, strict=True)]
        kept = tensors[0]
        sites = self._trace.sites.get(kept.stored, [])
        place = self._place(entries[0], name)
        here = len(sites) == 1 and place.value <= sites[0].begin < place.end
        if not here or self._made.recalled(place.value, place.end):
            raise RewriteRefused(f"{name} of parameter {join.kept} is spelled in an unusual way, or kept elsewhere too")
        self._made.replace(sites[0].begin, sites[0].end, self._fresh(kept, Summed(tuple(parts), kept.dtype)))

    def _stored(self, tensor: Tensor, turned: bool) -> Storage:
        seen = replace(tensor, shape=tensor.shape[::-1], strides=tensor.strides[::-1]) if turned else tensor
        weight = weight_of(self._found, "a moment", seen)
        if weight is None or weight.storage is None:
            raise RewriteRefused("a moment in the optimizer's state cannot be read")
        return weight.storage

    def _place(self, container: object, key: object) -> Place:
        place = self._trace.place(container, key)
        if place is None:
            raise RewriteRefused(f"{key} in the optimizer's state is no item of a dictionary in the pickle")
        return place
