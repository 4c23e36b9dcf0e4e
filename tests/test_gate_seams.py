"""Where the gate meets what is around it: the work tree of git, replacements that were killed, the terminal, two runs
at once. Each through the real command."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_onnx
from click.testing import CliRunner, Result
from gate_models import W, save

from tieaudit import journal
from tieaudit.cli import main
from tieaudit.locked import NAME, read_lock
from tieaudit.replacing import alone

HOSTILE = "m\x1b[31m\n::error::x"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")


def tieaudit(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), prog_name="tieaudit")


# --- the top of the work tree ---


def places_and_prints(*words: str) -> dict[str, list[tuple[str, str]]]:
    """What each format for a service says of findings: (path, fingerprint); errors and notifications among them."""
    (sarif,) = json.loads(tieaudit("check", "--format", "sarif", *words).stdout)["runs"]
    results = [*sarif["results"], *sarif["invocations"][0]["toolExecutionNotifications"]]
    found = {
        "sarif": [
            (
                one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"],
                one.get("partialFingerprints", {}).get("primaryLocationLineHash", ""),
            )
            for one in results
        ]
    }
    entries = json.loads(tieaudit("check", "--format", "gitlab", *words).stdout)
    found["gitlab"] = [(one["location"]["path"], one["fingerprint"]) for one in entries]
    lines = tieaudit("check", "--format", "github", *words).stdout.splitlines()
    found["github"] = [(line.split("file=")[1].split(",")[0], "") for line in lines if line.startswith("::")]
    return found


def test_services_are_told_paths_from_the_top_of_the_work_tree_wherever_the_check_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(Path("models/deep/m.safetensors"), {"a": W, "b": W.copy()})
    Path("models/broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    Path(".git").mkdir()
    from_the_top = places_and_prints("models")
    for name, found in from_the_top.items():
        assert {path for path, _ in found} == {"models/deep/m.safetensors", "models/broken.safetensors"}, name
    monkeypatch.chdir("models/deep")
    assert places_and_prints("..") == from_the_top
    assert places_and_prints("..") == from_the_top  # as remembered
    (document,) = json.loads(tieaudit("check", "--format", "json").stdout)["models"]
    assert document["path"] == "m.safetensors"  # for whoever sits here
    shutil.rmtree("../../.git")
    assert {path for path, _ in places_and_prints()["sarif"]} == {"m.safetensors"}


# --- replacements that were killed ---


def killed_in_place(home: Path, monkeypatch: pytest.MonkeyPatch, n_made: int = 0) -> None:
    """A lost tie with external data, and a fix in place that dies when so many of its files are replaced."""
    home.mkdir()
    tiny_onnx.lost(home / "m.onnx", external=True)
    module = sys.modules["tieaudit.exchange"]
    real, calls = module._make, []

    def dies(book: journal.Journal, number: int, step: journal.Step) -> None:
        calls.append(number)
        if len(calls) > n_made:
            raise SystemExit
        real(book, number, step)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_make", dies)
        patched.setattr(journal, "roll_back", lambda book: sys.exit())
        tieaudit("check", str(home), "--fix", "--in-place", "--require", "structural")
    assert journal.interrupted(home) != []


@pytest.mark.parametrize("words", [(), ("models",), ("models/m.onnx",), ("models/m.onnx.data",), ("models/*.onnx",)])
def test_until_a_killed_replacement_is_put_back_no_check_is_clean(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_place(Path("models"), monkeypatch)  # before it began: what is there can be read, and looks clean
    Path("tieaudit.toml").write_text('ignore = ["ALL"]\n')
    for _ in range(2):
        done = tieaudit("check", *words, "--exit-zero")
        assert done.exit_code == 2
        assert "models: a replacement of its files was begun and has not ended" in " ".join(done.output.split())
    done = tieaudit("check", *words, "--fix", "--in-place")
    assert "everything is as it was before it" in done.output
    assert tieaudit("check", *words).exit_code == 0


def test_the_rest_of_a_replacement_that_has_ended_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_in_place(Path("models"), monkeypatch, n_made=1)
    (begun,) = journal.interrupted(Path("models"))
    found = journal.read(begun)
    assert found is not None
    journal.roll_back(found)
    journal.close(found)
    Path("tieaudit.toml").write_text('ignore = ["ALL"]\n')
    assert tieaudit("check").exit_code == 0


# --- the terminal ---


def harmless(output: str) -> bool:
    return "\x1b" not in output and not any(line.lstrip().startswith("::") for line in output.splitlines())


def test_what_is_said_of_fixes_cannot_act_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_in_place(Path(HOSTILE), monkeypatch)
    for words in (("--diff",), ("--format", "github"), (), ("--fix", "--to", "../out"), ("--fix", "--in-place")):
        done = tieaudit("check", *words)
        assert "m\\x1b[31m\\x0a::error::x" in done.output
        assert harmless(done.stdout if "github" not in words else done.stderr), words
        assert harmless(done.stderr), words
    tiny_onnx.lost(Path(HOSTILE, "m.onnx"), external=True)
    Path("../out").mkdir(exist_ok=True)
    from tieaudit import overhaul
    from tieaudit.errors import RewriteRefused

    def refuses(*arguments: object) -> None:
        raise RewriteRefused(f"{HOSTILE}/m.onnx: refused")

    monkeypatch.setattr(overhaul, "_planned", refuses)
    for words in (("--diff",), ("--fix", "--in-place")):
        done = tieaudit("check", *words)
        assert "not mended, refused: m\\x1b[31m\\x0a::error::x/m.onnx: refused" in done.output
        assert harmless(done.output), words


# --- two models of one folder ---


def lost_export(home: Path, suffix: str = "") -> None:
    home.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(("encoder_model", "decoder_model")):
        table = tiny_onnx.table(number)
        tiny_onnx.language_model(home / f"{part}{suffix}.onnx", table, table.T)


def two_variants(home: Path, fixtures_dir: Path) -> int:
    lost_export(home)
    lost_export(home, "_fp16")
    return 2


def a_folder_and_its_exports(home: Path, fixtures_dir: Path) -> int:
    shutil.copytree(fixtures_dir / "gpt_decoder" / "hf_lost", home)
    lost_export(home)
    (home / "onnx").mkdir()
    tiny_onnx.lost(home / "onnx" / "model.onnx")
    return 3


@pytest.mark.parametrize("make", [two_variants, a_folder_and_its_exports], ids=lambda one: one.__name__)
@pytest.mark.parametrize("named", ["p", "."])
def test_models_that_share_a_folder_are_mended_into_one(
    make: Callable[[Path, Path], int], named: str, fixtures_dir: Path
) -> None:
    n_models = make(Path("p"), fixtures_dir)
    before = {path: path.read_bytes() for path in Path("p").rglob("*") if path.is_file()}
    assert tieaudit("check").exit_code == 1
    done = tieaudit("check", named, "--fix", "--to", "../out", "--require", "structural")
    assert done.exit_code == 0, done.output
    assert done.output.count("\nmended ") + done.output.startswith("mended ") == n_models
    assert {path: path.read_bytes() for path in Path("p").rglob("*") if path.is_file()} == before
    there = Path("../out") if named == "p" else Path("../out/p")
    assert {path.relative_to(there) for path in there.rglob("*.onnx")} == {
        path.relative_to("p") for path in before if path.suffix == ".onnx"
    }
    assert tieaudit("check", str(there)).exit_code == 0
    refused = tieaudit("check", named, "--fix", "--to", "../out", "--require", "structural")
    assert refused.exit_code != 0  # what somebody has is nobody's to be mended


# --- two runs at once ---


@pytest.mark.parametrize("words", [("a",), ()], ids=["one model", "all models"])
def test_two_runs_that_lock_at_once_keep_what_each_has_locked(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        save(Path(name, "m.safetensors"), {"a": W, "b": W.copy()})
    assert tieaudit("lock", "c").exit_code == 0
    Path("b").rename("../b")
    module = sys.modules["tieaudit.commands.lock"]
    real = module._locked

    def locks_slowly(*arguments: Any) -> Any:
        found = real(*arguments)
        Path("../b").rename("b")  # meanwhile somebody adds a model, and another run locks it
        patched.setattr(module, "_locked", real)
        assert tieaudit("lock", "b").exit_code == 0
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, "_locked", locks_slowly)
        assert tieaudit("lock", *words).exit_code == 0
    assert list(read_lock(Path(NAME))) == ["a/m.safetensors", "b/m.safetensors", "c/m.safetensors"]


def test_what_is_written_alone_is_not_written_by_two_at_once(tmp_path: Path) -> None:
    held, tried = threading.Event(), threading.Event()
    order: list[str] = []

    def second() -> None:
        held.wait(60)
        tried.set()
        with alone(tmp_path / "file"):
            order.append("second")

    other = threading.Thread(target=second, daemon=True)
    other.start()
    with alone(tmp_path / "file"):
        held.set()
        tried.wait(60)
        time.sleep(0.2)
        order.append("first")
    other.join(60)
    assert order == ["first", "second"]
    assert list(tmp_path.glob("file*")) == []
