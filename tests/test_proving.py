"""The proof runs in a process of its own: its end is a result, its memory is its own, and it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny_onnx
from click.testing import CliRunner, Result

from tieaudit.cli import main

pytest.importorskip("onnxruntime")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    return place


def proving_with(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Let the verifying process run this first; `verify` is the module, `os` and `signal` are there."""
    code = "import os, signal, tempfile\nfrom tieaudit import proving\nfrom importlib import import_module\n"
    code += f"verify = import_module('tieaudit.verify')\n{what}\nproving.serve()"
    monkeypatch.setattr("tieaudit.proving.COMMAND", (sys.executable, "-c", code))


KILLED = "lambda *a, **k: (tempfile.mkdtemp(), os.kill(os.getpid(), signal.SIGKILL))"


def refused(tmp_path: Path, *words: object) -> Result:
    """An apply that delivers nothing and leaves nothing, said in one line."""
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    before = sorted(tmp_path.rglob("*"))
    result = run("apply", source, "--to", tmp_path / "out.onnx", *words)
    assert sorted(tmp_path.rglob("*")) == before
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") <= 2
    return result


def test_a_verifying_process_that_is_killed_is_a_proof_that_could_not_run(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proving_with(monkeypatch, f"verify.structural.check = {KILLED}")
    result = refused(tmp_path)
    assert result.exit_code == 2
    assert (
        "the process that verifies crashed with signal SIGKILL: the system may have run out of memory" in result.stderr
    )
    assert "nothing was delivered" in result.stderr
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("level", "exit_code"), [("structural", 0), ("regional", 2)])
def test_what_was_proved_before_the_process_was_killed_counts(
    level: str, exit_code: int, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proving_with(monkeypatch, f"verify._regional = {KILLED}")
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    result = run("apply", source, "--to", to, "--require", level, "--format", "json")
    assert result.exit_code == exit_code, result.output
    assert to.exists() == (exit_code == 0)
    assert list(scratch.iterdir()) == []
    if exit_code == 0:
        levels = json.loads(result.output)["proof"]["levels"]
        assert [one["outcome"] for one in levels] == ["held", "not run", "not run"]
        assert "SIGKILL" in levels[1]["because"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise MemoryError", "the process that verifies ran out of memory"),
        ("raise SystemExit(7)", "the process that verifies ended with exit code 7"),
        ("from tieaudit.errors import CorruptFile; raise CorruptFile('x.bin: torn', hint='mend it')", "x.bin: torn"),
        ("raise ValueError('odd')", "a fault in tieaudit, nothing was delivered: ValueError: odd"),
        ("raise OSError(28, 'No space left on device', 'y')", "y: the system refused: No space left on device"),
        ("os.write(1, b'noise'); raise MemoryError", "ran out of memory"),
    ],
)
def test_whatever_happens_in_the_verifying_process_is_one_line(
    what: str, said: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proving_with(monkeypatch, f"def bad(*a, **k):\n    {what}\nverify.structural.check = bad")
    result = refused(tmp_path)
    assert result.exit_code == 2
    assert said in result.stderr
    assert list(scratch.iterdir()) == []


def test_a_process_that_cannot_even_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tieaudit.proving.COMMAND", (sys.executable, "-c", "import no_such_module"))
    result = refused(tmp_path)
    assert result.exit_code == 2
    assert "the process that verifies ended with exit code 1" in result.stderr


INTERRUPTED = """
import sys
from tieaudit import proving
code = "import time, tempfile; from importlib import import_module; from tieaudit import proving\\\\n"
code += "verify = import_module('tieaudit.verify')\\\\n"
code += "def wait(*a, **k):\\\\n    with tempfile.TemporaryDirectory():\\\\n"
code += "        print(chr(33), flush=True); time.sleep(600)\\\\n"
code += "verify.structural.check = wait; proving.serve()"
proving.COMMAND = (sys.executable, "-c", code)
proving.TRACEBACK_VARIABLE = "PATH"  # let the process print to our standard error
from tieaudit.cli import main
main(sys.argv[1:])
""".replace("\\\\n", "\\n")


def listens() -> None:
    """A shell's background job ignores the interrupt, and so does every process that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_during_the_proof_ends_its_process_too(number: signal.Signals, tmp_path: Path) -> None:
    source, scratch = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "scratch"
    scratch.mkdir()
    words = ["apply", str(source), "--to", str(tmp_path / "out.onnx")]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *words], env=environment, stderr=subprocess.PIPE, preexec_fn=listens
    ) as child:
        try:
            assert child.stderr is not None
            assert child.stderr.read(1) == b"!"
            child.send_signal(number)
            said = child.communicate(timeout=60)[1]  # ends when the last process that could print has ended
        finally:
            child.kill()
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert b"Traceback" not in said
    if number != signal.SIGKILL:
        assert list(scratch.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "scratch"]
    else:
        assert list(scratch.rglob("tmp*")) == []  # the process tidied up when its parent went


def test_the_peaks_of_writing_verifying_and_running_are_reported_apart(tmp_path: Path) -> None:
    source, to = tiny_onnx.lost(tmp_path / "m.onnx"), tmp_path / "out.onnx"
    result = run("apply", source, "--to", to, "--format", "json")
    facts = json.loads(result.output)["proof"]["facts"]
    peaks = [facts[f"n_bytes_peak_{name}"] for name in ("writing", "verifying", "running")]
    assert all(20e6 < peak < 64e9 for peak in peaks), peaks
    assert len(set(peaks)) == 3
    receipt = json.loads((tmp_path / "out.onnx.receipt.json").read_text())
    assert receipt["proof"]["facts"]["n_bytes_peak_verifying"] == peaks[1]
    text = run("apply", source, "--to", tmp_path / "again.onnx").output
    assert "memory at most: writing " in text
    compared = run("verify", source, to, "--format", "json")
    assert json.loads(compared.output)["proof"]["facts"]["n_bytes_peak_running"] > 20e6


def test_the_users_own_inputs_reach_the_other_process(tmp_path: Path) -> None:
    source = tiny_onnx.lost(tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", ids=np.array([[1, 2, 3]], np.int64))
    result = run("apply", source, "--inputs", tmp_path / "x.npz", "--to", tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    assert "1 input (the given inputs)" in result.output
