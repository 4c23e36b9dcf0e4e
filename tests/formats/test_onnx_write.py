"""The files of an edited ONNX model: compact data, shared data, and everything that must come along unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_cases import D, V, model_of, node, plan, rewritten, run, saved, table, tensor, tie, value

from tieaudit.change import Unshare, Written
from tieaudit.errors import CorruptFile, RewriteRefused
from tieaudit.formats.onnx import write
from tieaudit.formats.onnx.edit import can_realise, edit
from tieaudit.formats.onnx.read import load
from tieaudit.formats.onnx.transposed import Copy, Transposed
from tieaudit.model import Model
from tieaudit.storage import MemoryStorage

F, I64 = TensorProto.FLOAT, TensorProto.INT64
IDS = np.array([[1, 5, 0], [V - 1, -1, 7]], np.int64)
IDS_IN = value("ids", I64, ["b", "t"])
TABLE_BYTES = V * D * 4


def encoder() -> onnx.ModelProto:
    nodes = [node("Gather", ["embed", "ids"], ["x"]), node("Mul", ["x", "s"], ["y"])]
    return model_of(
        nodes, [IDS_IN], [value("y", F, ["b", "t", D])], [tensor("embed", table()), tensor("s", table(seed=5)[0])]
    )


def decoder() -> onnx.ModelProto:
    nodes = [node("Gather", ["wte", "ids"], ["x"]), node("MatMul", ["x", "head"], ["y"])]
    return model_of(
        nodes, [IDS_IN], [value("y", F, ["b", "t", V])], [tensor("wte", table()), tensor("head", table().T)]
    )


def save(proto: onnx.ModelProto, path: Path, data: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if data is not None:
        options = {"save_as_external_data": True, "location": data, "size_threshold": 0}
    onnx.save(proto, str(path), **options)
    return path


def two_parts(folder: Path, *, external: bool) -> Model:
    files = (
        save(encoder(), folder / "encoder_model.onnx", "encoder_model.onnx.data" if external else None),
        save(decoder(), folder / "decoder_model.onnx", "decoder_model.onnx.data" if external else None),
    )
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("a\nb\n")
    return load(folder, files)


ENCODER, WTE, HEAD = "encoder_model||embed", "decoder_model||wte", "decoder_model||head"


def same_parts(before: Path, after: Path) -> None:
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        onnx.checker.check_model(str(after / name))
        onnx.load(str(after / name))
        for level in (0, 99):
            one, other = run(before / name, {"ids": IDS}, level)[0], run(after / name, {"ids": IDS}, level)[0]
            np.testing.assert_allclose(other, one, atol=1e-5)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("order", [(ENCODER, WTE, HEAD), (HEAD, ENCODER, WTE), (WTE, HEAD, ENCODER)])
def test_members_in_two_files_are_one_range_of_a_common_data_file(
    order: tuple[str, ...], external: bool, tmp_path: Path
) -> None:
    model = two_parts(tmp_path / "in", external=external)
    turned = [HEAD] if order[0] != HEAD else [ENCODER, WTE]
    change = tie(*order, turned=turned)
    assert can_realise(model, change, "ort-cpu") is None
    written = edit(model, plan(model, change), tmp_path / "out")
    assert dict(written.renamed) == {HEAD: WTE}
    again = load(
        tmp_path / "out", tuple(tmp_path / "out" / name for name in ("encoder_model.onnx", "decoder_model.onnx"))
    )
    assert again.by_id[ENCODER].storage == again.by_id[WTE].storage
    # one table, not two or three: 96 × 16 × 4 bytes
    assert (tmp_path / "out" / "shared_weights.data").stat().st_size == TABLE_BYTES
    same_parts(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "vocab.txt").read_text() == "a\nb\n"
    assert set(written.files) == {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    files = [path for path in (tmp_path / "out").iterdir() if not path.is_dir()]
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in files)


def test_a_part_that_holds_only_the_other_layout_is_given_the_common_one(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "head"], ["y"])]
    only_head = model_of(
        nodes, [value("x", F, ["n", "t", D])], [value("y", F, ["n", "t", V])], [tensor("head", table().T)]
    )
    files = (save(encoder(), tmp_path / "in" / "encoder_model.onnx"), save(only_head, tmp_path / "in" / "lm_head.onnx"))
    model = load(tmp_path / "in", files)
    head = "lm_head||head"
    written = edit(model, plan(model, tie(head, ENCODER, turned=[ENCODER])), tmp_path / "out")
    assert dict(written.renamed) == {head: "lm_head||head_shared"}
    again = load(tmp_path / "out", tuple(tmp_path / "out" / file.name for file in files))
    assert again.by_id["lm_head||head_shared"].shape == (V, D)
    assert again.by_id["lm_head||head_shared"].storage == again.by_id[ENCODER].storage
    feed = {"x": np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)}
    np.testing.assert_allclose(run(tmp_path / "out" / "lm_head.onnx", feed)[0], run(files[1], feed)[0], atol=1e-5)


def test_a_member_in_a_branch_of_another_file(tmp_path: Path) -> None:
    then = helper.make_graph(
        [node("MatMul", ["x", "W"], ["p"])], "t", [], [value("p", F, None)], [tensor("W", table().T)]
    )
    other = helper.make_graph(
        [node("Tile", ["x", "k"], ["q"])], "e", [], [value("q", F, None)], [tensor("k", np.array([1, V // D]))]
    )
    forked = model_of(
        [node("If", ["c"], ["y"], name="fork", then_branch=then, else_branch=other)],
        [value("x", F, ["n", D]), value("c", TensorProto.BOOL, [])], [value("y", F, ["n", V])],
    )  # fmt: skip
    files = (
        save(encoder(), tmp_path / "in" / "encoder_model.onnx"),
        save(forked, tmp_path / "in" / "decoder_model.onnx"),
    )
    model = load(tmp_path / "in", files)
    inner = "decoder_model|fork.then_branch|W"
    written = edit(model, plan(model, tie(ENCODER, inner, turned=[inner])), tmp_path / "out")
    again = load(tmp_path / "out", tuple(tmp_path / "out" / file.name for file in files))
    assert again.by_id[written.renamed[inner]].storage == again.by_id[ENCODER].storage
    feed = {"x": table(seed=3)[:4], "c": np.array(True)}
    for level in (0, 99):
        after = run(tmp_path / "out" / "decoder_model.onnx", feed, level)[0]
        np.testing.assert_allclose(after, run(files[1], feed)[0], atol=1e-5)


def test_parts_in_different_folders_are_refused(tmp_path: Path) -> None:
    files = (
        save(encoder(), tmp_path / "a" / "encoder_model.onnx"),
        save(decoder(), tmp_path / "b" / "decoder_model.onnx"),
    )
    reason = can_realise(load(tmp_path, files), tie(ENCODER, WTE), "ort-cpu")
    assert reason is not None
    assert "different folders" in reason


def test_small_integers_stay_in_their_files(tmp_path: Path) -> None:
    proto = model_of(
        [node("Add", ["ids", "k"], ["y"])], [IDS_IN], [value("y", I64, ["b", "t"])], [tensor("k", np.array([7]))]
    )
    files = (save(proto, tmp_path / "encoder_model.onnx"), save(proto, tmp_path / "decoder_model.onnx"))
    reason = can_realise(load(tmp_path, files), tie("encoder_model||k", "decoder_model||k"), "ort-cpu")
    assert reason is not None
    assert "small integers inside the file" in reason


def test_a_taken_name_of_the_common_data_file_is_avoided(tmp_path: Path) -> None:
    model = two_parts(tmp_path / "in", external=False)
    (tmp_path / "in" / "shared_weights.data").write_text("mine")
    edit(model, plan(model, tie(ENCODER, WTE)), tmp_path / "out")
    assert (tmp_path / "out" / "shared_weights.data").read_text() == "mine"
    assert (tmp_path / "out" / "shared_weights_1.data").stat().st_size == TABLE_BYTES


def test_files_that_share_a_range_are_given_bytes_of_their_own(tmp_path: Path) -> None:
    first = two_parts(tmp_path / "in", external=False)
    edit(first, plan(first, tie(ENCODER, WTE)), tmp_path / "shared")
    files = tuple(tmp_path / "shared" / name for name in ("encoder_model.onnx", "decoder_model.onnx"))
    model = load(tmp_path / "shared", files)
    assert model.by_id[ENCODER].storage == model.by_id[WTE].storage
    edit(model, plan(model, Unshare(ENCODER, "wte")), tmp_path / "out")
    again = load(tmp_path / "out", tuple(tmp_path / "out" / file.name for file in files))
    assert (tmp_path / "out" / "shared_weights.data").stat().st_size == 2 * TABLE_BYTES
    assert again.by_id[ENCODER].storage != again.by_id[WTE].storage
    same_parts(tmp_path / "in", tmp_path / "out")


def test_three_files_with_one_name_are_given_bytes_of_their_own(tmp_path: Path) -> None:
    names = ("encoder_model", "decoder_model", "embed_tokens")
    files = tuple(save(encoder(), tmp_path / "in" / f"{name}.onnx") for name in names)
    first = load(tmp_path / "in", files)
    edit(first, plan(first, tie(*(f"{name}||embed" for name in names))), tmp_path / "shared")
    model = load(tmp_path / "shared", tuple(tmp_path / "shared" / file.name for file in files))
    twice = [Unshare("encoder_model||embed", "embed")] * 2
    edit(model, plan(model, *twice), tmp_path / "out")
    again = load(tmp_path / "out", tuple(tmp_path / "out" / file.name for file in files))
    assert len({again.by_id[f"{name}||embed"].storage for name in names}) == 3


def test_an_untouched_part_is_copied_byte_for_byte(tmp_path: Path) -> None:
    model = two_parts(tmp_path / "in", external=True)
    edit(model, plan(model, tie(WTE, HEAD, turned=[HEAD])), tmp_path / "out")
    for name in ("encoder_model.onnx", "encoder_model.onnx.data", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert (tmp_path / "out" / "decoder_model.onnx.data").stat().st_size == TABLE_BYTES
    same_parts(tmp_path / "in", tmp_path / "out")


def test_an_untouched_part_on_the_same_data_file_follows_it(tmp_path: Path) -> None:
    files = [save(decoder(), tmp_path / "in" / "decoder_model.onnx", "all.bin")]
    shared = onnx.load(str(files[0]), load_external_data=False)
    other = encoder()
    del other.graph.initializer[:]
    other.graph.initializer.append(shared.graph.initializer[0])
    other.graph.initializer[0].name = "embed"
    other.graph.initializer.append(tensor("s", table(seed=5)[0]))
    files.insert(0, save(other, tmp_path / "in" / "encoder_model.onnx"))
    model = load(tmp_path / "in", tuple(files))
    assert model.by_id[ENCODER].storage == model.by_id[WTE].storage
    edit(model, plan(model, tie(WTE, HEAD, turned=[HEAD])), tmp_path / "out")
    again = load(tmp_path / "out", tuple(tmp_path / "out" / file.name for file in files))
    assert again.by_id[ENCODER].storage == again.by_id[WTE].storage
    assert (tmp_path / "out" / "all.bin").stat().st_size == TABLE_BYTES
    same_parts(tmp_path / "in", tmp_path / "out")


def test_a_single_file_takes_only_its_own_data_along(tmp_path: Path) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "other.onnx").write_text("not mine")
    save(decoder(), tmp_path / "in" / "model.onnx", "data/w.bin")
    model = load(tmp_path / "in" / "model.onnx", (tmp_path / "in" / "model.onnx",))
    written, _, _ = rewritten(model, tmp_path / "out", tie("wte", "head", turned=["head"]))
    assert sorted(written.files) == ["data/w.bin", "model.onnx"]
    assert (tmp_path / "out" / "data" / "w.bin").stat().st_size == TABLE_BYTES


def test_inline_files_stay_inline_and_untouched_fields_survive(tmp_path: Path) -> None:
    proto = decoder()
    proto.producer_name = "somebody"
    path = save(proto, tmp_path / "in" / "model.onnx")
    # a field that this version of onnx does not know, at the end of the model: number 1000, bytes "abc"
    path.write_bytes(path.read_bytes() + b"\xc2\x3e\x03abc")
    model = load(path, (path,))
    written, _, after = rewritten(model, tmp_path / "out", tie("wte", "head", turned=["head"]))
    assert written.files == ("model.onnx",)
    assert after.producer_name == "somebody"
    assert b"\xc2\x3e\x03abc" in (tmp_path / "out" / "model.onnx").read_bytes()


def test_a_file_that_grows_too_large_moves_its_tensors_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "N_MOST_BYTES", 2 * TABLE_BYTES)
    model = saved(decoder(), tmp_path / "in")
    written, again, _ = rewritten(model, tmp_path / "out", Unshare("wte", "copy", (("", "", "x", 0),)))
    assert written.files == ("model.onnx.data", "model.onnx")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == 3 * TABLE_BYTES
    np.testing.assert_array_equal(
        run(tmp_path / "out" / "model.onnx", {"ids": IDS})[0], run(decoder(), {"ids": IDS})[0]
    )
    assert {weight.id for weight in again.weights} == {"wte", "head", "copy"}


@pytest.mark.parametrize("why", ["IR version 3", "too much that cannot be moved"])
def test_a_file_that_grows_too_large_and_can_hold_no_external_data_is_refused(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "N_MOST_BYTES", TABLE_BYTES // 2 if why == "IR version 3" else 50)
    proto = decoder()
    if why == "IR version 3":
        proto.ir_version = 3
    model = saved(proto, tmp_path / "in")
    change = tie("wte", "head", turned=["head"])
    with pytest.raises(RewriteRefused, match="which is what a protobuf file can hold, found one of") as refused:
        edit(model, plan(model, change), tmp_path / "out")
    assert "external data first (IR version 4 or newer)" in refused.value.hint
    assert not any((tmp_path / "out").iterdir())


def test_ranges_that_overlap_go_on_overlapping_and_large_ones_are_aligned(tmp_path: Path) -> None:
    # a in [0, 4 MiB), b the second half of it, c behind a gap of 100 bytes; d will be dropped. After a the new file
    # would go on at 4 MiB + 4, which is no multiple of 4096
    n = 1024 * 1024
    data = np.random.default_rng(0).standard_normal(n + n // 2).astype(np.float32).tobytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w.bin").write_bytes(data[: 4 * n] + b"x" * 100 + data[4 * n :])
    places = {"a": (0, n + 1), "b": (2 * n, n // 2), "c": (4 * n + 100, n // 4), "d": (4 * n + 100 + n, n // 4)}
    tensors = []
    for name, (offset, count) in places.items():
        made = TensorProto(name=name, data_type=F, dims=[count], data_location=1)
        entries = (("location", "w.bin"), ("offset", offset), ("length", 4 * count), ("checksum", "stale"))
        for key, text in entries:
            made.external_data.add(key=key, value=str(text))
        tensors.append(made)
    nodes = [node("Concat", list("abcd"), ["y"], axis=0)]
    proto = model_of(nodes, [], [value("y", F, [2 * n + 1])], tensors, check=False)
    (tmp_path / "in" / "model.onnx").write_bytes(proto.SerializeToString())
    model = load(tmp_path / "in" / "model.onnx", (tmp_path / "in" / "model.onnx",))
    before = {name: bytes(model.by_id[name].storage.read_ranges([(0, model.by_id[name].n_bytes)])[0]) for name in "abc"}  # type: ignore[union-attr]
    _, again, _ = rewritten(model, tmp_path / "out", tie("c", "d"), lossless=False)
    regions = {name: again.by_id[name].storage.region for name in "abc"}  # type: ignore[union-attr]
    assert regions["b"][1] - regions["a"][1] == 2 * n
    assert regions["c"][1] % 65536 == 0  # 4096 would do on Linux, but Windows maps at multiples of 64 KiB
    assert (tmp_path / "out" / "w.bin").stat().st_size == 4 * n + 65536 + n
    for name in "abc":
        assert again.by_id[name].storage.read_ranges([(0, again.by_id[name].n_bytes)])[0] == before[name]  # type: ignore[union-attr]
    assert b"stale" not in (tmp_path / "out" / "model.onnx").read_bytes()


def test_a_data_file_that_shrank_since_it_was_read_is_an_error_and_the_input_stays(tmp_path: Path) -> None:
    save(decoder(), tmp_path / "in" / "model.onnx", "w.bin")
    model = load(tmp_path / "in" / "model.onnx", (tmp_path / "in" / "model.onnx",))
    (tmp_path / "in" / "w.bin").write_bytes(b"short")
    before = (tmp_path / "in" / "model.onnx").read_bytes()
    with pytest.raises(CorruptFile):
        edit(model, plan(model, tie("wte", "head", turned=["head"])), tmp_path / "out")
    assert (tmp_path / "in" / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("item", [1, 2, 4, 8])
def test_transposed_bytes_are_numpy_s_in_every_range(item: int) -> None:
    rng = np.random.default_rng(item)
    values = rng.integers(0, 256, (7, 5, item)).astype(np.uint8)
    turned = Transposed(MemoryStorage(values.tobytes(), "m"), (7, 5), item)
    want = values.transpose(1, 0, 2).tobytes()
    assert turned.n_bytes == len(want)
    for begin in range(0, len(want), 3):
        for length in (0, 1, item, len(want) - begin):
            if begin + length <= len(want):
                assert turned.read_ranges([(begin, length)]) == [want[begin : begin + length]]


def test_a_transpose_larger_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from tieaudit.formats.onnx import transposed

    monkeypatch.setattr(transposed, "BLOCK_BYTES", 64)
    values = np.arange(300, dtype=np.float32).reshape(20, 15)
    turned = Transposed(MemoryStorage(values.tobytes(), "m"), (20, 15), 4)
    assert turned.read_ranges([(0, 1200)])[0] == np.ascontiguousarray(values.T).tobytes()


def test_a_copy_has_a_region_of_its_own() -> None:
    source = MemoryStorage(b"abc", "m")
    assert Copy(source, "x").region != source.region
    assert Copy(source, "x").region != Copy(source, "y").region
    assert Copy(source, "x").read_ranges([(1, 2)]) == [b"bc"]


GREEDY = "intel+onnxruntime/onnxruntime/test/testdata/transformers/tiny_gpt2_greedysearch_with_init_decoder.onnx"


def test_a_generation_graph_gets_its_weights_from_outside(corpus: Path, tmp_path: Path) -> None:
    # two bodies of one GreedySearch hold equal layers, and the main graph table and head
    path = corpus / GREEDY
    model = load(path, (path,))
    layers = sorted(
        (weight.id for weight in model.weights if weight.name.endswith("h.0.mlp.c_fc.weight")), reverse=True
    )
    assert len(layers) == 2
    table_id, head_id = "s_d_transformer.wte.weight", "s_d_onnx::MatMul_1478"
    changes = (tie(*layers), tie(table_id, head_id, turned=[head_id]))
    assert [can_realise(model, change, "ort-cpu") for change in changes] == [None, None]
    written: Written = edit(model, plan(model, *changes), tmp_path / "out")
    assert len(written.renamed) == 3
    listed = json.loads((corpus / "FEEDS.json").read_text())[GREEDY]["feeds"]
    feeds = {
        name: np.array(item, np.float32 if name == "repetition_penalty" else np.int32) for name, item in listed.items()
    }
    before, after = (run(where, feeds, 99) for where in (path, tmp_path / "out" / path.name))
    np.testing.assert_array_equal(before[0], after[0])
