"""The pickle machine with a notebook: which bytes of the pickle describe which value, and who remembers what.

What `splicing.py` needs to replace a piece of a pickle and leave every other byte where it is.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tieaudit.formats.torch_checkpoint.pickles import MAX_STEPS, OPERATIONS, Call, Machine, Made
from tieaudit.formats.torch_checkpoint.rebuild import Bytes
from tieaudit.formats.torch_checkpoint.stream import Stream

PUTS, GETS, _MEMOIZE, FRAME = frozenset(b"pqr\x94"), frozenset(b"ghj"), 0x94, 0x95
_MARK, _SETITEM, _SETITEMS, _DICT, _APPEND, _APPENDS = b"(sudae"
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_TUPLE = 0x74


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item of a dictionary or a list is spelled in a pickle."""

    begin: int
    """Of its key, or of the value where there is none."""
    value: int
    """Begin of the value."""
    end: int
    """End of the value."""
    alone: bool
    """Whether an opcode of its own (SETITEM, APPEND: one byte behind `end`) puts it into its container."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a tensor's storage, offset, sizes and strides are spelled, one after the other."""

    begin: int
    end: int


class Tracer(Machine):
    """A `Machine` that writes down places. Positions are those of its stream.

    Cost: some 60 bytes for every opcode that remembers or recalls, 200 for every item of a dictionary.
    """

    def __init__(self, stream: Stream, persistent: Callable[[object], object], call: Call) -> None:
        super().__init__(stream, persistent, call)
        self.begin = stream.at
        self.end = stream.at
        """Behind STOP."""
        self.sites: dict[Bytes, list[Site]] = {}
        self.ids: dict[Bytes, tuple[Any, ...]] = {}
        """The persistent id of every mention of a storage, as the pickle gives it."""
        self.puts = array("q")
        """Four numbers for each: index, begin of the value, begin and end of the opcode."""
        self.put_values: list[object] = []
        self.gets = array("q")
        """Three numbers for each: index, begin and end of the opcode."""
        self.frames = array("q")
        """Begin of every FRAME opcode, which is 9 bytes long."""
        self.memoizes = False
        """Whether numbers of memo entries are not spelled but counted (protocol 4)."""
        self._placed: dict[int, tuple[object, dict[object, Place]]] = {}
        self._begins: list[int] = []
        self._marked: list[tuple[int, list[int]]] = []
        self._last_key: object = None
        self._last_index = 0

    def place(self, container: object, key: object) -> Place | None:
        """Where the item of a dictionary (by key) or of a list (by index) is spelled; None: nobody noticed."""
        _, places = self._placed.get(id(container), (None, {}))
        return places.get(key)

    def load(self) -> object:
        stream = self._stream
        for _ in range(MAX_STEPS):
            at = stream.at
            code = stream.byte()
            if code == 46 and self._stack:  # STOP
                self.end = stream.at
                return self._stack[-1]
            operation = OPERATIONS.get(code)
            if operation is None:
                raise self._wrong(f"expected an opcode that PyTorch writes, found {bytes([code])!r}")
            try:
                before = (self._stack, len(self._marks))
                operation(self)
                self._note(code, at, *before)
            except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
                raise self._wrong(
                    f"opcode {bytes([code])!r} does not fit what is there ({type(error).__name__})"
                ) from None
        raise self._wrong(f"expected at most {MAX_STEPS:,} steps, found more")

    def _note(self, code: int, at: int, items: list[Any], n_marks: int) -> None:
        """After one opcode: keep `_begins` beside the stack, and write down what it did."""
        if code == _MARK:
            self._marked.append((at, self._begins))
            self._begins = []
            return
        inner = self._begins
        if len(self._marks) < n_marks:
            mark, self._begins = self._marked.pop()
            if len(self._stack) > len(self._begins):
                self._begins.append(mark)
            self._note_marked(code, at, items, inner)
            return
        count = _TUPLES.get(code, 0)
        if count:
            self._note_tuple(self._stack[-1], inner[-count:], at)
        elif code == _SETITEM:
            self._put_in(self._stack[-1], [(inner[-2], inner[-1], at, True)], [self._last_key])
        elif code == _APPEND:
            self._put_in(self._stack[-1], [(inner[-1], inner[-1], at, True)], None)
        elif code in PUTS or code in GETS:
            self._note_memo(code, at)
        elif code == FRAME:
            self.frames.append(at)
        if len(self._stack) > len(inner):
            inner.append(at)
        else:
            del inner[len(self._stack) :]

    def _note_marked(self, code: int, at: int, items: list[Any], inner: list[int]) -> None:
        ends = [*inner[1:], at]
        if code == _TUPLE:
            self._note_tuple(self._stack[-1], inner, at)
        elif code in (_SETITEMS, _DICT):
            spans = [(inner[n], inner[n + 1], ends[n + 1], False) for n in range(0, len(inner) - 1, 2)]
            self._put_in(self._stack[-1], spans, items[::2])
        elif code == _APPENDS:
            self._put_in(self._stack[-1], [(one, one, end, False) for one, end in zip(inner, ends, strict=True)], None)

    def set_item(self) -> None:
        self._last_key = self._stack[-2]
        super().set_item()

    def _put_in(self, target: Any, spans: list[tuple[int, int, int, bool]], keys: list[Any] | None) -> None:
        held = target
        if isinstance(target, Made):
            held = target.entries if keys is None else target.items
        names: Any = keys if keys is not None else range(len(held) - len(spans), len(held))
        places = self._placed.setdefault(id(held), (held, {}))[1]
        for name, span in zip(names, spans, strict=True):
            if isinstance(name, (str, int, bytes)):
                places[name] = Place(*span)

    def _note_tuple(self, made: tuple[Any, ...], begins: list[int], end: int) -> None:
        if len(made) >= 4 and isinstance(made[0], Bytes):  # what a tensor is rebuilt from
            self.sites.setdefault(made[0], []).append(Site(begins[0], begins[4] if len(made) > 4 else end))

    def _note_memo(self, code: int, at: int) -> None:
        if code in GETS:
            self.gets.extend((self._last_index, at, self._stream.at))
            return
        self.memoizes |= code == _MEMOIZE
        self.puts.extend((self._last_index, self._begins[-1], at, self._stream.at))
        self.put_values.append(self._stack[-1])

    def persistent(self) -> None:
        saved = self._stack[-1]
        super().persistent()
        found = self._stack[-1]
        if isinstance(found, Bytes) and isinstance(saved, tuple):
            self.ids[found] = saved

    def get(self, index: int) -> None:
        self._last_index = index
        super().get(index)

    def put(self, index: int) -> None:
        self._last_index = index
        super().put(index)
