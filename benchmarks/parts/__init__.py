"""The parts of the benchmark suite, one file each: measure, show, judge. `run.py` lists them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Command

Data = Any
"""What a part measured, as JSON: kept in results.json."""


@dataclass(frozen=True)
class Goal:
    """One sentence of what was aimed for, and whether the figures say so."""

    text: str
    holds: bool | None
    """None: not measured."""
    because: str
    """The figures."""


@dataclass(frozen=True)
class Part:
    """One benchmark."""

    name: str
    """As `--only` knows it."""
    title: str
    measure: Callable[[int], Data]
    """Number of repeats → figures. Starts whole processes; prints progress to stderr."""
    show: Callable[[Data], Sequence[str]]
    """Figures → lines of Markdown."""
    goals: Callable[[Data], Sequence[Goal]]


def built(name: str) -> Path:
    """The path of a generated model; built in a process of its own if need be, so that this one stays small."""
    command: Command = [sys.executable, ROOT / "benchmarks" / "models.py", name]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], n_text: int = 1) -> list[str]:
    """A Markdown table, the first `n_text` columns left, the others right."""
    rule = "|" + "---|" * n_text + "--:|" * (len(head) - n_text)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def mb(n_bytes: float) -> str:
    """Megabytes, 10^6."""
    return f"{n_bytes / 1e6:,.0f}"


def size(n_bytes: float) -> str:
    """A size with its unit."""
    for unit, n_per in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= n_per:
            return f"{n_bytes / n_per:,.{0 if n_bytes >= 100 * n_per else 1}f} {unit}"
    return f"{n_bytes:.0f} bytes"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def cell(text: str) -> str:
    """Foreign text that fits into one cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


@dataclass(frozen=True)
class Line:
    """Least squares: y = start + slope · x."""

    start: float
    slope: float
    r_squared: float


def fitted(x: Sequence[float], y: Sequence[float]) -> Line:
    """The straight line through points. ValueError below two different x."""
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((one - mean_x) ** 2 for one in x)
    if not spread:
        raise ValueError(f"expected at least two different x, found {sorted(set(x))}")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    start = mean_y - slope * mean_x
    total = sum((one - mean_y) ** 2 for one in y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Line(start, slope, 1 - left / total if total else 1.0)


def bend(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope between the last two points over that between the first two: 1 on a line, 1.3 and more on a parabola.

    That is what tells linear from quadratic; R² of few points does not. NaN-free: a flat beginning counts as 1.
    """
    first = (y[1] - y[0]) / (x[1] - x[0])
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return last / first if first > 0 else 1.0
