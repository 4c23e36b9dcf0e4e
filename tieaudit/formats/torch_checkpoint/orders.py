"""What is to happen to the tensors of one checkpoint file, and what that makes of its pickle and its storages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tieaudit.dtypes import dtype
from tieaudit.errors import RewriteRefused
from tieaudit.formats.torch_checkpoint.adjusting import splice
from tieaudit.formats.torch_checkpoint.adjustment import Adjustment
from tieaudit.formats.torch_checkpoint.contents import ALL, Contents, Named, holder_of
from tieaudit.formats.torch_checkpoint.opened import Opened
from tieaudit.formats.torch_checkpoint.pickles import Global, Machine
from tieaudit.formats.torch_checkpoint.read import Collected
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Parts, Rebuilder, Tensor
from tieaudit.formats.torch_checkpoint.splicing import Joined, Memo, Part, Splice, Target, item, recall
from tieaudit.formats.torch_checkpoint.stream import Stream
from tieaudit.formats.torch_checkpoint.tracing import Place, Site, Tracer
from tieaudit.storage import FileStorage, Storage
from tieaudit.strided import is_row_major, row_major, span
from tieaudit.view import AS_STORED, Reshape, Transpose, View


@dataclass
class Orders:
    """By name of a weight of the file."""

    values: dict[str, Storage] = field(default_factory=dict)
    """Gets these bytes, row by row, in a storage of its own."""
    same: dict[str, tuple[str, View]] = field(default_factory=dict)
    """Becomes this view of another weight's storage."""
    own: list[str] = field(default_factory=list)
    """Gets a storage of its own with the bytes that it has."""
    dropped: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    """New name → name of the weight that it is a copy of, written behind it."""
    lossless: bool = True
    states: tuple[Adjustment, ...] = ()
    """What becomes of optimizer states in the file."""

    def __bool__(self) -> bool:
        return bool(self.values or self.same or self.own or self.dropped or self.copies or self.states)


@dataclass(frozen=True)
class Made:
    """The file as it is to be."""

    pickle: list[bytes | Storage]
    used: Mapping[str, Bytes]
    """Every storage that the new pickle mentions, by key."""
    new: Mapping[str, Storage]
    """Content of the storages that the file did not have."""


def view_of(view: View, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a view of a tensor in the same storage. RewriteRefused where there are none."""
    for step in view.steps:
        if isinstance(step, Transpose):
            strides = tuple(strides[axis] for axis in step.perm)
        elif isinstance(step, Reshape) and is_row_major(shape, strides):
            strides = row_major(step.to)
        else:
            raise RewriteRefused(f"a tensor cannot be stored as another one {view}")
        shape = step.shape(shape)
    return shape, strides


class Subject:
    """A checkpoint file that is to be rewritten: what is the same for every order."""

    def __init__(self, found: Collected) -> None:
        assert found.opened.trace is not None
        self.found = found
        self.trace: Tracer = found.opened.trace
        self.memo = Memo(self.trace)
        self.names_of: dict[Bytes, list[str]] = {}
        """Rebuilt tensor, by its mention of a storage → the names of the model that it has."""
        for name, (tensor, _) in found.sources.items():
            if tensor.stored is not None:
                self.names_of.setdefault(tensor.stored, []).append(name)


def reason_against(subject: Subject, orders: Orders, whole: bool = False) -> str | None:
    """Why these orders cannot be carried out, as far as that shows before the pickle is put together, or then."""
    try:
        work = _Work(subject, orders)
        work.aim()
        work.spell()
        if whole:
            work.splice.pieces()
    except RewriteRefused as refused:
        return refused.message
    return None


def carry_out(subject: Subject, orders: Orders) -> Made:
    """The pickle with all orders carried out. RewriteRefused with a reason.

    Cost: one more run over the pickle, to see what it mentions; no tensor is read.
    """
    work = _Work(subject, orders)
    work.aim()
    work.spell()
    pickle = work.splice.pieces()
    return Made(pickle, _mentioned(subject.found.opened, pickle), work.new)


def _mentioned(opened: Opened, pickle: list[bytes | Storage]) -> dict[str, Bytes]:
    """Storages of the new pickle; that it can be read at all is seen here first."""
    rebuilder = Rebuilder(f"{opened.where}, rewritten")
    used: dict[str, Bytes] = {}

    def persistent(saved: object) -> object:
        found = rebuilder.persistent(saved)
        if isinstance(found, Bytes):
            used.setdefault(found.key, found)
        return found

    Machine(Stream(Joined(pickle), rebuilder.where), persistent, rebuilder.call).load()
    return used


class _Work:
    """Orders on their way into a pickle."""

    def __init__(self, subject: Subject, orders: Orders) -> None:
        self.subject, self.found, self.orders = subject, subject.found, orders
        self.opened, self.trace = subject.found.opened, subject.trace
        self.splice = Splice(self.opened.pickle, self.trace, subject.memo, self.opened.where)
        self.legacy = self.opened.layout == "legacy"
        self.new: dict[str, Storage] = {}
        self.targets: dict[str, Target] = {}
        """What each weight becomes that changes."""
        self._n_key = 0
        self._keys = {one.key for one in self.trace.ids}

    # what every weight becomes ------------------------------------------------------------------------------------

    def aim(self) -> None:
        for name, storage in self.orders.values.items():
            self.targets[name] = self._fresh(name, storage, row_major(self._tensor(name).shape))
        for name, (other, view) in self.orders.same.items():
            target = self.targets.get(other) or self._current(other)
            tensor, mine = self._tensor(name), self._current(name)
            if _plain_kind(target.kind) != _plain_kind(mine.kind) or tensor.dtype != self._tensor(other).dtype:
                raise RewriteRefused(
                    f"{name} and {other} were saved as two types of storage, {mine.kind} and {target.kind}"
                )
            shape, strides = view_of(view, target.shape, target.strides)
            if shape != tensor.shape:
                raise RewriteRefused(
                    f"{name}: expected the shape {list(tensor.shape)}, found {list(shape)} in the plan"
                )
            target = Target(target.kind, target.key, target.location, target.n_elements, target.offset, shape, strides)
            if target != mine:
                self.targets[name] = target
        for name in self.orders.own:
            self.targets[name] = self._copy(name)

    def _tensor(self, name: str) -> Tensor:
        found = self.found.sources.get(name)
        if found is None or found[0].stored is None:
            raise RewriteRefused(f"{name}: no tensor with a storage of its own kind is kept under this name")
        return found[0]

    def _current(self, name: str) -> Target:
        """What a weight is now."""
        return self._now(self._tensor(name))

    def _now(self, tensor: Tensor) -> Target:
        assert tensor.stored is not None
        kind, _, location, count = self.trace.ids[tensor.stored][1:5]
        assert isinstance(kind, Global)
        offset = tensor.offset + tensor.stored.begin
        return Target(kind.name, tensor.stored.key, str(location), count, offset, tensor.shape, tensor.strides)

    def _fresh(self, name: str, content: Storage, strides: tuple[int, ...]) -> Target:
        """A new storage for a weight."""
        if self.opened.swapped and name in self.orders.values:
            raise RewriteRefused(f"{name}: the file is big-endian, new values cannot be written into it")
        tensor = self._tensor(name)
        return self._placed(tensor, content, strides)

    def _placed(self, tensor: Tensor, content: Storage, strides: tuple[int, ...]) -> Target:
        """A new storage in the place of a tensor's."""
        was = self._now(tensor)
        while str(self._n_key) in self._keys:
            self._n_key += 1
        key = str(self._n_key)
        self._keys.add(key)
        self.new[key] = content
        item_bytes = dtype(tensor.dtype).item_bytes or 1
        return Target(was.kind, key, was.location, content.n_bytes // item_bytes, 0, was.shape, strides)

    def _copy(self, name: str) -> Target:
        """A storage with what a weight visits: as it lies there where that is all of a range, else row by row."""
        tensor, was = self._tensor(name), self._current(name)
        count, reach = _product(tensor.shape), span(tensor.shape, tensor.strides)
        item_bytes = dtype(tensor.dtype).item_bytes or 1
        if reach == count:  # as torch.clone, which keeps the order of dense tensors
            whole = self.opened.located.storage(was.key)
            begin, n_bytes = was.offset * item_bytes, count * item_bytes
            if isinstance(whole, FileStorage):
                return self._fresh(name, FileStorage(whole.path, whole.offset + begin, n_bytes), tensor.strides)
            return self._fresh(name, Part(whole, begin, n_bytes), tensor.strides)
        if self.opened.swapped:
            raise RewriteRefused(f"{name}: a part of a storage of a big-endian file cannot be copied out of it")
        storage = self.found.weights[name].storage
        assert storage is not None
        return self._fresh(name, storage, row_major(tensor.shape))

    def _moment(self, tensor: Tensor, content: Storage) -> bytes:
        return self._spelled(self._placed(tensor, content, row_major(tensor.shape)))

    # how that is spelled ------------------------------------------------------------------------------------------

    def spell(self) -> None:
        objects = self._one_object()
        again: dict[tuple[int, int], dict[int, tuple[Site, bytes]]] = {}
        sites = {self._tensor(name).stored: None for name in self.targets}
        for stored in filter(None, sites):
            names = [name for name in self.subject.names_of[stored] if name not in objects]
            self._spell_site(stored, names, again)
        for name in dict.fromkeys(self.orders.dropped):
            place = self._place(name)
            self.splice.replace(place.begin, place.end + place.alone, b"")
        for name, other in self.orders.copies.items():
            place, site = self._place(other), self._site(other)
            said = self.splice.replay(place.value, place.end, {site.begin: (site, self._spelled(self._copy(other)))})
            self.splice.insert(place.end + place.alone, item(name, said, place.alone))
        for (begin, end), targets in again.items():
            source = self.splice.source(begin)
            if source is None:
                raise RewriteRefused(
                    f"{self.opened.where}: byte {begin} of the pickle: a value that is kept twice in an unusual way"
                )
            self.splice.replace(begin, end, self.splice.replay(*source, targets))
        splice(self.splice, self.trace, self.found, self.orders.states, self._moment)

    def _spell_site(
        self, stored: Bytes, names: list[str], again: dict[tuple[int, int], dict[int, tuple[Site, bytes]]]
    ) -> None:
        """One rebuilt tensor under one name or several: here, and at the other places that recall it."""
        if not names:
            return
        site = self._site(names[0])
        if not self.orders.lossless and self._outside(stored, len(names)):
            raise RewriteRefused(
                f"{names[0]}: is kept outside of the model too, as the same tensor, which a lossy plan would change"
            )
        wanted: dict[str, Target | None] = {name: self.targets.get(name) for name in names}
        if len(set(wanted.values())) == 1:
            first = wanted[names[0]]
            if first is not None:
                self.splice.replace(site.begin, site.end, self._spelled(first))
            return
        places = {name: self._place(name) for name in names}
        here = next((name for name, place in places.items() if place.value <= site.begin < place.end), None)
        keeper = next((name for name, target in wanted.items() if target is None), None)
        if here is not None and keeper is not None and wanted[here] is not None and here in self.orders.own:
            wanted[here], wanted[keeper] = (
                None,
                wanted[here],
            )  # who keeps the old storage of equal bytes does not matter
        stays = wanted[here] if here is not None else None
        if stays is not None:
            self.splice.replace(site.begin, site.end, self._spelled(stays))
        for name, target in wanted.items():
            if name != here and target != stays:
                place = places[name]
                said = self._spelled(self._current(name) if target is None else target)
                again.setdefault((place.value, place.end), {})[site.begin] = (site, said)

    def _one_object(self) -> set[str]:
        """Parameters that become the very object that another name has, as in a module whose weights are tied.

        Two Parameters of one storage would be two to an optimizer. The names that this settles.
        """
        done: set[str] = set()
        groups: dict[str, list[str]] = {}
        for name, (other, view) in self.orders.same.items():
            if view == AS_STORED and name in self.targets and self._is_object(name) and self._is_object(other):
                groups.setdefault(other, [other]).append(name)
        for kept, names in groups.items():
            places = {name: self._place(name) for name in names}
            first = min(names, key=lambda name: places[name].value)
            index = self.splice.remembered(places[first].value, places[first].end)
            if index is None or len({one.value for one in places.values()}) < len(names):
                continue
            if first != kept:
                self.targets[kept] = self.targets[first] = self.targets.get(kept) or self._current(kept)
            for name in names:
                if name != first:
                    self.splice.replace(places[name].value, places[name].end, recall(index))
                    done.add(name)
        return done

    def _is_object(self, name: str) -> bool:
        tensor, named = self.found.sources[name]
        alone = tensor.stored is not None and len(self.subject.names_of[tensor.stored]) == 1
        return tensor.parameter is True and alone and not isinstance(named.leaf, Parts)

    def _outside(self, stored: Bytes, n_names: int) -> bool:
        """Whether names that are not the model's have a tensor too."""
        everything = Contents(self.opened.value, self.opened.where).choose(ALL).tensors
        return sum(1 for named in everything for tensor in _tensors(named) if tensor.stored is stored) > n_names

    def _site(self, name: str) -> Site:
        stored = self._tensor(name).stored
        sites = self.trace.sites.get(stored, []) if stored is not None else []
        if len(sites) != 1:
            raise RewriteRefused(f"{name}: the pickle spells its sizes in a way that PyTorch 0.4 and newer do not")
        return sites[0]

    def _place(self, name: str) -> Place:
        named = self.found.sources[name][1]
        place = self.trace.place(*holder_of(named))
        if place is None:
            raise RewriteRefused(f"{name}: is not an item of a dictionary or a list in the pickle")
        return place

    def _spelled(self, target: Target) -> bytes:
        return target.spelled(self.legacy)


def _tensors(named: Named) -> Iterable[Tensor]:
    waiting: list[object] = [named.leaf]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Parts):
            waiting += one.tensors.values()
        elif isinstance(one, Tensor):
            yield one


def _plain_kind(kind: str) -> str:
    """A class of storages without its device."""
    return kind.rpartition(".")[2]


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
