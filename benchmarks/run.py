"""The benchmark suite: measure, keep the figures in benchmarks/results.json, write docs/benchmarks.md from them.

    python benchmarks/run.py                            # everything, about 12 minutes on two quiet cores
    python benchmarks/run.py --only cold-start apply    # these parts again; the others stay as they were
    python benchmarks/run.py --only                     # only the page again, from the figures that are there

Models are built into benchmarks/built (13 GB with everything), peers installed into benchmarks/built/peers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page  # noqa: E402 - runs as a script, from any folder
from benchmarks.parts import (  # noqa: E402
    applying,
    bytes_read,
    checkpoints,
    cold_start,
    many_models,
    one_gigabyte,
    profiles,
    same_shape,
)
from tieaudit import __version__  # noqa: E402

PARTS = tuple(
    module.PART
    for module in (one_gigabyte, bytes_read, same_shape, checkpoints, cold_start, many_models, applying, profiles)
)


def machine() -> dict[str, Any]:
    """What the figures depend on, as far as the system says."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "n_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "tieaudit": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()


def read_results(path: Path) -> dict[str, Any]:
    """Part → what was measured of it; nothing where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def main() -> None:
    """The command line."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=page.RESULTS)
    parser.add_argument("--out", type=Path, default=page.PAGE)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("expected at least one repeat")
    results = read_results(options.results)
    load = os.getloadavg()[0]  # of others: it is read before anything of ours runs
    for part in PARTS:
        if options.only is not None and part.name not in options.only:
            continue
        data = part.measure(options.repeats)
        results[part.name] = {
            "measured_on": datetime.date.today().isoformat(),
            "load": round(load, 2),
            "n_repeats": options.repeats,
            "machine": machine(),
            "data": data,
        }
        results = {name: results[name] for name in names if name in results}
        options.results.write_text(json.dumps(results, indent=1) + "\n")  # after each: an interrupt loses one part
    page.written(results, PARTS, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
