"""SARIF 2.1.0 (OASIS), as GitHub's code scanning takes it: one run, all rules, results within its limits.

Limits: docs.github.com, "SARIF support for code scanning". A file over them is rejected whole, so results are grouped
until they fit, and each group says how many findings it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

from tieaudit.checked import Run
from tieaudit.reports import ReportFormat


def _of_run(run: Run, settings: Mapping[str, object]) -> str:
    from tieaudit.reports.sarif.log import of_run  # a scan asks for all formats, and needs none of this

    return of_run(run, settings)


sarif = ReportFormat(name="sarif", summary="SARIF 2.1.0, within the limits of GitHub's code scanning", of_run=_of_run)
