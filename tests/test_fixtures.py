"""The truth written beside the fixtures, against facts that were found another way."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fixtures.architecture import architectures
from fixtures.truth import weight_id

Truths = dict[str, dict[str, Any]]
ROOT = Path(__file__).resolve().parent.parent
LOOKED_UP = 40
"""Ids fed to the models stay below the smallest table, token types below two."""


def onnx_files(path: Path) -> dict[str, Path]:
    """The files of an ONNX fixture by part name; empty for a Hugging Face folder."""
    if path.suffix == ".onnx":
        return {"": path}
    return {file.stem: file for file in sorted(path.glob("*.onnx"))}


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every initializer of an ONNX fixture, by the id that tieaudit gives it."""
    return {
        weight_id(part, tensor.name): numpy_helper.to_array(tensor, base_dir=str(file.parent))
        for part, file in onnx_files(path).items()
        for tensor in onnx.load(file, load_external_data=False).graph.initializer
    }


def equal_classes(arrays: dict[str, np.ndarray[Any, Any]]) -> set[frozenset[str]]:
    """Classes of equal bytes, also transposed, that are no constants: every pair by brute force."""
    found: dict[bytes, set[str]] = defaultdict(set)
    for id, array in arrays.items():
        if array.size and not (array == array.flat[0]).all():
            kinds = [repr((a.shape, str(a.dtype))).encode() + a.tobytes() for a in (array, array.T)]
            found[min(kinds)].add(id)
    return {frozenset(ids) for ids in found.values() if len(ids) > 1}


def run(file: Path, n_batch: int, n_steps: int) -> list[np.ndarray[Any, Any]]:
    """Outputs of an ONNX file for inputs that depend on names and sizes only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    sizes = {"batch": n_batch, "sequence": n_steps, "source": n_steps + 2, "target": n_steps, "past": n_steps + 1}
    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for seed, value in enumerate(session.get_inputs()):
        shape = [sizes[d] if isinstance(d, str) else d for d in value.shape]
        if "with_past" in file.name and value.name == "input_ids":
            shape[1] = 1
        generator = np.random.default_rng(seed)
        if value.type == "tensor(int64)":
            high = 2 if "mask" in value.name or "type" in value.name else LOOKED_UP
            feeds[value.name] = generator.integers(0, high, shape)
            feeds[value.name][:, 0] = 1  # no row of a mask is empty
        else:
            feeds[value.name] = generator.standard_normal(shape).astype(np.float32)
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


def test_every_architecture_has_the_variants_that_the_issue_names(truths: Truths) -> None:
    for name in architectures():
        kinds = {path.split("/", 1)[1].split("/")[0].removesuffix(".onnx") for path in truths if path.startswith(name)}
        wanted = {"untied"} if name == "sentiment" else {"tied", "lost", "untied"}
        assert wanted <= kinds, name
    assert {"bart_seq2seq", "gpt_decoder", "bert_encoder", "albert_shared"} == {
        path.split("/")[0] for path in truths if path.endswith("hf_lost")
    }


def test_the_truth_about_stored_copies_is_what_brute_force_finds(fixtures_dir: Path, truths: Truths) -> None:
    for name, truth in truths.items():
        if onnx_files(fixtures_dir / name):
            expected = {frozenset(member["id"] for member in group["members"]) for group in truth["groups"]}
            assert equal_classes(tensors(fixtures_dir / name)) == expected, name


def test_each_member_is_its_group_s_first_seen_through_its_view(fixtures_dir: Path, truths: Truths) -> None:
    n_transposed = 0
    for name, truth in truths.items():
        if not onnx_files(fixtures_dir / name):
            continue
        arrays = tensors(fixtures_dir / name)
        for group in truth["groups"]:
            first = arrays[group["members"][0]["id"]]
            for member in group["members"]:
                seen = {"as stored": first, "transposed": first.T}[member["view"]]
                np.testing.assert_array_equal(arrays[member["id"]], seen)
                n_transposed += member["view"] == "transposed"
    # One head each in 5 models, 2 layers of the autoencoder, BART's head, GPT's external copy, 2 heads in parts.
    assert n_transposed == 5 + 2 + 1 + 1 + 2


def test_parameters_are_the_float_tensors_counted_once_per_class(fixtures_dir: Path, truths: Truths) -> None:
    for name, truth in truths.items():
        if not onnx_files(fixtures_dir / name):
            continue
        sizes = {id: a.size for id, a in tensors(fixtures_dir / name).items() if a.dtype == np.float32 and a.ndim}
        again = sum(sizes[m["id"]] for group in truth["groups"] if group["parameter"] for m in group["members"][1:])
        assert truth["n_parameters_named"] == sum(sizes.values()), name
        assert truth["n_parameters"] == sum(sizes.values()) - again, name


def test_shared_weights_are_those_with_several_consumers(fixtures_dir: Path, truths: Truths) -> None:
    for name, truth in truths.items():
        found = []
        for part, file in onnx_files(fixtures_dir / name).items():
            graph = onnx.load(file, load_external_data=False).graph
            n_uses = Counter(value for node in graph.node for value in node.input)
            floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims}
            found += [weight_id(part, weight) for weight in floats if n_uses[weight] > 1]
        assert sorted(found) == truth.get("shared", []), name


@pytest.mark.parametrize("sizes", [(1, 1), (2, 7), (3, 4)])
def test_tied_and_lost_compute_the_same_and_untied_does_not(
    fixtures_dir: Path, truths: Truths, sizes: tuple[int, int]
) -> None:
    for name in sorted({path.split("/")[0] for path in truths} - {"sentiment"}):
        tied, lost, untied = (run(fixtures_dir / name / f"{kind}.onnx", *sizes) for kind in ("tied", "lost", "untied"))
        np.testing.assert_allclose(tied[0], lost[0], rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.abs(tied[0] - untied[0]).max() > 0.02, name


def test_other_spellings_of_one_tie_compute_the_same(fixtures_dir: Path) -> None:
    home = fixtures_dir / "gpt_decoder"
    (tied,) = run(home / "tied.onnx", 2, 5)
    for name in ("foldable.onnx", "lost_external/model.onnx", "one_range/model.onnx"):
        (other,) = run(home / name, 2, 5)
        np.testing.assert_allclose(other, tied, rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_part_of_an_export_runs(fixtures_dir: Path) -> None:
    for variant in ("lost", "untied"):
        for part, file in onnx_files(fixtures_dir / "bart_seq2seq" / f"parts_{variant}").items():
            outputs = run(file, 2, 3)
            assert all(np.isfinite(output).all() for output in outputs), (variant, part)
            assert len(outputs) == {"encoder_model": 1, "decoder_model": 9, "decoder_with_past_model": 5}[part]


def test_one_range_has_two_names_on_the_same_bytes_and_no_byte_twice(fixtures_dir: Path, truths: Truths) -> None:
    model = onnx.load(fixtures_dir / "gpt_decoder/one_range/model.onnx", load_external_data=False)
    places = defaultdict(list)
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            places[where["location"], where["offset"], where["length"]].append(tensor.name)
    assert [names for names in places.values() if len(names) > 1] == [["transformer.wte.weight", "lm_head.weight"]]
    assert truths["gpt_decoder/one_range/model.onnx"]["n_bytes_duplicate"] == 0  # 0, not 1500 · 64 · 4 = 384_000


def test_a_lost_tie_costs_exactly_its_copy(fixtures_dir: Path, truths: Truths) -> None:
    # GPT: a table of 1500 × 64 float32 = 384_000 bytes; 96_000 parameters, and the wrong count has 96_000 more.
    lost = truths["gpt_decoder/lost.onnx"]
    assert lost["n_bytes_duplicate"] == 384_000
    assert lost["n_parameters_named"] - lost["n_parameters"] == 96_000
    assert truths["gpt_decoder/tied.onnx"]["n_parameters"] == lost["n_parameters"]
    assert truths["gpt_decoder/untied.onnx"]["n_parameters"] == lost["n_parameters_named"]
    # BART has one matrix in three roles: two copies too many, not one. 2 · 1600 · 64 · 4 = 819_200.
    assert truths["bart_seq2seq/lost.onnx"]["n_bytes_duplicate"] == 819_200
    sizes = {kind: (fixtures_dir / f"gpt_decoder/{kind}.onnx").stat().st_size for kind in ("tied", "lost")}
    assert 383_000 < sizes["lost"] - sizes["tied"] < 385_000


def test_live_transformers_models_have_the_parameters_and_ties_of_the_truth(fixtures_dir: Path, truths: Truths) -> None:
    transformers = pytest.importorskip("transformers")
    folders = {name: truth for name, truth in truths.items() if "class" in truth}
    assert len(folders) == 4 * 3
    for name, truth in folders.items():
        model = getattr(transformers, truth["class"]).from_pretrained(fixtures_dir / name)
        assert sum(p.numel() for p in model.parameters()) == truth["n_parameters"], name
        assert bool(truth["groups"]) == ("untied" not in name), name
        named = dict(model.named_parameters(remove_duplicate=False))
        for group in truth["groups"]:
            assert len({id(named[member["id"]]) for member in group["members"]}) == 1, name


def test_building_again_gives_the_same_bytes(fixtures_dir: Path, tmp_path: Path) -> None:
    for name in ("gpt_decoder", "tied_autoencoder"):
        command = [sys.executable, str(ROOT / "fixtures" / "build.py"), str(tmp_path), "--only", name]
        subprocess.run(command, check=True, capture_output=True)
        files = sorted(path.relative_to(fixtures_dir) for path in (fixtures_dir / name).rglob("*") if path.is_file())
        assert len(files) >= 4
        for file in files:
            assert (tmp_path / file).read_bytes() == (fixtures_dir / file).read_bytes(), file
