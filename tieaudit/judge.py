"""Stage: a model and the terms of a policy → Checked. The one place where a policy meets what the rules say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from tieaudit.audit import audit, rules
from tieaudit.checked import OF_THE_POLICY, RANK, Checked, Judged, Place
from tieaudit.model import Model
from tieaudit.policy import Policy, Suppression, Terms
from tieaudit.registry import nearest
from tieaudit.rules import Rule
from tieaudit.scan import look
from tieaudit.sealed import Locked
from tieaudit.verdict import CannotTell, Crashed, Demands, Finding, Found, Subject
from tieaudit.whereabouts import place_of, shown


def chosen(terms: Terms, *, of_the_policy: bool = False) -> dict[str, Rule]:
    """The rules that these terms select."""
    every = rules().items()
    return {
        code: rule
        for code, rule in every
        if terms.selects(code, rule.name) and (code in OF_THE_POLICY) == of_the_policy
    }


def judge(model: Model, terms: Terms, base: Path, shown_as: str, locked: Locked | None = None) -> Checked:
    """What the gate says of one model: selected rules, severities, thresholds and suppressions applied.

    `base`: what places are relative to; `shown_as`: how the model itself is called; `locked`: what the lock file says
    of it. Cost: that of a scan, and where something was locked a digest of what is tied.
    """
    subject = replace(look(model), demands=terms.demands, locked=locked)
    return judged(subject, terms, base, shown_as)


def judged(subject: Subject, terms: Terms, base: Path, shown_as: str, *, of_the_policy: bool = False) -> Checked:
    """The same for a model that was looked at."""
    report = audit(subject, (), terms.settings, only=chosen(terms, of_the_policy=of_the_policy))
    used: dict[str, None] = {}
    kept: list[Finding] = []
    for finding in report.findings:
        hiding = _hiding(terms, finding.code, finding.ids, used)
        if not hiding:
            severity = terms.severity_of(finding.code, finding.name, finding.severity)
            kept.append(replace(finding, severity=severity))
    unsure = [one for one in report.cannot_tell if not _hiding(terms, one.code, one.ids, used)]
    kept.sort(key=lambda one: (RANK[one.severity], -one.n_bytes, one.code, one.ids))
    model = subject.model
    return Checked(
        path=shown_as,
        format=model.format,
        findings=tuple(Judged(one, place_of(model, one, base), fingerprint(model, one)) for one in kept),
        cannot_tell=tuple(unsure),
        crashed=report.crashed,
        summary=report.summary,
        n_rules=report.n_rules,
        n_silenced=report.n_silenced,
        used=tuple(used),
        n_suppressed=len(report.findings) - len(kept) + len(report.cannot_tell) - len(unsure),
        unreadable=bool(subject.found.unreadable),
        n_bytes_read=subject.found.n_bytes_read,
        weights_here=model.weights_here,
        ran=_ran(terms, report.crashed),
    )


def _ran(terms: Terms, crashed: Collection[Crashed]) -> tuple[str, ...]:
    """Codes of the rules that said all they had to say, with those about the policy that these terms select."""
    every = {**chosen(terms), **chosen(terms, of_the_policy=True)}
    return tuple(sorted(every.keys() - {one.code for one in crashed}))


def _hiding(terms: Terms, code: str, ids: tuple[str, ...], used: dict[str, None]) -> bool:
    """Whether suppressions hide what a rule says of these weights; all that speak of one of them are used.

    All of the weights but one have to be named, the one that the others are copies of: a weight that joins them later
    is none that anybody accepted.
    """
    named = {one.key: set(one.named(code, ids)) for one in terms.suppressions}
    used.update((key, None) for key, weights in named.items() if weights)
    accepted = set().union(*named.values())
    return bool(accepted) and len(set(ids) - accepted) <= 1


def fingerprint(model: Model, finding: Finding) -> str:
    """What makes two findings the same one in two runs: see `Judged.fingerprint`; its message where it has no ids."""
    known = [(id, model.by_id.get(id)) for id in sorted(finding.ids)]
    rows = [[id, one.dtype, list(one.shape)] if one is not None else [id] for id, one in known]
    text = json.dumps([finding.code, rows or finding.message])  # quoted: a name may hold whatever parts two names
    return hashlib.sha256(text.encode()).hexdigest()


def weights_elsewhere(shown_as: str, format_name: str, because: str) -> Checked:
    """The answer about a model of which only pointers to the weights are here."""
    return Checked(shown_as, format_name, cannot_tell=(CannotTell(because, code="TIE902"),), weights_here=False)


def of_the_policy(
    policy: Policy, stale: Mapping[str, Suppression], base: Path, found_on: Mapping[str, Collection[str]]
) -> Checked | None:
    """What is to be said of the policy's own file: suppressions that hide nothing; None if nothing is.

    `found_on`: code → ids of the weights of which findings are left, so that a misspelt one is told from a stale one.
    """
    terms = policy.terms("")
    if not stale or not policy.file or not chosen(terms, of_the_policy=True):
        return None
    file = shown(Path(policy.file), base)
    said = {_sentence(one, found_on.get(one.code, ())): one for one in stale.values()}
    model = Model(policy.file, "policy", (), ())
    subject = Subject(model, Found(()), {}, Demands(stale=tuple(said)))
    found = judged(subject, replace(terms, suppressions=()), base, file, of_the_policy=True)
    placed = tuple(
        replace(one, place=Place(file, said[str(one.finding.evidence["suppression"])].line)) for one in found.findings
    )
    return replace(found, findings=placed, summary=None)


def _sentence(one: Suppression, found_on: Collection[str]) -> str:
    where = f" in {one.path}" if one.path else ""
    question = nearest(one.weight, found_on)
    meant = f"; {question}" if question and one.weight not in found_on else ""
    return f"the suppression of {one.code} on {one.weight}{where} hides nothing any more ({one.reason}){meant}"
