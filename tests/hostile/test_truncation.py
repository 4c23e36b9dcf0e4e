"""Files cut, or told to be longer or shorter, at every place where their structure has a boundary."""

from __future__ import annotations

import json

import pytest

from fuzz import boxes, records, texts
from fuzz.seeds import folders, onnx_files, safetensors_files
from fuzz.targets import check_folder, check_onnx, check_safetensors
from tieaudit.formats.onnx import wire

pytest.importorskip("safetensors")
ONNX = list(onnx_files())
SAFETENSORS = list(safetensors_files())


def around(places: list[int], end: int) -> list[int]:
    """Each place and its neighbours."""
    return sorted({at + step for at in places for step in (-1, 0, 1) if 0 <= at + step <= end})


@pytest.mark.parametrize("n_bytes_inline", [24, 1024])
@pytest.mark.parametrize("index", range(len(ONNX)))
def test_an_onnx_file_cut_at_any_field_is_what_the_library_says_it_is(
    index: int, n_bytes_inline: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # check_onnx compares with the library: what it refuses is refused, and what it reads is the same model
    monkeypatch.setattr(wire, "N_BYTES_INLINE", n_bytes_inline)
    data = ONNX[index]
    places = around(records.boundaries(data), len(data))
    assert len(places) > 60
    for at in places:
        assert check_onnx(data[:at]) is None


@pytest.mark.parametrize("index", range(len(ONNX)))
def test_an_onnx_file_in_which_one_length_lies_is_what_the_library_says_it_is(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "N_BYTES_INLINE", 24)
    top = records.parse(ONNX[index])
    every, pending = [], list(top.records)
    while pending:
        record = pending.pop()
        every.append(record)
        pending.extend(record.value if isinstance(record.value, list) else ())
    told = [record for record in every if record.wire == records.BYTES]
    assert len(told) > 10
    for record in told:
        for lie in (-1, 1, 127, 2**31, 2**62):
            record.n_extra = lie
            assert check_onnx(records.serialize(top.records)) is None
        record.n_extra = 0
    for record in every:
        for record.overlong in (1, 4, 10):
            assert check_onnx(records.serialize(top.records)) is None
        record.overlong = 0
    assert records.serialize(top.records) == ONNX[index]


@pytest.mark.parametrize("index", range(len(SAFETENSORS)))
def test_a_safetensors_file_cut_at_any_token_or_tensor_is_what_the_library_says_it_is(index: int) -> None:
    data = SAFETENSORS[index]
    n_header = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + n_header], data[8 + n_header :]
    ends = [info["data_offsets"][1] for name, info in json.loads(header).items() if name != "__metadata__"]
    for at in around([0, 8, *(8 + n_header + end for end in ends)], len(data)):
        assert check_safetensors(data[:at]) is None
    for at in around(texts.boundaries(header), len(header)):
        for told in (at, n_header):  # with the length that belongs to the cut header, and with the old one
            assert check_safetensors(told.to_bytes(8, "little") + header[:at] + body) is None
    for told in around([n_header, n_header + len(body)], 2**64 - 1):
        assert check_safetensors(told.to_bytes(8, "little") + data[8:]) is None


def test_a_folder_whose_index_or_config_is_cut_at_any_token_is_read_or_refused() -> None:
    n_cut = 0
    for data in folders():
        box = boxes.unpack(data)
        for place, (kind, name, content) in enumerate(box):
            if name.endswith(".json"):
                for at in around(texts.boundaries(content), len(content)):
                    cut = [*box[:place], (kind, name, content[:at]), *box[place + 1 :]]
                    assert check_folder(boxes.pack(cut)) is None
                    n_cut += 1
    assert n_cut > 150
