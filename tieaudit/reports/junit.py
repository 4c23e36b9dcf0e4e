"""JUnit's XML, which nearly every CI service shows: a suite for each model, a case for each rule.

Source: the schema of Jenkins' xunit plugin (junit-10.xsd), as pytest, GitLab and Jenkins read it. Beyond that schema,
as most tools do: `error`, the file of a case, which GitLab links to, and how many were skipped in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tieaudit.audit import rules
from tieaudit.checked import OF_THE_POLICY, Checked, Judged, Run
from tieaudit.printable import counted, printable
from tieaudit.reports import ReportFormat
from tieaudit.tally import not_read, said, where

_LONGEST = 2000
_N_MOST = 100
"""Findings of one rule in one model whose text is written out."""
_TEXT = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\n": "&#10;"})


@dataclass(frozen=True)
class _Case:
    """One `testcase`."""

    name: str
    element: str = ""
    """failure, error, skipped, or nothing where it passed."""
    kind: str = ""
    said: str = ""
    """The first line in short, for a list."""
    text: str = ""
    file: str = ""


def _of_run(run: Run, settings: Mapping[str, object]) -> str:
    """The document. Characters that XML 1.0 does not allow cannot occur: everything passed `printable`."""
    known = {code: f"{code} {rule.name}" for code, rule in rules().items()}
    of_models = [code for code in known if code not in OF_THE_POLICY]
    suites = [(model.path, cases) for model in run.models if (cases := list(_cases(model, known, of_models)))]
    suites += [(path, [_Case("reading", "error", "not-read", why, file=path)]) for path, why in not_read(run)]
    suites += [(path, [_Case("reading", "skipped", "skipped", why, file=path)]) for path, why in run.skipped]
    every = [case for _, cases in suites for case in cases]
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<testsuites name="tieaudit" {_counts(every)}>']
    for path, cases in suites:
        name = _attribute(printable(path) or ".")
        lines.append(f'<testsuite name="{name}" {_counts(cases)} time="0">')
        lines += [_case(name, case) for case in cases]
        lines.append("</testsuite>")
    # `##[` is a command to GitHub's runner where the document is printed to its log
    return "\n".join([*lines, "</testsuites>"]).replace("##", "#&#35;") + "\n"


def _counts(cases: Sequence[_Case]) -> str:
    n = Counter(case.element for case in cases)
    return f'tests="{len(cases)}" failures="{n["failure"]}" errors="{n["error"]}" skipped="{n["skipped"]}"'


def _cases(model: Checked, known: Mapping[str, str], of_models: Sequence[str]) -> Iterator[_Case]:
    """One for each rule; where the policy chose some, the silent ones are one case: which they were is not kept.

    `of_models`: codes of the rules that run on models, not on the policy.
    """
    spoke = set(said(model))
    silent = [code for code in of_models if code not in spoke] if model.n_rules == len(of_models) else []
    for code in sorted([*spoke, *silent]):
        yield _of_rule(model, code, known.get(code, "")) if code in spoke else _Case(known[code])
    n_more = model.n_rules - len(spoke) - len(silent)
    if n_more > 0:
        yield _Case(counted(n_more, "other rule"))


def _of_rule(model: Checked, code: str, title: str) -> _Case:
    """The worst of what a rule said of a model: crashed, a finding, cannot tell, known."""
    found = [judged for judged in model.findings if judged.finding.code == code]
    kept = [judged for judged in model.known if judged.finding.code == code]
    unsure = [item.because for item in model.cannot_tell if item.code == code]
    crashed = [crash.because for crash in model.crashed if crash.code == code]
    title = title or printable(" ".join([code, *[judged.finding.name for judged in (*found, *kept)][:1]]))
    file = where(found[0], model) if found else model.path
    text = _text(model, found, kept, unsure, crashed)
    if crashed:
        return _Case(title, "error", "crashed", crashed[0], text, file)
    if found:
        n_more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        first = printable(found[0].finding.message, _LONGEST - len(n_more)) + n_more
        return _Case(title, "failure", found[0].finding.severity, first, text, file)
    if unsure:
        return _Case(title, "skipped", "cannot-tell", unsure[0], text, file)
    return _Case(title, text=text, file=file)


def _text(
    model: Checked, found: Sequence[Judged], kept: Sequence[Judged], unsure: Sequence[str], crashed: Sequence[str]
) -> str:
    parts = [f"crashed, a fault of tieaudit: {printable(because, _LONGEST)}" for because in crashed]
    parts += [_finding(model, judged) for judged in found[:_N_MOST]]
    parts += [f"and {len(found) - _N_MOST:,} more findings; --format json lists all"] if len(found) > _N_MOST else []
    parts += [f"cannot tell: {printable(because, _LONGEST)}" for because in unsure[:_N_MOST]]
    parts += [f"and {len(unsure) - _N_MOST:,} more; --format json lists all"] if len(unsure) > _N_MOST else []
    parts += [f"in the baseline: {_finding(model, judged)}" for judged in kept[:_N_MOST]]
    parts += [f"and {len(kept) - _N_MOST:,} more in the baseline"] if len(kept) > _N_MOST else []
    return "\n".join(parts)


def _finding(model: Checked, judged: Judged) -> str:
    finding = judged.finding
    line = f":{judged.place.line}" if judged.place.line else ""
    text = f"{finding.severity} {printable(where(judged, model))}{line}: {printable(finding.message, _LONGEST)}"
    if finding.fix is None:
        return text
    how = "by hand" if finding.fix.safety == "manual" else "fix"
    return f"{text}\n  {how}: {printable(finding.fix.command, _LONGEST)}"


def _case(suite: str, case: _Case) -> str:
    file = f' file="{_attribute(printable(case.file))}"' if case.file else ""
    opened = f'<testcase classname="{suite}" name="{_attribute(case.name)}"{file} time="0"'
    text = case.text.translate(_TEXT)
    if case.element:
        shown = f'type="{_attribute(case.kind)}" message="{_attribute(printable(case.said, _LONGEST))}"'
        return f"{opened}><{case.element} {shown}>{text}</{case.element}></testcase>"
    return f"{opened}><system-out>{text}</system-out></testcase>" if text else f"{opened}/>"


def _attribute(text: str) -> str:
    return text.translate(_MARKUP)


junit = ReportFormat(
    name="junit",
    summary="JUnit XML, a suite for each model and a case for each rule",
    of_run=_of_run,
)
