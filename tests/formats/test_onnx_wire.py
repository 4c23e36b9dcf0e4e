"""The walk over the records of an ONNX file finds large tensors exactly, and gives up on anything malformed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from formats.onnx_files import graph, rows
from onnx import ModelProto, TensorProto, helper

from tieaudit.formats.onnx.wire import Malformed, Skeleton, packed_field, skeleton


def _walk(data: bytes) -> Skeleton:
    return skeleton(io.BytesIO(data), len(data))


def _restored(message: Any, found: Skeleton, data: bytes) -> None:
    """Put the bytes at the remembered places back where the tokens are."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for item in value if kind.is_repeated else [value]:
                _restored(item, found, data)
    if isinstance(message, TensorProto) and (place := found.place(message.raw_data)):
        message.raw_data = data[place[0] : place[0] + place[1]]


def _model() -> ModelProto:
    constant = helper.make_node("Constant", [], ["c"], value=rows("constant", 30, 30))
    then = graph([constant, helper.make_node("Add", ["c", "inner"], ["y"])], [rows("inner", 30, 30), rows("small", 2)])
    nodes = [helper.make_node("If", ["b"], ["y"], then_branch=then), helper.make_node("Relu", ["w"], ["r"])]
    functions = [helper.make_function("mine", "f", ["x"], ["c"], [constant], [helper.make_opsetid("", 17)])]
    return helper.make_model(graph(nodes, [rows("w", 40, 40)]), functions=functions)


def test_tensors_of_initializers_constants_bodies_and_functions_are_left_in_the_file() -> None:
    data = _model().SerializeToString()
    found = _walk(data)
    assert len(found.places) == 4  # w, inner, the constant twice; `small` is copied
    assert len(found.data) < len(data) - 4 * 3600 + 1000
    parsed = ModelProto.FromString(found.data)
    _restored(parsed, found, data)
    assert parsed == _model()


def test_the_file_is_read_at_its_headers_only(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph([], [rows("w", 1500, 1500)])).SerializeToString())
    n_read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal n_read
            data = super().read(-1 if size is None else size)
            n_read += len(data)
            return data

    with Counting(path) as file:
        skeleton(file, path.stat().st_size)
    assert n_read < 300_000  # of 9,000,000


def test_raw_data_that_looks_like_a_token_stays_data() -> None:
    found = _walk(_model().SerializeToString())
    assert found.place(bytes(len(found.token) + 8)) is None
    assert found.place(b"") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\x0b" + bytes(2000),  # a group
        lambda data: b"\x80" * 11 + data,  # a number of more than ten bytes
        lambda data: data + b"\x0d\x01",  # four bytes announced, one there
    ],
)
def test_records_that_do_not_fit_are_malformed(change: Any) -> None:
    with pytest.raises(Malformed, match="at byte"):
        _walk(change(_model().SerializeToString()))


def test_a_record_that_leaves_its_message_but_not_the_file_is_malformed() -> None:
    name = b"\x12\x90\x10" + bytes(2000)  # field 2 of the graph announces 2064 bytes, 2000 are left in it
    graph_record = b"\x3a\xd3\x0f" + name
    assert len(name) == 2003 == 0x53 + (0x0F << 7)
    with pytest.raises(Malformed, match="does not fit into its message at byte 3"):
        _walk(graph_record + b"\x12\xe8\x07" + bytes(1000))


def test_both_spellings_of_a_repeated_field_are_collected_in_order() -> None:
    packed, single = b"\x22\x08" + b"aaaabbbb", b"\x25" + b"cccc"
    assert packed_field(single + b"\x08\x07" + packed, 4) == b"ccccaaaabbbb"
    with pytest.raises(Malformed):
        packed_field(b"\x22\x09" + b"aaaabbbb", 4)
