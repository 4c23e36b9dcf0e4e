"""Made-up inputs: names and shapes that exporters use, ids within the vocabulary, and what complaints teach."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_cases import model_of, node, table, tensor, value

from tieaudit.errors import CorruptFile, UsageError
from tieaudit.formats.onnx.limits import id_limits
from tieaudit.inputs import Feed, Sizes, corrected, feed_of, made_up, read_inputs, stored_beside
from tieaudit.runners import Port, Signature

SIZES = Sizes(batch=2, sequence=7, past=3, encoder=5)


def feed(*ports: Port) -> dict[str, np.ndarray]:
    return dict(feed_of(Signature(ports, ()), SIZES).arrays)


def test_a_decoder_with_a_cache_gets_consistent_lengths() -> None:
    found = feed(
        Port("input_ids", "int64", ("batch_size", "sequence_length"), 100),
        Port("attention_mask", "int64", ("batch_size", "past_sequence_length + sequence_length")),
        Port("position_ids", "int64", ("batch_size", "sequence_length")),
        Port("past_key_values.0.key", "float32", ("batch_size", 4, "past_sequence_length", 8)),
        Port("past_key_values.0.encoder.key", "float32", ("batch_size", 4, "encoder_sequence_length_out", 8)),
        Port("use_cache_branch", "bool", (1,)),
    )
    assert found["input_ids"].shape == (2, 7)
    assert found["attention_mask"].shape == (2, 10) and (found["attention_mask"] == 1).all()  # 10, not 7
    assert found["position_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 9]] * 2  # behind the past, not from 0
    assert found["past_key_values.0.key"].shape == (2, 4, 3, 8)
    assert found["past_key_values.0.encoder.key"].shape == (2, 4, 5, 8)
    assert found["use_cache_branch"].tolist() == [False]


def test_symbols_without_meaning_get_theirs_from_the_place_and_sums_are_evaluated() -> None:
    found = feed(
        Port("input_ids", "int32", ("s0", "s1"), 9),
        Port("past_key", "float16", ("s0", 2, "s2", 4)),
        Port("attention_mask", "int32", ("s0", "s1 + s2")),
    )
    assert found["input_ids"].shape == (2, 7) and found["past_key"].shape == (2, 2, 3, 4)
    assert found["attention_mask"].shape == (2, 10)
    assert found["past_key"].dtype == np.float16


def test_ids_stay_below_the_smallest_table_and_above_the_special_ones() -> None:
    ids = feed(Port("input_ids", "int64", ("batch", "sequence"), 12))["input_ids"]
    assert ids.min() >= 3 and ids.max() < 12
    assert feed(Port("input_ids", "int64", ("b", "s"), 2))["input_ids"].max() < 2


def test_generation_inputs_are_reasonable() -> None:
    found = feed(
        Port("input_ids", "int32", ("batch", "sequence"), 50),
        Port("max_length", "int32", (1,)),
        Port("num_beams", "int32", (1,)),
        Port("length_penalty", "float32", (1,)),
        Port("vocab_mask", "int32", (50,)),
    )
    assert found["max_length"][0] > 7 and found["num_beams"].tolist() == [2]
    assert found["length_penalty"].tolist() == [1.0] and found["vocab_mask"].sum() == 50


def test_several_shapes_and_seeds_are_offered_and_none_for_what_is_no_tensor() -> None:
    port = Port("x", "float32", (None, None, 4))
    offers = [one.arrays["x"] for _, one in made_up(Signature((port,), ()))]
    assert len({one.shape for one in offers}) >= 3
    assert not list(made_up(Signature((Port("s", "", ()),), ())))


def test_complaints_of_the_runtime_teach_limits_and_sizes() -> None:
    signature = Signature((Port("ids", "int64", ("b", "s")), Port("x", "float32", ("b", "n"))), ())
    offer = feed_of(signature, SIZES)
    worst = int(offer.arrays["ids"].max())
    learned = corrected(signature, offer, f"idx={worst} must be within the inclusive range [-8,7]")
    assert learned is not None and learned.inputs[0].limit == 8
    text = "Got invalid dimensions for input: x for the following indices index: 1 Got: 3 Expected: 784 Please fix"
    learned = corrected(signature, offer, text)
    assert learned is not None and learned.inputs[1].dims == ("b", 784)
    assert corrected(signature, offer, "something else") is None


def test_limits_follow_ids_through_shape_operations_and_into_bodies(tmp_path: Path) -> None:
    body = onnx.helper.make_graph(
        [node("Gather", ["small", "ids"], ["inner"])], "b", [], [value("inner", 1, ["n", 16])],
        [tensor("small", table(shape=(40, 16)))],
    )  # fmt: skip
    proto = model_of(
        [
            node("Cast", ["tokens"], ["wide"], to=7),
            node("Reshape", ["wide", "flat"], ["ids"]),
            node("Gather", ["E", "ids"], ["outer"]),
            node("If", ["flag"], ["chosen"], then_branch=body, else_branch=body),
            node("Add", ["outer", "chosen"], ["y"]),
        ],
        [value("tokens", 6, ["b", "s"]), value("flag", 9, [])],
        [value("y", 1, ["n", 16])],
        [tensor("E", table()), tensor("flat", np.array([-1]))],
        check=False,
    )
    onnx.save(proto, str(tmp_path / "m.onnx"))
    assert id_limits(tmp_path / "m.onnx") == {"tokens": 40}  # the smaller of two tables, 96 and 40
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff")
    assert id_limits(tmp_path / "bad.onnx") == {}


def test_stored_test_data_is_read_and_a_broken_one_is_named(tmp_path: Path) -> None:
    signature = Signature((Port("x", "float32", (2,)),), ())
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    given = np.array([1.0, 2.0], np.float32)
    (folder / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(given).SerializeToString())
    found = stored_beside(tmp_path / "model.onnx", signature)
    assert [one.source for one in found] == ["test_data_set_0"]
    assert found[0].arrays["x"].tolist() == [1.0, 2.0]
    (folder / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(CorruptFile, match=r"input_0\.pb: expected a serialized TensorProto"):
        stored_beside(tmp_path / "model.onnx", signature)


def test_the_users_inputs_are_read_without_executing_anything(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.arange(3))
    assert read_inputs(tmp_path / "in.npz")["a"].tolist() == [0, 1, 2]
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    np.save(tmp_path / "single.npy", np.arange(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("objects.npz", "single.npy", "text.npz", "missing.npz"):
        with pytest.raises(UsageError, match=r"expected an \.npz archive"):
            read_inputs(tmp_path / name)


def test_a_feed_says_where_it_comes_from() -> None:
    assert str(Sizes(1, 5, 3, seed=1)) == "made up: batch 1, sequence 5, past 3, seed 1"
    assert Feed({}, "x").source == "x"
