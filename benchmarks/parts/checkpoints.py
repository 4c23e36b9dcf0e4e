"""Sharded checkpoints in sparse files: time and memory against the number of tensors, and against the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, TIEAUDIT, Measured, observe, repeated
from benchmarks.parts import Data, Goal, Part, bend, built, cell, fitted, mb, say, seconds, size, table

NUMBERS = ("checkpoint_10k", "checkpoint_30k", "checkpoint_60k", "checkpoint_90k")
SIZES = (
    ("checkpoint_30k_bytes_over_256", "checkpoint_30k_bytes_over_16", "checkpoint_30k"),
    ("checkpoint_90k_bytes_over_16", "checkpoint_90k"),
)
BEND, FLAT, R_SQUARED = 1.5, 1.25, 0.98
MEMORY_PER_TENSOR = 12_000
"""Bytes that a tensor may cost in the process: names, shapes, locators, and the report."""


def _measure(n_repeats: int) -> Data:
    rows: list[dict[str, Any]] = []
    environment = {"PYTHONPATH": str(_nobody_to_ask())}
    for name in dict.fromkeys((*NUMBERS, *(one for group in SIZES for one in group))):
        folder = built(name)
        about: dict[str, Any] = {"name": name, **_counted(folder)}
        seen = observe(["scan", folder, "--format", "json"], PYTHONPATH=environment["PYTHONPATH"])
        if seen.run.error:
            rows.append({**about, "error": seen.run.error})
        else:
            command: list[str | Path] = [*TIEAUDIT, "scan", folder, "--format", "json"]
            done = repeated(command, n_repeats, environment=environment, warm=True)
            rows.append({**about, "own_peak_bytes": seen.own_peak_bytes, **done.as_json()})
        say(f"{name:32} {about['n_tensors']:7,} tensors {seen.run.error or f'{done.median:8.2f} s'}")
    return rows


def _nobody_to_ask() -> Path:
    """A folder for the module path that hides torch and transformers, as where only the core is installed."""
    home = ROOT / "benchmarks" / "built" / "nobody_to_ask"
    home.mkdir(parents=True, exist_ok=True)
    for name in ("torch", "transformers"):
        (home / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')\n")
    return home


def _counted(folder: Path) -> dict[str, int]:
    """Read from the headers, without any library."""
    import json

    shards = sorted(folder.glob("*.safetensors"))
    n_tensors = 0
    for shard in shards:
        with shard.open("rb") as file:
            n_tensors += len(json.loads(file.read(int.from_bytes(file.read(8), "little")))) - 1
    n_bytes = sum(shard.stat().st_size for shard in shards)
    return {"n_tensors": n_tensors, "n_bytes": n_bytes, "n_shards": len(shards)}


def _show(data: Data) -> list[str]:
    rows = []
    for row in data:
        about = [f"{row['n_tensors']:,}", str(row["n_shards"]), size(row["n_bytes"])]
        if "error" in row:
            rows.append([*about, f"failed: {cell(row['error'])}", "–", "–"])
        else:
            rows.append([*about, seconds(_median(row)), mb(row["own_peak_bytes"]), mb(row["peak_bytes"])])
    head = ["tensors", "shards", "bytes", "seconds", "peak MB", "peak MB of any process"]
    lines = [
        "Names, shapes, element types and configuration of DeepSeek-V3 (float8 weights with block scales), with fewer",
        "layers or narrower ones, in sparse files: 512 bytes at the start, middle and end of each tensor are written,",
        "the rest are holes that read as zeros. That is harder than a real checkpoint, since elements read at random",
        "places are equal in all of them. Neither torch nor transformers can be imported, as in a CI job with the core",
        "alone; where they are installed, a child asks them about the class, which takes 5 to 25 s more.",
        "",
        *table(head, rows, n_text=0),
        "",
    ]
    return lines + [f"* {goal.text}: {goal.because}" for goal in _goals(data)]


def _median(row: Data) -> float:
    return Measured(tuple(row["seconds"]), 0, "").median


def _goals(data: Data) -> list[Goal]:
    by_name = {row["name"]: row for row in data if "error" not in row}
    texts = (
        "90,000 tensors in 163 shards: time linear in tensors",
        "checkpoints: time flat in bytes",
        "checkpoints: memory bounded, and flat in bytes",
    )
    if missing := [row for row in data if "error" in row]:
        because = f"{missing[0]['n_tensors']:,} tensors, {size(missing[0]['n_bytes'])}: {missing[0]['error']}"
        return [Goal(text, False, because) for text in texts]
    series = [by_name[name] for name in NUMBERS]
    x, y = [row["n_tensors"] for row in series], [_median(row) for row in series]
    line, bent = fitted(x, y), bend(x, y)
    groups = [[by_name[name] for name in group] for group in SIZES]
    times = [max(map(_median, group)) / min(map(_median, group)) for group in groups]
    per_gb = [fitted([row["n_bytes"] / 1e9 for row in group], list(map(_median, group))).slope for group in groups]
    peaks = [[row["own_peak_bytes"] for row in group] for group in groups]
    growth = max(max(group) / min(group) for group in peaks)
    start = series[0]["own_peak_bytes"]
    n_per = max((row["own_peak_bytes"] - start) / (row["n_tensors"] - series[0]["n_tensors"]) for row in series[1:])
    return [
        Goal(
            texts[0],
            line.r_squared >= R_SQUARED and bent <= BEND,
            f"{line.start:.2f} s + {line.slope * 1000:.3f} s per 1,000, R² {line.r_squared:.4f}, bend {bent:.2f}",
        ),
        Goal(
            texts[1],
            max(times) <= FLAT,
            f"{max(per_gb) * 1000:.2f} ms per GB at most; the slowest of one number of tensors takes "
            f"{max(times):.2f}× the fastest, over {size(groups[0][0]['n_bytes'])} to {size(groups[0][-1]['n_bytes'])}",
        ),
        Goal(
            texts[2],
            n_per <= MEMORY_PER_TENSOR and growth <= FLAT,
            f"{n_per / 1000:.1f} kB per tensor, {mb(series[-1]['own_peak_bytes'])} MB at the largest; "
            f"{growth:.2f}× between the smallest and the largest files of one number of tensors",
        ),
    ]


PART = Part("checkpoints", "Sharded checkpoints", _measure, _show, _goals)
