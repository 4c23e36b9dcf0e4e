"""Which ONNX files belong together, and which merely lie side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formats.onnx_files import graph, helper, onnx, read, rows, save

from tieaudit.formats.onnx import FORMAT
from tieaudit.formats.onnx.discover import alternative_of, group, owns
from tieaudit.formats.onnx.read import load


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def _groups(folder: Path) -> list[list[str]]:
    return [[file.stem for file in files] for _, files in group([folder])]


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        (["model"], [["model"]]),
        (["resnet", "yolo"], [["resnet"], ["yolo"]]),
        (
            ["decoder_model", "decoder_with_past_model", "encoder_model"],
            [["decoder_model", "decoder_with_past_model", "encoder_model"]],
        ),
        # the merged decoder is another spelling of the two: it replaces them or stands alone, never beside them
        (["decoder_model_merged", "encoder_model"], [["decoder_model_merged", "encoder_model"]]),
        (
            ["decoder_model", "decoder_model_merged", "decoder_with_past_model", "encoder_model"],
            [["decoder_model", "decoder_with_past_model", "encoder_model"], ["decoder_model_merged"]],
        ),
        (
            ["decoder_model", "decoder_model_quantized", "encoder_model", "encoder_model_quantized"],
            [["decoder_model", "encoder_model"], ["decoder_model_quantized", "encoder_model_quantized"]],
        ),
        (["model", "model_fp16", "model_q4f16"], [["model"], ["model_fp16"], ["model_q4f16"]]),
        (
            ["decoder-epoch-99-avg-1", "encoder-epoch-99-avg-1", "joiner-epoch-99-avg-1"],
            [["decoder-epoch-99-avg-1", "encoder-epoch-99-avg-1", "joiner-epoch-99-avg-1"]],
        ),
        (["base-decoder", "base-encoder", "tiny-decoder"], [["base-decoder", "base-encoder"], ["tiny-decoder"]]),
        (
            ["tiny-decoder", "tiny-decoder.int8", "tiny-encoder", "tiny-encoder.int8"],
            [["tiny-decoder", "tiny-encoder"], ["tiny-decoder.int8", "tiny-encoder.int8"]],
        ),
        (["decoder_model_merged", "embed_tokens", "vision_encoder"],
         [["decoder_model_merged", "embed_tokens", "vision_encoder"]]),
        (["cached_decode", "encode", "preprocess", "uncached_decode"],
         [["cached_decode", "encode", "preprocess", "uncached_decode"]]),
    ],
)  # fmt: skip
def test_files_are_one_model_only_if_their_names_are_parts_of_one_export(
    tmp_path: Path, stems: list[str], expected: list[list[str]]
) -> None:
    _touch(tmp_path, *(f"{stem}.onnx" for stem in stems))
    assert _groups(tmp_path) == expected


def test_the_path_of_a_model_in_parts_is_its_folder_and_of_a_file_the_file(tmp_path: Path) -> None:
    _touch(tmp_path, "encoder.onnx", "decoder.onnx", "other.onnx")
    assert [path for path, _ in group([tmp_path])] == [tmp_path, tmp_path / "other.onnx"]


def test_a_file_named_alone_is_a_model_alone(tmp_path: Path) -> None:
    _touch(tmp_path, "encoder_model.onnx", "decoder_model.onnx")
    file = tmp_path / "decoder_model.onnx"
    assert group([file]) == [(file, (file,))]


def test_a_manifest_joins_files_of_any_name(tmp_path: Path) -> None:
    _touch(tmp_path, "a.onnx", "b.onnx", "c.onnx")
    manifest = {"model": {"decoder": {"filename": "a.onnx"}, "vision": {"filename": "b.onnx"}}, "search": {}}
    (tmp_path / "genai_config.json").write_text(json.dumps(manifest))
    assert _groups(tmp_path) == [["a", "b"], ["c"]]
    (tmp_path / "genai_config.json").write_text("[" * 100_000)
    assert _groups(tmp_path) == [["a"], ["b"], ["c"]]


def test_shared_external_data_joins_files_of_any_name(tmp_path: Path) -> None:
    body = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [rows("w", 40, 40)], ["x"])
    for name, data in [("a", "shared.bin"), ("b", "shared.bin"), ("c", "own.bin")]:
        made = onnx.load(str(save(tmp_path / f"{name}.onnx", body)))
        (tmp_path / data).unlink(missing_ok=True)
        onnx.save(made, str(tmp_path / f"{name}.onnx"), save_as_external_data=True, location=data)
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 3000)
    assert _groups(tmp_path) == [["a", "b"], ["broken"], ["c"]]
    ((path, files), *_) = group([tmp_path])
    model = load(path, files)
    assert [part.name for part in model.parts] == ["a", "b"]
    assert [weight.id for weight in model.weights] == ["a||w", "b||w"]
    first, second = (weight.storage for weight in model.weights)
    assert first is not None and second is not None and first.region == second.region


def test_owned_are_onnx_files_their_folders_and_their_data_files_even_when_damaged(tmp_path: Path) -> None:
    _touch(tmp_path, "m.onnx", "m.onnx_data", "m.onnx.data", "weights.bin", "sub/onnx/n.onnx", "empty/readme.md")
    _touch(tmp_path, "old.ONNX", "m.onnx.ort/x")
    assert all(owns(tmp_path / name) for name in ("", "m.onnx", "m.onnx_data", "m.onnx.data", "sub", "old.ONNX"))
    assert not any(owns(tmp_path / name) for name in ("weights.bin", "empty"))
    owner = tmp_path / "m.onnx"
    assert group([tmp_path / "m.onnx_data"]) == [(owner, (owner,))]


def test_variants_say_what_they_are_an_alternative_of(tmp_path: Path) -> None:
    stems = "model model_fp16 lone_int8 encoder_model decoder_model decoder_model_merged decoder_with_past_model"
    _touch(tmp_path, *(f"{stem}.onnx" for stem in [*stems.split(), "encoder_model_q4", "decoder_model_q4"]))

    def of(*names: str) -> str | None:
        return alternative_of([tmp_path / f"{name}.onnx" for name in names])

    assert of("model") is None
    assert of("model_fp16") == "model"
    assert of("lone_int8") is None
    assert of("decoder_model_merged") == "decoder_model, decoder_with_past_model"
    assert of("decoder_model_q4", "encoder_model_q4") is not None
    assert of("decoder_model", "decoder_with_past_model", "encoder_model") is None


def test_the_format_is_wired_to_its_parts(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", graph([helper.make_node("Relu", ["w"], ["y"])], [rows("w", 3, 3)]))
    assert FORMAT.owns(path)
    assert FORMAT.group([path]) == [(path, (path,))]
    assert FORMAT.load(path, (path,)).weights == read(path).weights
    assert FORMAT.targets == ("ort-cpu", "ort-cuda")
