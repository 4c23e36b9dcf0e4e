"""What it costs to start: `--version`, `--help`, and small files."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.measure import TIEAUDIT, Command, Measured, observe, repeated
from benchmarks.parts import Data, Goal, Part, built, cell, mb, say, table

HEAVY = ("numpy", "onnx", "networkx", "torch")
COMMANDS = ("--version", "--help", "scan a 2 MB safetensors", "scan a 2 MB ONNX")


def _measure(n_repeats: int) -> Data:
    files: dict[str, Command] = {
        COMMANDS[2]: ["scan", built("small_safetensors")],
        COMMANDS[3]: ["scan", built("small_inline")],
    }
    rows: list[dict[str, Any]] = []
    done = repeated([sys.executable, "-c", "pass"], 2 * n_repeats)
    rows.append({"name": "`python -c pass`, for scale", **done.as_json()})
    for name in COMMANDS:
        arguments: Command = files.get(name, [name])
        done = repeated([*TIEAUDIT, *arguments], 2 * n_repeats)
        row: dict[str, Any] = {"name": name, **done.as_json()}
        if not done.error:
            seen = observe(arguments)
            heavy = [package for package in HEAVY if package in seen.packages]
            row |= {"n_modules": len(seen.modules), "heavy": heavy, "own_peak_bytes": seen.own_peak_bytes}
        rows.append(row)
        say(f"{name:32} {done.error or f'{done.median:.3f} s'}")
    return rows


def _show(data: Data) -> list[str]:
    rows = []
    for row in data:
        name = row["name"] if row["name"].startswith("`") else f"`tieaudit` {row['name']}"
        if "error" in row:
            rows.append([name, cell(row["error"]), "–", "–", "–"])
            continue
        median = Measured(tuple(row["seconds"]), 0, "").median
        counted = [str(row["n_modules"]), ", ".join(row["heavy"]) or "none"] if "heavy" in row else ["–", "–"]
        rows.append([name, counted[1], counted[0], f"{median * 1000:.0f}", mb(row.get("own_peak_bytes", 0) or 0)])
        if "own_peak_bytes" not in row:
            rows[-1][-1] = "–"
    return table(["command", f"of {', '.join(HEAVY)}", "modules", "ms", "peak MB"], rows, n_text=2)


def _goals(data: Data) -> list[Goal]:
    heavy = {row["name"]: row.get("heavy") for row in data}
    goals = []
    for names, packages in ((COMMANDS[:2], HEAVY), (COMMANDS[2:3], ("onnx",))):
        text = f"{' and '.join(names)}: no {', '.join(packages)}"
        seen = [heavy.get(name) for name in names]
        if any(one is None for one in seen):
            goals.append(Goal(text, None, "not measured"))
            continue
        loaded = sorted({package for one in seen if one for package in one if package in packages})
        goals.append(Goal(text, not loaded, f"imported: {', '.join(loaded) or 'none of them'}"))
    return goals


PART = Part("cold-start", "Cold start", _measure, _show, _goals)
