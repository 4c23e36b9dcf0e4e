"""safetensors files: the header's rules, shards, the writer, and the reference library as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tieaudit.dtypes import TABLE
from tieaudit.errors import CorruptFile, UnreadableModel
from tieaudit.find import find
from tieaudit.formats.safetensors import safetensors
from tieaudit.formats.safetensors.header import MAX_HEADER_BYTES, TAGS, read_header
from tieaudit.formats.safetensors.sharded import read_checkpoint
from tieaudit.formats.safetensors.weights import by_convention
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.load import load_one, locate
from tieaudit.storage import MemoryStorage

GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def file_of(header: object, data: bytes = b"", n_header: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if n_header is None else n_header).to_bytes(8, "little") + text + data


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "no length": (b"1234567", "expected at least 8 bytes"),
    "length over the limit": (file_of(b"{}", n_header=MAX_HEADER_BYTES + 1), "at most 100000000 bytes"),
    "length over the file": (file_of(b"{}", n_header=3), "truncated"),
    "length of all ones": (b"\xff" * 8 + b"{}", "at most 100000000 bytes"),
    "no object": (file_of(b"[]"), "expected '{' at byte 8"),
    "leading space": (file_of(b" {}"), "expected '{' at byte 8"),
    "empty header": (file_of(b""), "expected '{' at byte 8"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "expected UTF-8, found b'\\xff' at byte 10"),
    "not JSON": (file_of(b'{"a": }'), "error at byte 14"),
    "trailing text": (file_of(b"{} x"), "Extra data"),
    "NaN": (file_of(b'{"a": NaN}'), "found NaN"),
    "nested deeply": (file_of(b'{"a":' * 30000 + b"1" + b"}" * 30000), "nested too deeply"),
    "nested in a field that nobody reads": (
        file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"z":' + b"[" * 130 + b"]" * 130 + b"}}", b"x"),
        "nested too deeply",
    ),
    "tensor twice": (file_of(b'{"a":1,"a":2}'), "found 'a' twice"),
    "field twice": (file_of(b'{"a":{"dtype":"U8","dtype":"I8"}}'), "found 'dtype' twice"),
    "lone surrogate": (file_of(b'{"\\ud800":1}'), "lone surrogate"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "expected text in __metadata__ under 'a'"),
    "metadata a list": (file_of({"__metadata__": []}), "found list"),
    "entry no object": (file_of({"a": [1]}), "tensor 'a'"),
    "unknown dtype": (file_of({"a": {**GOOD, "dtype": "F128"}}, b"xx"), "found 'F128'"),
    "no shape": (file_of({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"xx"), "found None"),
    "negative size": (file_of({"a": {**GOOD, "shape": [-2]}}, b"xx"), "non-negative integers"),
    "negative zero": (file_of(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"x"), "data_offsets"),
    "true is no size": (file_of({"a": {**GOOD, "shape": [True, 2]}}, b"xx"), "non-negative integers"),
    "fractional size": (file_of({"a": {**GOOD, "shape": [2.0]}}, b"xx"), "non-negative integers"),
    "shape overflows": (file_of({"a": {**GOOD, "shape": [2**33, 2**33, 0]}}, b"xx"), "overflows 64 bits"),
    "size overflows": (file_of({"a": {**GOOD, "dtype": "F64", "shape": [2**60]}}, b"xx"), "overflows 64 bits"),
    "three offsets": (file_of({"a": {**GOOD, "data_offsets": [0, 1, 2]}}, b"xx"), "expected data_offsets"),
    "end before begin": (file_of({"a": {**GOOD, "data_offsets": [2, 0]}}, b"xx"), "begin ≤ end"),
    "wrong size": (file_of({"a": {**GOOD, "shape": [3]}}, b"xx"), "expected 3 bytes"),
    "half a byte": (file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"xx"), "12 bits"),
    "past the end": (file_of({"a": GOOD}, b"x"), "truncated"),
    "bytes left over": (file_of({"a": GOOD}, b"xxx"), "found 1 more bytes"),
    "hole": (file_of({"a": {**GOOD, "data_offsets": [1, 3]}}, b"xxx"), "a hole after the header"),
    "overlap": (file_of({"a": GOOD, "b": {**GOOD, "data_offsets": [1, 3]}}, b"xxx"), "an overlap with tensor 'a'"),
    "one range for two names": (file_of({"a": GOOD, "b": GOOD}, b"xx"), "an overlap with tensor 'a'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_broken_file_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[case]
    assert reason in refused(tmp_path, content)


def test_git_lfs_pointer_says_that_the_weights_are_not_here(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(UnreadableModel, match=r"git-LFS pointer.*git lfs pull"):
        read_header(path)


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    content = file_of({"__metadata__": {"format": "pt"}, "a": GOOD, "b": {**GOOD, "data_offsets": [2, 4]}}, b"abcd")
    path = tmp_path / "model.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptFile):
            read_header(path)
    path.write_bytes(content)
    assert [entry.name for entry in read_header(path).entries] == ["a", "b"]


def accepted_here(path: Path) -> bool:
    try:
        read_header(path)
    except CorruptFile:
        return False
    return True


def accepted_by_the_library(content: bytes) -> bool:
    library = pytest.importorskip("safetensors")
    try:
        library.deserialize(content)
    except library.SafetensorError:
        return False
    return True


sizes = st.one_of(
    st.integers(0, 4), st.sampled_from([-1, 2**32, 2**63, 2**64 - 1, 2**64, 2**70, 1.0, "2", None, True, [1]])
)
tags = st.one_of(st.sampled_from([*TAGS, "F16", "U8"]), st.sampled_from(["f16", "C128", "", None, 3]))


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Mostly right headers: tensors one after the other, with now and then a field that is not."""
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=3, unique=True)):
        tag = draw(tags)
        shape = draw(st.lists(sizes, max_size=3))
        n_bytes = draw(st.integers(0, 3))
        if all(isinstance(size, int) and 0 <= size < 5 for size in shape) and isinstance(tag, str) and tag in TAGS:
            n_bytes = TABLE[TAGS[tag]].n_bits * int(np.prod(shape or [1])) // 8
        begin = offset + draw(st.sampled_from([0, 0, 0, 0, 1]))
        info: dict[str, Any] = {"dtype": tag, "shape": shape, "data_offsets": [begin, begin + n_bytes]}
        if draw(st.integers(0, 9)) == 0:
            info.pop(draw(st.sampled_from(sorted(info))))
        if draw(st.integers(0, 9)) == 0:
            info["extra"] = draw(st.sampled_from([None, 1, [], {"a": 1.5}]))
        header[name] = info
        offset = begin + n_bytes
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.sampled_from([None, {}, {"format": "pt"}, {"a": 1}, [], "x", {"a": None}, {"a": {}}])
        )
    return header, offset + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))


@settings(max_examples=400, deadline=None)
@given(headers(), st.booleans())
def test_accepts_exactly_what_the_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], int], ascii_only: bool
) -> None:
    header, n_data = drawn
    text = json.dumps(header, ensure_ascii=ascii_only).encode()
    content = file_of(text + b" " * (-len(text) % 8), b"\1" * max(n_data, 0))
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    assert accepted_here(path) == accepted_by_the_library(content)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_changed_byte_never_crashes_and_never_widens_what_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = file_of({"__metadata__": {"format": "pt"}, "a": GOOD, "b": {**GOOD, "data_offsets": [2, 4]}}, b"abcd")
    content = bytearray(good)
    content[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(bytes(content))
    if accepted_here(path):
        assert accepted_by_the_library(bytes(content))


@pytest.mark.parametrize("tag", sorted(TAGS))
def test_every_element_type_survives_being_written_and_read_by_both(tag: str, tmp_path: Path) -> None:
    name = TAGS[tag]
    data = bytes(range(TABLE[name].n_bytes(8)))
    path = tmp_path / "one.safetensors"
    write_safetensors([NewEntry("w", name, (2, 4), MemoryStorage(data, "w"))], {"format": "pt"}, path)
    (entry,) = read_header(path).entries
    assert (entry.name, entry.dtype, entry.shape) == ("w", name, (2, 4))
    assert entry.storage.read_ranges([(0, entry.storage.n_bytes)]) == [data]
    library = pytest.importorskip("safetensors")
    ((read_name, info),) = library.deserialize(path.read_bytes())
    assert (read_name, info["dtype"], list(info["shape"]), bytes(info["data"])) == ("w", tag, [2, 4], data)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"), st.binary(max_size=9), max_size=5
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)
def test_what_is_written_is_read_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, bytes], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("round") / "model.safetensors"
    entries = [NewEntry(name, "uint8", (len(data),), MemoryStorage(data, name)) for name, data in tensors.items()]
    write_safetensors(entries, metadata, path)
    header = read_header(path)
    assert [entry.name for entry in header.entries] == list(tensors)
    assert header.metadata == metadata
    assert [entry.storage.read_ranges([(0, entry.storage.n_bytes)])[0] for entry in header.entries] == [
        *tensors.values()
    ]
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def write(path: Path, metadata: dict[str, str] | None = None, **tensors: list[float]) -> None:
    entries = []
    for name, values in tensors.items():
        data = np.array(values, "<f4").tobytes()
        entries.append(NewEntry(name.replace("__", "."), "float32", (len(values),), MemoryStorage(data, name)))
    write_safetensors(entries, metadata or {}, path)


def sharded(folder: Path, **weight_map: str) -> Path:
    write(folder / "a.safetensors", one=[1.0], two=[2.0])
    write(folder / "b.safetensors", three=[3.0])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    return index


def test_shards_are_one_model_and_a_shard_means_its_index(tmp_path: Path) -> None:
    index = sharded(tmp_path, one="a.safetensors", two="a.safetensors", three="b.safetensors")
    shards = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for named in ([index], [shards[1]], [*shards, index]):
        assert safetensors.group(named) == [(index, (index, *shards))]
    model = safetensors.load(index, ())
    assert [weight.name for weight in model.weights] == ["one", "two", "three"]
    regions = [weight.storage.region for weight in model.weights if weight.storage]
    assert [Path(container).name for container, _, _ in regions] == ["a.safetensors", "a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"one": "a.safetensors", "three": "b.safetensors"}, "'two' missing"),
        ({"one": "a.safetensors", "two": "b.safetensors", "three": "b.safetensors"}, "found it in a.safetensors"),
        (
            {"one": "a.safetensors", "two": "a.safetensors", "four": "a.safetensors"},
            "'four' in a.safetensors, found no",
        ),
        ({"one": "c.safetensors"}, "expected the shard c.safetensors"),
        ({"one": "../a.safetensors"}, "expected the plain name"),
        ({"one": "/etc/passwd"}, "expected the plain name"),
        ({"one": 3}, "expected the plain name"),
        ({}, "expected an object weight_map"),
    ],
)
def test_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, weight_map: Any, reason: str) -> None:
    index = sharded(tmp_path, **weight_map)
    with pytest.raises(CorruptFile, match=reason):
        read_checkpoint(index)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path, one="a.safetensors", two="a.safetensors", three="b.safetensors")
    (tmp_path / "b.safetensors").unlink()
    write(tmp_path / "b.safetensors", three=[3.0], one=[1.0])
    with pytest.raises(CorruptFile, match=r"'one' in one shard, found it in a.safetensors and b.safetensors"):
        read_checkpoint(index)


def test_alias_map_documents_a_tie_that_nothing_restores(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"format": "pt", "head": "embed"}, embed=[1.0, 2.0])
    model = safetensors.load(path, ())
    assert model.by_id["head"].absent
    assert model.by_id["head"].shape == (2,)
    (declaration,) = model.declarations
    assert declaration.members == ("embed", "head")
    assert (declaration.active, declaration.restores) == (True, False)
    assert declaration.claimed_by == "model.safetensors __metadata__"


def test_metadata_that_names_no_tensor_is_no_alias_map(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"format": "pt", "author": "nobody"}, embed=[1.0])
    model = safetensors.load(path, ())
    assert model.declarations == ()
    assert len(model.weights) == 1


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "parameter"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "float32", (4, 4), True),
        ("h.0.attn.bias", "float32", (1, 1, 8, 8), False),  # GPT-2's causal mask …
        ("h.0.attn.bias", "float32", (8,), True),  # … and a bias that is learned, under the same name
        ("rotary_emb.inv_freq", "float32", (8,), False),
        ("bn.running_mean", "float32", (8,), False),
        ("embeddings.position_ids", "int64", (1, 8), False),
        ("counter", "int64", (), False),
        ("q_proj.qweight", "int32", (8, 8), None),
        ("q_proj.weight", "float8_e4m3fn", (8, 8), None),
    ],
)
def test_parameters_are_told_from_buffers_by_name_and_type(
    name: str, dtype: str, shape: tuple[int, ...], parameter: bool | None
) -> None:
    assert by_convention(name, dtype, shape)[0] is parameter


def test_shards_without_an_index_are_one_model(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    save_file({"embed": table}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"head": table.copy()}, tmp_path / "m-00002-of-00002.safetensors")
    save_file({"other": table + 1}, tmp_path / "m.safetensors")
    for named in (tmp_path, tmp_path / "m-00002-of-00002.safetensors"):
        sources, errors = locate([str(named)])
        assert errors == []
        (model,) = [one.load() for one in sources if "-of-" in one.path.name]
        assert [weight.name for weight in model.weights] == ["embed", "head"]
        assert [set(tie.ids) for tie in find(model).ties] == [{"embed", "head"}]
    assert len(locate([str(tmp_path)])[0]) == 2


def test_a_missing_shard_or_a_name_in_two_of_them_is_one_clear_line(tmp_path: Path) -> None:
    table = np.ones((4, 4), np.float32)
    save_file({"embed": table}, tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(CorruptFile, match=r"expected 2 shards by its name, found no file m-00002-of-00002"):
        load_one(tmp_path / "m-00001-of-00002.safetensors")
    save_file({"embed": table}, tmp_path / "m-00002-of-00002.safetensors")
    with pytest.raises(CorruptFile, match="expected tensor 'embed' in one shard, found it in m-00001"):
        load_one(tmp_path / "m-00001-of-00002.safetensors")
    save_file({"embed": table}, tmp_path / "n-00001-of-99999.safetensors")
    assert len(load_one(tmp_path / "n-00001-of-99999.safetensors").weights) == 1  # a number nobody means
