"""Stage: Subject → candidates. Asks schemes which weights could be one; reads no bytes."""

from __future__ import annotations

from collections.abc import Iterable

from tieaudit.registry import choose, discover
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject


def schemes(names: Iterable[str]) -> list[Scheme]:
    """The schemes of these names, in order; UsageError with the nearest spelling for an unknown one."""
    known = discover("schemes", Scheme)
    return [choose(known, name, "scheme") for name in names]


def propose(subject: Subject, scheme: Scheme) -> tuple[list[Candidate], list[Refusal]]:
    """What one scheme would do to this model, and what it cannot do and why."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for proposal in scheme.propose(subject):
        if isinstance(proposal, Candidate):
            candidates.append(proposal)
        else:
            refusals.append(proposal)
    return candidates, refusals


def listed_candidates(subject: Subject) -> tuple[Candidate, ...]:
    """The candidates that `scan` lists: of every scheme that proposes more than what the ties already say."""
    found: list[Candidate] = []
    for scheme in discover("schemes", Scheme).values():
        if scheme.listed_by_scan:
            found.extend(propose(subject, scheme)[0])
    return tuple(found)
