"""Replacing pieces of a pickle: every other byte stays, and so does what every other part of the pickle remembers.

A pickle remembers values under numbers (PUT) and recalls them later (GET). A piece that goes may have remembered what
somebody else recalls: it is then spelled out where it is recalled first. Nothing new is remembered, so no number moves.
Source of the opcodes: CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import pickletools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from tieaudit.errors import RewriteRefused
from tieaudit.formats.torch_checkpoint.pickles import Global, Made
from tieaudit.formats.torch_checkpoint.rebuild import Bytes, Tensor
from tieaudit.formats.torch_checkpoint.tracing import FRAME, GETS, PUTS, Site, Tracer
from tieaudit.storage import Region, Storage

_MAX_REPLAYED_BYTES = 1024 * 1024
"""Of one value that is spelled out a second time: a tensor takes some 200."""
_MAX_DEPTH = 60
_FRAME_BYTES = 9


@dataclass(frozen=True)
class Target:
    """What a tensor is to be: a step through a storage."""

    kind: str
    """Name of the storage's class, as `torch.FloatStorage`."""
    key: str
    location: str
    n_elements: int
    """Of the storage."""
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def spelled(self, legacy: bool) -> bytes:
        """The opcodes that push storage, offset, sizes and strides; before 1.6 a storage has one more field."""
        module, _, name = self.kind.rpartition(".")
        kind = b"c" + module.encode("utf-8") + b"\n" + name.encode("utf-8") + b"\n"
        said = [text("storage"), kind, text(self.key), text(self.location), integer(self.n_elements)]
        said += [b"N"] * legacy
        sizes = (b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (self.shape, self.strides))
        return b"(" + b"".join(said) + b"tQ" + integer(self.offset) + b"".join(sizes)


def item(key: str, value: bytes, alone: bool) -> bytes:
    """The opcodes of one more item of a dictionary."""
    return text(key) + value + b"s" * alone


def spelled_list(items: Iterable[bytes]) -> bytes:
    """The opcodes of a list."""
    return b"](" + b"".join(items) + b"e"


def recall(index: int) -> bytes:
    """The opcode that pushes what is remembered under a number."""
    return b"h" + bytes([index]) if index < 256 else b"j" + index.to_bytes(4, "little")


def _remember(index: int) -> bytes:
    return b"q" + bytes([index]) if index < 256 else b"r" + index.to_bytes(4, "little")


def text(said: str) -> bytes:
    """The opcode of a text."""
    data = said.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def integer(number: int) -> bytes:
    """The opcode of a number."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if 0 <= number < 65536:
        return b"M" + number.to_bytes(2, "little")
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + number.to_bytes(4, "little", signed=True)
    data = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


@dataclass(frozen=True, slots=True)
class _Put:
    index: int
    value: int
    """Begin of the value."""
    begin: int
    end: int
    made: object


class Memo:
    """What a pickle remembers and recalls, and where; one for all edits of a file."""

    def __init__(self, trace: Tracer) -> None:
        puts, gets = trace.puts, trace.gets
        self.puts: dict[int, list[_Put]] = {}
        self.index_of: dict[tuple[int, int], int] = {}
        """Begin of a value and end of the opcode that remembers it → its number."""
        for n, made in enumerate(trace.put_values):
            put = _Put(puts[4 * n], puts[4 * n + 1], puts[4 * n + 2], puts[4 * n + 3], made)
            self.puts.setdefault(put.index, []).append(put)
            self.index_of[put.value, put.end] = put.index
        self.gets: dict[int, list[tuple[int, int]]] = {}
        self.index_at: dict[int, int] = {}
        """Position of a GET → its number."""
        for n in range(0, len(gets), 3):
            self.gets.setdefault(gets[n], []).append((gets[n + 1], gets[n + 2]))
            self.index_at[gets[n + 1]] = gets[n]


class Splice:
    """Edits of one pickle, collected and then carried out together. Positions are those of `trace`."""

    def __init__(self, pickle: Storage, trace: Tracer, memo: Memo, where: str) -> None:
        self._pickle = pickle
        self._trace = trace
        self._memo = memo
        self._where = where
        self._replaced: dict[tuple[int, int], bytes] = {}
        self._inserted: dict[int, bytes] = {}

    def replace(self, begin: int, end: int, by: bytes) -> None:
        """The piece from `begin` to `end` becomes other opcodes, which must leave the same on the stack."""
        self._replaced[begin, end] = by

    def insert(self, at: int, said: bytes) -> None:
        """Opcodes more before a position."""
        self._inserted[at] = self._inserted.get(at, b"") + said

    def remembered(self, begin: int, end: int) -> int | None:
        """The number under which the value that is spelled from `begin` up to `end` is remembered, if it is."""
        return self._memo.index_of.get((begin, end))

    def recalled(self, begin: int, end: int) -> bool:
        """Whether the value that is spelled from `begin` up to `end` is recalled at another place too."""
        index = self.remembered(begin, end)
        return index is not None and any(at >= end for at, _ in self._memo.gets.get(index, ()))

    def source(self, at: int) -> tuple[int, int] | None:
        """Where the value is spelled that the GET at a position recalls; None: there is no GET."""
        index = self._memo.index_at.get(at)
        if index is None:
            return None
        put = self._known(index, at)
        return put.value, put.begin

    def replay(self, begin: int, end: int, targets: Mapping[int, tuple[Site, bytes]], depth: int = 0) -> bytes:
        """A value spelled once more, with nothing remembered or recalled, and other targets at some sites."""
        if end - begin > _MAX_REPLAYED_BYTES or depth > _MAX_DEPTH:
            raise self._refused(f"a value of {end - begin} bytes, or many within each other, would be spelled twice")
        (span,) = self._pickle.read_ranges([(begin, end - begin)])
        found = bytearray()
        until = begin
        for at, stop, code in self._opcodes(span, begin):
            if at in targets:
                site, said = targets[at]
                found += said
                until = site.end
            elif at < until or code in PUTS or code == FRAME:
                continue
            elif code in GETS:
                put = self._known(self._memo.index_at[at], at)
                if not is_plain(put.made):
                    raise self._refused("a value refers to a container that is kept elsewhere too")
                found += self.replay(put.value, put.begin, {}, depth + 1)
            else:
                found += span[at - begin : stop - begin]
            if len(found) > _MAX_REPLAYED_BYTES:
                raise self._refused(f"a value of more than {_MAX_REPLAYED_BYTES} bytes would be spelled twice")
        return bytes(found)

    def _opcodes(self, span: bytes, begin: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and code of every opcode of a value that begins at `begin` of the pickle."""
        try:
            places = [(at or 0, ord(opcode.code)) for opcode, _, at in pickletools.genops(span + b".")]
        except ValueError as error:
            raise self._refused(f"a value in it cannot be spelled twice: {error}") from None
        for (at, code), (stop, _) in pairwise(places):
            yield begin + at, begin + stop, code

    def pieces(self) -> list[bytes | Storage]:
        """The pickle with all edits made, from the beginning of the trace to its end."""
        edits = dict(self._replaced)
        gone = sorted(edits)
        for one, other in pairwise(gone):
            if other[0] < one[1]:
                raise self._refused("two changes concern the same bytes of the pickle")
        if gone or self._inserted:
            edits.update(self._moved(gone))
            edits.update(self._counted(gone))
        for at, said in self._inserted.items():
            edits[at, at] = said
        found: list[bytes | Storage] = []
        reached = self._trace.begin
        for (begin, end), said in sorted(edits.items()):
            found += [Part(self._pickle, reached, begin - reached), said]
            reached = end
        found.append(Part(self._pickle, reached, self._trace.end - reached))
        return [piece for piece in found if (len(piece) if isinstance(piece, bytes) else piece.n_bytes)]

    def _moved(self, gone: list[tuple[int, int]]) -> Iterable[tuple[tuple[int, int], bytes]]:
        """What the pieces that go had remembered, at the first place that recalls it."""
        begins = [begin for begin, _ in gone]

        def inside(at: int) -> bool:
            n = bisect_right(begins, at) - 1
            return n >= 0 and at < gone[n][1]

        for index, puts in self._memo.puts.items():
            for n, put in enumerate(puts):
                if not inside(put.begin):
                    continue
                until = puts[n + 1].begin if n + 1 < len(puts) else self._trace.end
                users = [
                    get for get in self._memo.gets.get(index, ()) if put.end <= get[0] < until and not inside(get[0])
                ]
                if users:
                    if not is_plain(put.made):
                        raise self._refused("a container in a piece that changes is kept elsewhere too")
                    yield users[0], self.replay(put.value, put.begin, {}) + _remember(index)

    def _counted(self, gone: list[tuple[int, int]]) -> Iterable[tuple[tuple[int, int], bytes]]:
        """Numbers that protocol 4 counts are spelled, as counting would go wrong; frames, which are optional, go."""
        begins = [begin for begin, _ in gone]

        def inside(at: int) -> bool:
            n = bisect_right(begins, at) - 1
            return n >= 0 and at < gone[n][1]

        if self._trace.memoizes:
            for puts in self._memo.puts.values():
                for put in puts:
                    if put.end - put.begin == 1 and not inside(put.begin):
                        yield (put.begin, put.end), _remember(put.index)
        for at in self._trace.frames:
            if not inside(at):
                yield (at, at + _FRAME_BYTES), b""

    def _known(self, index: int, at: int) -> _Put:
        puts = self._memo.puts[index]
        return puts[bisect_right([put.begin for put in puts], at) - 1]

    def _refused(self, because: str) -> RewriteRefused:
        return RewriteRefused(f"{self._where}: {because}; such a checkpoint is not rewritten")


def is_plain(value: object, depth: int = 0) -> bool:
    """Whether a value is the same wherever it is spelled: no container that is filled later."""
    if isinstance(value, tuple):
        return depth < _MAX_DEPTH and all(is_plain(one, depth + 1) for one in value)
    if isinstance(value, (dict, list)):
        return not value
    if isinstance(value, Made):
        return value.state is None and not value.items and not value.entries
    return isinstance(value, (str, bytes, int, float, type(None), Global, Bytes, Tensor))


@dataclass(frozen=True)
class Part:
    """A range of another storage."""

    source: Storage
    begin: int
    n_bytes: int

    @property
    def region(self) -> Region:
        container, first, _ = self.source.region
        return (container, first + self.begin, first + self.begin + self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return self.source.read_ranges([(self.begin + begin, length) for begin, length in ranges])


class Joined:
    """Pieces one behind the other, as one storage."""

    def __init__(self, pieces: Iterable[bytes | Storage]) -> None:
        self._pieces = tuple(pieces)
        self._ends: list[int] = []
        self.n_bytes = 0
        for piece in self._pieces:
            self.n_bytes += len(piece) if isinstance(piece, bytes) else piece.n_bytes
            self._ends.append(self.n_bytes)

    @property
    def region(self) -> Region:
        return ("joined", 0, self.n_bytes)

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        return [self._range(begin, begin + length) for begin, length in ranges]

    def _range(self, begin: int, end: int) -> bytes:
        found = b""
        n = bisect_right(self._ends, begin)
        while begin < end:
            piece, first = self._pieces[n], self._ends[n - 1] if n else 0
            last = min(end, self._ends[n])
            here = (begin - first, last - begin)
            found += piece[here[0] : here[0] + here[1]] if isinstance(piece, bytes) else piece.read_ranges([here])[0]
            begin, n = last, n + 1
        return found
