"""The demonstration of `make demo`: scan → apply → verify on models whose tie got lost, and what it saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path("fixtures/built")
OUT = Path("fixtures/demo")
COMMAND = [sys.executable, "-m", "tieaudit"]


@dataclass(frozen=True)
class Case:
    """One model of the demonstration."""

    title: str
    before: str
    after: str


CASES = (
    Case("A GPT-style export whose head is a transposed copy of the embedding", "gpt_decoder/lost.onnx", "gpt.onnx"),
    Case("A BART export in three files: one matrix stored five times", "bart_seq2seq/parts_lost", "bart"),
    Case("A BERT folder that stores a declared tie twice", "bert_encoder/hf_lost", "bert"),
)


def run(*arguments: str, quiet: bool = False) -> str:
    """Run tieaudit at the top of the repository and show command and output. Ends the demonstration if it fails."""
    if not quiet:
        print(f"\n$ tieaudit {' '.join(arguments)}", flush=True)
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if not quiet:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"the demonstration failed: exit code {done.returncode} from tieaudit {' '.join(arguments)}")
    return done.stdout


def summary(path: str) -> dict[str, Any]:
    """The totals of a scan."""
    scanned: dict[str, Any] = json.loads(run("scan", path, "--format", "json", quiet=True))["models"][0]["summary"]
    return scanned


def main() -> None:
    """Run every case and end with a table."""
    os.environ.setdefault("COLUMNS", "100")
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    (ROOT / OUT).mkdir(parents=True)
    rows = []
    for case in CASES:
        before, after = str(BUILT / case.before), str(OUT / case.after)
        print(f"\n{'=' * 100}\n{case.title}\n{'=' * 100}")
        run("scan", before)
        run("apply", before, "--scheme", "dedup", "--to", after)
        run("verify", before, after)
        rows.append((case.before, summary(before), summary(after)))

    print(f"\n{'=' * 100}\nBefore and after\n{'=' * 100}\n")
    print(f"{'model':28} {'parameters':>11} {'bytes before':>13} {'stored twice':>13} {'bytes after':>12} {'twice':>6}")
    for name, old, new in rows:
        print(
            f"{name:28} {old['n_parameters']:>11,} {old['n_bytes']:>13,} {old['n_bytes_duplicate']:>13,} "
            f"{new['n_bytes']:>12,} {new['n_bytes_duplicate']:>6,}"
        )
    print(f"\nThe repaired models and their receipts are in {OUT}/.")


if __name__ == "__main__":
    main()
