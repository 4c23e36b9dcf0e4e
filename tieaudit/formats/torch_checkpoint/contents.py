"""What a checkpoint holds: the state dict that is the model, under which key, and what lies beside it.

Trainers nest: Lightning `state_dict`, DeepSpeed `module`, others `model` or `model_state_dict`; beside it the state of
an optimizer, of which Adam's holds two tensors for every parameter, and averages (EMA) of the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from tieaudit.errors import CorruptFile, UsageError
from tieaudit.formats.torch_checkpoint.pickles import Made
from tieaudit.formats.torch_checkpoint.rebuild import Embedded, Parts, Tensor

MAIN_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
"""Keys under which trainers keep the model, the first one that is there wins."""
_SURE_KEYS = MAIN_KEYS[:3]
ALL = "."
"""The key that means the whole file."""
_AVERAGES = re.compile(r"(^|_|\.)(ema|swa|averaged?|shadow|teacher)(_|\.|$)|^ema|ema$", re.IGNORECASE)
_TRAINING = re.compile(
    r"optim|sched|scaler|rng|random|^(lr|epoch|step|global_step|loss|best_.*|callbacks|loops|hparams|args|hyper_parameters)$",
    re.IGNORECASE,
)
_FLAT = "_flat_weights"
"""Recurrent modules of TorchScript keep a list of their own parameters, which are named already."""
_MAX_DEPTH = 100
_MAX_VISITS = 1_000_000

Leaf = Tensor | Parts | Embedded


class Named(NamedTuple):
    """A tensor under its dotted name."""

    name: str
    leaf: Leaf
    holder: object = None
    """The container that it lies in; None for a value that is a tensor itself."""
    inner: str = ""
    """Its name there."""


Names = list[Named]


@dataclass(frozen=True)
class Chosen:
    """The tensors that are read as the model."""

    key: str
    """Where they are, as `--key` spells it; empty for the whole file."""
    tensors: Names
    beside: tuple[str, ...]
    """What else the file holds, one text for each key that has tensors."""


class Contents:
    """The containers of one unpickled value, pruned to those that hold tensors."""

    def __init__(self, value: object, where: str) -> None:
        self.value = value
        self.where = where
        self._children: dict[int, list[tuple[str, object]]] = {}
        self._keep: list[object] = [value]
        self._prune()

    def choose(self, key: str) -> Chosen:
        """The tensors under a key; without one, of the state dict that is the model. UsageError for an unknown key."""
        if key == ALL:
            return Chosen("", list(self._leaves(self.value)), ())
        if key:
            return Chosen(key, list(self._leaves(self._at(key))), tuple(self._beside(key)))
        path: list[str] = []
        found = self.value
        while (main := self._main(found)) is not None and len(path) < 8:
            path.append(main)
            found = dict(self.children(found))[main]
        if path:
            return Chosen(".".join(path), list(self._leaves(found)), tuple(self._beside(path[0])))
        if not isinstance(found, dict):
            return Chosen("", list(self._leaves(found)), ())
        read = list(self._unlike_training(found))
        kept = [one for name, child in read for one in self._below(found, name, child)]
        if not kept:  # nothing but the state of an optimizer
            return Chosen("", list(self._leaves(found)), ())
        return Chosen("", kept, tuple(self._beside(*(name for name, _ in read))))

    def children(self, container: object) -> list[tuple[str, object]]:
        """What holds tensors inside, by name."""
        return self._children.get(id(container), [])

    def _main(self, found: object) -> str | None:
        """The key of the model, unless this is a state dict already: one that holds tensors itself."""
        named = dict(self.children(found))
        if not isinstance(found, (dict, Made)) or _is_module(found):
            return None
        main = next((key for key in MAIN_KEYS if _is_container(named.get(key))), None)
        if main is None or main in _SURE_KEYS:
            return main
        # `model` beside `discriminator` is one of two models, and inside another one the name of a module
        others = {name for name, child in self._unlike_training(found) if _is_container(child)} - {main}
        return main if found is self.value and not others else None

    def _unlike_training(self, found: object) -> Iterator[tuple[str, object]]:
        for name, child in self.children(found):
            if not self._is_training(name, child) and not (_AVERAGES.search(name) and _is_container(child)):
                yield name, child

    def _is_training(self, name: str, child: object) -> bool:
        held = child.items if isinstance(child, Made) and child.items else child
        if isinstance(held, dict) and {"state", "param_groups"} <= held.keys():
            return True
        return bool(_TRAINING.search(name)) and (_is_container(child) or isinstance(child, (Tensor, Embedded)))

    def _beside(self, *read: str) -> Iterator[str]:
        heads = {name.partition(".")[0] if name not in dict(self.children(self.value)) else name for name in read}
        for name, child in self.children(self.value):
            if name not in heads:
                count = sum(1 for _ in self._below(self.value, name, child))
                yield f"{name} ({count:,} tensor{'s' if count != 1 else ''})"

    def _at(self, key: str) -> object:
        """The container under a dotted key; the longest name that is there goes first, as names may hold dots."""
        found, rest = self.value, key
        module = dict(self.children(found)).get("")
        if module is not None and not key.startswith("CONSTANTS"):  # TorchScript: the module, and constants beside it
            found = module
        while rest:
            named = dict(self.children(found))
            fitting = [name for name in named if rest == name or rest.startswith(name + ".")]
            if not fitting:
                there = ", ".join(list(named)[:12]) or "no tensors"
                raise UsageError(f"{self.where}: no key {key!r} holds tensors", hint=f"there: {there}")
            name = max(fitting, key=len)
            found, rest = named[name], rest[len(name) + 1 :]
        return found

    def _below(self, holder: object, name: str, child: object) -> Iterator[Named]:
        if isinstance(child, (Tensor, Parts, Embedded)):
            yield Named(name, child, holder, name)
            return
        for found in self._leaves(child):
            yield found._replace(name=f"{name}.{found.name}")

    def _leaves(self, value: object) -> Iterator[Named]:
        """Every tensor below by its dotted name, in the order of the file. CorruptFile beyond `_MAX_VISITS`."""
        if isinstance(value, (Tensor, Parts, Embedded)):
            yield Named("tensor", value)
            return
        stack: list[Iterator[tuple[str, object]]] = [iter(self.children(value))]
        names: list[str] = []
        path = [value]
        inside = {id(value)}
        n_visits = 0
        while stack:
            name, child = next(stack[-1], ("", None))
            if child is None:
                stack.pop()
                inside.discard(id(path.pop()))
                names = names[:-1]
                continue
            n_visits += 1
            if n_visits > _MAX_VISITS or len(stack) > _MAX_DEPTH:
                what = f"at most {_MAX_VISITS:,} tensors" if n_visits > _MAX_VISITS else f"at most {_MAX_DEPTH} levels"
                raise CorruptFile(f"{self.where}: expected {what} of names, found more: nested beyond reason")
            if isinstance(child, (Tensor, Parts, Embedded)):
                yield Named(".".join([*names, name]), child, path[-1], name)
            elif id(child) not in inside:  # else a container that holds itself
                stack.append(iter(self.children(child)))
                names.append(name)
                path.append(child)
                inside.add(id(child))

    def _prune(self) -> None:
        """Children that hold tensors, for every container once: shared ones are not walked again."""
        order: list[tuple[object, list[tuple[str, object]]]] = []
        seen = {id(self.value)}
        waiting = [self.value]
        parents: dict[int, list[object]] = {}
        bearing: list[object] = []
        while waiting:
            container = waiting.pop()
            inner = [(name, child) for name, child in _inside(container) if _is_leaf(child) or _is_container(child)]
            order.append((container, inner))
            for _, child in inner:
                if _is_leaf(child):
                    bearing.append(container)
                    continue
                parents.setdefault(id(child), []).append(container)
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)
                    self._keep.append(child)
        holds: set[int] = set()
        while bearing:
            container = bearing.pop()
            if id(container) not in holds:
                holds.add(id(container))
                bearing.extend(parents.get(id(container), ()))
        for container, inner in order:
            if id(container) in holds:
                self._children[id(container)] = [one for one in inner if _is_leaf(one[1]) or id(one[1]) in holds]


def _is_leaf(value: object) -> bool:
    return isinstance(value, (Tensor, Parts, Embedded))


def _is_container(value: object) -> bool:
    return isinstance(value, (dict, list, tuple, Made))


def _is_module(value: object) -> bool:
    state = value.state if isinstance(value, Made) else None
    return isinstance(state, dict) and isinstance(state.get("_modules"), (dict, Made))


def _inside(container: object) -> Iterator[tuple[str, object]]:
    """Name and value of everything in a container. A pickled module has its parameters, buffers and modules."""
    if isinstance(container, dict):
        yield from ((_name(key), value) for key, value in container.items())
    elif isinstance(container, (list, tuple)):
        yield from ((str(index), value) for index, value in enumerate(container))
    elif isinstance(container, Made):
        state = container.state
        if isinstance(state, dict) and _is_module(container):
            for part in ("_parameters", "_buffers", "_modules"):
                held = state.get(part)
                inner = _inside(held) if isinstance(held, (dict, Made)) else ()
                yield from ((name, _as_buffer(child) if part == "_buffers" else child) for name, child in inner)
            return
        for held in (state, container.items, container.entries, container.args):
            if isinstance(held, (dict, list, tuple)):
                yield from ((name, child) for name, child in _inside(held) if name != _FLAT)
            elif held is not None:
                yield "state", held


def holder_of(named: Named) -> tuple[object, object]:
    """The dictionary or list that a tensor was put into, and its key or index there; (None, None) if there is none."""
    holder = named.holder
    held: list[object] = [holder]
    if isinstance(holder, Made):
        state = holder.state
        parts = (state.get(part) for part in ("_parameters", "_buffers")) if isinstance(state, dict) else ()
        held = [holder.items, holder.entries, state]
        held += [part.items if isinstance(part, Made) else part for part in parts]
    for one in held:
        if isinstance(one, dict) and _same(one.get(named.inner), named.leaf):
            return one, named.inner
        if isinstance(one, dict):
            for key, value in one.items():
                if _same(value, named.leaf) and _name(key) == named.inner:
                    return one, key
        elif isinstance(one, list):
            for index, value in enumerate(one):
                if str(index) == named.inner and _same(value, named.leaf):
                    return one, index
    return None, None


def _same(value: object, leaf: Leaf) -> bool:
    """Whether a value is the one that was found; buffers of modules are marked as such when they are."""
    return value is leaf or (
        isinstance(value, Tensor) and isinstance(leaf, Tensor) and value.stored is leaf.stored is not None
    )


def _as_buffer(value: object) -> object:
    return replace(value, parameter=False, because="a buffer of its module") if isinstance(value, Tensor) else value


def _name(key: object) -> str:
    if isinstance(key, bytes):
        return key.decode("latin-1")
    return key if isinstance(key, str) else str(key) if isinstance(key, (int, float, bool)) else type(key).__name__
