"""Fuzz the readers: `python -m fuzz.run [TARGET …] [--seconds N]`. `make fuzz` runs each for FUZZ_SECONDS.

Each target runs in a child process under atheris (libFuzzer with the coverage of tieaudit). What fails is stored in
fuzz/found/<target>/ and the run goes on until its time is over; what was learnt stays in fuzz/corpus/<target>/.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import random
import re
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parent
NAMES = ("onnx", "safetensors", "checkpoint", "folder", "scan")
MEMORY_MB = 2048


def fuzz(name: str, arguments: list[str]) -> None:
    """This process becomes the fuzzer of one target; it does not return."""
    import atheris

    with atheris.instrument_imports(include=["tieaudit"]):
        import tieaudit

        for module in pkgutil.walk_packages(tieaudit.__path__, "tieaudit."):  # most import each other inside functions
            if not module.name.endswith(("__main__", ".ask")):
                importlib.import_module(module.name)
        from fuzz.targets import TARGETS
        from tieaudit.formats.onnx import wire

    target = TARGETS[name]
    wire.N_BYTES_INLINE = 24  # inputs are small: their tensors shall be left in the file all the same
    for seed in target.seeds():  # everything imported late is imported now, before reads are watched
        target.check(seed)

    def changed(data: bytes, n_most: int, seed: int) -> bytes:
        limit = min(n_most, target.n_most)
        return target.mutated(data, random.Random(seed), limit, lambda part: bytes(atheris.Mutate(part, limit)))

    atheris.Setup([sys.argv[0], *arguments], target.check, custom_mutator=changed)
    atheris.Fuzz()


def run(name: str, seconds: int) -> int:
    """Fuzz one target for a time, beginning again after each failure. Returns how many failures there were."""
    from fuzz.targets import TARGETS

    corpus, found = HOME / "corpus" / name, HOME / "found" / name
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed{index}").write_bytes(seed)
    end, n_runs, n_failed, last = time.monotonic() + seconds, 0, 0, ""
    while (left := int(end - time.monotonic())) > 0:
        options = [
            *(
                f"-max_total_time={left}",
                f"-max_len={TARGETS[name].n_most}",
                "-timeout=10",
                f"-rss_limit_mb={MEMORY_MB}",
            ),
            *(
                f"-artifact_prefix={found}{os.sep}",
                "-print_final_stats=1",
                "-verbosity=1",
                "-len_control=0",
                str(corpus),
            ),
        ]
        command = [sys.executable, "-m", "fuzz.run", "--child", name, *options]
        done = subprocess.run(
            command, cwd=HOME.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        n_runs += sum(map(int, re.findall(r"number_of_executed_units: *(\d+)", done.stdout)))
        last = next(iter(re.findall(r"cov: \d+ ft: \d+ corp: \d+", done.stdout)[::-1]), last)
        if done.returncode:
            n_failed += 1
            (found / f"log{n_failed}.txt").write_text(done.stdout[-20_000:])
            print(f"{name}: {_reason(done.stdout)}", flush=True)
    print(
        f"{name}: {seconds} s, {n_runs:,} runs, {n_runs / seconds:,.0f} a second, {last}, {n_failed} failures",
        flush=True,
    )
    return n_failed


def _reason(log: str) -> str:
    """The exception that ended a run, with the place in tieaudit where it was raised, or what libFuzzer says."""
    raised = log.partition("Uncaught Python exception: ===")[2].splitlines()[1:2]
    said = raised or [line for line in log.splitlines() if "ERROR: libFuzzer" in line] or ["ended with an error"]
    places = re.findall(r'File ".*?(tieaudit/[\w/]+\.py)", line (\d+)', log)
    return said[0][:300] + (f" ({places[-1][0]}:{places[-1][1]})" if places else "")


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument(
        "--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "600")), help="for each target"
    )
    options = parser.parse_args()
    if unknown := set(options.targets) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    sys.exit(1 if sum(run(name, options.seconds) for name in options.targets or NAMES) else 0)


if __name__ == "__main__":
    main()
