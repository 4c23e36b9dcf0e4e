"""Read an ONNX file without its tensors: large `raw_data` fields are left in the file and remembered by offset.

A protobuf message is a sequence of (tag, value) records; a nested message is a record whose value is its length and
its bytes. The walk copies every record as it is, except that a large `TensorProto.raw_data` is replaced by a short
token; what comes out is a valid, small ModelProto for the library to parse. So a model of 2 GB costs a few seeks,
and the tensors are located exactly, wherever they are (initializers, Constant nodes, subgraphs, functions).

It judges nothing: whatever is not well-formed raises `Malformed`, and the caller lets the library say what is wrong.

Source of the encoding: protobuf.dev/programming-guides/encoding; field numbers: onnx.proto (IR version 13).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

N_BYTES_INLINE = 1024
"""Messages and raw_data shorter than this are copied whole: a seek would cost more than the bytes."""
_FIRST_WINDOW_BYTES, _WINDOW_BYTES = 1 << 9, 1 << 16
_MAX_DEPTH = 400  # messages; the library itself refuses more than 100

_MOST_LENGTH_BYTES = 5  # 35 bits; protobuf itself reads no more of a length

_VARINT, _FIXED64, _BYTES, _START_GROUP, _END_GROUP, _FIXED32 = range(6)

# message → field number → message type of that field, as far as tensors can be below it
_NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function", 20: "Training"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_RAW_DATA = 9


class Malformed(Exception):
    """Not a well-formed sequence of records; never leaves this package."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} at byte {offset}")


@dataclass(frozen=True)
class Skeleton:
    """A serialized ModelProto whose large raw_data fields are tokens."""

    data: bytes
    token: bytes
    """Random prefix of every token; no file can contain it on purpose."""
    places: tuple[tuple[int, int], ...]
    """(offset, length) of each left-out raw_data, in the order of the tokens' numbers."""

    def place(self, raw: bytes) -> tuple[int, int] | None:
        """Where the bytes behind a token are, or None if `raw` is not a token but data."""
        if len(raw) != len(self.token) + 8 or not raw.startswith(self.token):
            return None
        return self.places[int.from_bytes(raw[len(self.token) :], "little")]


def skeleton(file: BinaryIO, n_bytes: int) -> Skeleton:
    """The model in `file` (`n_bytes` long) without its large raw_data.

    Raises `Malformed` where a record does not end inside its message.
    Cost: time linear in the messages of 1 KiB and more; memory: the file less its large tensors.
    """
    walk = _Walk(file, n_bytes)
    data = b"".join(walk.message("Model", 0, n_bytes, 0))
    return Skeleton(data, walk.token, tuple(walk.places))


class _Walk:
    def __init__(self, file: BinaryIO, n_bytes: int) -> None:
        self.file = file
        self.n_bytes = n_bytes
        self.token = os.urandom(24)
        self.places: list[tuple[int, int]] = []
        self._begin = 0
        self._window = b""
        self._ahead = _FIRST_WINDOW_BYTES

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file, through a window that headers share."""
        if begin < self._begin or end > self._begin + len(self._window):
            # behind a tensor that was left out, little is needed: its neighbour's name; in a graph, all that follows
            is_next = 0 <= begin - self._begin <= len(self._window)
            self._ahead = min(self._ahead * 2, _WINDOW_BYTES) if is_next else _FIRST_WINDOW_BYTES
            self.file.seek(begin)
            self._window = self.file.read(max(end - begin, min(self._ahead, self.n_bytes - begin)))
            self._begin = begin
            if len(self._window) < end - begin:
                raise Malformed("the file ends", begin + len(self._window))
            if end - begin > _WINDOW_BYTES:  # do not keep a large copy alive
                data, self._window = self._window, b""
                return data
        return self._window[begin - self._begin : end - self._begin]

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, offset behind it) of a base-128 number, at most ten bytes."""
        here = at - self._begin
        if 0 <= here < len(self._window) and at < end and self._window[here] < 0x80:  # most numbers are small
            return self._window[here], at + 1
        value = 0
        head = self.read(at, min(at + 10, end))
        for index, byte in enumerate(head):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at + index + 1
        raise Malformed("a number does not end", at)

    def message(self, kind: str, begin: int, end: int, depth: int) -> list[bytes]:
        """The pieces of one message with large raw_data replaced."""
        if depth > _MAX_DEPTH:
            raise Malformed("messages are nested too deeply", begin)
        if end - begin < N_BYTES_INLINE:
            return [self.read(begin, end)]
        nested = _NESTED[kind]
        pieces: list[bytes] = []
        copied = at = begin  # records from `copied` to `at` are not in `pieces` yet
        while at < end:
            tag, behind_tag = self.varint(at, end)
            if tag & 7 != _BYTES:
                at = self._skip(tag & 7, behind_tag, end)
                continue
            length, value = self.varint(behind_tag, end)
            behind = value + length
            if value - behind_tag > _MOST_LENGTH_BYTES:  # what is spelt again below, the library would have refused
                raise Malformed("a length is spelt with too many bytes", behind_tag)
            if behind > end:
                raise Malformed(f"a record of {length} bytes does not fit into its message", at)
            if length >= N_BYTES_INLINE:
                inner = None
                if kind == "Tensor" and tag >> 3 == _RAW_DATA:
                    inner = [self.token + len(self.places).to_bytes(8, "little")]
                    self.places.append((value, length))
                elif tag >> 3 in nested:
                    inner = self.message(nested[tag >> 3], value, behind, depth + 1)
                if inner is not None:
                    pieces.append(self.read(copied, behind_tag))  # the tag as it is: the library judges it
                    pieces.append(_encode(sum(map(len, inner))))
                    pieces.extend(inner)
                    copied = behind
            at = behind
        if copied < end:
            pieces.append(self.read(copied, end))
        return pieces if len(pieces) < 2 else [b"".join(pieces)]

    def _skip(self, wire_type: int, at: int, end: int) -> int:
        if wire_type == _VARINT:
            return self.varint(at, end)[1]
        width = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
        if width is None:  # groups are not used by ONNX
            raise Malformed(f"wire type {wire_type}", at)
        if at + width > end:
            raise Malformed("a fixed-width number does not fit into its message", at)
        return at + width


def _encode(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def packed_field(message: bytes, number: int) -> bytes:
    """All payload bytes of one repeated fixed-width field of a serialized message, packed or not, in order.

    Used for `float_data` and `double_data`: going through Python floats would quieten signalling NaNs.
    Raises `Malformed`. Cost: one pass.
    """
    import io

    walk = _Walk(io.BytesIO(message), len(message))
    end, at, found = len(message), 0, []
    while at < end:
        tag, behind = walk.varint(at, end)
        if tag & 7 == _BYTES:
            length, value = walk.varint(behind, end)
            at = value + length
            if at > end:
                raise Malformed("a record does not fit into its message", behind)
        else:
            value, at = behind, walk._skip(tag & 7, behind, end)
        if tag >> 3 == number:
            found.append(message[value:at])
    return b"".join(found)
