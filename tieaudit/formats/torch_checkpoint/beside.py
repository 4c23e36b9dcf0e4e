"""The structural proof of a rewritten checkpoint for everything that is no weight of the model: it is what it was.

The values of both pickles are compared, not their bytes: numbers, texts, inert records of classes and calls, and the
bytes of every other tensor (optimizers, averages); then the other members of the archive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tieaudit.formats.torch_checkpoint.adjustment import Adjustment, Join
from tieaudit.formats.torch_checkpoint.archive import Archive
from tieaudit.formats.torch_checkpoint.legacy import LegacyFile
from tieaudit.formats.torch_checkpoint.opened import Opened, open_file
from tieaudit.formats.torch_checkpoint.optimizer_states import NAMES, PARAMS, State, states_in
from tieaudit.formats.torch_checkpoint.pickles import Global, Made, UnhashedKey
from tieaudit.formats.torch_checkpoint.read import Collected, collect, weight_of
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Embedded, Parts, Tensor
from tieaudit.formats.torch_checkpoint.splicing import Joined, Part
from tieaudit.formats.torch_checkpoint.stream import Blob
from tieaudit.formats.torch_checkpoint.totals import Term, same_sum
from tieaudit.storage import Storage, same_bytes

_N_MOST = 4
_CHANGES = (".data/serialization_id", "data.pkl")
PROMISE = ".format_version"
"""The member that promises storages in the order of the pickle, from key 0; it may go, which promises less."""


def differences(
    before: Path,
    after: Path,
    key: str,
    gone: frozenset[str],
    new: frozenset[str],
    adjustments: Callable[[], Sequence[Adjustment]] = tuple,
) -> list[str]:
    """What differs between two files besides the model's own weights, in sentences; a few at most.

    `gone`, `new`: names of weights that the plan takes out of the file and puts into it. `adjustments` says those of
    optimizer states, if there is one; each must be exactly what was planned, its sums computed once more.
    Cost: both pickles, and every byte of the tensors beside the model.
    """
    one, other = collect(open_file(before), key), collect(open_file(after), key)
    states = list(states_in(one.opened.value))
    planned = {adjustment.where: adjustment for adjustment in adjustments()} if states else {}
    comparison = _Comparison(one, other, gone, new)
    comparison.states = {id(state.held): (state, planned[state.where]) for state in states if state.where in planned}
    found = []
    for problem in (*comparison.run(), *_members(one.opened, other.opened)):
        found.append(problem)
        if len(found) == _N_MOST:
            break
    return found


class _Comparison:
    def __init__(
        self,
        one: Collected,
        other: Collected,
        gone: frozenset[str],
        new: frozenset[str],
    ) -> None:
        self._one, self._other = one, other
        self.states: dict[int, tuple[State, Adjustment]] = {}
        """By the identity of what is to be adjusted."""
        self._weights = {tensor.stored for tensor, _ in one.sources.values()}
        self._gone = {(id(named.holder), named.inner) for name, (_, named) in one.sources.items() if name in gone}
        self._new = {(id(named.holder), named.inner) for name, (_, named) in other.sources.items() if name in new}
        self._waiting: list[tuple[str, object, object]] = [("", one.opened.value, other.opened.value)]
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> Iterator[str]:
        while self._waiting:
            where, a, b = self._waiting.pop()
            if isinstance(a, (dict, list, tuple, Made, Parts)):
                if (id(a), id(b)) in self._seen:
                    continue
                self._seen.add((id(a), id(b)))
            if type(a) is not type(b) or self._differ(where, a, b):
                yield f"{where or 'the value of the file'}: not named by the plan, but it changed"

    def _differ(self, where: str, a: object, b: object) -> bool:
        """Whether two values of one type differ; what they hold is left to wait."""
        if id(a) in self.states and isinstance(b, dict):
            return self._state_differs(where, *self.states[id(a)], b)
        if isinstance(a, dict) and isinstance(b, dict):
            mine = [key for key in a if (id(a), key) not in self._gone]
            theirs = [key for key in b if (id(b), key) not in self._new]
            for key, other in zip(mine, theirs, strict=False):
                self._waiting += [(where, key, other), (f"{where}.{key}".lstrip("."), a[key], b[other])]
            return len(mine) != len(theirs)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            self._waiting += [(f"{where}.{n}", *pair) for n, pair in enumerate(zip(a, b, strict=False))]
            return len(a) != len(b)
        if isinstance(a, Made) and isinstance(b, Made):
            for part in ("function", "args", "state", "items", "entries"):
                self._waiting.append((where, getattr(a, part), getattr(b, part)))
            return False
        if isinstance(a, Parts) and isinstance(b, Parts):
            self._waiting.append((where, dict(a.tensors), dict(b.tensors)))
            return a.kind != b.kind
        if isinstance(a, Global) and isinstance(b, Global):
            return a.name != b.name
        return self._leaf_differs(where, a, b)

    def _state_differs(self, where: str, state: State, planned: Adjustment, b: dict[object, object]) -> bool:
        """Whether an optimizer's state is other than planned; what should be as it was is left to wait."""
        now = next((one for one in states_in(b) if one.held is b), None)
        if now is None or list(state.held) != list(b) or len(state.groups) != len(now.groups):
            return True
        for n, (mine, theirs) in enumerate(zip(state.groups, now.groups, strict=True)):
            numbers, names = mine[PARAMS], mine.get(NAMES)
            assert isinstance(numbers, list)
            wanted: dict[str, object] = {PARAMS: planned.renumbered(numbers)}
            if isinstance(names, list) and len(names) == len(numbers):
                wanted[NAMES] = planned.named(names, numbers)
            if list(mine) != list(theirs) or any(theirs[key] != value for key, value in wanted.items()):
                return True
            self._waiting += [(f"{where}.{n}.{key}", mine[key], theirs[key]) for key in mine if key not in wanted]
        new = planned.new_numbers
        kept = {number: entry for number, entry in state.entries.items() if number in new}
        if [new[number] for number in kept if isinstance(number, int)] != list(now.entries):
            return True
        joined = {join.kept: join for join in planned.joins}
        return any(
            self._entry_differs(f"{where}.{number}", state, joined.get(number), entry, other)
            for (number, entry), other in zip(kept.items(), now.entries.values(), strict=True)
            if isinstance(number, int)
        )

    def _entry_differs(self, where: str, state: State, join: Join | None, a: object, b: object) -> bool:
        """One parameter's entry: sums where it was joined with others, everything else as it was."""
        if join is None or not isinstance(a, dict) or not isinstance(b, dict):
            self._waiting.append((where, a, b))
            return False
        if list(a) != list(b):
            return True
        self._waiting += [(f"{where}.{key}", a[key], b[key]) for key in a if key not in join.sums.all]
        others = [(state.entries[number], turned) for number, turned in join.others]
        return any(
            not same_sum(
                self._read(self._one, a[key], False),
                [self._read(self._one, entry[key], turned) for entry, turned in others if isinstance(entry, dict)],
                self._read(self._other, b[key], False),
            )
            for key in join.sums.all
        )

    def _read(self, found: Collected, tensor: object, turned: bool) -> Term:
        weight = weight_of(found, "a moment", tensor) if isinstance(tensor, Tensor) else None
        return Term(weight, turned)

    def _leaf_differs(self, where: str, a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = (a.dtype, a.shape, a.parameter, a.odd) == (b.dtype, b.shape, b.parameter, b.odd)
            if not same or (a.stored is None) != (b.stored is None):
                return True
            return a.stored is not None and a.stored not in self._weights and not self._same_tensor(where, a, b)
        if isinstance(a, Bytes) and isinstance(b, Bytes):  # a storage that was saved by itself
            same = (a.dtype, a.n_elements, a.begin) == (b.dtype, b.n_elements, b.begin)
            return not same or not same_bytes(_stored(self._one.opened, a), _stored(self._other.opened, b))
        if isinstance(a, Embedded) and isinstance(b, Embedded):
            same = (a.dtype, a.shape, a.fortran) == (b.dtype, b.shape, b.fortran)
            return not same or not same_bytes(_blob(self._one, a.data), _blob(self._other, b.data))
        if isinstance(a, Blob) and isinstance(b, Blob):
            return not same_bytes(_blob(self._one, a), _blob(self._other, b))
        if isinstance(a, UnhashedKey) and isinstance(b, UnhashedKey):
            self._waiting.append((where, a.value, b.value))
            return False
        return struct.pack("<d", a) != struct.pack("<d", b) if isinstance(a, float) and isinstance(b, float) else a != b

    def _same_tensor(self, where: str, a: Tensor, b: Tensor) -> bool:
        one = weight_of(self._one, f"{where} (before)", a)
        other = weight_of(self._other, f"{where} (after)", b)
        if one is None or other is None or one.storage is None or other.storage is None:
            return one is other is None
        return same_bytes(one.storage, other.storage)


def _blob(found: Collected, data: bytes | Blob) -> Storage:
    """Bytes that lie in the pickle itself."""
    return Joined([data]) if isinstance(data, bytes) else Part(found.opened.pickle, data.offset, data.n_bytes)


def _stored(opened: Opened, stored: Bytes) -> Storage:
    return opened.located.storage(stored.key)


def _members(one: Opened, other: Opened) -> Iterator[str]:
    """Members of an archive that are neither the pickle nor storages, and that nobody wrote anew."""
    if isinstance(one.container, LegacyFile) or isinstance(other.container, LegacyFile):
        if type(one.container) is not type(other.container):
            yield "expected a file of the layout of the original"
        return
    contents = [_small(archive) for archive in (one.container, other.container)]
    for name in contents[0].keys() | contents[1].keys():
        a, b = contents[0].get(name), contents[1].get(name)
        if name == PROMISE and b is None:
            continue
        if a is None or b is None or not same_bytes(a, b):
            yield f"member {name} of the archive: not named by the plan, but it changed"


def _small(archive: Archive) -> dict[str, Storage]:
    found = {}
    for member in archive.all:
        name = member.name.removeprefix(archive.top)
        if name not in _CHANGES and not name.startswith("data/"):
            found[name] = archive.content(member)
    return found
