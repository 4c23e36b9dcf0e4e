"""Which weights of one model are which of another: by name, by value, by the end of the name, by role and shape.

Everything is per *value*: the names and the uses of one stored tensor are looked for together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from tieaudit.dtypes import dtype
from tieaudit.equality import copies, of_buffers
from tieaudit.model import Weight, classes, storage_of
from tieaudit.roles import is_tied_head
from tieaudit.sealing import fingerprint
from tieaudit.storage import reading
from tieaudit.verdict import Subject

By = Literal["name", "values", "end of name", "role"]
Slot = tuple[str, int | None, str | None, int | None]
"""Kind, layer, side and expert of a role."""
_VAGUE = ("other", "projection", "bias", "buffer")
_NUMBERED = re.compile(r"onnx::\w+|_?(val|tensor|initializer|t)?_?\d+|.*_output_\d+")
"""Names that torch's two exporters and converters make up."""
_N_PROBED = 16
_HEAD = "output_head"


@dataclass(frozen=True)
class Value:
    """One value of a model: all names that are one by region, by a loader, or by their bytes."""

    at: int
    ids: tuple[str, ...]
    stored: tuple[str, ...]
    """One name of each stored copy."""
    n_copies: int
    n_bytes: int
    """Of one copy."""
    served: tuple[str, ...] = ()
    """Types of the operations that one stored tensor serves, where those are several."""

    @property
    def is_tie(self) -> bool:
        """Several names, or one stored tensor that serves several operations."""
        return len(self.ids) > 1 or bool(self.served)


class Side:
    """One of the two models, by its values."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        model, found = subject.model, subject.found
        self.weights = model.by_id
        ties = [
            tie
            for tie in found.ties
            if tie.origin in ("aliased", "absent", "measured")
            and not of_buffers(model, tie)
            and not found.constants.intersection(tie.ids)
        ]
        used = {
            tie.ids[0]: tuple(sorted({member.use.partition(" @ ")[0] for member in tie.members}))
            for tie in ties
            if tie.members[0].use
        }
        groups = classes(tie.ids for tie in ties)
        inside = {id for ids in groups for id in ids}
        groups += [(weight.id,) for weight in model.weights if weight.id not in inside]
        self.values = tuple(self._value(at, ids, used) for at, ids in enumerate(groups))
        self.home = {id: value.at for value in self.values for id in value.ids}

    def _value(self, at: int, ids: tuple[str, ...], used: Mapping[str, tuple[str, ...]]) -> Value:
        model = self.subject.model
        stored = tuple(names[0] for names in copies(model, ids))
        n_bytes = model.by_id[stored[0]].n_bytes if stored else 0
        served = tuple(dict.fromkeys(op for id in ids for op in used.get(id, ())))
        return Value(at, ids, stored, max(len(stored), 1), n_bytes, served)

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """Name → ids: a weight of several parts has its name in each."""
        found: dict[str, list[str]] = defaultdict(list)
        for weight in self.weights.values():
            found[weight.name].append(weight.id)
        return found

    @cached_property
    def slots(self) -> dict[str, tuple[Slot, ...]]:
        """What each weight is for; a table that is its own output head is that, too."""
        roles, found = self.subject.roles, dict[str, tuple[Slot, ...]]()
        for id, role in roles.items():
            if role.kind not in _VAGUE:
                found[id] = ((role.kind, role.layer, role.side, role.expert),)
        for use in self.subject.model.uses:
            if is_tied_head(use, roles) and use.weight in found:
                found[use.weight] = (found[use.weight][0], (_HEAD, None, None, None))
        return found

    @cached_property
    def by_slot(self) -> dict[tuple[Slot, tuple[int, ...]], list[str]]:
        """Slot and shape, in any order of the axes → ids."""
        found: dict[tuple[Slot, tuple[int, ...]], list[str]] = defaultdict(list)
        for id, slots in self.slots.items():
            for slot in slots if id in self.weights else ():
                found[_sideless(slot), self.shape(id)].append(id)
        return found

    def shape(self, id: str) -> tuple[int, ...]:
        return tuple(sorted(self.weights[id].shape))

    def held(self, value: Value) -> Weight | None:
        """A stored weight of the value whose bytes can be read; None for constants, which tie nothing."""
        for id in value.stored:
            weight = self.weights[id]
            known = not self.subject.unseen((id,))
            if known and weight.n_elements > 0 and id not in self.subject.found.constants:
                return weight
        return None


def _sideless(slot: Slot) -> Slot:
    """An output head is one whichever side the graph or the name puts it on."""
    return (slot[0], None, None, None) if slot[0] == _HEAD else slot


@dataclass
class Counterparts:
    """Pairs of ids, found in the order of how sure they are; a pair of a surer kind excludes those of the others."""

    one: Side
    other: Side
    own: dict[str, dict[str, By]] = field(default_factory=dict)
    """Id → ids on the other side that are it, by name, by the end of the name, or by role."""
    equal: dict[int, set[int]] = field(default_factory=dict)
    """Value → values on the other side that have its bytes, as stored, transposed, or in a narrower float type."""
    n_bytes_read: int = 0

    def match(self) -> None:
        """Find all pairs. Raises CorruptFile and OSError where bytes cannot be read."""
        self._by_name()
        with reading(scattered=True) as files:
            self._by_value()
            self.n_bytes_read = files.n_bytes
        self._by_number()
        self._by_end()
        self._by_role()

    def reversed(self) -> Counterparts:
        """The same pairs, asked from the other side."""
        own: dict[str, dict[str, By]] = {}
        equal: dict[int, set[int]] = {}
        for one, others in self.own.items():
            for other, by in others.items():
                own.setdefault(other, {})[one] = by
        for at, places in self.equal.items():
            for place in places:
                equal.setdefault(place, set()).add(at)
        return Counterparts(self.other, self.one, own, equal)

    def values_of(self, value: Value) -> list[int]:
        """What a value is on the other side: the values of its members' own counterparts; by its bytes, where a member
        has none of its own."""
        found = {self.other.home[other] for id in value.ids for other in self.own.get(id, ())}
        alone = [id for id in value.ids if not self.own.get(id)]
        if alone and not found & self.equal.get(value.at, set()):
            found |= self.equal.get(value.at, set())
        return sorted(found)

    def how(self, id: str) -> str:
        """How the counterparts of a weight were found; empty where there are none."""
        return next(iter(self.own.get(id, {}).values()), "values" if self.equal.get(self.one.home[id]) else "")

    def doubtful(self, value: Value, same: Value) -> tuple[str, tuple[str, ...]] | None:
        """A member that is taken to be one with the others only because nothing else is known to be it, and what on the
        other side is known to be nothing else. None where there is no such thing."""
        alone = [id for id in value.ids if not self.own.get(id)]
        if not alone or same.is_tie:
            return None
        free = tuple(id for id in self._unclaimed.get(self.one.shape(alone[0]), ()) if id not in same.ids)
        return (alone[0], free) if free else None

    @cached_property
    def _unclaimed(self) -> dict[tuple[int, ...], list[str]]:
        """Weights of the other side by shape that nothing says anything about: no counterpart, no value, no role."""
        claimed = {other for others in self.own.values() for other in others}
        claimed |= {id for places in self.equal.values() for place in places for id in self.other.values[place].ids}
        found: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for id, weight in self.other.weights.items():
            if weight.is_float and weight.parameter is not False and id not in claimed and id not in self.other.slots:
                found[self.other.shape(id)].append(id)
        return found

    def _pair(self, one: str, other: str, by: By) -> None:
        self.own.setdefault(one, {}).setdefault(other, by)

    def _by_name(self) -> None:
        """Names that somebody gave, whatever became of the shape: a table that was cut is still that table."""
        for id, weight in self.one.weights.items():
            if not _NUMBERED.fullmatch(weight.name):
                for other in [id] if id in self.other.weights else self.other.by_name.get(weight.name, []):
                    self._pair(id, other, "name")

    def _by_number(self) -> None:
        """Names that an exporter counted up: the next export may give them to others, so that values go before them."""
        matched = {at for places in self.equal.values() for at in places}
        for id in self.one.weights:
            if id in self.other.weights and _NUMBERED.fullmatch(self.one.weights[id].name):
                known = self.one.home[id] in self.equal or self.other.home[id] in matched
                if not known and self.one.shape(id) == self.other.shape(id):
                    self._pair(id, id, "name")

    def _by_value(self) -> None:
        """Compare values that are tied on one side with those on the other that have their shape."""
        mine, theirs = _by_shape(self.one), _by_shape(self.other)
        read = _Read()
        for shape, values in mine.items():
            others = theirs.get(shape, [])
            tied = [(value, held) for value, held in others if value.is_tie]
            for value, held in values:
                for partner in read.alike(held, others if value.is_tie else tied):
                    self.equal.setdefault(value.at, set()).add(partner.at)

    def _by_end(self) -> None:
        """Names that end alike and have one shape, where no other two do: prefixes are what wrappers change."""
        mine, theirs = self._free()
        for one, others, forward in ((mine, theirs, True), (theirs, mine, False)):
            ends = _ends(others)
            here = self.one if forward else self.other
            there = self.other if forward else self.one
            own_ends = _ends(one)
            for id in one:
                if not here.values[here.home[id]].is_tie:
                    continue
                for end in _suffixes(here.weights[id].name):
                    near = [other for other in ends.get(end, ()) if there.shape(other) == here.shape(id)]
                    if len(near) == 1 and len(own_ends[end]) == 1:
                        self._pair(*((id, near[0]) if forward else (near[0], id)), "end of name")
                    if near:
                        break

    def _by_role(self) -> None:
        """The one weight on each side that is for this, in this layer, and has this shape."""
        mine, theirs = set(self._free()[0]), set(self._free()[1])
        for key, ids in self.one.by_slot.items():
            others = self.other.by_slot.get(key, [])
            if len(ids) != 1 or len(others) != 1:
                continue
            one, other = ids[0], others[0]
            second = key[0][0] == _HEAD and (self._also_head(self.one, one) or self._also_head(self.other, other))
            if (one in mine and other in theirs) or second:
                self._pair(one, other, "role")

    def _also_head(self, side: Side, id: str) -> bool:
        return len(side.slots[id]) > 1

    def _free(self) -> tuple[list[str], list[str]]:
        """Weights of both sides that have no counterpart of their own."""
        claimed = {other for others in self.own.values() for other in others}
        return [id for id in self.one.weights if not self.own.get(id)], [
            id for id in self.other.weights if id not in claimed
        ]


def _ends(ids: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for id in ids:
        for end in _suffixes(id):
            found[end].append(id)
    return found


def _suffixes(name: str) -> Iterator[str]:
    """The ends of a dotted name, the longest first, of two components at least."""
    parts = name.rpartition("|")[2].split(".")[-8:]
    for begin in range(len(parts) - 1):
        yield ".".join(parts[begin:])


def _common(one: str, other: str) -> str:
    """The type in which numbers of two types are compared: the narrower of two float types; empty if there is none."""
    kinds = dtype(one), dtype(other)
    if one == other:
        return one
    if any(kind.family != "float" or kind.item_bytes is None for kind in kinds) or kinds[0].n_bits == kinds[1].n_bits:
        return ""
    return min(kinds, key=lambda kind: kind.n_bits).name


def _by_shape(side: Side) -> dict[tuple[int, ...], list[tuple[Value, Weight]]]:
    found: dict[tuple[int, ...], list[tuple[Value, Weight]]] = defaultdict(list)
    for value in side.values:
        held = side.held(value)
        if held is not None:
            found[tuple(sorted(held.shape))].append((value, held))
    return found


class _Read:
    """What was read of weights: a few numbers of each that has to be looked at, a digest of what then still collides.

    Every weight is probed and digested once for each type that it is compared in, however many it is compared with.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[int, str], str] = {}
        self._types: dict[int, list[str]] = {}
        self._indices: dict[tuple[int, str, str], dict[bytes, list[tuple[Value, Weight]]]] = {}
        self._kept: list[object] = []
        """What the keys above are the identities of."""

    def alike(self, weight: Weight, others: list[tuple[Value, Weight]]) -> Iterator[Value]:
        """Those of `others` whose numbers are those of the weight, in the narrower of the two types."""
        for kind in self._kinds(others):
            common = _common(weight.dtype, kind)
            near = self._index(others, kind, common).get(_probed(weight, common), ()) if common else ()
            for value, other in near:
                if self._digest(weight, common) == self._digest(other, common):
                    yield value

    def _kinds(self, others: list[tuple[Value, Weight]]) -> list[str]:
        if id(others) not in self._types:
            self._kept.append(others)
            self._types[id(others)] = sorted({other.dtype for _, other in others})
        return self._types[id(others)]

    def _index(
        self, others: list[tuple[Value, Weight]], kind: str, common: str
    ) -> dict[bytes, list[tuple[Value, Weight]]]:
        key = (id(others), kind, common)
        if key not in self._indices:
            found: dict[bytes, list[tuple[Value, Weight]]] = defaultdict(list)
            for value, other in others:
                if other.dtype == kind:
                    found[_probed(other, common)].append((value, other))
            self._indices[key] = found
        return self._indices[key]

    def _digest(self, weight: Weight, common: str) -> str:
        key = (id(weight), common)
        if key not in self._digests:
            self._kept.append(weight)
            self._digests[key] = fingerprint(weight, common)
        return self._digests[key]


def _probed(weight: Weight, as_type: str) -> bytes:
    """A few numbers that a transpose does not move: the diagonal of a matrix; of other tensors some at equal distances.

    Empty where elements are no whole bytes. Cost: 16 reads of one element.
    """
    import numpy as np

    kind, shape = dtype(weight.dtype), weight.shape
    if kind.item_bytes is None or weight.n_bytes != kind.n_bytes(weight.n_elements):
        return b""
    turns = len(shape) == 2 and min(shape) > 1
    n_all, step = (min(shape), shape[1] + 1) if turns else (weight.n_elements, 1)
    places: Sequence[int] = sorted({index * (n_all - 1) // (_N_PROBED - 1) for index in range(_N_PROBED)})
    held = storage_of(weight).read_ranges([(place * step * kind.item_bytes, kind.item_bytes) for place in places])
    numbers = np.frombuffer(b"".join(held), kind.numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers.astype(dtype(as_type).numpy()).tobytes()
