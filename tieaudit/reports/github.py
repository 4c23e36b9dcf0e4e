"""Annotations in GitHub's pull requests: workflow commands on stdout, which the runner takes out of the log.

Source: docs.github.com, "Workflow commands for GitHub Actions"; the escapes are those of actions/toolkit
(packages/core/src/command.ts), which actions/runner (ActionCommand.cs) undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tieaudit.checked import Checked, Judged, Run
from tieaudit.printable import counted, inert, printable
from tieaudit.reports import ReportFormat
from tieaudit.tally import from_the_top, not_read, tally, where, worst_first
from tieaudit.verdict import Severity

_N_MOST = 10
"""Annotations of one kind that GitHub shows of one step (github.com/orgs/community/discussions/26680)."""
_LONGEST = 2000
_LONGEST_PATH = 4096
"""Characters; no system opens a longer one."""

_Kind = Literal["error", "warning", "notice"]
_KINDS: Mapping[Severity, _Kind] = {"error": "error", "warning": "warning", "info": "notice"}


@dataclass(frozen=True)
class _Annotation:
    kind: _Kind
    path: str
    line: int
    title: str
    message: str

    @property
    def command(self) -> str:
        """The line that the runner understands."""
        where = f"file={_property(printable(self.path, _LONGEST_PATH))}," if self.path else ""
        where += f"line={self.line}," if self.path and self.line else ""
        return f"::{self.kind} {where}title={_property(self.title)}::{_data(self.message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _of_run(run: Run, settings: Mapping[str, object]) -> str:
    """What could not be judged and the worst findings first, within GitHub's limits; the verdict is plain text."""
    run = from_the_top(run)
    shown: list[_Annotation] = []
    n_of: dict[_Kind, int] = {"error": 0, "warning": 0, "notice": 0}
    # the last notice says what is missing
    room: dict[_Kind, int] = {"error": _N_MOST, "warning": _N_MOST, "notice": _N_MOST - 1}
    for annotation in _annotations(run):
        if n_of[annotation.kind] < room[annotation.kind]:
            shown.append(annotation)
        n_of[annotation.kind] += 1
    verdict = tally(run).verdict
    cut = [counted(n - room[kind], kind) for kind, n in n_of.items() if n > room[kind]]
    if cut:
        why = f"GitHub shows {_N_MOST} annotations of each kind for one step; --format json lists all"
        shown.append(_Annotation("notice", "", 0, "tieaudit", f"{verdict}\nand {', '.join(cut)} more: {why}"))
    return "\n".join([*(one.command for one in shown), inert(verdict)]) + "\n"


def _annotations(run: Run) -> list[_Annotation]:
    found = [
        _Annotation("error", path, 0, "tieaudit: not read", printable(message, _LONGEST))
        for path, message in not_read(run)
    ]
    for model in run.models:
        for crash in model.crashed:
            said = f"{printable(crash.because, _LONGEST)}\na fault of tieaudit, please report it"
            found.append(_Annotation("error", model.path, 0, f"{printable(crash.code)} crashed", said))
    found += [_finding(model, judged) for model, judged in worst_first(run)]
    for model in run.models:
        for unsure in model.cannot_tell:
            title = f"{printable(unsure.code)} cannot tell"
            found.append(_Annotation("notice", model.path, 0, title, printable(unsure.because, _LONGEST)))
    return found


def _finding(model: Checked, judged: Judged) -> _Annotation:
    finding = judged.finding
    message = printable(finding.message, _LONGEST)
    if finding.fix is not None:
        how = "by hand" if finding.fix.safety == "manual" else "fix"
        message += f"\n{how}: {printable(finding.fix.command, _LONGEST)}"
    title = f"{printable(finding.code)} {printable(finding.name)}"
    return _Annotation(_KINDS[finding.severity], where(judged, model), judged.place.line, title, message)


github = ReportFormat(
    name="github",
    summary="annotations in a pull request, as GitHub Actions reads them from the log",
    of_run=_of_run,
)
