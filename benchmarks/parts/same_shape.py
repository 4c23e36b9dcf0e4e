"""Thousands of different tensors of one shape, where sorting by shape tells nothing apart: time against number."""

from __future__ import annotations

from typing import Any

from benchmarks import peers
from benchmarks.measure import TIEAUDIT, Measured, repeated
from benchmarks.parts import Data, Goal, Part, bend, built, cell, fitted, mb, say, seconds, table

NUMBERS = {1_000: "1k", 3_000: "3k", 10_000: "10k"}
FORMS = {"inline": "ONNX", "safetensors": "safetensors"}
BEND = 1.5
"""Above this the last points rise visibly faster than the first: n log n at these sizes is 1.15."""


def _measure(n_repeats: int) -> Data:
    rows: list[dict[str, Any]] = []
    for form, title in FORMS.items():
        by_program: dict[str, dict[str, Any]] = {}
        for n_tensors, label in NUMBERS.items():
            path = built(f"same_{label}_{form}")
            runs = {"`tieaudit scan`": repeated([*TIEAUDIT, "scan", path, "--format", "json"], n_repeats)}
            other = peers.ONNX[0] if form == "inline" else peers.SAFETENSORS[0]
            runs[other.name] = peers.measured(other, path, n_repeats)
            for name, done in runs.items():
                say(f"{n_tensors:6,} tensors of one shape, {title:12} {name:50} {done.error or f'{done.median:.2f} s'}")
                by_program.setdefault(name, {"program": name, "form": title, "points": {}})
                by_program[name]["points"][str(n_tensors)] = done.as_json()
        rows += by_program.values()
    return rows


def medians(points: Data) -> tuple[list[float], list[float]]:
    """Numbers and medians of the points that were measured."""
    measured = {float(n): Measured(tuple(p["seconds"]), 0, "").median for n, p in points.items() if "error" not in p}
    return list(measured), list(measured.values())


def _show(data: Data) -> list[str]:
    head = ["program", "format", *(f"{n:,}: s" for n in NUMBERS), "s per 1,000", "R²", "bend", f"peak MB at {10_000:,}"]
    rows = []
    for row in data:
        x, y = medians(row["points"])
        last = row["points"][str(max(NUMBERS))]
        cells = [
            cell(point["error"]) if "error" in point else seconds(Measured(tuple(point["seconds"]), 0, "").median)
            for point in row["points"].values()
        ]
        fit = ["–", "–", "–"]
        if len(x) > 2:
            line = fitted(x, y)
            fit = [f"{line.slope * 1000:.3f}", f"{line.r_squared:.4f}", f"{bend(x, y):.2f}"]
        rows.append([row["program"], row["form"], *cells, *fit, "–" if "error" in last else mb(last["peak_bytes"])])
    return [
        "Different matrices of 64 × 64. *Bend* is the slope between the last two points over that between the first",
        "two: 1 where time is linear in the number of tensors, 3.25 where it is quadratic.",
        "",
        *table(head, rows, n_text=2),
    ]


def _goals(data: Data) -> list[Goal]:
    goals = []
    for row in data:
        if "tieaudit" not in row["program"]:
            continue
        text = f"10,000 tensors of one shape, {row['form']}: time linear in tensors"
        x, y = medians(row["points"])
        if len(x) < len(NUMBERS):
            goals.append(Goal(text, False, "not every number could be measured"))
            continue
        line, bent = fitted(x, y), bend(x, y)
        because = f"{line.slope * 1000:.3f} s per 1,000, R² {line.r_squared:.4f}, bend {bent:.2f}"
        goals.append(Goal(text, line.r_squared >= 0.98 and bent <= BEND, because))
    return goals


PART = Part("same-shape", "Many tensors of one shape", _measure, _show, _goals)
