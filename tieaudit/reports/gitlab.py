"""GitLab's Code Quality report: an array that the merge request compares with that of the target branch.

Source: docs.gitlab.com, "Code Quality", report format; GitLab stops reading at the first entry that breaks its schema
(gitlabhq/gitlabhq, lib/gitlab/ci/parsers/codequality/code_climate.rb) and keeps one entry for a fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from tieaudit.checked import Checked, Judged, Run
from tieaudit.printable import printable
from tieaudit.reports import ReportFormat
from tieaudit.tally import from_the_top, not_read, where
from tieaudit.verdict import Severity

_SEVERITIES: Mapping[Severity, str] = {"error": "critical", "warning": "major", "info": "info"}
_LONGEST = 2000
_LONGEST_PATH = 4096


def _of_run(run: Run, settings: Mapping[str, object]) -> str:
    """Findings, and what could not be judged: a report that leaves it out would read as clean."""
    seen: dict[str, int] = {}
    entries = [_numbered(entry, seen) for entry in _entries(from_the_top(run))]
    # ASCII, and no `##` that a runner may take for a command where the report is printed to its log
    return json.dumps(entries, indent=1, ensure_ascii=True).replace("##", "#\\u0023") + "\n"


def _entries(run: Run) -> Iterator[dict[str, object]]:
    for path, message in not_read(run):
        yield _entry("not-read", message, "blocker", path, 1, "")
    for model in run.models:
        for crash in model.crashed:
            said = f"{crash.code} crashed, a fault of tieaudit: {crash.because}"
            yield _entry(f"{crash.code} crashed", said, "blocker", model.path, 1, "")
        for judged in model.findings:
            yield _finding(model, judged)
        for unsure in model.cannot_tell:
            said = f"cannot tell: {unsure.because}"
            yield _entry(unsure.code, said, "info", model.path, 1, "\0".join((unsure.because, *unsure.ids)))


def _finding(model: Checked, judged: Judged) -> dict[str, object]:
    finding = judged.finding
    said = finding.message
    if finding.fix is not None:
        said += f" ({'by hand' if finding.fix.safety == 'manual' else 'fix'}: {finding.fix.command})"
    name, severity = f"{finding.code} {finding.name}", _SEVERITIES[finding.severity]
    # also the model: two with the same weights have the same finding, and GitLab would keep one of them
    return _entry(name, said, severity, where(judged, model), judged.place.line, f"{model.path}\0{judged.fingerprint}")


def _entry(name: str, said: str, severity: str, path: str, line: int, key: str) -> dict[str, object]:
    """`key`: what tells it apart from others of this name in this file, the same from run to run."""
    from hashlib import sha256

    path, name = path or ".", printable(name)
    fingerprint = sha256("\0".join((name, path, key)).encode("utf-8", "surrogatepass")).hexdigest()
    return {
        "description": printable(said, _LONGEST) or name,
        "check_name": name,
        "fingerprint": fingerprint,
        "severity": severity,
        "location": {"path": printable(path, _LONGEST_PATH), "lines": {"begin": max(line, 1)}},
    }


def _numbered(entry: dict[str, object], seen: dict[str, int]) -> dict[str, object]:
    """The entry with a fingerprint that no earlier one has."""
    from hashlib import sha256

    fingerprint = str(entry["fingerprint"])
    n = seen[fingerprint] = seen.get(fingerprint, 0) + 1
    return entry if n == 1 else {**entry, "fingerprint": sha256(f"{fingerprint} {n}".encode()).hexdigest()}


gitlab = ReportFormat(
    name="gitlab",
    summary="a Code Quality report, as GitLab shows it in a merge request",
    of_run=_of_run,
)
