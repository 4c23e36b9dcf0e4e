"""Whole processes, measured: wall time from start to exit, peak resident memory, what they printed, how they failed.

This module imports no numpy, and neither may whoever starts processes: on Linux the peak of a child begins at the
resident memory of the process that starts it.
"""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Command = Sequence[str | Path]
TIMEOUT_SECONDS = 120.0
BUDGET_SECONDS = 10.0
"""After this long a program is not repeated again; it is timed at least once."""
# compiled modules may be kept, as pip keeps them for every installed peer: the run that is not counted compiles ours
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "NO_COLOR": "1",
}


@dataclass(frozen=True)
class Run:
    """One process from start to exit."""

    seconds: float
    peak_bytes: int
    """Largest resident set of the process or of one that it started and waited for."""
    exit_code: int
    """Negative: ended by that signal."""
    stdout: str
    stderr: str
    timed_out: bool = False

    @property
    def error(self) -> str:
        """Why it did not succeed, in one line; empty if it did."""
        if self.timed_out:
            return f"not finished after {self.seconds:.0f} s"
        if self.exit_code == 0:
            return ""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"ended with exit code {self.exit_code}"
        return said.replace(f"{ROOT}{os.sep}", "").removeprefix("error: ")[:200]


@dataclass(frozen=True)
class Measured:
    """One command, repeated."""

    seconds: tuple[float, ...]
    peak_bytes: int
    """Largest of any repeat."""
    stdout: str
    """Of the last repeat."""
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        if self.error:
            return {"error": self.error}
        return {"seconds": [round(one, 4) for one in self.seconds], "peak_bytes": self.peak_bytes}


def run(
    command: Command,
    *,
    timeout: float = TIMEOUT_SECONDS,
    environment: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
) -> Run:
    """Start a command and wait for it. `keep`: file descriptors that it inherits."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            pass_fds=keep,
        )
        expired = threading.Event()

        def end() -> None:
            expired.set()
            child.kill()

        alarm = threading.Timer(timeout, end)
        alarm.start()
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        alarm.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Run(seconds, peak, child.returncode, _text(out), _text(err), expired.is_set())


def _text(file: Any) -> str:
    file.seek(0)
    return bytes(file.read()).decode("utf-8", "replace")


def repeated(
    command: Command,
    n_repeats: int,
    *,
    timeout: float = TIMEOUT_SECONDS,
    environment: Mapping[str, str] | None = None,
    budget: float = BUDGET_SECONDS,
    warm: bool = False,
) -> Measured:
    """Once to warm up (the system's file cache, compiled modules), then `n_repeats` times while `budget` seconds last.

    `warm`: something else has done the warming up.
    """
    runs: list[Run] = []
    spent = 0.0
    for repeat in range(int(warm), n_repeats + 1):
        one = run(command, timeout=timeout, environment=environment)
        if one.error:
            return Measured((), 0, "", one.error)
        if repeat:
            runs.append(one)
        spent += one.seconds
        if runs and spent > budget:
            break
    return Measured(tuple(one.seconds for one in runs), max(one.peak_bytes for one in runs), runs[-1].stdout)


TIEAUDIT = (sys.executable, "-m", "tieaudit")
"""This checkout, since commands run in its folder."""

_OBSERVER = """
import atexit, os, sys
def report(handle=int(sys.argv[1])):
    status = dict(line.split(':', 1) for line in open('/proc/self/status'))
    own = int(status['VmHWM'].split()[0]) * 1024
    os.write(handle, repr((own, sorted(sys.modules))).encode())
atexit.register(report)
import runpy
sys.argv[:] = sys.argv[1:]
runpy.run_module('tieaudit', run_name='__main__', alter_sys=True)
"""


@dataclass(frozen=True)
class Observed:
    """What a tieaudit process says about itself when it ends. Not timed: looking costs time."""

    run: Run
    own_peak_bytes: int
    """Without the processes it started."""
    modules: frozenset[str]
    """Everything that was imported."""

    @property
    def packages(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self.modules)


def observe(arguments: Command, *, timeout: float = TIMEOUT_SECONDS, **environment: str) -> Observed:
    """`tieaudit ARGUMENTS…` with a report at its end; none from a process that was killed. Linux only."""
    with tempfile.TemporaryFile() as report:
        handle = report.fileno()
        command = [sys.executable, "-c", _OBSERVER, str(handle), *arguments]
        done = run(command, timeout=timeout, environment=environment, keep=[handle])
        text = _text(report)
    if not text and not done.error:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: ended well, but without a report")
    own, modules = ast.literal_eval(text) if text else (0, ())
    return Observed(done, own, frozenset(modules))
