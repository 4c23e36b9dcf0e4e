"""Two thousand models in one run: bounded memory, a sign of life on a terminal, and a second run that reads nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gate_models import OTHER, W, save

N = 2_000
N_EXTRA_BYTES = 20_000
"""Of the main process for each model: an answer takes some 3 kB, and is held once as a noun and once as text."""
MEASURED = """
import atexit, runpy, sys
from pathlib import Path
def report(file=sys.argv[1]):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path(file).write_text(status["VmHWM"].split()[0])
if __name__ == "__main__":  # processes that are spawned read this file again
    atexit.register(report)
    sys.argv[:] = sys.argv[1:]
    runpy.run_module("tieaudit", run_name="__main__", alter_sys=False)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("many")
    for index in range(N):
        save(home / f"{index // 50:02d}" / f"{index:04d}.safetensors", {"a": W, "b": OTHER if index % 5 else W.copy()})
    return home


def check(home: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """What a run says, and the most memory that its main process took, in bytes."""
    script, peak = home.parent / "measured.py", home.parent / "peak.txt"
    script.write_text(MEASURED)
    command = [sys.executable, str(script), str(peak), "check", "--format", "json", *arguments]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stderr == ""  # no progress where nobody looks
    return json.loads(done.stdout), 1024 * int(peak.read_text())


def test_two_thousand_models_take_bounded_memory_and_cost_nothing_the_second_time(models: Path) -> None:
    _, few = check(models, "--jobs", "2", "--no-cache", *(f"{index:02d}" for index in range(4)))  # 200 models
    cold, many = check(models, "--jobs", "2")
    assert len(cold["models"]) == N
    assert sum(len(model["findings"]) for model in cold["models"]) == N // 5
    assert not any(model["cached"] for model in cold["models"])
    assert (many - few) / (N - 200) < N_EXTRA_BYTES
    warm, _ = check(models, "--jobs", "2")
    assert all(model["cached"] for model in warm["models"])
    assert [_settled(model) for model in warm["models"]] == [_settled(model) for model in cold["models"]]
    save(models / "07" / "0350.safetensors", {"a": W, "c": W.copy()})
    third, _ = check(models, "--jobs", "2")
    assert [model["path"] for model in third["models"] if not model["cached"]] == ["07/0350.safetensors"]


def _settled(model: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name != "cached"}


def test_progress_is_shown_on_a_terminal_only(models: Path) -> None:
    command = [sys.executable, "-m", "tieaudit", "check", "--no-cache", "--jobs", "1", "00", "01"]
    parent, child = pty.openpty()
    running = subprocess.Popen(
        command, cwd=models, stdout=subprocess.PIPE, stderr=child, env={**os.environ, "TERM": "xterm"}
    )
    os.close(child)
    seen = b""
    while True:
        try:
            block = os.read(parent, 4096)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        seen += block
    out, _ = running.communicate()
    os.close(parent)
    assert b"checking" in seen
    assert b"/100" in seen
    assert b"checking" not in out
    assert b"\x1b" not in out
