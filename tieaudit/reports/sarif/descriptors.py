"""What a SARIF log says of the rules: all that there are, whether or not they found something."""

from __future__ import annotations

from collections.abc import Mapping

from tieaudit.audit import rules
from tieaudit.checked import Run
from tieaudit.printable import printable, shorten
from tieaudit.rules import Rule, sections
from tieaudit.verdict import Finding, Severity

LEVELS: Mapping[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
_PROBLEMS: Mapping[Severity, str] = {"error": "error", "warning": "warning", "info": "recommendation"}
_LONGEST_NAME = 255
_LONGEST_DESCRIPTION = 1024
"""Characters that GitHub takes."""
_TAGS = {
    "1": "declared-against-actual",
    "2": "lost-or-gained-in-saving",
    "3": "graph",
    "4": "training",
    "5": "opportunity",
    "9": "tool",
}
"""First digit of a code → what its family is about."""


def descriptors(run: Run) -> list[dict[str, object]]:
    """One `reportingDescriptor` for each rule, by code; also for codes of the run that no rule here has."""
    known = rules()
    found = {code: _of_rule(rule) for code, rule in known.items()}
    for model in run.models:
        for judged in (*model.findings, *model.known):
            if judged.finding.code not in found:
                found[judged.finding.code] = _of_finding(judged.finding)
        for code in (*(item.code for item in model.cannot_tell), *(item.code for item in model.crashed)):
            if code not in found:
                found[code] = _of_finding(Finding((), "", code=code))
    return [found[code] for code in sorted(found)]


def _of_rule(rule: Rule) -> dict[str, object]:
    parts = sections(rule.page)
    short = " ".join(parts[""].split())
    full = " ".join(f"{parts['']} {parts.get('What it does', '')}".split())
    pages = {heading: text for heading, text in parts.items() if heading and text}
    text = "\n\n".join([short, *(f"{heading}:\n{text}" for heading, text in pages.items())])
    markdown = "\n\n".join([short, *(f"**{heading}**\n\n{text}" for heading, text in pages.items())])
    return _descriptor(rule.code, rule.name, rule.severity, short, full, {"text": text, "markdown": markdown})


def _of_finding(finding: Finding) -> dict[str, object]:
    code, name = printable(finding.code), printable(finding.name) or printable(finding.code)
    text = f"{name}: no rule of this version has the code {code}"
    return _descriptor(finding.code, name, finding.severity, name, text, {"text": text})


def _descriptor(
    code: str, name: str, severity: Severity, short: str, full: str, help: dict[str, str]
) -> dict[str, object]:
    family = _TAGS.get(code.removeprefix("TIE")[:1])
    return {
        "id": printable(code),
        "name": shorten(name, _LONGEST_NAME),
        "shortDescription": {"text": shorten(short or name, _LONGEST_DESCRIPTION)},
        "fullDescription": {"text": shorten(full or name, _LONGEST_DESCRIPTION)},
        "help": help,
        "defaultConfiguration": {"level": LEVELS[severity]},
        "properties": {
            "tags": ["weight-tying", *([family] if family else [])],
            "problem.severity": _PROBLEMS[severity],
        },
    }
