"""Files that claim what cannot be: sizes, depths, shapes, types, places. One line, exit 2, at once, no other file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from fuzz.guard import guarded
from fuzz.records import BYTES, Record, serialize
from tieaudit.cli import main
from tieaudit.formats.huggingface import asking


@pytest.fixture(autouse=True)
def _no_class_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "installed", lambda: False)


def scan(path: Path, home: Path) -> Result:
    """`scan` as a user runs it: its own exit, in time, nothing written, nothing read outside of `home`."""
    runner = CliRunner()
    runner.invoke(main, ["scan", str(Path(__file__).parent / "nothing")])  # what is imported late is imported now
    began = time.process_time()
    with guarded(home.resolve()):
        result = runner.invoke(main, ["scan", str(path)])
    assert time.process_time() - began < 5
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "a fault in tieaudit" not in result.output
    return result


def refused(path: Path, home: Path) -> str:
    """The one line with which a path is refused."""
    result = scan(path, home)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("error: ")
    assert len(line) < 2500
    return line


def onnx_file(path: Path, tensor: Any) -> Path:
    graph = helper.make_graph([helper.make_node("Neg", ["w"], ["y"])], "g", [], [], [tensor])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def external(path: Path, location: str | bytes) -> Path:
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="LOCATION")
    onnx_file(path, tensor)
    name = location if isinstance(location, bytes) else location.encode()
    data = path.read_bytes()
    if len(name) != 8:  # lengths of all that is around it change; let the library write them, then put the bytes in
        tensor.external_data[0].value = "L" * len(name)
        data = onnx_file(path, tensor).read_bytes()
    path.write_bytes(data.replace(b"LOCATION" if len(name) == 8 else b"L" * len(name), name))
    return path


OUTSIDE = {
    "up": "../secret",
    "up and down": "sub/../../secret",
    "absolute": "{other}/secret",
    "a linked file": "link",
    "a file in a linked folder": "linked/secret",
    "the folder above through a link": "linked/../secret",
    "a link to itself": "loop",
    "a link to nothing": "nowhere",
    "a Windows drive": "C:\\secret",
    "backslashes": "..\\secret",
    "a network path": "\\\\host\\secret",
    "two slashes": "//etc/passwd",
    "a zero byte": "a\0b",
    "no name": "",
    "this folder": ".",
    "the folder above": "..",
    "a folder": "sub",
    "a file below a file": "m.onnx/x",
    "a pipe": "pipe",
    "a device": "null",
    "a long name": "x" * 5000,
    "many steps": "a/" * 2000,
    "no UTF-8": b"\xff\xfe",
    "an escape code": "\x1b[2J\u202e\n",
    "a web address": "https://example.com/secret",
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_external_data_that_is_no_file_of_the_folder_is_refused_and_never_opened(tmp_path: Path, case: str) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home, other, home / "sub"):
        folder.mkdir()
    for secret in (tmp_path / "secret", other / "secret"):
        secret.write_bytes(bytes(16))
    (home / "link").symlink_to(other / "secret")
    (home / "linked").symlink_to(other)
    (home / "loop").symlink_to("loop")
    (home / "nowhere").symlink_to("none")
    (home / "null").symlink_to("/dev/zero")
    os.mkfifo(home / "pipe")
    location = OUTSIDE[case]
    if isinstance(location, str):
        location = location.replace("{other}", str(other))
    line = refused(external(home / "m.onnx", location), home)
    assert "tensor 'w'" in line
    assert "\x1b" not in line


def test_external_data_beside_the_model_is_read_however_it_is_spelt(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("data", "sub/data"):
        (tmp_path / name).write_bytes(bytes(16))
    (tmp_path / "link").symlink_to("sub/data")
    for location in ("data", "./data", "sub/../data", "sub//data", "link"):
        assert scan(external(tmp_path / "m.onnx", location), tmp_path).exit_code == 0, location


HUGE: dict[str, Callable[[Any], None]] = {
    "2^40 elements and no bytes": lambda tensor: tensor.dims.extend([2**40]),
    "2^124 elements": lambda tensor: tensor.dims.extend([2**62, 2**62]),
    "a negative size": lambda tensor: tensor.dims.extend([-(2**63)]),
    "an external file of 2^62 bytes": lambda tensor: (
        tensor.dims.extend([2**60]),
        setattr(tensor, "data_location", 1),
        tensor.external_data.add(key="location", value="m.onnx"),
        tensor.external_data.add(key="length", value=str(2**62)),
    ),
    "an offset of 2^63": lambda tensor: (
        tensor.dims.extend([1]),
        setattr(tensor, "data_location", 1),
        tensor.external_data.add(key="location", value="m.onnx"),
        tensor.external_data.add(key="offset", value=str(2**63)),
    ),
    "more digits than a number has": lambda tensor: (
        setattr(tensor, "data_location", 1),
        tensor.external_data.add(key="location", value="m.onnx"),
        tensor.external_data.add(key="offset", value="1" * 100_000),
    ),
    "2^40 strings": lambda tensor: (setattr(tensor, "data_type", 8), tensor.dims.extend([2**40])),
    "2^40 of four bits": lambda tensor: (setattr(tensor, "data_type", 22), tensor.dims.extend([2**40])),
}


@pytest.mark.parametrize("case", HUGE)
def test_an_onnx_tensor_that_claims_more_than_there_is_is_refused_at_once(tmp_path: Path, case: str) -> None:
    tensor = TensorProto(name="w", data_type=1)
    HUGE[case](tensor)
    assert "tensor 'w'" in refused(onnx_file(tmp_path / "m.onnx", tensor), tmp_path)


@pytest.mark.parametrize("dims", [[2**62, 0, 2**62], [0] * 64, [2**63 - 1, 2**63 - 1, 0]])
def test_an_onnx_tensor_without_elements_is_read_whatever_its_other_sizes(tmp_path: Path, dims: list[int]) -> None:
    path = onnx_file(tmp_path / "m.onnx", TensorProto(name="w", data_type=1, dims=dims))
    assert scan(path, tmp_path).exit_code == 0


def nested(depth: int, number: int, inner: bytes) -> bytes:
    """One field inside the other, built from the inside out: the lengths of 10,000 levels are 30 kB."""
    for _ in range(depth):
        inner = serialize([Record(number, BYTES, inner)])
    return inner


def _of_graphs(depth: int) -> bytes:
    body = b""
    for _ in range(depth):  # a graph holds a node (1), the node an attribute (5), the attribute a graph (6)
        body = nested(1, 1, nested(1, 5, nested(1, 6, body)))
    return nested(1, 7, body)


def _of_types(depth: int) -> bytes:
    kind = b""
    for _ in range(depth):  # a type holds a sequence (4), the sequence a type (1)
        kind = nested(1, 4, nested(1, 1, kind))
    return nested(1, 7, nested(1, 11, nested(1, 2, kind)))


DEEP = {
    "graphs in graphs": lambda: _of_graphs(10_000),
    "types in types": lambda: _of_types(10_000),
    "attributes of functions": lambda: nested(1, 25, nested(1, 7, nested(1, 5, _of_graphs(3000)))),
    "lengths in an unknown field": lambda: nested(1, 7, b"") + nested(20_000, 999, b"x"),
}


@pytest.mark.parametrize("case", DEEP)
def test_messages_nested_beyond_any_model_are_refused_without_a_recursion(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(DEEP[case]())
    if case == "lengths in an unknown field":  # bytes that nobody reads; the library reads it as well
        assert scan(path, tmp_path).exit_code in (0, 2)
    else:
        refused(path, tmp_path)


def header(content: bytes, told: int | None = None) -> bytes:
    return (len(content) if told is None else told).to_bytes(8, "little") + content


SAFETENSORS = {
    "2^62 bytes of header": header(b"{}", 2**62),
    "2^64 - 1 bytes of header": header(b"{}", 2**64 - 1),
    "100,000,001 bytes of header": header(b"{}", 100_000_001),
    "2^40 elements": header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
    "2^124 elements": header(
        b'{"a":{"dtype":"U8","shape":[4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}'
    ),
    "an overflow times nothing": header(
        b'{"a":{"dtype":"U8","shape":[9999999999999,9999999999999,0],"data_offsets":[0,0]}}'
    ),
    "a number of a million digits": header(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,0]}}'
    ),
    "lists in lists": header(b'{"__metadata__":{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}}"),
    "objects in objects": header(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "one name twice": header(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "one name in two spellings": header(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0061":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "a name that is no UTF-8": header(b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "a name that is half a character": header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "a byte order mark": header(b"\xef\xbb\xbf{}"),
    "NaN": header(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'),
    "a tensor called __metadata__": header(b'{"__metadata__":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "a long name": header(b'{"' + b"n" * 65536 + b'":1}'),
    "a name with escape codes": header(b'{"\\u001b[2J\\u202e\\n":1}'),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_safetensors_header_that_claims_the_impossible_is_refused_at_once(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[case])
    line = refused(path, tmp_path)
    assert "\x1b" not in line and "\u202e" not in line


def checkpoint(folder: Path) -> None:
    entry = b'{"transformer.wte.weight":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    (folder / "model.safetensors").write_bytes(header(entry) + b"ab")


CONFIGS = {
    "a list": b"[]",
    "a text": b'"gpt2"',
    "a number": b"1",
    "null": b"null",
    "nothing": b"",
    "no UTF-8": b'{"a":"\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "lists in lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects in objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of many digits": b'{"a":' + b"9" * 10_000 + b"}",
    "a trailing comma": b'{"a":1,}',
    "an HTML page": b"<html></html>",
    "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_the_wrong_shape_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(CONFIGS[case])
    assert "config.json" in refused(tmp_path, tmp_path)


def test_a_config_of_a_hundred_megabytes_is_refused_unread(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100_000_000)
    assert "found 100000000" in refused(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "value", [[], {}, [{}], 1, -1.5, None, True, "x", "\ud800", "x" * 10**6, {"a": {"b": []}}], ids=str
)
@pytest.mark.parametrize("key", ["model_type", "architectures", "tie_word_embeddings", "text_config", "auto_map"])
def test_any_value_under_any_key_of_a_config_is_read_or_refused(tmp_path: Path, key: str, value: object) -> None:
    checkpoint(tmp_path)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], key: value}
    for text in (json.dumps(config), json.dumps(config)[:-1] + ', "tie_word_embeddings": NaN, "model_type": "gpt2"}'):
        (tmp_path / "config.json").write_text(text)
        assert scan(tmp_path, tmp_path).exit_code in (0, 2)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "",
        ".",
        "..",
        "a\0b",
        "C:x",
        "a\\b",
        "pipe",
        "sub",
        "model.safetensors.index.json",
        "missing.safetensors",
        "x" * 5000,
        "\u202e\x1b[2J",
        *(None, 1, [], {}, True),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_index_that_points_to_no_shard_beside_it_is_refused(tmp_path: Path, name: object) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    os.mkfifo(home / "pipe")
    checkpoint(home / "sub")
    (tmp_path / "secret.safetensors").write_bytes((home / "sub" / "model.safetensors").read_bytes())
    index = home / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 10**30}, "weight_map": {"transformer.wte.weight": name}}))
    for config in (None, "{}"):  # as a bare checkpoint and as a folder of transformers
        if config is not None:
            (home / "config.json").write_text(config)
        line = refused(index, home)
        assert "model.safetensors.index.json" in line or "File name too long" in line


@pytest.mark.parametrize("weight_map", ["[]", '"a"', "1", "null", "{}", '{"a":"b","a":"c"}', "{" * 10**5])
def test_a_weight_map_of_the_wrong_kind_is_refused(tmp_path: Path, weight_map: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": ' + weight_map + "}")
    assert "index.json" in refused(index, tmp_path)
