"""This machine and this process: the processor's name, memory now and at most, and how long something takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

N_MOST_RUNS = 100
SECONDS_OF_A_SLOW_RUN = 2.0


def processor_name() -> str:
    """The CPU's name, for the report."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def resident_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            n_pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import os

    return n_pages * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    """Let `peak_since` begin anew. Linux: 5 in clear_refs resets VmHWM (proc_pid_clear_refs(5), since 4.0)."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_since() -> int | None:
    """The most resident memory since `forget_peak`, in bytes; None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        return None


@dataclass(frozen=True)
class Timing:
    """What running something costs."""

    seconds: tuple[float, ...]
    """Of every run after the first, in order."""
    n_bytes_peak: int | None
    """The most memory that the first run took beyond what was there before it; None where nobody says."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def repeated(run: Callable[[], object], n_runs: int, seconds: float) -> Timing:
    """Run once to warm up, then at least `n_runs` times and until `seconds` have passed, but at most 100 times.

    Once more only where the first run took longer than two seconds. The peak is the growth of this process during
    the first run.
    """
    before = resident_bytes()
    forget_peak()
    began = time.perf_counter()
    run()
    n_runs = n_runs if time.perf_counter() - began < SECONDS_OF_A_SLOW_RUN else 1
    after = peak_since()
    peak = None if before is None or after is None else max(0, after - before)
    measured: list[float] = []
    began = time.perf_counter()
    while len(measured) < n_runs or (len(measured) < N_MOST_RUNS and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        run()
        measured.append(time.perf_counter() - start)
    return Timing(tuple(measured), peak)
