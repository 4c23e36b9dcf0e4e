"""Bugs of peers that were reproduced by running them, and what tieaudit does with the same input or the broken file.

Rows of docs/peer-cases.md whose id begins with FACT: 1_3 safetensors and huggingface_hub, 2_1 optimum-onnx, 2_3 ONNX
Runtime's Python pass, 2_8 onnxsim, 2_9 graphsurgeon, 3 and F what was measured. That page also says which of those rows
other tests cover.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_cases as cases
import peer_models as peers
import pytest
import tiny_onnx
from onnx_cases import node
from peer_models import INT64, codes, deduplicated, found, initializers, measured, random, shared, write

from tieaudit.errors import CorruptFile
from tieaudit.find import find
from tieaudit.formats.huggingface.defaults import table as defaults
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.load import load_one
from tieaudit.scan import scan
from tieaudit.storage import MemoryStorage, reading
from tieaudit.view import TRANSPOSED

IDS = np.array([[0, 5, 59], [7, 7, 1]], np.int64)
LOOKUP = {"ids": (INT64, ["n", "m"])}


def tensors_file(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    entries = [NewEntry(name, str(v.dtype), v.shape, MemoryStorage(v.tobytes(), name)) for name, v in tensors.items()]
    write_safetensors(entries, metadata or {}, path)
    return path


# --- 1.3: safetensors, and the copy of it in huggingface_hub --------------------------------------------------------


@pytest.mark.parametrize("order", ["ABC", "ACB", "CBA"])
def test_FACT_1_3a_a_file_in_which_a_tensor_holds_two_others_is_refused_whatever_the_order(
    tmp_path: Path, order: str
) -> None:
    """huggingface/safetensors, huggingface_hub; huggingface/transformers#47814: the sweep keeps the last end, not the
    largest one, so the second part of a whole is not grouped with it. A file may hold no such thing at all."""
    spans = {"A": (0, 40), "B": (4, 12), "C": (20, 28)}
    header = {
        name: {"dtype": "F32", "shape": [(spans[name][1] - spans[name][0]) // 4], "data_offsets": list(spans[name])}
        for name in order
    }
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + random(10).tobytes())
    with pytest.raises(CorruptFile, match="overlap"):
        load_one(path)


def test_FACT_1_3b_a_transposed_alias_is_found_once_it_is_a_copy_in_a_file(tmp_path: Path) -> None:
    """huggingface/safetensors: `_end_ptr` calls view(-1) on a transposed alias and raises; whoever makes it contiguous
    to get it saved stores the matrix twice, and nothing in the file says so."""
    weight = random(40, 16)
    path = tensors_file(tmp_path / "m.safetensors", {"embed": weight, "head": np.ascontiguousarray(weight.T)})
    (tie,) = found(path).ties
    assert [member.view for member in tie.members][1] == TRANSPOSED
    assert codes(path) == ["TIE202"]
    result = peers.cli("apply", path, "--to", tmp_path / "out")  # no class would restore it
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_FACT_1_3c_parts_of_one_storage_are_tensors_of_their_own_in_a_file(tmp_path: Path) -> None:
    """huggingface/safetensors: q, k and v that are slices of one storage, or one slice alone, raise a RuntimeError
    though nothing is shared between them. In a file they are dense and differ."""
    fused = random(48, 16)
    parts = {"q": fused[:16], "k": fused[16:32], "v": fused[32:]}
    path = tensors_file(tmp_path / "m.safetensors", parts)
    assert found(path).ties == ()
    assert codes(path) == []
    assert scan(load_one(path)).summary.n_parameters == 48 * 16
    alone = tensors_file(tmp_path / "alone.safetensors", {"v": parts["v"]})
    assert codes(alone) == []


def test_FACT_1_3d_a_name_dropped_for_another_has_no_shape_of_its_own_and_is_said_to_be_missing(tmp_path: Path) -> None:
    """huggingface/safetensors: a view under another shape or type is dropped for the whole it is a view of, and the
    alias map records neither. What the map says is taken as a note: it restores nothing, and the name is missing."""
    path = tensors_file(tmp_path / "m.safetensors", {"whole": random(8, 8)}, {"as_ints": "whole"})
    (claim,) = load_one(path).declarations
    assert not claim.restores
    report = scan(load_one(path))
    assert report.summary.n_parameters == 64  # not 128: one tensor, two names
    assert "TIE105" in {one.code for one in [*report.findings, *report.cannot_tell]}


# --- 2: ONNX tools --------------------------------------------------------------------------------------------------


def test_FACT_2_1e_two_heads_under_one_module_name_are_both_tied(tmp_path: Path) -> None:
    """huggingface/optimum-onnx: two nodes that may be `lm_head` are announced as skipped and then raise a KeyError.
    Names of nodes decide nothing here."""
    table = random(60, 8)
    nodes = [
        node("Gather", ["E", "ids"], ["x"], name="/embed/Gather"),
        node("MatMul", ["x", "H1"], ["y1"], name="/a/lm_head/MatMul"),
        node("MatMul", ["x", "H2"], ["y2"], name="/b/lm_head/MatMul"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"E": table, "H1": table.T, "H2": table.T}, ["y1", "y2"], LOOKUP)
    assert measured(path) == [{"E", "H1", "H2"}]
    assert codes(path) == ["TIE202"]
    assert list(initializers(deduplicated(path, {"ids": IDS}, 1e-5)).values()).count((60, 8)) == 1


def test_FACT_2_1f_an_encoder_s_own_copy_is_found_across_files_and_shared(tmp_path: Path) -> None:
    """huggingface/optimum-onnx: the tie pass looks at one file, so the encoder of a T5 or BART keeps a copy, and a BART
    decoder keeps both of its own (its embedding is of another module class)."""
    table, folder = random(60, 8), tmp_path / "export"
    lookup = node("Gather", ["embed", "ids"], ["x"])
    write(folder / "encoder_model.onnx", [lookup], {"embed": table}, ["x"], LOOKUP)
    head = [lookup, node("MatMul", ["x", "head"], ["logits"])]
    write(folder / "decoder_model.onnx", head, {"embed": table, "head": table.T}, ["logits"], LOOKUP)
    ids = {"encoder_model||embed", "decoder_model||embed", "decoder_model||head"}
    assert measured(folder) == [ids]
    assert codes(folder) == ["TIE203"]
    to = peers.applied(folder, name="out")
    for part, feeds in (("encoder_model", IDS), ("decoder_model", IDS)):
        peers.assert_same_outputs(folder / f"{part}.onnx", to / f"{part}.onnx", {"ids": feeds}, 1e-5)
    assert measured(to) == []


MERGED = {
    "int64": (np.array([100001, 5], np.int64), np.array([100002, 5], np.int64)),
    "large int64": (np.array([5 * 10**9, 5], np.int64), np.array([5000040000, 5], np.int64)),
    "signs": (np.array([1e-9, 2.0], np.float32), np.array([-1e-9, 2.0], np.float32)),
}


@pytest.mark.parametrize("case", MERGED)
def test_FACT_2_3_a_file_in_which_different_tensors_were_merged_differs(case: str, tmp_path: Path) -> None:
    """microsoft/onnxruntime, onnx_model.py has_same_value: np.allclose decides where hashes differ, so different
    integers and small numbers of other sign become one initializer. Once merged a file cannot show it; verify can."""
    first, second = MERGED[case]
    kind = onnx.helper.np_dtype_to_tensor_dtype(first.dtype)
    nodes = [node("Gather", ["a", "i"], ["p"]), node("Gather", ["b", "i"], ["q"]), node("Sub", ["p", "q"], ["d"])]
    nodes.append(node("Sign", ["d"], ["y"]))
    before = write(
        tmp_path / "before.onnx", nodes, {"a": first, "b": second}, {"y": kind}, {"i": (INT64, ["n"])}, {"y": ["n"]}
    )
    assert measured(before) == []
    made = onnx.load(str(before))
    made.graph.node[1].input[0] = "a"
    del made.graph.initializer[1]
    onnx.save(made, str(tmp_path / "after.onnx"))
    assert codes(tmp_path / "after.onnx") == []
    result = peers.cli("verify", before, tmp_path / "after.onnx")
    assert result.exit_code == 1, result.output


def test_FACT_2_8_FACT_2_9_a_tie_that_a_tool_folded_into_two_matrices_is_found_and_repaired(tmp_path: Path) -> None:
    """onnxsim/onnxsim#174, #309, graphsurgeon fold_constants, ONNX Runtime at BASIC: Transpose(E) of a tied model is
    computed and stored (4.46 MB became 8.65 MB). The file that ONNX Runtime writes stands for all three."""
    tied = tiny_onnx.language_model(tmp_path / "tied.onnx", tiny_onnx.table(), None)
    assert shared(tied) == [{"wte.weight"}]
    cases.run(tied, {"ids": IDS}, 1, tmp_path / "folded.onnx")
    (both,) = measured(tmp_path / "folded.onnx")
    assert "wte.weight" in both
    assert codes(tmp_path / "folded.onnx") == ["TIE202"]
    deduplicated(tmp_path / "folded.onnx", {"ids": IDS}, 1e-5)


# --- 3: measured ----------------------------------------------------------------------------------------------------


def test_FACT_3_2b_a_table_that_was_quantised_once_for_lookup_and_head_is_an_intact_tie(tmp_path: Path) -> None:
    """onnxruntime.quantization.quantize_dynamic on a tied model: the embedding is stored as int8 once, and the head
    reads it through DequantizeLinear and Transpose. One tensor, two uses, of which a runtime may fold one."""
    table = np.random.default_rng(0).integers(-127, 127, (160, 8)).astype(np.int8)
    nodes = [
        node("Gather", ["q", "ids"], ["g"]),
        node("DequantizeLinear", ["g", "scale", "zero"], ["h"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node("Transpose", ["d"], ["t"], perm=[1, 0]),
        node("MatMul", ["h", "t"], ["y"]),
    ]
    weights = {"q": table, "scale": np.float32(0.01), "zero": np.int8(0)}
    path = write(tmp_path / "m.onnx", nodes, weights, inputs=LOOKUP)
    (tie,) = found(path).ties
    assert (tie.origin, set(tie.ids)) == ("aliased", {"q"})
    assert [str(member.view) for member in tie.members] == ["as stored", "dequantized, transposed"]
    assert codes(path) == ["TIE301"]
    assert scan(load_one(path)).summary.n_parameters == 160 * 8


def test_FACT_3_3_two_hundred_tensors_of_one_shape_are_told_apart_by_a_few_of_their_bytes(tmp_path: Path) -> None:
    """onnx-ir hashes all bytes, onnxoptimizer and OnnxSlim load all of them (2.3 and 2.8 s for 201 MiB), ONNX Runtime's
    Python pass compares all pairs (21 s for half of it). What differs is not read here."""
    rows = {f"w{index}": random(64, 256, seed=index) for index in range(200)}
    path = tensors_file(tmp_path / "m.safetensors", {**rows, "again": rows["w7"]})
    with reading() as files:
        assert [set(tie.ids) for tie in find(load_one(path)).ties] == [{"w7", "again"}]
    # header and two members in full, plus a first block and probes of each: 201 × 64 KiB hold 13.2 MB
    assert files.n_bytes < 2 * 65_536 + 201 * 8_192


def test_FACT_F1_a_half_precision_lookup_in_the_other_layout_runs_at_every_level(tmp_path: Path) -> None:
    """microsoft/onnxruntime 1.32: Gather(axis=1), Transpose, MatMul in fp16 ends in a segmentation fault at ALL. What
    --transposed-as gather writes is the flattened form, which does not."""
    table = random(60, 8, kind=np.float16)
    nodes = [node("Gather", ["E", "ids"], ["x"]), node("MatMul", ["x", "H"], ["y"])]
    element = onnx.TensorProto.FLOAT16
    path = write(tmp_path / "m.onnx", nodes, {"E": table, "H": table.T}, {"y": element}, LOOKUP)
    to = peers.applied(path, "--transposed-as", "gather")
    ops = [one.op_type for one in onnx.load(str(to)).graph.node]
    assert ops[ops.index("Gather") - 1] == "Reshape"  # ids are made a row first
    assert ops[ops.index("Gather") + 1 : ops.index("MatMul")].count("Reshape") == 1
    peers.assert_same_outputs(path, to, {"ids": IDS})  # levels 0 and 99


def test_FACT_F3_a_lookup_keeps_its_rows_and_the_head_turns(tmp_path: Path) -> None:
    """A lookup along axis 1 takes up to a hundred times as long as one along axis 0: by default it is never made."""
    path = tiny_onnx.lost(tmp_path / "m.onnx")
    after = deduplicated(path, {"ids": IDS}, 1e-5)
    (lookup,) = (one for one in after.graph.node if one.op_type == "Gather")
    assert all(attribute.i == 0 for attribute in lookup.attribute if attribute.name == "axis")
    assert "Gemm" in [one.op_type for one in after.graph.node]


def test_FACT_F4_a_lookup_in_the_other_layout_changes_no_bit(tmp_path: Path) -> None:
    """Gather(axis=1) and the untied MatMul were bit-equal in every case tried; a Gemm may differ by 1.7e-6."""
    path = tiny_onnx.lost(tmp_path / "m.onnx")
    to = peers.applied(path, "--transposed-as", "gather")
    peers.assert_same_outputs(path, to, {"ids": IDS})


def test_FACT_F12_what_the_library_declares_and_does_not_tie_is_not_declared_here() -> None:
    """transformers 5.23: the heads of audioflamingo3, musicflamingo, mllama, rembert and pop2piano are not tied, though
    a flag or `_tied_weights_keys` says so."""
    classes = defaults(5)["classes"]
    for name in (
        "AudioFlamingo3ForConditionalGeneration", "MusicFlamingoForConditionalGeneration", "MllamaForCausalLM",
        "RemBertForCausalLM", "Pop2PianoForConditionalGeneration",
    ):  # fmt: skip
        (head,) = classes[name]["head"]
        assert not any(head in tie["members"] for tie in classes[name].get("ties", [])), name
    (three,) = classes["Pop2PianoForConditionalGeneration"]["ties"]
    assert len(three["members"]) == 3  # its embeddings are


def test_FACT_F2_a_half_precision_head_that_the_runtime_widens_is_measured_beside_the_untied_one(
    tmp_path: Path,
) -> None:
    """microsoft/onnxruntime 1.32, CPU: at ALL the head is kept a second time in fp32 (untied 512 → 768 kB, tied 256 →
    768 kB), so the file halves and the memory does not. Both figures come from the same provider, and it is said."""
    table = random(500, 16, kind=np.float16)
    nodes = [node("Gather", ["E", "ids"], ["x"]), node("MatMul", ["x", "H"], ["y"])]
    half = onnx.TensorProto.FLOAT16
    path = write(tmp_path / "m.onnx", nodes, {"E": table, "H": table.T}, {"y": half}, LOOKUP)
    result = peers.cli("apply", path, "--to", tmp_path / "out.onnx", "--format", "json")
    facts = json.loads(result.stdout)["proof"]["facts"]
    assert facts["n_bytes_stored_before"] == 2 * table.nbytes
    assert facts["n_bytes_stored_after"] < table.nbytes + 100
    assert facts["n_bytes_optimised_before"] > 3 * table.nbytes  # 16 + 32 bits for each value
    assert facts["n_bytes_optimised_after"] > 3 * table.nbytes
    assert facts["held_in_a_wider_type_by_the_runtime"] == "E"
