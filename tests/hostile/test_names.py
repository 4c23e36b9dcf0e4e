"""Names out of files are untrusted: whatever they hold, a terminal shows text, JSON is ASCII, a line stays a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main
from tieaudit.formats.huggingface import asking

NAMES = {
    "escape codes": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "a line of its own": "w\nerror: forged\r\x0b\x0c\u2028",
    "right to left": "\u202egnp.weight\u2066\u200f",
    "invisible": "\u200b\u00ad\ufeff\u2060\U000e0041",
    "64 KiB": "n" * 65536,
    "64 KiB of escape codes": "\x1b" * 65536,
    "an option": "--to",
    "markup": "[bold red]w[/nothing] {x} %s \\",
    "separators": "a|b%7Cc/d, e @ f",
    "blank": " \u3000",
}


def run(*words: object) -> Result:
    """The command as a user runs it; nothing but its own exit may come out."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "a fault in tieaudit" not in result.output
    return result


def checked(result: Result, *codes: int) -> str:
    """The output, which shows what it holds, in lines of a bearable length that no name has begun."""
    assert result.exit_code in codes, result.output[:3000]
    odd = {sign for sign in result.output if not sign.isprintable() and sign != "\n"}
    assert odd == set()
    assert not any(line.startswith("error: forged") for line in result.output.splitlines())
    assert max(map(len, result.output.splitlines()), default=0) < 5000
    return result.output


def checked_json(result: Result, *codes: int) -> str:
    """The output, which is JSON in ASCII."""
    assert result.exit_code in codes, result.output[:3000]
    assert result.stdout.isascii()
    assert not {sign for sign in result.output if not sign.isprintable() and sign != "\n"}
    if result.stdout or result.exit_code != 2:  # what was refused before there was a result is an error in a line
        json.loads(result.stdout)
    return result.stdout


def renamed(path: Path, name: str) -> Path:
    """The lost tie of `tiny_onnx` with one name in every place that a name can have."""
    model = onnx.load(str(tiny_onnx.lost(path)))
    new = {"wte.weight": f"{name}1", "lm_head.weight_T": f"{name}2"}
    for tensor in model.graph.initializer:
        tensor.name = new[tensor.name]
    for place, node in enumerate(model.graph.node):
        node.input[:] = [new.get(one, one) for one in node.input]
        node.name = f"{name}{place}"
    model.graph.name = model.producer_name = model.doc_string = name
    model.metadata_props.add(key=name, value=name)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(autouse=True)
def _no_class_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "installed", lambda: False)


@pytest.mark.parametrize("case", NAMES)
def test_a_name_in_an_onnx_file_is_text_in_scan_and_plan(tmp_path: Path, case: str) -> None:
    path = renamed(tmp_path / "m.onnx", NAMES[case])
    assert "TIE202" in checked(run("scan", path), 0)
    assert json.dumps(NAMES[case])[1:-1] in checked_json(run("scan", path, "--format", "json"), 0)
    for scheme in ("dedup", "io", "untie", "declare"):
        checked(run("plan", path, "--scheme", scheme), 0, 2)
        checked_json(run("plan", path, "--scheme", scheme, "--format", "json"), 0, 2)


ALL_IN_ONE = "".join(name[:40] for name in NAMES.values())


@pytest.mark.parametrize("name", [ALL_IN_ONE, "\x1b" * 65536], ids=["of all kinds", "64 KiB"])
def test_a_name_in_an_onnx_file_is_text_in_apply_verify_and_their_receipt(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime")
    path, to = renamed(tmp_path / "m.onnx", name), tmp_path / "out.onnx"
    checked(run("apply", path, "--to", to, "--device", "cpu"), 0)
    receipt = tmp_path / "out.onnx.receipt.json"
    text = receipt.read_text()
    assert text.isascii() and not {sign for sign in text if not sign.isprintable() and sign != "\n"}
    checked(run("verify", "--receipt", receipt), 0)
    checked(run("verify", path, to, "--device", "cpu"), 0)
    checked_json(run("verify", path, to, "--device", "cpu", "--format", "json"), 0)
    checked(run("apply", "--undo", receipt), 0)
    assert not to.exists()
    checked_json(run("apply", path, "--to", to, "--device", "cpu", "--format", "json"), 0)
    to.write_bytes(b"changed")
    checked(run("verify", "--receipt", receipt), 1)
    checked(run("apply", "--undo", receipt), 2)


def write_folder(home: Path, name: str, config: dict[str, object] | None) -> Path:
    """A checkpoint in which two equal tensors, a documented alias and (if given) the class have that name."""
    table = np.arange(32, dtype=np.float32).tobytes() * 20
    header: dict[str, object] = {"__metadata__": {f"{name}3": f"{name}1", name: name}}
    for place in (1, 2):
        at = [(place - 1) * len(table), place * len(table)]
        header[f"{name}{place}"] = {"dtype": "F32", "shape": [20, 32], "data_offsets": at}
    text = json.dumps(header).encode()
    (home / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + 2 * table)
    if config is not None:
        (home / "config.json").write_text(json.dumps(config))
        return home
    return home / "model.safetensors"


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("case", NAMES)
def test_a_name_in_a_checkpoint_is_text_in_every_command(tmp_path: Path, case: str, with_config: bool) -> None:
    name = NAMES[case]
    config: dict[str, object] = {"model_type": name, "architectures": [name], "tie_word_embeddings": True}
    path = write_folder(tmp_path, name, config if with_config else None)
    checked(run("scan", path), 0)
    checked_json(run("scan", path, "--format", "json"), 0)
    for scheme in ("dedup", "io", "untie", "declare"):
        checked(run("plan", path, "--scheme", scheme), 0, 2)
        checked_json(run("plan", path, "--scheme", scheme, "--format", "json"), 0, 2)
    checked(run("apply", path, "--to", tmp_path / "out"), 0, 2)


@pytest.mark.parametrize("case", NAMES)
def test_a_name_in_an_error_is_text_and_cut(tmp_path: Path, case: str) -> None:
    name = NAMES[case]
    header = json.dumps({name: {"dtype": name, "shape": [name], "data_offsets": name}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    index = {"weight_map": {name: "b.safetensors", f"{name}2": "../" + name}}
    (tmp_path / "b.safetensors.index.json").write_text(json.dumps(index))
    tensor = onnx.TensorProto(name=name, data_type=1, dims=[3], raw_data=b"short")
    model = onnx.helper.make_model(onnx.helper.make_graph([], name, [], [], [tensor]))
    (tmp_path / "c.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "receipt.json").write_text(
        json.dumps({"schema": name, "input": name, "output": {"files": {name: name}}})
    )
    for file in ("a.safetensors", "b.safetensors.index.json", "c.onnx"):
        for words in (["scan"], ["plan"], ["verify", tmp_path / "a.safetensors"], ["apply"]):
            checked(run(*words, tmp_path / file), 2)
        checked_json(run("scan", tmp_path / file, "--format", "json"), 2)
    checked(run("verify", "--receipt", tmp_path / "receipt.json"), 2)
    checked(run("apply", "--undo", tmp_path / "receipt.json"), 2)
    checked(run("explain", name), 2)
    checked(run("plan", tmp_path / "c.onnx", "--scheme", name), 2)


@pytest.mark.parametrize(
    "name", ["\x1b[2J.onnx", "a\nerror: forged.onnx", "\u202exnno.onnx", "[red]x.onnx", "-.onnx", "n" * 250 + ".onnx"]
)
def test_the_name_of_a_file_is_text_in_every_command_and_on_a_terminal(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_onnx.lost(tmp_path / "m.onnx").rename(tmp_path / name)
    checked(run("scan", path), 0)
    checked(run("scan", tmp_path), 0)
    checked(run("plan", path), 0)
    checked(run("scan", path / "x"), 2)
    path.write_bytes(b"nothing")
    checked(run("scan", path), 2)
    tiny_onnx.lost(path)
    monkeypatch.setattr("tieaudit.console.on_terminal", lambda stream: True)
    assert run("scan", path).exit_code == 0  # the progress line must not take a name for markup


def test_names_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    path = renamed(tmp_path / "m.onnx", "NAME")
    path.write_bytes(path.read_bytes().replace(b"NAME", b"\xed\xa0\x80\xff"))  # half a character, and no UTF-8
    for words in (["scan"], ["plan"], ["apply"], ["verify", path]):
        (line,) = checked(run(*words, path), 2).strip().splitlines()
        assert "UTF-8" in line
