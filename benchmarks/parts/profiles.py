"""Where the time of a scan goes: stacks sampled every millisecond, by stage and by function."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.measure import Command, run
from benchmarks.parts import Data, Goal, Part, built, cell, say, table

MODELS = {
    "tied_external": "1.07 GB, external data",
    "tied_inline": "1.07 GB, one file",
    "tied_safetensors": "1.07 GB, safetensors",
    "distinct_external": "1.07 GB without duplicates, external data",
    "same_10k_inline": "10,000 tensors of one shape, ONNX",
    "same_10k_safetensors": "10,000 tensors of one shape, safetensors",
    "checkpoint_90k": "90,000 tensors in 163 shards",
    "small_safetensors": "2 MB, safetensors",
}
N_FUNCTIONS = 6

_SAMPLER = """
import signal, sys, time
stages, functions = {}, {}
PASSED = ('tieaudit.cli', 'tieaudit.console', 'tieaudit.scan', 'tieaudit.__main__')
def sample(signum, frame):
    where, stage, importing = '', '', False
    while frame is not None:
        name = frame.f_globals.get('__name__', '')
        if name.startswith('importlib._bootstrap'):
            importing = True
        if name.startswith('tieaudit.'):
            if not where:
                where = name.removeprefix('tieaudit.') + '.' + frame.f_code.co_name
            if name not in PASSED:
                stage = name.split('.')[1]
        frame = frame.f_back
    key = 'imports' if importing else stage or 'start and end'
    stages[key] = stages.get(key, 0) + 1
    key = 'imports' if importing else where or 'outside'
    functions[key] = functions.get(key, 0) + 1
begin = time.perf_counter()
signal.signal(signal.SIGALRM, sample)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
try:
    from tieaudit.cli import main
    main(['scan', sys.argv[1], '--format', 'json'], standalone_mode=False)
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
seconds = time.perf_counter() - begin
import json
print(json.dumps({'seconds': seconds, 'stages': stages, 'functions': functions}), file=sys.stderr)
"""


def _measure(n_repeats: int) -> Data:
    del n_repeats
    rows: list[dict[str, Any]] = []
    for name, title in MODELS.items():
        command: Command = [sys.executable, "-c", _SAMPLER, built(name)]
        run(command)  # into the cache
        done = run(command)
        said = {"error": done.error} if done.error else json.loads(done.stderr.splitlines()[-1])
        rows.append({"model": name, "title": title, **_most(said)})
        say(f"profile of {name:24} {done.error or said['seconds']}")
    return rows


def _most(said: Any) -> Any:
    """The samples, without the long tail of functions."""
    if "error" in said:
        return said
    order = sorted(said["functions"].items(), key=lambda item: -item[1])
    return {**said, "n_samples": sum(said["stages"].values()), "functions": dict(order[:N_FUNCTIONS])}


def _shares(counts: Mapping[str, int], n_samples: int, least: float) -> str:
    order = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{cell(name)} {n / n_samples:.0%}" for name, n in order if n >= least * n_samples)


def _show(data: Data) -> list[str]:
    rows = []
    for row in data:
        if "error" in row:
            rows.append([row["title"], "–", f"failed: {cell(row['error'])}", "–"])
            continue
        stages = _shares(row["stages"], row["n_samples"], 0.02)
        functions = _shares({f"`{k}`": n for k, n in row["functions"].items()}, row["n_samples"], 0.02)
        rows.append([row["title"], f"{row['seconds']:.2f}", stages, functions])
    return [
        "The stack of the process was looked at every millisecond. *By stage*: the module that the command line called",
        "and everything below it. *By function*: the innermost function of tieaudit and the system and library calls",
        "that it waits for. Seconds are without the start of the interpreter.",
        "",
        *table(["model", "s", "by stage", "by function"], rows, n_text=4),
    ]


def _goals(data: Data) -> list[Goal]:
    del data
    return []


PART = Part("profiles", "Where the time goes", _measure, _show, _goals)
