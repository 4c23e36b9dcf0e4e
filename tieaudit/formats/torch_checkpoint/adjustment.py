"""What tying parameters makes of an optimizer's state in the same file, where that is certain; else why it is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tieaudit.change import Edit, Share, Unshare
from tieaudit.formats.torch_checkpoint.contents import Contents
from tieaudit.formats.torch_checkpoint.moments import Sums, counts, sums
from tieaudit.formats.torch_checkpoint.optimizer_states import GROUPS, NAMES, STATE, State, live, numberings
from tieaudit.formats.torch_checkpoint.read import Collected, collect, weight_of
from tieaudit.formats.torch_checkpoint.rebuild import Tensor
from tieaudit.model import Model, Weight

_OTHER_COPIES = re.compile(r"fp32|master", re.IGNORECASE)
"""Keys under which mixed-precision trainers keep weights of their own, numbered as the optimizer's."""
_MAX_COUNT_BYTES = 64


@dataclass(frozen=True)
class Join:
    """Parameters that become one."""

    kept: int
    """The number of the one whose place it takes: the first in the order of `model.parameters()`."""
    others: tuple[tuple[int, bool], ...]
    """Numbers of those that go, and whether they are its transpose."""
    sums: Sums


@dataclass(frozen=True)
class Adjustment:
    """One state as the tied model's optimizer expects it; plain data, by the numbers that the file has."""

    where: str
    n_before: int
    joins: tuple[Join, ...]

    @cached_property
    def new_numbers(self) -> Mapping[int, int]:
        """Number → number afterwards, of the parameters that stay."""
        gone = {number for join in self.joins for number, _ in join.others}
        stay = [number for number in range(self.n_before) if number not in gone]
        return {number: n for n, number in enumerate(stay)}

    @property
    def n_after(self) -> int:
        """Parameters that stay."""
        return len(self.new_numbers)

    def kept(self, because: str) -> Kept:
        """The same state where the adjustment cannot be made."""
        return Kept(self.where, self.n_after, f"{because}; {_refused(self.n_before, self.n_after)}", _HOW_TO_TIE)

    def renumbered(self, numbers: Sequence[object]) -> list[int]:
        """The `params` of a group afterwards."""
        new = self.new_numbers
        return [new[number] for number in numbers if isinstance(number, int) and number in new]

    def named(self, names: Sequence[object], numbers: Sequence[object]) -> list[object]:
        """The `param_names` of a group afterwards."""
        return [name for name, number in zip(names, numbers, strict=True) if number in self.new_numbers]


@dataclass(frozen=True)
class Kept:
    """A state that stays as it is, byte for byte."""

    where: str
    n_after: int
    """Parameters of the result."""
    because: str
    """Empty: it fits the result."""
    how: str = ""
    """How to go on."""


Decision = Adjustment | Kept

_HOW_TO_TIE = (
    "to train the result, make the optimizer from the tied model and let it start afresh; or add the first moments of "
    "the names that became one (exp_avg, momentum_buffer; transposed where the tie is), which is exact, and the second "
    "ones (exp_avg_sq), which is an estimate: of (g₁+g₂)² neither holds the term 2·g₁·g₂"
)
_HOW_TO_UNTIE = (
    "to train the result, make the optimizer from the untied model and let it start afresh; or give the new parameter "
    "a copy of the tied one's state: a sum cannot be split again"
)


def decide(found: Collected, state: State, model: Model, edits: Sequence[Edit], adjust: bool = True) -> Decision:
    """What becomes of one state of a file when the model is edited. `adjust` False: only whether it fits.

    Certain is: the state has one entry for every parameter of the model, in an order that their shapes or names
    confirm; the optimizer's entries are known; what became one was stepped equally often. Cost: a few bytes.
    """
    before, after = live(model, ()), live(model, edits)
    if numberings(state, after):
        return Kept(state.where, len(after), "")
    orders = numberings(state, before)
    if not orders:
        said = (
            f"its {len(state.numbers)} entries cannot be told to belong to the {len(before)} parameters before or the "
        )
        return Kept(
            state.where,
            len(after),
            f"{said}{len(after)} afterwards; load_state_dict refuses other numbers than its own",
        )
    untied = len(after) >= len(before) or any(isinstance(edit, Unshare) for edit in edits)
    refused = _refused(len(before), len(after))
    if untied or not adjust:
        return Kept(state.where, len(after), refused, _HOW_TO_UNTIE if untied else _HOW_TO_TIE)
    ways = [_joins(found, state, model, edits, order, before) for order in orders]
    joins = ways[0]
    because = joins if isinstance(joins, str) else _reason_against(state, found)
    if not because and (other := _another(found, state)):
        because = f"{other!r} in the file has parameters of the same shapes, and it may be theirs"
    if any(way != joins for way in ways):
        because = "which of its entries are whose cannot be told"
    if isinstance(joins, str) or because:
        return Kept(state.where, len(after), f"{because}; {refused}", _HOW_TO_TIE)
    made = Adjustment(state.where, len(before), joins)
    if made.n_after != len(after):
        return Kept(state.where, len(after), f"which of its entries go cannot be told; {refused}", _HOW_TO_TIE)
    return made


def _refused(n_before: int, n_after: int) -> str:
    return f"it has one entry for each of {n_before} parameters, the result has {n_after}; load_state_dict refuses it"


def _reason_against(state: State, found: Collected) -> str:
    """Why a state is not one that PyTorch's own optimizers leave."""
    if state.numbers != list(range(len(state.numbers))) or any(isinstance(one, bool) for one in state.numbers):
        return "its parameters are not numbered as PyTorch numbers them"
    if set(state.entries) - set(state.numbers):
        return "it has entries for parameters that no group has"
    if any(NAMES in group for group in state.groups) and not _are_texts(state.names):
        return "its groups name their parameters in an unusual way"
    if any(str(key) not in (STATE, GROUPS) for key in state.held):
        return "it holds more than entries and groups"
    copies = [str(key) for key in state.around if _OTHER_COPIES.search(str(key))]
    if copies:
        return f"{copies[0][:60]!r} beside it keeps weights by the same numbers"
    if found.opened.swapped:
        return "the file is big-endian, new values cannot be written into it"
    return ""


def _another(found: Collected, state: State) -> str:
    """What else in the file the optimizer may belong to, where the user chose another model than the usual one."""
    contents = Contents(found.opened.value, found.opened.where)
    if found.chosen.key == contents.choose("").key:
        return ""
    for name, _ in contents.children(found.opened.value):
        if f"{found.chosen.key}.".startswith(f"{name}.") or f"{state.where}.".startswith(f"{name}."):
            continue
        others = tuple(collect(found.opened, name).weights.values())
        if numberings(state, live(Model(found.opened.where, "torch_checkpoint", (), others), ())):
            return name
    return ""


def _are_texts(names: Sequence[object] | None) -> bool:
    return names is not None and all(isinstance(name, str) for name in names)


def _joins(
    found: Collected,
    state: State,
    model: Model,
    edits: Sequence[Edit],
    order: Sequence[Weight],
    before: Sequence[Weight],
) -> tuple[Join, ...] | str:
    """The parameters that become one, if `order` is that of the state; a reason where they cannot be added."""
    number_of = {weight.id: number for number, weight in enumerate(order)}
    rank = {weight.id: n for n, weight in enumerate(before)}
    joins = []
    for edit in edits:
        if not isinstance(edit, Share):
            continue
        members = {member.id: member.view for member in edit.members if member.id in number_of}
        regions = {one.storage.region for id in members if (one := model.by_id[id]).storage is not None}
        for member in edit.members:
            stored = model.by_id[member.id].storage
            if stored is None or stored.region not in regions:
                return f"{member.id} is no parameter, but shares with one"
        if len(members) < 2:
            continue
        if any(view.steps and not view.transposes for view in members.values()):
            return f"{next(iter(members))} is tied through another view than a transpose"
        ids = sorted(members, key=lambda id: rank[id])
        numbers = [number_of[id] for id in ids]
        turned = [members[id].transposes != members[ids[0]].transposes for id in ids]
        added = _added(found, state, numbers, [model.by_id[id].shape for id in ids])
        if isinstance(added, str):
            return added
        joins.append(Join(numbers[0], tuple(zip(numbers[1:], turned[1:], strict=True)), added))
    concerned = [number for join in joins for number in (join.kept, *(other for other, _ in join.others))]
    if len(set(concerned)) < len(concerned):
        return "one parameter is tied twice"
    return tuple(joins)


def _added(found: Collected, state: State, numbers: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Sums | str:
    group_of = [group for group, count in zip(state.groups, state.counts, strict=True) for _ in range(count)]
    entries = [state.entries.get(number) for number in numbers]
    added = sums(entries, [group_of[number] for number in numbers], shapes)
    if isinstance(added, str):
        return added
    first = counts(entries[0])
    for number, entry in zip(numbers, entries, strict=True):
        for name, count in counts(entry).items():
            mine, other = _count(found, first[name]), _count(found, count)
            if mine is None or mine != other:
                return f"{name} of parameters {numbers[0]} and {number} differs: they were not stepped together"
    return added


def _count(found: Collected, value: object) -> object:
    """A count of steps as it can be compared; None for what is none."""
    if isinstance(value, (int, float)):
        return (type(value).__name__, value)
    if not isinstance(value, Tensor) or value.stored is None:
        return None
    weight = weight_of(found, "a count of steps", value)
    if weight is None or weight.storage is None or weight.n_bytes > _MAX_COUNT_BYTES:
        return None
    return (weight.dtype, weight.shape, weight.storage.read_ranges([(0, weight.n_bytes)])[0])
