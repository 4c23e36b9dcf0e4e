"""Reports: one file per output format. A report turns finished verdicts into text; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tieaudit.checked import Run
from tieaudit.errors import UsageError
from tieaudit.verdict import Report


def no_scans(reports: Sequence[Report], errors: Sequence[tuple[str, str]], settings: Mapping[str, object]) -> str:
    """What a format does with scans that it cannot show."""
    raise UsageError("this format shows what `tieaudit check` finds, not scans", hint="use text or json")


def no_runs(run: Run, settings: Mapping[str, object]) -> str:
    """What a format does with runs of the gate that it cannot show."""
    raise UsageError("this format shows scans, not what `tieaudit check` finds")


@dataclass(frozen=True)
class ReportFormat:
    """One way of showing what was found: scans, runs of the gate, or both."""

    name: str
    summary: str
    render: Callable[[Sequence[Report], Sequence[tuple[str, str]], Mapping[str, object]], str] = no_scans
    """(reports, errors as (path, message), settings) → the text for stdout."""
    of_run: Callable[[Run, Mapping[str, object]], str] = no_runs
    """(run, settings: color, width, statistics) → the text for stdout or a file, of `tieaudit check`."""
