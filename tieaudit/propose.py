"""Stage: Subject → candidates. Asks schemes which weights could be one; reads no bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tieaudit.errors import UsageError
from tieaudit.registry import choose, discover
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject


@dataclass(frozen=True)
class Asked:
    """A scheme as the user asked for it: `cycle:3` is the scheme cycle with the argument 3."""

    scheme: Scheme
    argument: str = ""


def schemes(names: Iterable[str]) -> list[Asked]:
    """The schemes of these names, in order.

    UsageError with the nearest spelling for an unknown one, and for an argument where the scheme takes none.
    """
    known = discover("schemes", Scheme)
    found = []
    for text in names:
        name, colon, argument = text.partition(":")
        scheme = choose(known, name, "scheme")
        if colon and not scheme.argument:
            raise UsageError(f"--scheme {text}: expected {name} alone, which takes nothing behind a colon")
        found.append(Asked(scheme, argument))
    return found


def propose(subject: Subject, asked: Asked) -> tuple[list[Candidate], list[Refusal]]:
    """What one scheme would do to this model, and what it cannot do and why. UsageError for an unfit argument."""
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for proposal in asked.scheme.propose(subject, asked.argument):
        if isinstance(proposal, Candidate):
            candidates.append(proposal)
        else:
            refusals.append(proposal)
    return candidates, refusals


def listed_candidates(subject: Subject) -> tuple[Candidate, ...]:
    """The candidates that `scan` lists: of every scheme that saves something, with the first argument worth comparing.

    `scheme` is then the text that `--scheme` takes (`cycle:6`). None where weights are elsewhere: what could be one
    tensor may be one already. Cost: every scheme looks at names, roles and shapes; no weight is read.
    """
    if not subject.model.weights_here:
        return ()
    found: list[Candidate] = []
    for scheme in discover("schemes", Scheme).values():
        for argument in list(scheme.worth_comparing(subject))[:1] if scheme.listed_by_scan else ():
            name = f"{scheme.name}:{argument}" if argument else scheme.name
            found.extend(replace(one, scheme=name) for one in propose(subject, Asked(scheme, argument))[0])
    return tuple(found)
