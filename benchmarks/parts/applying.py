"""`apply` on the 1.07 GB model: memory of the process that writes, of the proof, and disk space."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Command, Observed, observe, run
from benchmarks.parts import Data, Goal, Part, built, cell, mb, say, seconds, size, table

MODELS = {
    "tied_external": "ONNX, external data",
    "tied_inline": "ONNX, one file",
    "tied_safetensors": "safetensors",
    "folder_tied": "Hugging Face folder",
    "tenth_external": "a tenth of it, external data",
    "tenth_inline": "a tenth of it, one file",
}
PAIRS = (("tenth_external", "tied_external"), ("tenth_inline", "tied_inline"))
"""The same graph, ten times larger: how much more memory does writing it need?"""
BLOCK_BYTES = 16 * 2**20
"""The largest block of the tool (`compare.STRIPE_BYTES`): what memory may grow by when the model does."""
TIMEOUT_SECONDS = 240.0

_WRITE_ONLY = """
import sys
from pathlib import Path
from tieaudit.load import load_one
from tieaudit.plan import Choices, plan
from tieaudit.rewrite import rewrite, workspace
from tieaudit.scan import look
model = load_one(sys.argv[1])
with workspace(Path(sys.argv[2])) as folder:
    rewrite(model, plan(look(model), Choices()), folder)
"""


class Disk:
    """The most space that files below a folder took while this was open."""

    def __init__(self, folder: Path):
        self.folder, self.peak_bytes = folder, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, taken(self.folder))


def taken(folder: Path) -> int:
    """Allocated bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for home, _, names in os.walk(folder):  # passes over folders that vanish
        for name in names:
            try:
                total += os.lstat(os.path.join(home, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _measure(n_repeats: int) -> Data:
    del n_repeats  # a proof of a gigabyte takes its time, and memory does not vary: once
    return [_one(name, title) for name, title in MODELS.items()]


def _one(name: str, title: str) -> dict[str, Any]:
    path = built(name)
    row: dict[str, Any] = {"model": name, "title": title, "n_bytes": taken(path if path.is_dir() else path.parent)}
    # On the same disk as the model, as a user would: the system's temporary folder may be memory.
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks" / "built") as scratch:
        home = Path(scratch)
        out = home / ("out" + path.suffix)
        begin = time.perf_counter()
        done = run([sys.executable, "-c", _WRITE_ONLY, path, out], timeout=TIMEOUT_SECONDS)
        row["write_seconds"] = None if done.error else round(time.perf_counter() - begin, 3)
        with Disk(home) as disk:
            arguments: Command = ["apply", path, "--to", out, "--format", "json"]
            seen: Observed = observe(arguments, timeout=TIMEOUT_SECONDS, TMPDIR=scratch)
        row["disk_peak_bytes"] = disk.peak_bytes
        row["disk_output_bytes"] = taken(home)
        if seen.run.error:
            row["error"] = seen.run.error
        else:
            said = json.loads(seen.run.stdout)
            facts = said["proof"]["facts"]
            row["seconds"] = round(seen.run.seconds, 3)
            row["own_peak_bytes"] = seen.own_peak_bytes
            row["peak_bytes"] = {key.rsplit("_", 1)[1]: n for key, n in facts.items() if key.startswith("n_bytes_peak")}
            row["levels"] = {level["name"]: level["outcome"] for level in said["proof"]["levels"]}
        shutil.rmtree(out, ignore_errors=True)
    say(f"apply to {title:32} {row.get('error') or row['seconds']}")
    return row


def _show(data: Data) -> list[str]:
    rows = []
    for row in data:
        start = [row["title"], size(row["n_bytes"])]
        if "error" in row:
            rows.append([*start, f"failed: {cell(row['error'])}", *["–"] * 7])
            continue
        held = ", ".join(name for name, outcome in row["levels"].items() if outcome == "held")
        alone = "–" if row["write_seconds"] is None else seconds(row["write_seconds"])
        peaks = [mb(row["own_peak_bytes"]), *(_peak(row, kind) for kind in ("verifying", "running"))]
        disk = [size(row["disk_output_bytes"]), size(row["disk_peak_bytes"])]
        rows.append([*start, held, alone, seconds(row["seconds"]), *peaks, *disk])
    return [
        "One run each. *Writing alone* is scan, plan and rewrite in one process, nothing proved and nothing delivered;",
        "`apply` proves in processes of their own: one that compares bytes, and those in which ONNX Runtime or torch",
        "runs the models before and after. Disk is what the output takes, and the most that all files together took",
        "meanwhile, temporary ones included.",
        "",
        *table(
            [
                "model",
                "size",
                "proofs that held",
                "writing alone, s",
                "`apply`, s",
                "writer: peak MB",
                "comparing: peak MB",
                "running models: peak MB",
                "output",
                "most disk",
            ],
            rows,
            n_text=3,
        ),
    ]


def _peak(row: Data, kind: str) -> str:
    n_bytes = row["peak_bytes"].get(kind)
    return mb(n_bytes) if n_bytes else "–"


def _goals(data: Data) -> list[Goal]:
    by_name = {row["model"]: row for row in data}
    text = "`apply`: the writer's memory does not grow with the model beyond a block"
    growths = []
    for small, large in PAIRS:
        one, other = by_name[small], by_name[large]
        if failed := one.get("error") or other.get("error"):
            return [Goal(text, None, failed)]
        growths.append(other["own_peak_bytes"] - one["own_peak_bytes"])
    because = f"{max(growths) / 1e6:+.0f} MB for ten times the model; a block is {mb(BLOCK_BYTES)} MB"
    return [Goal(text, max(growths) <= BLOCK_BYTES, because)]


PART = Part("apply", "Writing: `apply`", _measure, _show, _goals)
