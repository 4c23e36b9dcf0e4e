"""Rules: one file each, named by the defect. A rule judges and never prints; the engine is `audit.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tieaudit.verdict import CannotTell, Finding, Severity, Subject

Check = Callable[[Subject], Iterator[Finding | CannotTell]]


@dataclass(frozen=True)
class Rule:
    """A rule with its page (the docstring of `check`) and its examples, which are its tests."""

    code: str
    name: str
    """The defect; reads after "allow …"."""
    severity: Severity
    since: str
    check: Check
    bad: tuple[Subject, ...]
    """Subjects on which the rule must find something."""
    good: tuple[Subject, ...]
    """Subjects on which it must stay silent."""
    unsure: tuple[Subject, ...]
    """Subjects on which it must say that it cannot tell."""

    @property
    def page(self) -> str:
        return self.check.__doc__ or ""


def rule(
    code: str, name: str, *, severity: Severity, since: str, bad: Any = (), good: Any = (), unsure: Any = ()
) -> Callable[[Check], Rule]:
    """Turn a check function into a `Rule`. Examples are subjects made by `toy.toy`."""

    def wrap(check: Check) -> Rule:
        return Rule(code, name, severity, since, check, tuple(bad), tuple(good), tuple(unsure))

    return wrap
