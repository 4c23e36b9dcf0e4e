"""Reading ONNX files: where the bytes are, for every type and every way to store them; and what is refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from formats.onnx_files import graph, info, read, rows, save, stored, tensor
from onnx import TensorProto, helper, numpy_helper

from tieaudit.dtypes import TABLE, dtype
from tieaudit.errors import CorruptFile, UnreadableModel, WeightsNotHere
from tieaudit.formats.onnx.tensors import DTYPES
from tieaudit.storage import FileStorage, MemoryStorage


def _one(path: Path, made: TensorProto) -> Path:
    return save(path, graph([helper.make_node("Identity", [made.name], ["y"])], [made]))


def test_every_element_type_of_the_library_has_a_canonical_name() -> None:
    known = {number for name, number in TensorProto.DataType.items() if name != "UNDEFINED"}
    assert set(DTYPES) == known
    assert all(name in TABLE for name in DTYPES.values())


@pytest.mark.parametrize("number", [n for n, name in DTYPES.items() if TABLE[name].family != "string"])
@pytest.mark.parametrize("raw", [True, False])
def test_raw_and_typed_fields_give_the_same_bytes(tmp_path: Path, number: int, raw: bool) -> None:
    kind = dtype(DTYPES[number])
    values = np.array([0, 1, 1, 0, 1]).astype(kind.numpy())
    made = helper.make_tensor("w", number, [5], values)
    if raw:
        made = numpy_helper.from_array(numpy_helper.to_array(made), "w")
        assert made.data_type == number
        assert made.HasField("raw_data")
    else:
        made = helper.make_tensor("w", number, [5], values.tolist() if kind.name != "bool" else [0, 1, 1, 0, 1])
    (weight,) = read(_one(tmp_path / "m.onnx", made)).weights
    assert (weight.dtype, weight.shape) == (kind.name, (5,))
    # what the library packs, whichever field it is in: five int4 are 3 bytes (not 5), five float6 are 4
    expected = numpy_helper.from_array(numpy_helper.to_array(made)).raw_data
    assert stored(weight) == expected
    assert weight.n_bytes == kind.n_bytes(5)


def test_nan_payloads_in_float_data_survive(tmp_path: Path) -> None:
    bits = np.array([0x7F800001, 0x7FC00001, 0x80000000, 0xFFFFFFFF], "<u4")  # signalling, quiet, -0.0, all ones
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    # a packed float_data field (number 4, wire type 2) by hand: through Python floats the first becomes 0x7FC00001
    made.MergeFromString(b"\x22\x10" + bits.tobytes())
    (weight,) = read(_one(tmp_path / "m.onnx", made)).weights
    assert stored(weight) == bits.tobytes()


def test_strings_are_their_lengths_and_their_bytes(tmp_path: Path) -> None:
    made = helper.make_tensor("w", TensorProto.STRING, [2], [b"ab", b""])
    (weight,) = read(_one(tmp_path / "m.onnx", made)).weights
    # not just b"ab": ["ab", ""] and ["a", "b"] are different tensors
    assert stored(weight) == b"\2\0\0\0\0\0\0\0ab" + bytes(8)
    assert weight.parameter is False


@pytest.mark.parametrize("n_padding", [0, 500])
def test_the_unused_half_of_the_last_byte_is_zero(tmp_path: Path, n_padding: int) -> None:
    n_elements = 3 + 8 * n_padding  # inline in memory, and left in the file
    data = b"\x21" * ((n_elements + 1) // 2 - 1) + b"\xf3"
    made = helper.make_tensor("w", TensorProto.INT4, [n_elements], data, raw=True)
    (weight,) = read(_one(tmp_path / "m.onnx", made)).weights
    assert stored(weight)[-1] == 0x03
    assert isinstance(weight.storage, MemoryStorage)


def test_a_large_inline_tensor_stays_in_the_file(tmp_path: Path) -> None:
    made = rows("w", 40, 30)
    path = _one(tmp_path / "m.onnx", made)
    (weight,) = read(path).weights
    assert isinstance(weight.storage, FileStorage)
    assert path.read_bytes()[weight.storage.offset :][:4800] == made.raw_data
    assert stored(weight) == made.raw_data


def test_zero_sized_tensors_and_scalars_are_weights(tmp_path: Path) -> None:
    made = [tensor("empty", np.zeros((0, 4))), tensor("scalar", 2.5)]
    nodes = [helper.make_node("Add", ["empty", "scalar"], ["y"])]
    model = read(save(tmp_path / "m.onnx", graph(nodes, made)))
    assert [(weight.shape, weight.n_bytes) for weight in model.weights] == [((0, 4), 0), ((), 4)]


def _external(folder: Path, name: str = "w.bin", **changes: str) -> Path:
    made = rows("w", 4, 8)
    (folder / "w.bin").write_bytes(b"head" + made.raw_data)
    entries = {"location": name, "offset": "4", "length": "128"} | changes
    external = TensorProto(name="w", data_type=1, dims=[4, 8], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        if value != "-":
            external.external_data.add(key=key, value=value)
    return _one(folder / "m.onnx", external)


def test_external_data_is_a_range_of_its_file(tmp_path: Path) -> None:
    path = _external(tmp_path)
    model = read(path)
    assert model.weights[0].storage == FileStorage(str((tmp_path / "w.bin").resolve()), 4, 128)
    assert stored(model.weights[0]) == rows("w", 4, 8).raw_data
    assert model.parts[0].paths == (str(path), str((tmp_path / "w.bin").resolve()))
    assert model.metadata["external_data"] == "w.bin"


def test_an_absent_length_means_what_the_shape_says(tmp_path: Path) -> None:
    path = _external(tmp_path, length="-")
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes() + b"more of another tensor")
    assert read(path).weights[0].n_bytes == 128  # not 150: the rest of the file is somebody else's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "missing.bin"}, "found no such file"),
        ({"name": "/etc/passwd"}, "found the absolute path '/etc/passwd'"),
        ({"name": "../w.bin"}, "inside the model's folder, found '../w.bin'"),
        ({"name": "link.bin"}, "inside the model's folder, found 'link.bin'"),
        ({"name": ""}, "found the location ''"),
        ({"name": "a\0b"}, "found the location"),
        ({"name": "x" * 5000}, "inside the model's folder, found"),
        ({"length": "127"}, "expected 128 bytes for float32 [4, 8], found length = 127 at byte 4 of w.bin"),
        ({"offset": "5"}, "expected 128 bytes at byte 5 of w.bin, which has only 132 bytes"),
        ({"offset": "-4"}, "found '-4'"),
        ({"offset": "٤"}, "found '٤'"),  # a digit to str.isdigit(), not to any runtime
        ({"offset": "9" * 50}, "found '999"),
    ],
)
def test_bad_external_data_is_refused_with_its_place(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(bytes(200))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(outside)
    path = _external(folder, **changes)
    with pytest.raises(CorruptFile) as error:
        read(path)
    assert message in str(error.value)
    assert "tensor 'w'" in str(error.value) and "m.onnx" in str(error.value)


def test_a_git_lfs_pointer_as_data_file_is_called_so(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "w.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 132\n")
    with pytest.raises(WeightsNotHere, match=r"found a git-LFS pointer to 132 bytes \(run `git lfs pull`\)"):
        read(path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (TensorProto(name="w", data_type=1, dims=[3], raw_data=bytes(8)), "expected 12 bytes of raw data .* found 8"),
        (TensorProto(name="w", data_type=1, dims=[700], raw_data=bytes(2000)), "found 2000 at byte"),
        (TensorProto(name="w", data_type=1, dims=[3], float_data=[1, 2]), "expected 3 elements .* found 2"),
        (TensorProto(name="w", data_type=8, dims=[3], string_data=[b"a"]), "expected 3 strings, found 1"),
        (TensorProto(name="w", data_type=1, dims=[-3], raw_data=bytes(12)), r"found the shape \[-3\]"),
        (TensorProto(name="w", data_type=99, dims=[3], raw_data=bytes(12)), "expected an element type .* found 99"),
        (TensorProto(name="w", data_type=1, dims=[2**40, 2**40]), "expected .* elements .* found 0"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(tmp_path: Path, made: TensorProto, message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        read(_one(tmp_path / "m.onnx", made))


def test_sparse_initializers_are_values_then_indices(tmp_path: Path) -> None:
    body = graph([helper.make_node("MatMul", ["x", "s"], ["y"])], inputs=["x"])
    body.sparse_initializer.add().CopyFrom(
        helper.make_sparse_tensor(tensor("s", [1.0, 2.0]), tensor("s_indices", [0, 5], np.int64), [2, 3])
    )
    (weight,) = read(save(tmp_path / "m.onnx", body)).weights
    assert (weight.name, weight.shape, weight.held_as) == ("s", (2, 3), "sparse_initializer")
    assert weight.n_bytes == 2 * 4 + 2 * 8  # not 24 dense bytes of other meaning: the lengths happen to agree
    assert stored(weight)[:8] == np.array([1, 2], np.float32).tobytes()
    assert weight.parameter is True


def test_initializers_that_a_caller_may_replace_or_that_are_returned_are_marked(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = read(save(tmp_path / "m.onnx", graph(nodes, [rows("w", 3, 3)], ["x", "w"], ["y", "w"])))
    (weight,) = model.weights
    assert weight.overridable and weight.graph_output
    assert [(use.op, use.node) for use in model.uses] == [("output", "@w"), ("MatMul", "y")]


def test_before_ir_version_4_an_initializer_among_the_inputs_is_no_choice_of_a_caller(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    for ir_version, overridable in ((3, False), (4, True)):
        path = save(tmp_path / f"{ir_version}.onnx", graph(nodes, [rows("w", 3, 3)], ["x", "w"], ["y"]))
        made = onnx.load(str(path))
        made.ir_version = ir_version
        onnx.save(made, str(path))
        (weight,) = read(path).weights
        assert weight.overridable is overridable


def test_constant_nodes_and_initializers_of_bodies_are_weights_with_their_scope(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=tensor("ignored", np.eye(2)))
    then = graph([constant, helper.make_node("MatMul", ["x", "c"], ["y"])])
    other = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [rows("w", 2, 2)])
    outer = helper.make_node("If", ["cond"], ["y"], name="choose", then_branch=then, else_branch=other)
    body = graph([outer], [rows("w", 2, 2)], ["x", info("cond", TensorProto.BOOL, 0)])
    model = read(save(tmp_path / "m.onnx", body))
    assert {weight.id: weight.held_as for weight in model.weights} == {
        "w": "initializer",
        "|choose.then_branch|c": "constant_node",
        "|choose.else_branch|w": "initializer",
    }
    assert "w" not in model.uses_of  # hidden by the w of the branch
    assert model.by_id["w"].parameter is None and model.by_id["w"].because == "not used by any node"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", "git-LFS pointer (12345 bytes"),
        (b"\n<!DOCTYPE html><html>404</html>", "found an HTML page"),
        (b"Not Found", "found text, beginning 'Not Found'"),
        (b"PK\x03\x04abc", "found a zip archive"),
        (b"\x08\x07\x12\x04", "truncated or is no protobuf message"),
        (b"\x08\x07", "found no graph in it (2 bytes)"),
        (b"\xff" * 5000, "truncated or is no protobuf message"),
    ],
)
def test_what_is_no_model_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptFile) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def _field(number: int, payload: bytes) -> bytes:
    """One length-delimited protobuf record; the library itself refuses to build what is nested too deeply."""
    size, length = len(payload), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + payload


@pytest.mark.parametrize(("depth", "is_read"), [(30, True), (60, False), (120, False)])
def test_too_deeply_nested_graphs_are_refused_and_thirty_levels_are_read(
    tmp_path: Path, depth: int, is_read: bool
) -> None:
    body = graph([helper.make_node("Identity", ["w"], ["y"])]).SerializeToString()
    for _ in range(depth):
        attribute = _field(1, b"then_branch") + b"\xa0\x01\x05" + _field(6, body)
        body = _field(1, _field(1, b"c") + _field(2, b"y") + _field(4, b"If") + _field(5, attribute))
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x08" + _field(7, body + _field(5, rows("w", 2, 2).SerializeToString())))
    if is_read:
        (use,) = read(path).uses
        assert use.scope.count("/") == depth - 1
    else:
        with pytest.raises(CorruptFile, match="nested more deeply"):
            read(path)


def test_damaged_files_are_refused_and_never_crash(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = [rows("w", 20, 30), tensor("shape", [2, -1], np.int64), helper.make_tensor("t", 16, [3], [1, 2, 3])]
    then = graph([helper.make_node("Transpose", ["w"], ["z"], perm=[1, 0]), helper.make_node("Relu", ["z"], ["y"])])
    nodes = [
        helper.make_node("If", ["c"], ["a"], then_branch=then, else_branch=then),
        helper.make_node("Reshape", ["w", "shape"], ["r"]),
        helper.make_node("Gemm", ["a", "r", "t"], ["y"], transB=1),
    ]
    path = save(tmp_path / "m.onnx", graph(nodes, made, [info("c", TensorProto.BOOL, 0)]))
    whole = path.read_bytes()
    n_refused = 0
    for _ in range(400):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 5)):
                data[rng.choice([rng.randrange(200), rng.randrange(len(data))]) % len(data)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            model = read(path)
        except UnreadableModel:
            n_refused += 1
            continue
        for use in model.uses:
            str(use.view), use.view.shape(model.by_id[use.weight].shape)
    assert n_refused > 50


def test_odd_names_keep_ids_apart_and_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    names = ["a|b", "a%7Cb", "ü\n", "/x/y"]
    nodes = [helper.make_node("Concat", names, ["y"], axis=0)]
    path = save(tmp_path / "m.onnx", graph(nodes, [rows(name, 2, 2) for name in names]))
    assert [weight.id for weight in read(path).weights] == ["a%7Cb", "a%257Cb", "ü\n", "/x/y"]
    path.write_bytes(path.read_bytes().replace("ü".encode(), b"\xff\xff"))
    with pytest.raises(CorruptFile, match="expected names in UTF-8"):
        read(path)


def test_the_corpus_is_read_without_a_crash_and_every_inline_byte_is_where_it_is_said_to_be(corpus: Path) -> None:
    n_read, refused = 0, []
    for path in sorted(corpus.rglob("*.onnx")):
        try:
            model = read(path)
        except CorruptFile as error:
            refused.append(str(error))
            continue
        n_read += 1
        raw = {}
        for item in onnx.load_model(str(path), load_external_data=False).graph.initializer:
            raw[item.name] = item
        for weight in model.weights:
            inline = raw.get(weight.name)
            if weight.scope == "" and inline is not None and inline.raw_data and dtype(weight.dtype).n_bits >= 8:
                assert stored(weight) == inline.raw_data, (path, weight.name)
        for use in model.uses:
            use.view.shape(model.by_id[use.weight].shape)
    assert n_read > 100
    # models of the corpus that are broken on purpose
    assert all("found no such file" in text or "etc/passwd" in text for text in refused), refused


def test_importing_the_format_loads_no_onnx_and_no_torch() -> None:
    code = (
        "import sys,  tieaudit.formats.onnx; "
        "print([name for name in ('onnx', 'google.protobuf', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "."},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_bfloat16_is_not_float16(tmp_path: Path) -> None:
    made = numpy_helper.from_array(np.array([1.5], ml_dtypes.bfloat16), "w")
    (weight,) = read(_one(tmp_path / "m.onnx", made)).weights
    assert (weight.dtype, stored(weight)) == ("bfloat16", b"\xc0\x3f")


def test_metadata_tells_what_a_report_needs(tmp_path: Path) -> None:
    metadata: Any = read(_one(tmp_path / "m.onnx", rows("w", 2, 2))).metadata
    assert metadata["opset"] == "ai.onnx 17, com.microsoft 1, mine 1"
    assert metadata["n_nodes"] == "1"
    assert "external_data" not in metadata
