"""What a plan means for the optimizer states in the same file: whether they still fit, and how to go on.

An optimizer's state names parameters by their number in the order of `model.parameters()`. A tied parameter is there
once, so that tying takes one number away and untying adds one. The state itself is never changed: docs/decisions.
Source: torch/optim/optimizer.py, version 2.13, `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tieaudit.change import Edit, Share, Unshare
from tieaudit.errors import TieAuditError
from tieaudit.formats import KEY_GIVEN
from tieaudit.formats.torch_checkpoint.orders import Subject
from tieaudit.formats.torch_checkpoint.pickles import Made
from tieaudit.formats.torch_checkpoint.rebuild import Tensor
from tieaudit.formats.torch_checkpoint.write import file_of, subject_of
from tieaudit.model import Model, Weight

_GROUPS, _STATE = "param_groups", "state"
_N_MOST = 1_000_000
_HOW_TO_TIE = (
    "to train the result, make the optimizer from the tied model and let it start afresh; or add the first moments of "
    "the names that became one (exp_avg, momentum_buffer; transposed where the tie is), which is exact, and the second "
    "ones (exp_avg_sq), which is an estimate: of (g₁+g₂)² neither holds the term 2·g₁·g₂"
)
_HOW_TO_UNTIE = (
    "to train the result, make the optimizer from the untied model and let it start afresh; or give the new parameter "
    "a copy of the tied one's state: a sum cannot be split again"
)


@dataclass(frozen=True)
class _State:
    """One optimizer's state in a file."""

    where: str
    n_parameters: int
    """Parameters in all its groups."""
    shapes: tuple[tuple[int, ...] | None, ...]
    """Of the largest state tensor of each parameter, in the order of the groups; None where it has none yet."""


def notes(model: Model, edits: Sequence[Edit]) -> tuple[str, ...]:
    """One sentence for every optimizer state beside a model whose ties change. Cost: a run over the pickle, once."""
    changing = [edit for edit in edits if isinstance(edit, (Share, Unshare))]
    if not changing:
        return ()
    found = []
    files = {file_of(model, weight) for weight in model.weights if weight.storage is not None} - {None}
    for file in sorted(filter(None, files)):
        try:
            subject = subject_of(file, model.metadata.get(KEY_GIVEN, ""))
        except TieAuditError:
            continue
        before = [weight.shape for weight in _live(model, ())]
        after = [weight.shape for weight in _live(model, changing)]
        found += [said for state in _states(subject) for said in _said(state, before, after)]
    return tuple(found)


def _said(state: _State, before: list[tuple[int, ...]], after: list[tuple[int, ...]]) -> tuple[str, ...]:
    name = f"the optimizer state {state.where!r}" if state.where else "the optimizer state"
    if _fits(state, after):
        said = f"{name} has one entry for each of the {len(after)} parameters that the result has: it is kept and fits"
        return (said,)
    kept = f"{name} is kept as it is, and does not fit the result"
    if _fits(state, before):
        how = _HOW_TO_TIE if len(after) < len(before) else _HOW_TO_UNTIE
        counts = f"it has one entry for each of {len(before)} parameters, the result has {len(after)}"
        return f"{kept}: {counts}; load_state_dict refuses it", how
    said = f"its {state.n_parameters} entries cannot be told to belong to the {len(before)} parameters before or the "
    return (
        f"{name} is kept as it is: {said}{len(after)} afterwards; load_state_dict refuses other numbers than its own",
    )


def _fits(state: _State, shapes: list[tuple[int, ...]]) -> bool:
    """Whether the state is that of these parameters, in their order, as far as it says."""
    return state.n_parameters == len(shapes) and all(
        one is None or one == other for one, other in zip(state.shapes, shapes, strict=True)
    )


def _live(model: Model, edits: Sequence[Share | Unshare]) -> Iterator[Weight]:
    """The parameters of the live module in the order of its state dict: of several names of one, the first."""
    anchor: dict[str, str] = {}
    for edit in edits:
        if isinstance(edit, Share):
            anchor.update((member.id, edit.members[0].id) for member in edit.members)
    own = {edit.name for edit in edits if isinstance(edit, Unshare)}
    seen: set[object] = set()
    for weight in model.weights:
        if weight.parameter is False or weight.storage is None:
            continue
        one: object = anchor.get(weight.id, weight.id)
        storage = model.by_id[str(one)].storage
        if weight.name not in own and storage is not None:
            one = storage.region
        if one not in seen:
            seen.add(one)
            yield weight


def _states(subject: Subject) -> Iterator[_State]:
    """Every value of the file that has the keys of an optimizer's state dict, wherever it lies."""
    waiting: list[tuple[str, object]] = [("", subject.found.opened.value)]
    seen: set[int] = set()
    while waiting and len(seen) < _N_MOST:
        where, value = waiting.pop()
        if id(value) in seen or not isinstance(value, (dict, list, tuple, Made)):
            continue
        seen.add(id(value))
        held = value.items if isinstance(value, Made) and value.items else value
        if isinstance(held, dict) and {_STATE, _GROUPS} <= held.keys():
            state = _read(where, held[_STATE], held[_GROUPS])
            if state is not None:
                yield state
            continue
        waiting += [(f"{where}.{name}".lstrip("."), child) for name, child in _inside(value)]


def _inside(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, Made):
        for held in (value.state, value.items, value.entries):
            yield from _inside(held)
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _read(where: str, state: object, groups: object) -> _State | None:
    if not isinstance(state, dict) or not isinstance(groups, list):
        return None
    numbers: list[object] = []
    for group in groups:
        held = group.get("params") if isinstance(group, dict) else None
        if not isinstance(held, list):
            return None
        numbers += held
    shapes = tuple(_largest(state.get(number)) if isinstance(number, (int, str)) else None for number in numbers)
    return _State(where, len(numbers), shapes)


def _largest(held: object) -> tuple[int, ...] | None:
    """The shape of a parameter's moments: those of its largest state tensor that is no count of steps."""
    tensors: Iterable[object] = held.values() if isinstance(held, dict) else ()
    shapes = [one.shape for one in tensors if isinstance(one, Tensor) and one.shape]
    return max(shapes, key=_product, default=None)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
