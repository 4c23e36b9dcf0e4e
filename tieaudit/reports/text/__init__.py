"""The reports for people, the verdict last: one screen for each model of a scan, the findings of a run of the gate.

Everything that comes from a file passes `printable`, and every line `inert`. Long lists are cut and counted; JSON
lists all.
"""

from __future__ import annotations

from collections.abc import Mapping

from tieaudit.checked import Run
from tieaudit.reports import ReportFormat
from tieaudit.reports.text.scan import of_scans


def _of_run(run: Run, settings: Mapping[str, object]) -> str:
    from tieaudit.reports.text.gate import of_run  # a scan needs none of this

    return of_run(run, settings)


text = ReportFormat(name="text", summary="for people, the verdict last", render=of_scans, of_run=_of_run)
