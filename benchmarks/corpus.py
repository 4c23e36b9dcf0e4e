"""Scan every file of a corpus, repair what is lossless with every proof that can run, and write docs/corpus.md.

    python benchmarks/corpus.py [CORPUS]      default: TIEAUDIT_CORPUS; nothing is done where there is none

Every scan and every apply is a process of its own, as a user would start it. Files that say the same are counted, files
with something stored twice are listed.
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
ENDINGS = (".onnx", ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2")
SMALL = 20
"""Names under which files of one folder are listed together where they show the same roles."""
NO_MODELS = (".md", ".tsv", ".json")
"""Lists and notes that describe a corpus."""


@dataclass
class Repair:
    """What `apply --scheme dedup` made of a file."""

    outcome: str
    """`delivered`, `nothing to do`, or the first reason why not."""
    seconds: float = 0.0
    n_bytes_before: int = 0
    """Size of the files of the model."""
    n_bytes_after: int = 0
    level: str = ""
    """The highest level of proof that held, and why no higher one ran."""
    left: int = 0
    """Ties that a second scan still measures in what was delivered."""


@dataclass
class Row:
    """What was seen of one file."""

    name: str
    exit_code: int
    seconds: float
    error: str = ""
    traceback: bool = False
    n_ties: int = 0
    n_bytes_ties: int = 0
    n_buffers: int = 0
    n_bytes_buffers: int = 0
    n_bytes_constants: int = 0
    n_shared: int = 0
    """Ties that are one stored tensor already."""
    codes: tuple[str, ...] = ()
    roles: Counter[str] = field(default_factory=Counter)
    """Kind of role → how many stored names have it."""
    n_against: int = 0
    """Weights about whose role the name contradicts the graph."""
    embedding_candidates: tuple[str, ...] = ()
    """Schemes that propose to share a table or a head."""
    repair: Repair | None = field(default=None)

    @property
    def n_bytes(self) -> int:
        return self.n_bytes_ties + self.n_bytes_buffers + self.n_bytes_constants


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """One process of the tool."""
    command = [sys.executable, "-m", "tieaudit", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a process printed; empty if it printed none."""
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return answer


def scanned(path: Path, corpus: Path) -> Row:
    """Scan one file, and repair it where something is stored twice."""
    started = time.perf_counter()
    done = run("scan", path, "--format", "json")
    row = Row(str(path.relative_to(corpus)), done.returncode, time.perf_counter() - started)
    row.traceback = "Traceback" in done.stderr
    answer = answer_of(done)
    for error in answer.get("errors", ()):
        row.error = error["message"].replace(str(corpus), "…")
    for model in answer.get("models", ()):
        count(row, model)
    if row.n_bytes and path.suffix == ".onnx":
        row.repair, broke = repaired(path)
        row.traceback = row.traceback or broke
    return row


def count(row: Row, model: dict[str, Any]) -> None:
    """Add what the report of one model says."""
    for group in model["groups"]:
        if group["origin"] == "aliased":
            row.n_shared += 1
        elif group["origin"] == "measured" and group["buffers"]:
            row.n_buffers, row.n_bytes_buffers = row.n_buffers + 1, row.n_bytes_buffers + group["n_bytes_saved"]
        elif group["origin"] == "measured":
            row.n_ties, row.n_bytes_ties = row.n_ties + 1, row.n_bytes_ties + group["n_bytes_saved"]
    n_bytes = {weight["id"]: weight["n_bytes"] for weight in model["weights"]}
    row.n_bytes_constants += sum(n_bytes[id] for ids in model["constant_groups"] for id in ids[1:])
    row.roles.update(model["n_by_role"])
    row.n_against += sum(bool(weight["role"]["against"]) for weight in model["weights"])
    row.embedding_candidates += tuple(one["scheme"] for one in model["candidates"])
    row.codes = tuple(sorted({*row.codes, *(finding["code"] for finding in model["findings"])}))


def repaired(path: Path) -> tuple[Repair, bool]:
    """What `apply --scheme dedup` makes of a file, and whether it crashed."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "out" / path.name
        started = time.perf_counter()
        done = run("apply", path, "--scheme", "dedup", "--to", to, "--format", "json")
        repair = Repair("nothing to do", time.perf_counter() - started)
        answer, crashed = answer_of(done), "Traceback" in done.stderr
        plan = answer.get("plan") or {}
        if to.exists():
            reasons = list(dict.fromkeys(refusal["because"] for refusal in plan["refusals"]))
            repair.outcome = "delivered" + "".join(f"; refused: {reason[:120]}" for reason in reasons[:1])
            repair.n_bytes_before = size_of(path)
            repair.n_bytes_after = sum(file.stat().st_size for file in to.parent.iterdir() if file.suffix != ".json")
            repair.level = proof_of(answer["proof"])
            again = Row("", 0, 0.0)
            for model in answer_of(run("scan", to, "--format", "json")).get("models", ()):
                count(again, model)
            repair.left = again.n_ties
        elif done.returncode:
            reasons = [refusal["because"] for refusal in plan.get("refusals", ())]
            repair.outcome = "refused: " + [*reasons, *done.stderr.strip().splitlines(), "?"][0][:160]
    return repair, crashed


def size_of(path: Path) -> int:
    """Bytes of an ONNX file and of the data files that it names."""
    from onnx import load
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    named = {ExternalDataInfo(t).location for t in load(path, load_external_data=False).graph.initializer
             if uses_external_data(t)}  # fmt: skip
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in named)


def proof_of(proof: dict[str, Any]) -> str:
    """The highest level that held, and why those above it did not run."""
    levels = {level["name"]: level for level in proof["levels"]}
    best = next(name for name in LEVELS if levels.get(name, {}).get("outcome") == "held")
    above = [levels[name] for name in LEVELS[: LEVELS.index(best)] if name in levels]
    return best + "".join(f" ({level['name']}: {level['because'].splitlines()[0][:110]})" for level in above)


def counted(n: int, noun: str) -> str:
    """`1 tie`, `2 ties`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def page(rows: list[Row], others: list[Row]) -> str:
    """The page: totals, then the files that say something."""
    outcomes = Counter("read" if row.exit_code == 0 else "refused in one line" for row in rows)
    seconds = sorted(row.seconds for row in rows)
    repairs = [row.repair for row in rows if row.repair is not None]
    delivered = [repair for repair in repairs if repair.outcome.startswith("delivered")]
    held = Counter(repair.level.split(" (")[0] for repair in delivered)
    # a data file that is called after its model leads to it
    kinds = Counter(
        row.error.partition(": ")[2].partition(" (")[0] or "the data of a model, which is read" for row in others
    )
    lines = [
        *HEAD,
        f"{len(rows)} ONNX, safetensors and PyTorch files: "
        f"{', '.join(f'{n} {name}' for name, n in outcomes.most_common())}; "
        f"{sum(row.traceback for row in [*rows, *others])} tracebacks. Median {seconds[len(seconds) // 2]:.2f} s a "
        f"scan, start of the process included, slowest {seconds[-1]:.2f} s.",
        "",
        f"{sum(row.n_ties > 0 for row in rows)} files hold ties that are stored more than once, "
        f"{sum(row.n_buffers > 0 for row in rows)} equal buffers, {sum(row.n_bytes_constants > 0 for row in rows)} "
        f"equal constants; in {sum(row.n_shared > 0 for row in rows)} one stored tensor serves several operations.",
        "",
        f"`apply --scheme dedup` delivered {len(delivered)} models, had nothing to do for "
        f"{sum(repair.outcome == 'nothing to do' for repair in repairs)} and refused "
        f"{sum(repair.outcome.startswith('refused') for repair in repairs)}. Highest proof: "
        f"{', '.join(f'{name} {count}' for name, count in held.most_common())}. A second scan of what was delivered "
        f"measures {counted(sum(repair.left for repair in delivered), 'tie')}, of what was refused.",
        "",
        *of_roles(rows),
        "",
        "## Refused",
        "",
        *(f"- `{row.name}`: {row.error}" for row in rows if row.exit_code != 0),
        "",
        f"Of the {len(others)} files of other kinds, one line and exit code 2 for each that is no part of a model:",
        "",
        *(f"- {count}: {what}" for what, count in kinds.most_common()),
        "",
        *table(rows),
    ]
    return "\n".join(lines) + "\n"


def of_roles(rows: list[Row]) -> list[str]:
    """Roles of all files, then of each: files of one folder that show the same are one line."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.roles)
    n_all = max(sum(total.values()), 1)
    plain = [row for row in rows if not row.roles["token_embedding"]]
    proposing = [row for row in plain if row.embedding_candidates]
    against = [row for row in rows if row.n_against]
    n_against = counted(sum(row.n_against for row in against), "weight")
    lines = [
        "## Roles",
        "",
        f"{n_all:,} stored names of {sum(bool(row.roles) for row in rows)} files; {share(total['other'], n_all)} of "
        f"them are *other*. In {len(plain)} files nothing embeds tokens: an embedding scheme proposes something in "
        f"{len(proposing)} of these. Where a name contradicts the graph ({n_against} of "
        f"{counted(len(against), 'file')}), the graph counts and `against` has the other.",
        "",
        *(f"- `{row.name}` proposes {', '.join(row.embedding_candidates)}" for row in proposing),
        ", ".join(f"{kind} {n:,}" for kind, n in total.most_common()) + ".",
        "",
        "Of each file, files of one folder with the same counts in one line:",
        "",
        "| file | names | other | roles |",
        "|---|--:|--:|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.roles:
            kinds = " · ".join(f"{kind} {n}" for kind, n in row.roles.most_common() if kind != "other")
            folder = row.name.rpartition("/")[0]
            groups.setdefault((folder if sum(row.roles.values()) < SMALL else row.name, kinds), []).append(row)
    for (_, kinds), group in groups.items():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        sizes = [sum(row.roles.values()) for row in group]
        least, most = min(sizes), max(sizes)
        n = f"{least:,}" if least == most else f"{least:,}–{most:,}"
        other = share(sum(row.roles["other"] for row in group), sum(sizes))
        lines.append(f"| {group[0].name}{more} | {n} | {other} | {kinds or '–'} |")
    return lines


def share(part: int, whole: int) -> str:
    """`12 %`."""
    return f"{100 * part / whole:.0f} %" if whole else "–"


HEAD = [
    "# The corpus",
    "",
    "Made by `python benchmarks/corpus.py`: every file of a folder of models from public repositories, one process "
    "each. That the ties are those of brute force, and which of them a person takes for one, is tested in "
    "`tests/test_corpus.py` against `tests/corpus_truth.toml`.",
    "",
]
LEGEND = [
    "## What is stored twice",
    "",
    "Bytes that further copies take: of *ties* (trained tensors, equal or transposed), of *buffers* (masks, priors, "
    "shapes: equal bytes, no parameters) and of *constants* (tensors filled with one value). `dedup` stores every tie "
    "once, buffers and constants only where one class frees 1 KiB: so it may free more than the ties take, or leave "
    "what is small. *Size* is that of the files before and after, with what the format spends on names and nodes: the "
    "nodes through which a head reads a table transposed take some 900 bytes, so a tie of a few hundred costs more.",
    "",
    "| file | ties | in ties | in buffers | in constants | findings | scan, s | `apply --scheme dedup` | size | proof "
    "| s |",
    "|---|--:|--:|--:|--:|---|--:|---|--:|---|--:|",
]


def table(rows: list[Row]) -> list[str]:
    """Files with a tie, with a finding or with something to do; of the rest, a count."""
    listed = [row for row in rows if row.n_ties or row.codes or (row.repair and row.repair.outcome != "nothing to do")]
    quiet = [row for row in rows if row.n_bytes and row not in listed]
    lines = list(LEGEND)
    for row in sorted(listed, key=lambda row: -row.n_bytes):
        repair = row.repair or Repair("–")
        sizes = f"{repair.n_bytes_before:,} → {repair.n_bytes_after:,}" if repair.n_bytes_before else "–"
        cells = [
            row.name, row.n_ties, f"{row.n_bytes_ties:,}", f"{row.n_bytes_buffers:,}", f"{row.n_bytes_constants:,}",
            " ".join(row.codes) or "–", f"{row.seconds:.2f}", repair.outcome, sizes, repair.level or "–",
            f"{repair.seconds:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    most = max((row.n_bytes for row in quiet), default=0)
    return [*lines, "", f"{len(quiet)} more files hold buffers or constants twice, {most:,} bytes the most of one."]


def main() -> int:
    """Write the page; exit 1 if anything crashed, or ended with another code than 0 or 2."""
    home = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TIEAUDIT_CORPUS", "")
    if not home or not Path(home).is_dir():
        print("no corpus: name a folder, or set TIEAUDIT_CORPUS", file=sys.stderr)
        return 0
    corpus = Path(home).resolve()
    paths = [path for path in sorted(corpus.rglob("*")) if path.is_file()]
    rows, others = [], []
    for number, path in enumerate(paths, 1):
        if path.suffix in ENDINGS:
            rows.append(scanned(path, corpus))
        elif path.suffix not in NO_MODELS:
            others.append(scanned(path, corpus))
        if sys.stderr.isatty():
            print(f"\r{number}/{len(paths)}", end="", file=sys.stderr)
    PAGE.write_text(page(rows, others), encoding="utf-8")
    every = [*rows, *others]
    return 1 if any(row.traceback or row.exit_code not in (0, 2) for row in every) else 0


if __name__ == "__main__":
    sys.exit(main())
