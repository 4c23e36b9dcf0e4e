"""Two thousand small models in one run of the gate: cold, and again where nothing changed."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import TIEAUDIT, Measured, Run, run
from benchmarks.parts import Data, Goal, Part, built, mb, say, seconds, table

FASTER = 20.0
HASHED = """
import hashlib, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).rglob("*")):
    if path.is_file():
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path)
"""
"""What one writes by hand to see whether any file changed; it knows nothing of ties."""
COLD, WARM, RELOADED, SMALL, BY_HAND = (
    "`tieaudit check`, cold",
    "`tieaudit check` again, nothing changed",
    "`tieaudit check` after a fresh checkout (new times, same bytes)",
    "`tieaudit check`, cold, a tenth of the models",
    "sha256 of every file, by hand",
)


def _measure(n_repeats: int) -> Data:
    folder = built("folder_many")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        copy, cache = Path(scratch, "models"), Path(scratch, "cache")
        check = [*TIEAUDIT, "check", copy, "--cache-dir", cache, "--format", "json"]
        tenth = [*TIEAUDIT, "check", *(copy / f"{index:03d}" for index in range(4)), "--no-cache", "--format", "json"]

        def times(name: str, command: list[Any], prepare: Any, n: int) -> None:
            runs: list[Run] = []
            for repeat in range(n + 1):
                prepare()
                one = run(command)
                if one.exit_code not in (0, 1):
                    rows.append({"program": name, "error": one.error})
                    return
                runs += [one] if repeat else []
            done = Measured(tuple(one.seconds for one in runs), max(one.peak_bytes for one in runs), "")
            rows.append({"program": name, **done.as_json()})
            say(f"{name:60} {done.median:.2f} s")

        _copied(folder, copy)
        times(COLD, check, lambda: shutil.rmtree(cache, ignore_errors=True), min(n_repeats, 3))
        times(WARM, check, lambda: None, n_repeats)
        times(RELOADED, check, lambda: _copied(folder, copy), min(n_repeats, 3))
        times(SMALL, tenth, lambda: None, min(n_repeats, 3))
        times(BY_HAND, [sys.executable, "-c", HASHED, str(copy)], lambda: None, n_repeats)
    return rows


def _copied(source: Path, target: Path) -> None:
    """As a checkout makes them: other files, other times."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(".complete"))


def _show(data: Data) -> list[str]:
    rows = []
    for row in data:
        if "error" in row:
            rows.append([row["program"], row["error"], "–"])
        else:
            median = Measured(tuple(row["seconds"]), 0, "").median
            rows.append([row["program"], seconds(median), mb(row["peak_bytes"])])
    return [
        "2,000 models of two matrices of 128 × 16, half of them ONNX and half safetensors, in folders of fifty, every",
        "fifth with an equal copy that is found. Memory is that of the largest process.",
        "",
        *table(["program", "seconds", "peak MB"], rows),
    ]


def _goals(data: Data) -> list[Goal]:
    found = {row["program"]: row for row in data if "error" not in row}
    faster = f"2,000 models: a second run where nothing changed ≥ {FASTER:.0f}× faster"
    bounded = "2,000 models: memory does not grow with their number beyond 20 kB for each"
    if not {COLD, WARM, SMALL} <= found.keys():
        return [Goal(faster, None, "not measured"), Goal(bounded, None, "not measured")]
    cold, warm = (Measured(tuple(found[name]["seconds"]), 0, "").median for name in (COLD, WARM))
    each = (found[COLD]["peak_bytes"] - found[SMALL]["peak_bytes"]) / 1_800
    return [
        Goal(faster, cold / warm >= FASTER, f"{cold:.2f} s and {warm:.2f} s: {cold / warm:.1f}×"),
        Goal(bounded, each <= 20_000, f"{max(each, 0) / 1e3:.1f} kB for each model"),
    ]


PART = Part("many-models", "Two thousand models in one run", _measure, _show, _goals)
