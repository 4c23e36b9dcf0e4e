"""Serialized protobuf messages as trees of records, and changes to them that know what a record is.

A record is (field number, wire type, payload); a payload is a number, bytes, or the records of a nested message. What
is changed stays nearly right, so that a reader gets past its first check: one length lies, one field comes twice, one
message is split in two, one number is spelt with more bytes than it needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

VARINT, FIXED64, BYTES, START_GROUP, END_GROUP, FIXED32 = range(6)
# message → field → message type of that field; the same facts as onnx.proto, written down a second time on purpose
NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "Opset", 14: "Entry", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph", 3: "Entry", 4: "Entry"},
    "Graph": {1: "Node", 5: "Tensor", 11: "Info", 12: "Info", 13: "Info", 14: "Annotation", 15: "Sparse", 16: "Entry"},
    "Function": {7: "Node", 9: "Opset", 11: "Attribute", 12: "Info", 14: "Entry"},
    "Node": {5: "Attribute", 9: "Entry"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        14: "Type",
        15: "Type",
        22: "Sparse",
        23: "Sparse",
    },
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {3: "Segment", 13: "Entry", 16: "Entry"},
    "Info": {2: "Type", 4: "Entry"},
    "Type": {1: "TypeTensor", 4: "TypeSequence", 5: "TypeMap", 8: "TypeTensor", 9: "TypeSequence"},
    "TypeTensor": {2: "Shape"},
    "TypeSequence": {1: "Type"},
    "TypeMap": {2: "Type"},
    "Shape": {1: "Dimension"},
    "Annotation": {2: "Entry"},
}
WORDS = (
    *(b"", b"y", b"w", b"x", b"..", b"/etc/passwd", b"../m.data", b"m.data", b"./m.data", b"a/../m.data", b"location"),
    *(
        b"Identity",
        b"Transpose",
        b"Cast",
        b"Reshape",
        b"Constant",
        b"If",
        b"Loop",
        b"Gather",
        b"MatMul",
        b"Gemm",
        b"Add",
    ),
    *(b"com.microsoft", b"ai.onnx", b"offset", b"length", b"0", b"18446744073709551616", b"-1", b"\xff\xfe", b"a\x00b"),
    *(b"value", b"sparse_value", b"perm", b"axes", b"to", b"axis", b"transB", b"FusedMatMul", b"DequantizeLinear"),
)
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 22, 100, 127, 128, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass
class Record:
    """One field of a message."""

    number: int
    wire: int
    value: int | bytes | list[Record]
    kind: str = ""
    """Type of the nested message, or ''."""
    n_extra: int = 0
    """Bytes by which the announced length differs from the true one."""
    overlong: int = 0
    """Bytes more than needed in which the tag is spelt."""


@dataclass
class Message:
    """A message and whatever could not be parsed behind its last whole record."""

    records: list[Record] = field(default_factory=list)
    rest: bytes = b""


def encode(value: int, overlong: int = 0) -> bytes:
    """A base-128 number, spelt with `overlong` bytes more than it needs."""
    out = bytearray()
    value &= 2**64 - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(overlong):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def decode(data: bytes, at: int) -> tuple[int, int]:
    """(number, offset behind it). ValueError if it does not end."""
    value = shift = 0
    for index in range(at, min(at + 10, len(data))):
        value |= (data[index] & 0x7F) << shift
        shift += 7
        if data[index] < 0x80:
            return value, index + 1
    raise ValueError("a number without an end")


def parse(data: bytes, kind: str = "Model", depth: int = 0) -> Message:
    """The records of a message, nested ones too, as far as they can be read."""
    message, at = Message(), 0
    while at < len(data):
        try:
            tag, behind = decode(data, at)
            record, at = _record(data, tag, behind, kind, depth)
        except ValueError:
            message.rest = data[at:]
            break
        message.records.append(record)
    return message


def _record(data: bytes, tag: int, at: int, kind: str, depth: int) -> tuple[Record, int]:
    number, wire = tag >> 3, tag & 7
    if wire == VARINT:
        value, behind = decode(data, at)
        return Record(number, wire, value), behind
    if wire in (FIXED32, FIXED64):
        behind = at + (8 if wire == FIXED64 else 4)
        if behind > len(data):
            raise ValueError("no room")
        return Record(number, wire, data[at:behind]), behind
    if wire in (START_GROUP, END_GROUP):
        return Record(number, wire, b""), at
    if wire != BYTES:
        raise ValueError("no such wire type")
    length, begin = decode(data, at)
    if begin + length > len(data):
        raise ValueError("no room")
    payload, inner = data[begin : begin + length], NESTED.get(kind, {}).get(number, "")
    if inner and depth < 60:
        parsed = parse(payload, inner, depth + 1)
        if not parsed.rest:
            return Record(number, wire, parsed.records, inner), begin + length
    return Record(number, wire, payload), begin + length


def serialize(records: list[Record]) -> bytes:
    """The bytes of records, with whatever lies they tell."""
    pieces = []
    for record in records:
        pieces.append(encode(record.number << 3 | record.wire, record.overlong))
        value = record.value
        payload = value if isinstance(value, bytes) else serialize(value) if isinstance(value, list) else encode(value)
        if record.wire == BYTES:
            pieces.append(encode(len(payload) + record.n_extra))
        pieces.append(payload)
    return b"".join(pieces)


def boundaries(data: bytes, kind: str = "Model") -> list[int]:
    """Every offset at which a record, its length or its payload begins or ends, nested ones included."""
    found: set[int] = {0, len(data)}

    def visit(begin: int, end: int, kind: str) -> None:
        at = begin
        while at < end:
            found.add(at)
            tag, behind = decode(data, at)
            found.add(behind)
            if tag & 7 == VARINT:
                at = decode(data, behind)[1]
            elif tag & 7 == BYTES:
                length, value = decode(data, behind)
                found.update((value, value + length))
                if inner := NESTED.get(kind, {}).get(tag >> 3):
                    visit(value, value + length, inner)
                at = value + length
            else:
                at = behind + (8 if tag & 7 == FIXED64 else 4)

    visit(0, len(data), kind)
    return sorted(found)


def _messages(records: list[Record], kind: str) -> Iterator[tuple[list[Record], str]]:
    yield records, kind
    for record in records:
        if isinstance(record.value, list):
            yield from _messages(record.value, record.kind)


def mutated(data: bytes, rng: random.Random, n_most: int) -> bytes:
    """`data` with one to four changes; at most `n_most` bytes where that can be had by cutting."""
    top = parse(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        places = list(_messages(top.records, "Model"))
        # any message is as likely as any other, or the top ones would hardly ever be met in a large graph
        records, kind = rng.choice(places)
        rng.choice(CHANGES)(records, kind, rng, places)
    rest = top.rest if rng.random() < 0.9 else b""
    return (serialize(top.records) + rest)[:n_most]


Places = list[tuple[list[Record], str]]
Change = Callable[[list[Record], str, random.Random, Places], None]


def _delete(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    if records:
        del records[rng.randrange(len(records))]


def _again(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    if records:
        records.insert(rng.randrange(len(records) + 1), _copy(rng.choice(records)))


def _shuffle(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    rng.shuffle(records)


def _transplant(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """A copy of a record out of another message, mostly one of the same kind."""
    same = [other for other, its_kind in places if its_kind == kind and other]
    source = rng.choice(same) if same and rng.random() < 0.8 else rng.choice(places)[0]
    if source:
        records.insert(rng.randrange(len(records) + 1), _copy(rng.choice(source)))


def _renumber(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    if records:
        rng.choice(records).number = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 25, 99, 2**29 - 1))


def _rewire(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """Another wire type, with a payload that fits it or not."""
    if records:
        record = rng.choice(records)
        record.wire = rng.randrange(8)
        if record.wire in (START_GROUP, END_GROUP):
            record.value = b""
        elif record.wire in (FIXED32, FIXED64) and rng.random() < 0.8:
            record.value = rng.randbytes(8 if record.wire == FIXED64 else 4)
        elif record.wire == VARINT and rng.random() < 0.8:
            record.value = rng.choice(NUMBERS)


def _renumber_value(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    numbers = [record for record in records if isinstance(record.value, int)]
    if numbers:
        record = rng.choice(numbers)
        assert isinstance(record.value, int)  # chosen so
        record.value = rng.choice((*NUMBERS, record.value + 1, record.value - 1, -1))


def _reword(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """Another text: a word of the format, a name that occurs elsewhere, or something odd."""
    texts = [record for record in records if isinstance(record.value, bytes) and record.wire == BYTES]
    if texts:
        names = [r.value for other, _ in places for r in other if isinstance(r.value, bytes) and len(r.value) < 40]
        odd = (b"\x1b[2J", "\u202e".encode(), b"a\nb", b"n" * 300)
        rng.choice(texts).value = rng.choice((rng.choice(WORDS), rng.choice(names or [b""]), rng.choice(odd)))


def _lie(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    if records:
        rng.choice(records).n_extra = rng.choice((-2, -1, 1, 2, 3, 127, 128, 2**31, 2**62, -(2**62)))


def _spell_long(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    if records:
        rng.choice(records).overlong = rng.choice((1, 2, 4, 8, 9, 12))


def _split(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """One nested message as two records of the same field, which a reader merges."""
    nested = [index for index, record in enumerate(records) if isinstance(record.value, list) and record.value]
    if nested:
        index = rng.choice(nested)
        record = records[index]
        assert isinstance(record.value, list)  # chosen so
        at = rng.randrange(len(record.value) + 1)
        second = Record(record.number, BYTES, record.value[at:], record.kind)
        record.value = record.value[:at]
        records.insert(rng.randrange(index + 1, len(records) + 1), second)


def _repack(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """A packed field as single ones, or a single number as a packed field of one."""
    if records:
        index = rng.randrange(len(records))
        record = records[index]
        if isinstance(record.value, int):
            records[index] = Record(record.number, BYTES, encode(record.value))
        elif isinstance(record.value, bytes) and record.wire == BYTES and len(record.value) % 4 == 0:
            wide = rng.choice((4, 8)) if len(record.value) % 8 == 0 else 4
            wire = FIXED64 if wide == 8 else FIXED32
            pieces = [record.value[at : at + wide] for at in range(0, len(record.value), wide)]
            records[index : index + 1] = [Record(record.number, wire, piece) for piece in pieces[:64]]


def _unknown(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    made = Record(rng.choice((17, 50, 1000, 2**29 - 1)), BYTES, rng.randbytes(rng.randrange(40)))
    records.insert(rng.randrange(len(records) + 1), made)


def _group(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    number = rng.choice((5, 9, 30))
    at = rng.randrange(len(records) + 1)
    records.insert(at, Record(number, START_GROUP, b""))
    if rng.random() < 0.8:
        records.insert(rng.randrange(at + 1, len(records) + 1), Record(number, END_GROUP, b""))


def _resize(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """Longer or shorter bytes."""
    leaves = [record for record in records if isinstance(record.value, bytes) and record.wire == BYTES]
    if leaves:
        record = rng.choice(leaves)
        assert isinstance(record.value, bytes)  # chosen so
        n_bytes = rng.choice((0, 1, len(record.value) // 2, len(record.value) + 1, 64, 1023, 1024, 1025, 2048))
        record.value = (record.value + bytes(n_bytes))[:n_bytes]


def _nest(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """The graph as the body of a node of itself, several times over."""
    if kind == "Graph":
        for _ in range(rng.choice((1, 2, 5, 33, 40))):
            attribute = [
                Record(1, BYTES, b"then_branch"),
                Record(20, VARINT, 5),
                Record(6, BYTES, list(records), "Graph"),
            ]
            node = [Record(1, BYTES, b"c"), Record(2, BYTES, b"y"), Record(4, BYTES, b"If")]
            node.append(Record(5, BYTES, attribute, "Attribute"))
            records[:] = [Record(1, BYTES, node, "Node")]


def _connect(records: list[Record], kind: str, rng: random.Random, places: Places) -> None:
    """A node that reads what another one makes, or itself: cycles, shared names, shadowing."""
    if kind == "Node":
        names = [
            r.value
            for other, its in places
            if its in ("Node", "Tensor", "Info")
            for r in other
            if r.number in (1, 2, 8)
        ]
        leaves = [name for name in names if isinstance(name, bytes) and len(name) < 100]
        if leaves:
            records.append(Record(rng.choice((1, 1, 2)), BYTES, rng.choice(leaves)))


CHANGES: tuple[Change, ...] = (
    *(_delete, _again, _shuffle, _transplant, _renumber, _rewire, _renumber_value, _reword, _reword, _lie, _spell_long),
    *(_split, _repack, _unknown, _group, _resize, _nest, _connect, _connect, _transplant),
)


def _copy(record: Record) -> Record:
    value = [_copy(inner) for inner in record.value] if isinstance(record.value, list) else record.value
    return Record(record.number, record.wire, value, record.kind, record.n_extra, record.overlong)
