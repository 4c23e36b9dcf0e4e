"""`scan` of the 1.07 GB model in three spellings, beside what else looks for equal weights in such a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.measure import TIEAUDIT, Measured, repeated
from benchmarks.parts import Data, Goal, Part, built, cell, mb, say, seconds, table

EQUAL = {"layers.1.0.weight", "layers.15.0.weight"}
TRANSPOSED = {"embed.weight", "head.weight"}
FORMS = {"external": "ONNX, external data", "safetensors": "safetensors", "inline": "ONNX, everything in one file"}
PEER = peers.ONNX[0].name
LIMITS = {"external": 200e6, "safetensors": 200e6, "inline": 250e6}
TIMES = 6.0


def judged(groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Which of the two planted pairs a program saw, and what else it says is one."""
    flat = [set(group) for group in groups]
    wrong = [group for group in flat if not any(group <= pair for pair in (EQUAL, TRANSPOSED))]
    return {
        "equal": any(group <= EQUAL for group in flat),
        "transposed": any(group <= TRANSPOSED for group in flat),
        "wrong": sorted(name for group in wrong for name in group),
    }


def own_groups(stdout: str) -> list[list[str]]:
    """The measured ties of `scan --format json`."""
    model = json.loads(stdout)["models"][0]
    return [[member["id"] for member in one["members"]] for one in model["groups"] if one["origin"] == "measured"]


def _row(name: str, does: str, done: Measured, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    say(f"  {name:60} {done.error or f'{done.median:8.2f} s {done.peak_bytes / 1e6:8.0f} MB'}")
    return {"name": name, "does": does, **done.as_json(), **({} if done.error else judged(groups))}


def _measure(n_repeats: int) -> Data:
    data: dict[str, Any] = {"versions": peers.versions({"own", "onnx", "optimum"}), "forms": {}}
    for form in FORMS:
        path = built(f"tied_{form}")
        say(f"1.07 GB, {FORMS[form]}")
        done = repeated([*TIEAUDIT, "scan", path, "--format", "json"], n_repeats)
        groups = [] if done.error else own_groups(done.stdout)
        rows = [_row("`tieaudit scan`", "reports equal and transposed ones", done, groups)]
        programs = peers.SAFETENSORS if form == "safetensors" else peers.ONNX
        names = _names(Path(path), form)
        for program in programs:
            done = peers.measured(program, path, n_repeats)
            groups = [] if done.error else peers.found(done.stdout, names)
            rows.append(_row(program.name, program.does, done, groups))
        data["forms"][form] = rows
    return data


def _names(path: Path, form: str) -> set[str]:
    """The 98 names; from the safetensors spelling, whose header needs no library."""
    path = path if form == "safetensors" else Path(built("tied_safetensors"))
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return set(header) - {"__metadata__"}


def _show(data: Data) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        "98 float32 tensors: an embedding of 32,000 × 1,024 with its transposed copy as head, and 16 layers of six",
        "matrices, one of them stored twice. Whether a program saw the two pairs is read from what it printed or left.",
        "Peers that rewrite do so in memory, where nothing else is said. A program that needs long is repeated less",
        f"often than the others; *n* says how often. Beside tieaudit: {versions}.",
    ]
    head = ["program", "what it does", "equal pair", "transposed pair", "seconds", "n", "peak MB"]
    for form, title in FORMS.items():
        rows = []
        for row in data["forms"][form]:
            if "error" in row:
                rows.append([row["name"], f"failed: {cell(row['error'])}", "–", "–", "–", "–", "–"])
                continue
            saw = ["yes" if row[kind] else "no" for kind in ("equal", "transposed")]
            does = row["does"] + (f"; **wrongly: {', '.join(row['wrong'][:4])}**" if row["wrong"] else "")
            figures = [seconds(_median(row)), str(len(row["seconds"])), mb(row["peak_bytes"])]
            rows.append([row["name"], does, *saw, *figures])
        lines += ["", f"### {title}", "", *table(head, rows, n_text=4)]
    return lines


def _median(row: Data) -> float:
    return Measured(tuple(row["seconds"]), 0, "").median


def _goals(data: Data) -> list[Goal]:
    goals = []
    for form, limit in LIMITS.items():
        text = f"{FORMS[form]}: ≥ {TIMES:.0f}× faster than onnx-ir's hashed pass, ≤ {mb(limit)} MB"
        own = data["forms"][form][0]
        # onnx-ir reads no safetensors: there, the same weights as external data are what it is compared on.
        peer = next(one for one in data["forms"]["inline" if form == "inline" else "external"] if one["name"] == PEER)
        if "error" in own or "error" in peer:
            goals.append(Goal(text, None, own.get("error") or f"onnx-ir: {peer['error']}"))
            continue
        ratio, peak = _median(peer) / _median(own), own["peak_bytes"]
        both = own["equal"] and own["transposed"] and not own["wrong"]
        because = f"{ratio:.1f}×, {mb(peak)} MB, {'both pairs found' if both else 'NOT both pairs found'}"
        goals.append(Goal(text, ratio >= TIMES and peak <= limit and both, because))
    return goals


PART = Part("one-gigabyte", "A 1.07 GB model", _measure, _show, _goals)
