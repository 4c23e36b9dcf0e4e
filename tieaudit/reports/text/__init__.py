"""The reports for people, the verdict last: one screen for each model of a scan, the findings of a run of the gate.

Everything that comes from a file passes `printable`, and every line `inert`. Long lists are cut and counted; JSON
lists all.
"""

from __future__ import annotations

from tieaudit.reports import ReportFormat
from tieaudit.reports.text.gate import of_run
from tieaudit.reports.text.scan import of_scans

text = ReportFormat(name="text", summary="for people, the verdict last", render=of_scans, of_run=of_run)
