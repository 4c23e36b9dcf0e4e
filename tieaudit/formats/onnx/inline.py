"""Write a model whose large raw_data fields are tokens, with the bytes that the tokens stand for.

The counterpart of `wire.skeleton`: only messages that hold a token are taken apart, everything else is copied as it
is, and the bytes go from file to file in blocks.
"""

from __future__ import annotations

from collections.abc import Callable

from tieaudit.copying import NewFile
from tieaudit.formats.onnx.transposed import append
from tieaudit.formats.onnx.wire import _BYTES, _NESTED, _RAW_DATA, Malformed, _encode
from tieaudit.storage import Storage

N_MOST_BYTES = 2**31 - 2**20
"""What fits into one protobuf message (2 GiB), with a margin."""

Pieces = list[bytes | Storage]


def expanded(data: bytes, token: bytes, stored: Callable[[bytes], Storage | None]) -> tuple[Pieces, int]:
    """(pieces to write one after another, their length in bytes) of a serialized ModelProto.

    `stored` gives what a raw_data that starts with `token` stands for. Cost: linear in the messages that hold tokens.
    """
    return _message(data, "Model", 0, len(data), token, stored)


def write_pieces(pieces: Pieces, file: NewFile) -> None:
    """Write bytes and storages in order, ranges of files by the kernel where it can."""
    for piece in pieces:
        if isinstance(piece, bytes):
            file.write(piece)
        else:
            append(file, piece)


def _message(
    data: bytes, kind: str, begin: int, end: int, token: bytes, stored: Callable[[bytes], Storage | None]
) -> tuple[Pieces, int]:
    pieces: Pieces = []
    n_bytes = 0
    copied = at = begin
    following = data.find(token, begin, end)
    while following >= 0 and at < end:
        tag, behind_tag = _varint(data, at)
        if tag & 7 != _BYTES:
            at = _skip(data, tag & 7, behind_tag)
            continue
        length, value = _varint(data, behind_tag)
        behind = value + length
        if following < behind:
            inner = _field(data, kind, tag >> 3, value, behind, token, stored)
            if inner is not None:
                head = data[copied:at] + _encode(tag) + _encode(inner[1])
                pieces += [head, *inner[0]]
                n_bytes += len(head) + inner[1]
                copied = behind
            following = data.find(token, behind, end)
        at = behind
    if copied < end:
        pieces.append(data[copied:end])
        n_bytes += end - copied
    return pieces, n_bytes


def _field(
    data: bytes, kind: str, number: int, begin: int, end: int, token: bytes, stored: Callable[[bytes], Storage | None]
) -> tuple[Pieces, int] | None:
    """A length-delimited field that contains the token's bytes, or None if they mean nothing there."""
    if kind == "Tensor" and number == _RAW_DATA:
        storage = stored(data[begin:end])
        return ([storage], storage.n_bytes) if storage is not None else None
    if number not in _NESTED[kind]:
        return None
    return _message(data, _NESTED[kind][number], begin, end, token, stored)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _skip(data: bytes, wire_type: int, at: int) -> int:
    if wire_type == 0:
        return _varint(data, at)[1]
    width = {1: 8, 5: 4}.get(wire_type)
    if width is None:
        raise Malformed(f"wire type {wire_type}", at)
    return at + width
