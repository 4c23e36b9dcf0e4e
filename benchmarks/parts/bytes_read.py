"""How much of a model without duplicates is read, and of one with: counted where tieaudit reads weights."""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.measure import run
from benchmarks.parts import Data, Goal, Part, built, say, size, table

MODELS = {
    "distinct_external": "no duplicates, ONNX with external data",
    "distinct_inline": "no duplicates, ONNX in one file",
    "distinct_safetensors": "no duplicates, safetensors",
    "tied_external": "262 MB transposed and 17 MB equal, ONNX with external data",
    "tied_inline": "the same in one file",
    "tied_safetensors": "the same as safetensors",
    "same_10k_safetensors": "10,000 different tensors of 16 kB, safetensors",
    "checkpoint_10k": "9,400 different tensors in 17 shards",
}
MOST = 0.01

_CODE = """
import json, sys, numpy
from tieaudit.load import load_one
from tieaudit.find import find
def requested():
    return int(open('/proc/self/io').read().split()[1])
load_one(sys.argv[2]); find(load_one(sys.argv[2]))  # everything is imported before anything is counted
begin = requested()
model = load_one(sys.argv[1])
found = find(model)
n_all = requested() - begin
stored = sum(weight.n_bytes for weight in model.weights)
print(json.dumps({'weights': found.n_bytes_read, 'all': n_all, 'stored': stored}))
"""


def _measure(n_repeats: int) -> Data:
    rows: list[dict[str, Any]] = []
    for name, title in MODELS.items():
        spelling = "inline" if name.endswith(("inline", "external")) else "safetensors"
        done = run([sys.executable, "-c", _CODE, built(name), built(f"small_{spelling}")])
        row = {"error": done.error} if done.error else json.loads(done.stdout)
        rows.append({"model": name, "title": title, **row})
        say(f"bytes read of {name:24} {row}")
    return rows


def _show(data: Data) -> list[str]:
    rows = []
    for row in data:
        if "error" in row:
            rows.append([row["title"], f"failed: {row['error']}", "", ""])
        else:
            share = f"{row['weights'] / row['stored']:.3%}"
            rows.append([row["title"], size(row["stored"]), f"{size(row['weights'])} ({share})", size(row["all"])])
    head = ["model", "stored", "read of the weights", "read in all"]
    return [
        "The second figure is counted by the storage layer while ties are searched. The third is what the process",
        "asked the system for while it read and searched the model, headers and graph included. Pages that are looked",
        "at through a memory map are in neither.",
        "",
        *table(head, rows),
    ]


def _goals(data: Data) -> list[Goal]:
    text = f"without duplicates, < {MOST:.0%} of the bytes are read"
    rows = [row for row in data if row["model"].startswith("distinct")]
    if failed := next((row for row in rows if "error" in row), None):
        return [Goal(text, None, failed["error"])]
    worst = max(row["all"] / row["stored"] for row in rows)
    return [Goal(text, worst < MOST, f"at most {worst:.3%}, headers and graph included")]


PART = Part("bytes-read", "Bytes read", _measure, _show, _goals)
