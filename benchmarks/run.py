"""Time and memory of `tieaudit scan` as a whole process, beside peers that are installed; writes docs/benchmarks.md.

    python benchmarks/run.py [--megabytes 64 256] [--repeats 5] [--out docs/benchmarks.md]

Every program reads the same generated model and does its own job: tieaudit reports (equal and transposed, exactly),
the others rewrite in memory (equal only). All are timed from start to exit, imports and loading included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tieaudit import __version__  # noqa: E402 - runs as a script, from any folder


@dataclass(frozen=True)
class Program:
    """Something to time: Python code that gets the model's path as its argument."""

    name: str
    does: str
    package: str
    code: str


PROGRAMS = (
    Program(
        "`tieaudit scan`",
        "reports equal and transposed copies",
        "tieaudit",
        "import sys; from tieaudit.cli import main; main(['scan', sys.argv[1], '--format', 'json'])",
    ),
    Program(
        "onnx-ir `DeduplicateHashedInitializersPass`",
        "merges equal copies",
        "onnx-ir",
        "import sys, onnx_ir as ir\n"
        "from onnx_ir.passes.common import DeduplicateHashedInitializersPass as P\n"
        "P()(ir.load(sys.argv[1]))",
    ),
    Program(
        "onnxoptimizer `eliminate_duplicate_initializer`",
        "merges equal copies",
        "onnxoptimizer",
        "import sys, onnx, onnxoptimizer\n"
        "onnxoptimizer.optimize(onnx.load(sys.argv[1]), ['eliminate_duplicate_initializer'])",
    ),
    Program("`onnx.load`", "only loads, for scale", "onnx", "import sys, onnx; onnx.load(sys.argv[1])"),
)


@dataclass(frozen=True)
class Measured:
    """One program on one model."""

    program: Program
    seconds: float
    """Median of the repeats, wall clock."""
    peak_bytes: int
    """Largest resident set of any repeat."""


def measure(program: Program, path: Path, n_repeats: int) -> Measured:
    """Run it `n_repeats` times, and once before that so that the file is in the system's cache for all."""
    seconds, peaks = [], []
    for repeat in range(n_repeats + 1):
        begin = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-c", program.code, str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{program.name} ended with exit code {child.returncode}")
        if repeat:
            seconds.append(time.perf_counter() - begin)
            peaks.append(used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return Measured(program, statistics.median(seconds), max(peaks))


def installed() -> list[tuple[Program, str]]:
    """The programs that can run here, with their versions."""
    found = []
    for program in PROGRAMS:
        try:
            own = program.package == "tieaudit"  # this checkout, installed or not
            found.append((program, __version__ if own else importlib.metadata.version(program.package)))
        except importlib.metadata.PackageNotFoundError:
            print(f"{program.package} is not installed: left out", file=sys.stderr)
    return found


def page(results: Sequence[tuple[int, Sequence[Measured]]], n_repeats: int) -> str:
    """The text of docs/benchmarks.md."""
    versions = ", ".join(f"{program.package} {version}" for program, version in installed())
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; do not edit. Whole processes, from start to exit, imports and loading included: the",
        f"median of {n_repeats} runs with a warm file cache, and the largest resident memory of any. The models are",
        "generated: float32 matrices of one shape in external data, the last one a transposed copy of the first. The",
        "peers merge equal copies and do not look for transposed ones; they are here for scale, not as a contest.",
        "",
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}; {versions}.",
    ]
    for n_bytes, rows in results:
        lines += ["", f"## {n_bytes / 2**20:,.0f} MiB of weights", ""]
        lines += ["| program | what it does | seconds | peak MiB |", "|---|---|--:|--:|"]
        for row in rows:
            program = row.program
            lines.append(f"| {program.name} | {program.does} | {row.seconds:.2f} | {row.peak_bytes / 2**20:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 512], help="sizes of the models")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    home = ROOT / "benchmarks" / "built"
    home.mkdir(exist_ok=True)
    results = []
    for n_megabytes in options.megabytes:
        path = home.resolve() / f"chain_{n_megabytes}.onnx"
        if not path.exists():
            # In a process of its own: a child's peak memory starts at its parent's, so this one stays small.
            subprocess.run([sys.executable, ROOT / "benchmarks" / "chain.py", path, str(n_megabytes)], check=True)
        rows = []
        for program, _ in installed():
            rows.append(measure(program, path, options.repeats))
            print(f"{n_megabytes:6} MiB  {program.name:50} {rows[-1].seconds:8.2f} s", file=sys.stderr)
        results.append((n_megabytes * 2**20, rows))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(page(results, options.repeats))


if __name__ == "__main__":
    main()
