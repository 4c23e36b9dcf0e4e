"""Stage: Subject → Report. Runs every rule on the same immutable subject and sorts what they say.

A rule ends in finding, fine, cannot tell or crashed; all are counted. A crash is the tool's fault and never reads as
clean: what the rule said before it crashed is kept, and so is the traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tieaudit.config import DEFAULTS, Settings
from tieaudit.errors import PluginError, UsageError
from tieaudit.registry import discover
from tieaudit.rules import Rule
from tieaudit.summary import summary
from tieaudit.verdict import Candidate, CannotTell, Crashed, Finding, Report, Subject

_ORDER = {"error": 0, "warning": 1, "info": 2}


def rules() -> dict[str, Rule]:
    """All rules by code, in order. PluginError if two share a code."""
    found: dict[str, Rule] = {}
    for rule in discover("rules", Rule).values():
        if rule.code in found:
            raise PluginError(f"rules {found[rule.code].name} and {rule.name} both have the code {rule.code}")
        found[rule.code] = rule
    return dict(sorted(found.items()))


def audit(
    subject: Subject,
    candidates: Sequence[Candidate] = (),
    settings: Settings = DEFAULTS,
    *,
    only: Mapping[str, Rule] | None = None,
) -> Report:
    """The whole answer about one model: what every rule found, could not tell, or where it crashed.

    Findings under their rule's threshold are silenced and counted; ties and totals keep them.
    Cost: that of the rules; nothing is read.
    """
    findings: list[Finding] = []
    unsure: list[CannotTell] = []
    crashed: list[Crashed] = []
    n_silenced = 0
    chosen = rules() if only is None else only
    for rule in chosen.values():
        said, crash = _run(rule, subject)
        for item in said:
            if isinstance(item, CannotTell):
                unsure.append(replace(item, code=rule.code))
            elif item.n_bytes < settings.threshold(rule.code):
                n_silenced += 1
            else:
                findings.append(replace(item, code=rule.code, name=rule.name, severity=rule.severity))
        if crash is not None:
            crashed.append(crash)
    findings.sort(key=lambda found: (_ORDER[found.severity], -found.n_bytes, found.code, found.ids))
    return Report(
        subject=subject,
        summary=summary(subject.model, subject.found),
        candidates=tuple(candidates),
        findings=tuple(findings),
        cannot_tell=tuple(unsure),
        crashed=tuple(crashed),
        n_rules=len(chosen),
        n_silenced=n_silenced,
    )


def _run(rule: Rule, subject: Subject) -> tuple[list[Finding | CannotTell], Crashed | None]:
    said: list[Finding | CannotTell] = []
    try:
        for item in rule.check(subject):
            if not isinstance(item, Finding | CannotTell):
                raise PluginError(f"{rule.code} {rule.name}: expected a Finding or CannotTell, found {item!r}")
            said.append(item)
    except UsageError:  # the fault of who expects a scheme with an argument that is none, not of the rule
        raise
    except Exception as error:  # a rule may be third-party code; whatever it raises is shown, never swallowed
        reason = f"{type(error).__name__}: {error}"
        return said, Crashed(rule.code, reason, traceback.format_exc())
    return said, None
