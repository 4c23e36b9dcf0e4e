"""Expressions of free sizes: what they say in plain arithmetic, and whether they are nothing else.

PyTorch writes `sympy.srepr` (`Add(Symbol('s0', positive=True, integer=True), Integer(1))`), before 2.5 plain
arithmetic (`s0 + 1`), and evaluates either. Source: torch/_export/serde/serialize.py, `_parse_sym_expr`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tieaudit.errors import UnreadableModel

_MAX_TEXT = 4000
_MAX_DEPTH = 50
_SYMBOL_NAME = re.compile(r"[a-z]{1,4}\d{1,9}")
_ASSUMPTION = re.compile(r"(positive|negative|nonnegative|nonpositive|integer|real|finite|zero|nonzero)=(True|False)")
_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*(?:=(?:True|False))?|'[a-z]{1,4}\d{1,9}'|-?\d+\.\d+|-?\d+|[(),])")
_INFIX = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|\d+\.\d+|\d+|//|[-+*/%(),]|[<>=!]=?)")
_FUNCTIONS = frozenset(
    "FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural "
    "FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt "
    "RoundDecimal ToFloat Identity Max Min Add Mul Integer Rational Eq Ne Lt Le Gt Ge Equality Unequality "
    "StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not".split()
)
"""Without `Pow`: a tower of powers would never end."""
_WORDS = frozenset({"true", "false", "True", "False"})


@dataclass(frozen=True)
class Term:
    """A call, a symbol, or a number."""

    head: str
    """`Add`, `Symbol` …; the text of a number or a truth value."""
    terms: tuple[Term, ...] = ()
    symbol: str = ""


def readable(text: str) -> str:
    """`s0 + 1` of either spelling; the text itself where it is more than sums and products."""
    term = _parsed(text)
    return (_plain(term) or text) if term is not None else text


def checked(text: str, where: str) -> str:
    """The expression, if it is arithmetic of sizes. UnreadableModel for anything else, as it is evaluated."""
    if not _parsed(text) and not _is_infix(text):
        raise UnreadableModel(f"{where}: {text[:80]!r} is no plain arithmetic, and it would be evaluated")
    return text


def _parsed(text: str) -> Term | None:
    """The tree of `srepr`; None for anything that has another form or another name in it."""
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or len(text) > _MAX_TEXT:
            return None
        tokens.append(found[1])
        at = found.end()
    try:
        term, end = _term(tokens, 0, 0)
    except IndexError:
        return None
    return term if term is not None and end == len(tokens) else None


def _term(tokens: list[str], at: int, depth: int) -> tuple[Term | None, int]:
    word = tokens[at]
    if re.fullmatch(r"-?\d+(\.\d+)?", word) and len(word) <= 20 or word in _WORDS:
        return Term(word), at + 1
    if word == "Symbol" and tokens[at + 1] == "(" and tokens[at + 2].startswith("'"):
        end = at + 3
        while tokens[end] == "," and _ASSUMPTION.fullmatch(tokens[end + 1]):
            end += 2
        return (Term("Symbol", symbol=tokens[at + 2][1:-1]) if tokens[end] == ")" else None), end + 1
    if word not in _FUNCTIONS or tokens[at + 1] != "(" or depth > _MAX_DEPTH:
        return None, at
    found: list[Term] = []
    at += 2
    while tokens[at] != ")":
        if found:
            if tokens[at] != ",":
                return None, at
            at += 1
        term, at = _term(tokens, at, depth + 1)
        if term is None:
            return None, at
        found.append(term)
    return Term(word, tuple(found)), at + 1


def _plain(term: Term) -> str | None:
    """Sums and products in the usual notation; None for what is more."""
    if term.symbol:
        return term.symbol
    if term.head == "Integer" and len(term.terms) == 1:
        return term.terms[0].head
    if not term.terms:
        return term.head
    inner = [_plain(one) for one in term.terms]
    if term.head in ("Add", "Mul") and all(one is not None and " " not in one or term.head == "Add" for one in inner):
        return (" + " if term.head == "Add" else "*").join(one for one in inner if one is not None)
    return None


def _is_infix(text: str) -> bool:
    """Whether a text is arithmetic in the usual notation, of symbols, numbers and functions of sizes."""
    at = 0
    while at < len(text):
        found = _INFIX.match(text, at)
        word = found[1] if found is not None else "?"
        if word[0].isalpha() or word[0] == "_":
            known = word in _FUNCTIONS or word in _WORDS or _SYMBOL_NAME.fullmatch(word) is not None
        else:
            known = word != "?" and len(word) <= 20
        if found is None or not known or len(text) > _MAX_TEXT:
            return False
        at = found.end()
    return bool(text.strip()) and "**" not in text
