"""The page of a rule, scheme, merge or relation by its name: what `tieaudit explain` prints and the docs show."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from tieaudit.audit import rules
from tieaudit.config import DEFAULTS, rows
from tieaudit.errors import UsageError
from tieaudit.merges import NO_CALIBRATION, Merge
from tieaudit.printable import size
from tieaudit.registry import discover, nearest
from tieaudit.relations import Relation
from tieaudit.rules import HEADINGS as HEADINGS
from tieaudit.rules import Rule
from tieaudit.rules import sections as sections
from tieaudit.schemes import Scheme
from tieaudit.verdict import Demands


def explain(name: str) -> str:
    """The page called `name`: a rule's code or name, a scheme, a merge or a relation; the lines of a family of rules.

    A name that several sets use gives all its pages. UsageError with the nearest spelling if nothing is called so.
    """
    known = pages()
    wanted = name.strip()
    family = wanted.upper()
    if family.startswith("TIE") and family not in known and any(code.startswith(family) for code in rules()):
        return "\n".join(["rules", *_rule_lines(family)]) + "\n"
    if wanted not in known and wanted.partition(":")[0] in known:
        wanted = wanted.partition(":")[0]  # cycle:3 is explained by cycle
    if wanted.upper() in known:
        wanted = wanted.upper()
    if wanted not in known:
        question = nearest(wanted, known) or nearest(wanted.upper(), known)
        hint = question or "`tieaudit explain` lists what there is"
        raise UsageError(f"no rule, scheme, merge policy or relation is called {wanted!r}", hint=hint)
    return "\n".join(page() for page in known[wanted])


def index() -> str:
    """Everything that has a page, a line each."""
    lines = ["rules", *_rule_lines("")]
    for title, members in (
        ("schemes", discover("schemes", Scheme)),
        ("merge policies", discover("merges", Merge)),
        ("relations", discover("relations", Relation)),
    ):
        lines += ["", title, *(f"  {name}: {member.summary}" for name, member in members.items())]
    return "\n".join(lines)


def _rule_lines(family: str) -> list[str]:
    """A line for each rule whose code begins so."""
    first = {code: inspect.cleandoc(rule.page).partition("\n")[0] for code, rule in rules().items()}
    return [f"  {code}  {rules()[code].name}: {line}" for code, line in first.items() if code.startswith(family)]


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


def policy_of(demands: Demands) -> str:
    """The lines of a policy file that demand this; empty for nothing."""
    quoted = ", ".join(f'"{name}"' for name in demands.expect)
    lines = [f"expect = [{quoted}]"] if demands.expect else []
    limits = {"max-duplicate-bytes": demands.max_duplicate_bytes, "max-parameters": demands.max_parameters}
    lines += [f"{key} = {most}" for key, most in limits.items() if most is not None]
    return "".join(f"{line}\n" for line in lines)


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
