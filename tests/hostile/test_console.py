"""The terminal's side: closed, full and narrow outputs, interrupts, limits that are no numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_onnx
from click.testing import CliRunner

from tieaudit.cli import main

COMMAND = [sys.executable, "-m", "tieaudit"]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def shell(line: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line.replace("TIEAUDIT", " ".join(COMMAND))],
        env={**ENVIRONMENT, **more},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line_and_exit_2(tmp_path: Path) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    done = shell(f"TIEAUDIT scan {model} > /dev/full")
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_gone_changes_no_exit_code_and_prints_nothing(tmp_path: Path) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    done = shell(f"set -o pipefail; TIEAUDIT scan {model} --format json | true")
    assert (done.returncode, done.stderr) == (0, "")


COMMANDS = {
    "--help": 0,
    "--version": 0,
    "scan --help": 0,
    "scan MODEL": 0,
    "scan nowhere.onnx": 2,
    "scan --no-such-option": 2,
    "plan MODEL": 0,
    "apply MODEL": 0,
    "apply --undo nowhere": 2,
    "verify --receipt nowhere": 2,
    "explain": 0,
    "explain TIE201": 0,
    "nonsense": 2,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_whether_anybody_reads_an_output_changes_no_exit_code_of_any_command(tmp_path: Path, words: str) -> None:
    given = words.replace("MODEL", str(tiny_onnx.lost(tmp_path / "m.onnx")))
    line = f"TIEAUDIT {given} 2> errors | true; echo ${{PIPESTATUS[0]}}; TIEAUDIT {given} 2>&1 > /dev/null | true; "
    done = shell(f"cd {tmp_path}; {line} echo ${{PIPESTATUS[0]}}")
    assert done.stdout.split() == [str(COMMANDS[words])] * 2
    said = (tmp_path / "errors").read_text()
    assert "Traceback" not in said
    assert "Broken pipe" not in said
    assert bool(said) == bool(COMMANDS[words])


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_traceback(tmp_path: Path, closed: str) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    done = shell(f"TIEAUDIT scan {model} {closed}")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "more",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}],
    ids=["latin-1", "C"],
)
def test_a_terminal_without_the_characters_gets_escapes(tmp_path: Path, more: dict[str, str]) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    for words in ("plan", "scan --format json", "scan"):
        done = shell(f"TIEAUDIT {words} {model}", **more)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("limit", ["nan", "-1", "-inf", "x"])
def test_a_limit_that_nothing_can_exceed_or_meet_is_refused(tmp_path: Path, limit: str) -> None:
    # every comparison with NaN is false: `drift > nan` would deliver whatever the drift is
    model, to = tiny_onnx.untied(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    for words in (["verify", model, model], ["apply", model, "--scheme", "io", "--allow-lossy", "--to", to]):
        result = CliRunner().invoke(main, [*map(str, words), "--max-drift", limit])
        assert result.exit_code == 2
        assert "--max-drift" in result.output
    assert not to.exists()


def test_an_unexpected_error_is_one_line_with_the_command_and_never_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIEAUDIT_TRACEBACK", raising=False)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("tieaudit.commands.plan.choices", fail)
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["plan", str(model)])
    assert result.exit_code == 2
    assert f"error: tieaudit plan {model}: a fault in tieaudit, nothing was delivered: ZeroDivisionError: one two" in (
        result.output
    )
    monkeypatch.setenv("TIEAUDIT_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(main, ["plan", str(model)]).exception, ZeroDivisionError)


STOPPED = """
import importlib, sys, time
module = importlib.import_module('tieaudit.apply')
def wait(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(60)
module.prove_apart = wait
from tieaudit.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_and_prints_no_traceback(tmp_path: Path, number: signal.Signals, code: int) -> None:
    model = tiny_onnx.lost(tmp_path / "m.onnx")
    words = ["apply", str(model), "--to", str(tmp_path / "out.onnx")]
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "writing\n"
            time.sleep(0.1)
            child.send_signal(number)
            _, said = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == code
    assert "Traceback" not in said
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
