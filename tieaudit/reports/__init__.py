"""Reports: one file per output format. A report turns finished verdicts into text; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tieaudit.verdict import Report


@dataclass(frozen=True)
class ReportFormat:
    """One way of showing scans."""

    name: str
    summary: str
    render: Callable[[Sequence[Report], Sequence[tuple[str, str]], Mapping[str, object]], str]
    """(reports, errors as (path, message), settings) → the text for stdout."""
