"""The command `tieaudit check` in hostile places: pipes and devices for files, names that act, answers that lie."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gate_models import OTHER, W, old, save

from tieaudit.cached import FOLDER
from tieaudit.cli import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tieaudit(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def bad(name: str = "a.safetensors") -> Path:
    """A model with one finding, TIE201."""
    return save(Path(name), {"a": W, "b": W.copy()})


def known(file: str) -> list[str]:
    return [entry["path"] for entry in json.loads(Path(file).read_text())["findings"]]


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("place", ["tieaudit.toml", "tieaudit.lock", "baseline", "groups"])
@pytest.mark.parametrize("what", ODD)
def test_what_is_no_file_is_refused_at_once_in_one_line(place: str, what: str) -> None:
    bad()
    if place == "groups":
        Path("tieaudit.toml").write_text("expect = ['custom:groups']\n")
    ODD[what](Path(place))
    words = [sys.executable, "-m", "tieaudit", "check", *(["--baseline", place] if place == "baseline" else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)  # waits for no writer
    assert done.returncode == 2
    assert place in done.stderr + done.stdout
    assert "fault" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", ["nowhere", "tieaudit.toml"])
def test_a_policy_that_is_a_link_to_nowhere_does_not_open_the_gate(target: str) -> None:
    bad()
    Path("tieaudit.toml").symlink_to(target)
    done = tieaudit("check")
    assert done.exit_code == 2
    assert "tieaudit.toml: cannot be read" in done.stderr


def test_a_policy_beside_the_way_up_rules_nothing() -> None:
    bad("there/a.safetensors")
    Path("here").mkdir()
    Path("here/tieaudit.toml").write_text("ignore = ['ALL']\n")
    os.chdir("here")
    done = tieaudit("check", "../there")
    assert done.exit_code == 1  # not 0: `here` is no folder above `there`, though "here/../there" begins with it
    assert "TIE201" in done.stdout


def test_a_policy_may_begin_with_a_byte_order_mark_and_have_windows_line_ends() -> None:
    bad()
    Path("tieaudit.toml").write_bytes(b"\xef\xbb\xbfignore = ['TIE201']\r\nfail-on = 'info'\r\n")
    assert tieaudit("check").exit_code == 0


@pytest.mark.parametrize("scheme", ["custom:missing.toml", "custom:", "custom:a\\u0000b", "cycle:banana"])
def test_an_expected_scheme_that_cannot_be_is_the_user_s_error_and_no_crash(scheme: str) -> None:
    bad()
    Path("tieaudit.toml").write_text(f'expect = ["{scheme}"]\n')
    done = tieaudit("check")
    assert done.exit_code == 2
    assert "fault" not in done.stdout + done.stderr
    assert "expected" in done.output or "cannot be read" in done.output


def test_two_reports_in_one_format_are_both_written() -> None:
    bad()
    assert tieaudit("check", "--report", "json=one", "--report", "json=two").exit_code == 1
    assert json.loads(Path("one").read_text()) == json.loads(Path("two").read_text())


def test_a_report_for_a_folder_that_is_not_there_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad()
    monkeypatch.setattr("tieaudit.patrol.patrol", lambda *_: pytest.fail("it was run"))
    done = tieaudit("check", "--report", "json=no/where.json")
    assert done.exit_code == 2
    assert "found no no" in done.stderr


def test_a_report_goes_through_a_pipe_and_a_device_and_replaces_neither() -> None:
    bad()
    os.mkfifo("pipe")
    reader = subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE)
    assert tieaudit("check", "--report", "json=pipe", "--report", "sarif=/dev/null").exit_code == 1
    out, _ = reader.communicate(timeout=30)
    assert json.loads(out)["schema"] == "tieaudit/check/1"
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_report_that_cannot_be_written_costs_exit_code_2_and_neither_the_result_nor_the_other_report() -> None:
    bad()
    done = tieaudit("check", "--report", "json=.", "--report", "sarif=there")
    assert done.exit_code == 2
    assert "TIE201" in done.stdout
    assert ".: cannot be written" in done.stderr or ".: expected a file" in done.stderr
    assert json.loads(Path("there").read_text())["version"] == "2.1.0"


def test_a_baseline_is_never_written_in_the_place_of_a_pipe() -> None:
    bad()
    os.mkfifo("known")
    done = tieaudit("check", "--baseline", "known", "--write-baseline")
    assert done.exit_code == 2
    assert stat.S_ISFIFO(os.stat("known").st_mode)


def test_a_baseline_of_some_models_keeps_what_it_knew_of_the_others() -> None:
    bad("a.safetensors")
    bad("b.safetensors")
    tieaudit("check", "--write-baseline")
    assert known("tieaudit-baseline.json") == ["a.safetensors", "b.safetensors"]
    save(Path("a.safetensors"), {"a": W, "b": OTHER})
    tieaudit("check", "a.safetensors", "--write-baseline")
    assert known("tieaudit-baseline.json") == ["b.safetensors"]  # not []: nobody looked at b
    Path("b.safetensors").unlink()
    tieaudit("check", "--write-baseline")
    assert known("tieaudit-baseline.json") == []


def test_a_baseline_keeps_what_it_knew_of_a_model_that_cannot_be_read_now() -> None:
    bad("a.safetensors")
    whole = bad("b.safetensors").read_bytes()
    tieaudit("check", "--write-baseline")
    Path("b.safetensors").write_bytes(whole[:-1])
    done = tieaudit("check", "--write-baseline")
    assert done.exit_code == 2
    assert known("tieaudit-baseline.json") == ["a.safetensors", "b.safetensors"]


NAMES = (b"::error::a", b"x\n::error::b", b"##[error]c", b"\x1b[2J", b"\xff\xfe", "\u202ed".encode())


def test_names_are_no_commands_in_what_lock_and_diff_print() -> None:
    files = [str(bad(f"{os.fsdecode(name)}.safetensors")) for name in NAMES]
    printed = [tieaudit("lock"), *(tieaudit("diff", files[0], name) for name in files[1:])]
    for done in printed:
        assert done.exit_code == 0
        for line in done.output.splitlines():
            assert not line.lstrip().startswith("::")
            assert "##[" not in line
            assert line.isprintable()


def test_a_note_on_standard_error_is_no_command() -> None:
    bad()
    Path("tieaudit.toml").write_text('lock = "::error::x"\n')
    gone = 'version = 1\n[model."gone"]\nformat = "onnx"\nn_bytes = 0\nn_bytes_duplicate = 0\nties = []\n'
    Path("::error::x").write_text(gone)
    done = tieaudit("check")
    assert "holds gone, which is not there" in done.stderr
    assert not any(line.startswith("::") for line in done.stderr.splitlines())


LIES: dict[str, tuple[str, object]] = {
    "an unknown severity": ("severity", "fatal"),
    "a severity that cannot be looked up": ("severity", ["error"]),
    "a line below zero": ("line", -5),
    "a line that is a text": ("line", "7"),
    "a negative number of bytes": ("n_bytes", -1),
    "a count that is true": ("n_weights", True),
    "ids that are numbers": ("ids", [1, 2]),
    "a message that is a list": ("message", ["x"]),
    "evidence that is a list": ("evidence", []),
    "a fix of no known safety": ("safety", "harmless"),
    "notes that are numbers": ("notes", [1]),
    "an exit code that there is none of": ("exit_code", 77),
}


def _lying(document: object, key: str, value: object) -> object:
    if isinstance(document, dict):
        return {name: value if name == key else _lying(inner, key, value) for name, inner in document.items()}
    return [_lying(inner, key, value) for inner in document] if isinstance(document, list) else document


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_lies_about_its_types_is_asked_anew(lie: str) -> None:
    old(bad())
    os.utime(".", (1, 1))
    first = tieaudit("check", "--format", "json")
    tieaudit("check")
    for file in Path(FOLDER).rglob("*.json"):
        file.write_text(json.dumps(_lying(json.loads(file.read_text()), *LIES[lie])))
    again = tieaudit("check", "--format", "json")
    assert (again.exit_code, again.stderr) == (first.exit_code, first.stderr)
    assert json.loads(again.stdout)["models"][0]["findings"] == json.loads(first.stdout)["models"][0]["findings"]


@pytest.mark.parametrize("what", ["a pipe", "a device without end"])
def test_an_answer_that_is_no_file_is_asked_anew(what: str) -> None:
    old(bad())
    tieaudit("check")
    for file in list(Path(FOLDER).rglob("*.json")):
        file.unlink()
        ODD[what](file)
    done = subprocess.run([sys.executable, "-m", "tieaudit", "check"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
