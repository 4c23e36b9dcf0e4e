"""Which models a list of paths means: one, several, a pile, variants; and one clear line for what is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_onnx
from click.testing import CliRunner

from tieaudit.cli import main
from tieaudit.errors import UnreadableModel, UsageError
from tieaudit.load import load_one, locate


def found(*paths: object) -> list[tuple[str, tuple[str, ...]]]:
    sources, errors = locate(str(path) for path in paths)
    assert errors == []
    return [(source.path.name, tuple(file.name for file in source.files)) for source in sources]


def copies(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_onnx.lost(folder / names[0])
    for name in names[1:]:
        shutil.copy(folder / names[0], folder / name)
    return folder


def test_an_unrelated_pile_of_files_is_a_pile_of_models(tmp_path: Path) -> None:
    copies(tmp_path, "cat.onnx", "dog.onnx")
    assert found(tmp_path) == [("cat.onnx", ("cat.onnx",)), ("dog.onnx", ("dog.onnx",))]


def test_known_parts_of_one_export_are_one_model_and_its_variants_are_alternatives(tmp_path: Path) -> None:
    names = [f"{stem}{variant}.onnx" for variant in ("", "_int8") for stem in ("decoder_model", "encoder_model")]
    copies(tmp_path / "export", *names)
    plain, variant = found(tmp_path / "export")
    assert plain == ("export", ("decoder_model.onnx", "encoder_model.onnx"))
    assert variant == ("export", ("decoder_model_int8.onnx", "encoder_model_int8.onnx"))
    model = load_one(tmp_path / "export")
    assert [part.name for part in model.parts] == ["decoder_model", "encoder_model"]  # the plain one is the model
    assert "alternative_of" not in model.metadata


def test_a_model_named_twice_is_one_model(tmp_path: Path) -> None:
    copies(tmp_path, "cat.onnx")
    assert found(tmp_path, tmp_path / "cat.onnx", tmp_path / "*.onnx") == [("cat.onnx", ("cat.onnx",))]


def test_models_deep_in_a_folder_are_found_and_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    copies(tmp_path / "a" / "b", "cat.onnx")
    copies(tmp_path / ".git" / "x", "dog.onnx")
    assert found(tmp_path) == [("cat.onnx", ("cat.onnx",))]


def test_one_model_is_expected_where_a_command_takes_one(tmp_path: Path) -> None:
    copies(tmp_path, "cat.onnx", "dog.onnx")
    with pytest.raises(UsageError, match=r"expected one model, found 2: .*cat\.onnx, .*dog\.onnx"):
        load_one(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
        ("m.onnx", b"<!DOCTYPE html><html>Not found</html>", "an HTML page"),
        ("m.onnx", b"", "an empty file"),
        ("m.onnx", b"\xff" * 99, "expected an ONNX model"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer"),
        ("m.safetensors", b"<html>", "m.safetensors"),
        ("m.txt", b"hello", "not a model that tieaudit recognises"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = CliRunner().invoke(main, ["scan", str(tmp_path / name)])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert said in line
    assert str(tmp_path / name) in line


def test_an_empty_folder_a_missing_path_and_a_url_are_one_line_each(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", "https://example.org/model.onnx"):
        _, ((_, message),) = locate([str(path)])
        assert "\n" not in message
        assert str(path) in message


def test_a_link_that_leads_nowhere_and_a_folder_that_contains_itself_do_not_hang(tmp_path: Path) -> None:
    copies(tmp_path / "a", "cat.onnx")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert found(tmp_path) == [("cat.onnx", ("cat.onnx",))]
    (tmp_path / "gone.onnx").symlink_to(tmp_path / "missing")
    with pytest.raises(UnreadableModel, match="symbolic link"):
        load_one(tmp_path / "gone.onnx")


def test_good_models_are_reported_beside_bad_ones_and_the_exit_code_says_so(tmp_path: Path) -> None:
    copies(tmp_path, "cat.onnx")
    (tmp_path / "dog.onnx").write_bytes(b"")
    result = CliRunner().invoke(main, ["scan", str(tmp_path)])
    assert result.exit_code == 2
    assert "TIE202" in result.output
    assert "an empty file" in result.output
