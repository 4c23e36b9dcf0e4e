"""The page of a rule, scheme, merge or relation by its name: what `tieaudit explain` prints and the docs show."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from tieaudit.audit import rules
from tieaudit.config import DEFAULTS, rows
from tieaudit.merges import NO_CALIBRATION, Merge
from tieaudit.printable import size
from tieaudit.registry import choose, discover
from tieaudit.relations import Relation
from tieaudit.rules import HEADINGS as HEADINGS
from tieaudit.rules import Rule
from tieaudit.rules import sections as sections
from tieaudit.schemes import Scheme


def explain(name: str) -> str:
    """The page called `name`: a rule's code or name, a scheme, a merge or a relation.

    A name that several sets use gives all its pages. UsageError with the nearest spelling if nothing is called so.
    """
    known = pages()
    wanted = name.strip()
    if wanted not in known and wanted.partition(":")[0] in known:
        wanted = wanted.partition(":")[0]  # cycle:3 is explained by cycle
    if wanted.upper() in known:
        wanted = wanted.upper()
    return "\n".join(page() for page in choose(known, wanted, "rule, scheme, merge or relation"))


def index() -> str:
    """Everything that has a page, a line each."""
    lines = ["rules"]
    lines += [
        f"  {code}  {rule.name}: {inspect.cleandoc(rule.page).partition(chr(10))[0]}" for code, rule in rules().items()
    ]
    for title, members in (
        ("schemes", discover("schemes", Scheme)),
        ("merge policies", discover("merges", Merge)),
        ("relations", discover("relations", Relation)),
    ):
        lines += ["", title, *(f"  {name}: {member.summary}" for name, member in members.items())]
    return "\n".join(lines)


def pages() -> dict[str, list[Callable[[], str]]]:
    """Everything that can be explained: name → the functions that write its pages."""
    found: dict[str, list[Callable[[], str]]] = {}
    for code, rule in rules().items():
        found.setdefault(code, []).append(partial(rule_page, rule))
        found.setdefault(rule.name, []).append(partial(rule_page, rule))
    for scheme in discover("schemes", Scheme).values():
        found.setdefault(scheme.name, []).append(partial(scheme_page, scheme))
    for merge in discover("merges", Merge).values():
        found.setdefault(merge.name, []).append(partial(merge_page, merge))
    for relation in discover("relations", Relation).values():
        found.setdefault(relation.name, []).append(partial(relation_page, relation))
    return found


def rule_page(rule: Rule) -> str:
    """Code, name, severity and threshold of a rule, then its docstring."""
    lines = [f"{rule.code} {rule.name} ({rule.severity}, since {rule.since})", ""]
    lines += [inspect.cleandoc(rule.page), "", f"Threshold: {threshold(rule)}"]
    return "\n".join(lines) + "\n"


def threshold(rule: Rule) -> str:
    """The setting that silences findings of this rule, in words."""
    names = [row.name for row in rows() if rule.code in row.silences]
    if not names:
        return "none, every finding is shown"
    return f"findings under {size(DEFAULTS.threshold(rule.code))} are silenced ({', '.join(names)})"


def scheme_page(scheme: Scheme) -> str:
    """A scheme's own page, with its source."""
    body = scheme.page or f"{scheme.name}: {scheme.summary}"
    return f"{inspect.cleandoc(body)}\n\nSource: {scheme.source}\n"


def merge_page(merge: Merge) -> str:
    """What a merge policy does to unequal weights."""
    body = inspect.cleandoc(merge.page) if merge.page else f"{merge.name}: {merge.summary}"
    needs = f"\n\nNeeds calibration: {NO_CALIBRATION}." if merge.needs else ""
    how = merge.name + (f":{merge.argument}" if merge.argument else "")
    return f"{body}\n\nUsed with --merge {how}.{needs}\n\nSource: {merge.source}\n"


def relation_page(relation: Relation) -> str:
    """What a relation means and where it occurs."""
    return f"{relation.name}: {relation.summary}\n\nSource: {relation.source}\n"
