"""Scan every ONNX and safetensors file of a corpus, repair what is lossless, and write docs/corpus.md.

    python benchmarks/corpus.py [CORPUS]      default: TIEAUDIT_CORPUS; nothing is done where there is none

Every scan and every apply is a process of its own, as a user would start it. Files that say the same are counted, files
with ties are listed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "corpus.md"
LEVELS = ("end to end", "regional", "structural")


@dataclass
class Row:
    """What was seen of one model."""

    name: str
    exit_code: int
    seconds: float
    error: str = ""
    n_ties: int = 0
    n_bytes_duplicate: int = 0
    codes: tuple[str, ...] = ()
    applied: str = ""
    """Outcome of `apply --scheme dedup`: bytes before and after, and the highest level of proof that held."""
    traceback: bool = field(default=False)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """One process of the tool."""
    command = [sys.executable, "-m", "tieaudit", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def scanned(path: Path, corpus: Path) -> Row:
    """Scan one file, and repair it where bytes are stored twice."""
    started = time.perf_counter()
    done = run("scan", path, "--format", "json")
    row = Row(str(path.relative_to(corpus)), done.returncode, time.perf_counter() - started)
    row.traceback = "Traceback" in done.stderr
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith("{") else {"models": [], "errors": []}
    for error in answer["errors"]:
        row.error = error["message"].replace(str(corpus), "…")
    for model in answer["models"]:
        row.n_ties += sum(group["origin"] == "measured" for group in model["groups"])
        row.n_bytes_duplicate += model["summary"]["n_bytes_duplicate"]
        row.codes = tuple(sorted({finding["code"] for finding in model["findings"]}))
    if row.n_ties and path.suffix == ".onnx":
        row.applied, broke = repaired(path)
        row.traceback = row.traceback or broke
    return row


def repaired(path: Path) -> tuple[str, bool]:
    """What `apply --scheme dedup` makes of a file, and whether it crashed."""
    with tempfile.TemporaryDirectory() as folder:
        done = run("apply", path, "--scheme", "dedup", "--to", Path(folder) / "out", "--format", "json")
    crashed = "Traceback" in done.stderr
    answer = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    if "proof" not in answer:
        refusals = [refusal["because"] for refusal in answer.get("plan", {}).get("refusals", ())]
        said = [*refusals, *done.stderr.strip().splitlines(), "nothing to do"][0]
        return (f"refused: {said[:140]}" if done.returncode else "nothing to do"), crashed
    held = [level["name"] for level in answer["proof"]["levels"] if level["outcome"] == "held"]
    best = next(name for name in LEVELS if name in held)
    return f"{answer['plan']['n_bytes_saved']:,} bytes saved, {best}", crashed


def page(rows: list[Row]) -> str:
    """The page: totals, then the files that say something."""
    outcomes = Counter("read" if row.exit_code == 0 else "refused in one line" for row in rows)
    seconds = sorted(row.seconds for row in rows)
    lines = [
        "# The corpus",
        "",
        "Made by `python benchmarks/corpus.py`: every ONNX and safetensors file of a folder of models from public",
        "repositories, one process each. Ties are checked against brute force in `tests/test_corpus.py`.",
        "",
        f"{len(rows)} files: {', '.join(f'{count} {name}' for name, count in outcomes.most_common())}; "
        f"{sum(row.traceback for row in rows)} tracebacks. Median {seconds[len(seconds) // 2]:.2f} s a scan, start of "
        f"the process included, slowest {seconds[-1]:.2f} s. {sum(row.n_ties > 0 for row in rows)} files hold measured "
        "ties of any size.",
        "",
        "## Refused",
        "",
        *(f"- `{row.name}`: {row.error}" for row in rows if row.exit_code != 0),
        "",
        "## With measured ties",
        "",
        "| file | ties | bytes stored twice | findings | `apply --scheme dedup` |",
        "|---|--:|--:|---|---|",
    ]
    for row in sorted((row for row in rows if row.n_ties), key=lambda row: -row.n_bytes_duplicate):
        findings = " ".join(row.codes) or "–"
        lines.append(f"| {row.name} | {row.n_ties} | {row.n_bytes_duplicate:,} | {findings} | {row.applied or '–'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; exit 1 if anything crashed."""
    home = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TIEAUDIT_CORPUS", "")
    if not home or not Path(home).is_dir():
        print("no corpus: name a folder, or set TIEAUDIT_CORPUS", file=sys.stderr)
        return 0
    corpus = Path(home).resolve()
    paths = [path for path in sorted(corpus.rglob("*")) if path.suffix in (".onnx", ".safetensors")]
    rows = []
    for number, path in enumerate(paths, 1):
        rows.append(scanned(path, corpus))
        if sys.stderr.isatty():
            print(f"\r{number}/{len(paths)}", end="", file=sys.stderr)
    PAGE.write_text(page(rows), encoding="utf-8")
    return 1 if any(row.traceback for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
