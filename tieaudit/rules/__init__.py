"""Rules: one file each, named by the defect. A rule judges and never prints; the engine is `audit.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tieaudit.verdict import CannotTell, Finding, Severity, Subject

HEADINGS = (
    "What it does",
    "Why it matters",
    "How it is decided",
    "Example",
    "Fix",
    "Cannot tell when",
    "Sources",
)
"""The headings of every rule's page, in this order."""

Check = Callable[[Subject], Iterator[Finding | CannotTell]]


@dataclass(frozen=True)
class Examples:
    """What a rule says about small models; they are its tests and the examples of its page."""

    bad: Sequence[Subject] = ()
    """Subjects on which the rule must find something."""
    good: Sequence[Subject] = ()
    """Subjects on which it must stay silent."""
    unsure: Sequence[Subject] = ()
    """Subjects on which it must say that it cannot tell."""


@dataclass(frozen=True)
class Rule:
    """A rule with its page (the docstring of `check`) and its examples, which are its tests."""

    code: str
    name: str
    """The defect; reads after "allow …"."""
    severity: Severity
    since: str
    check: Check
    make_examples: Callable[[], Examples]
    """Makes them when they are asked for: a scan needs the rule, only its page and its tests need the examples."""

    @cached_property
    def examples(self) -> Examples:
        return self.make_examples()

    @property
    def page(self) -> str:
        return self.check.__doc__ or ""


def rule(
    code: str, name: str, *, severity: Severity, since: str, examples: Callable[[], Examples]
) -> Callable[[Check], Rule]:
    """Turn a check function into a `Rule`. `examples` makes its examples, from subjects that `toy.toy` builds."""

    def wrap(check: Check) -> Rule:
        return Rule(code, name, severity, since, check, examples)

    return wrap


def sections(page: str) -> dict[str, str]:
    """Heading → text of a rule's docstring; the text before the first heading is under the empty heading."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(page).splitlines():
        if line.rstrip(":") in HEADINGS and line.endswith(":"):
            current = line.rstrip(":")
            found[current] = []
        else:
            found[current].append(line.removeprefix("    ") if current else line)
    return {heading: "\n".join(lines).strip() for heading, lines in found.items()}
