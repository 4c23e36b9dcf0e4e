"""Stage: two weights that a scheme would make one → how alike they are. Every number stands beside its null.

Shapes say nothing: two tables of one model have equal shapes and are, as a rule, unrelated. Tying unrelated tables
after training destroys the model: without calibration every policy costs a nat per token or more (docs/merging.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tieaudit.diagnostics import Diagnostic, Measured, Pair
from tieaudit.errors import TieAuditError, in_one_line
from tieaudit.model import Member, Weight
from tieaudit.pairing import pair
from tieaudit.placing import Place
from tieaudit.registry import discover
from tieaudit.verdict import Candidate, Likeness, Subject

CLOSE = 0.8
"""Median row cosine from which one table is the other one, moved a little (a fine-tuned child of a tied parent)."""
RELATED = 0.3
MAPPED = 0.5
"""Share of one table beyond chance that a linear map of the other explains: an adapter could restore that much."""
_SPREADS = 5.0
"""So many standard deviations above the null before a number counts."""
N_MOST_MEMBERS = 64
"""Members of one class that are compared with its first one."""
N_MOST_CLASSES = 4
"""Classes of one scheme that are compared without a plan: what a further layer's says, the first ones have said."""
_ORDER = ("equal", "close", "related", "related by a linear map", "cannot tell", "unrelated")
"""From the least damage to the most."""


def likeness(weights: Sequence[tuple[Weight, Member]], *, deep: bool = False, place: Place = np.asarray) -> Likeness:
    """How alike two members of a class are, seen in one layout; `place`: see `placing`. Cost: see `pairing.pair`."""
    ids = tuple(weight.id for weight, _ in weights)
    found = _likeness(weights, deep, place)
    return replace(found, ids=ids)


def foreseen(subject: Subject, candidates: Sequence[Candidate], *, deep: bool, place: Place) -> tuple[Candidate, ...]:
    """The candidates that would change values, with how alike members are: the first one and the other least alike.

    Of a scheme with very many classes, as those for layers have, only the `N_MOST_CLASSES` largest are compared.
    Cost: see `pairing.pair`, for each further member of such a class, up to `N_MOST_MEMBERS`.
    """
    lossy = [one for one in candidates if not one.lossless and one.action == "share"]
    compared: set[int] = set()
    for scheme in dict.fromkeys(one.scheme for one in lossy):
        own = sorted((one for one in lossy if one.scheme == scheme), key=lambda one: -one.n_bytes_saved)
        compared.update(id(one) for one in own[:N_MOST_CLASSES])
    return tuple(_foreseen(subject, one, deep, place) if id(one) in compared else one for one in candidates)


def _foreseen(subject: Subject, candidate: Candidate, deep: bool, place: Place) -> Candidate:
    first, *others = [(subject.model.by_id[member.id], member) for member in candidate.members]
    found = []
    for other in others[:N_MOST_MEMBERS]:
        try:
            found.append(likeness((first, other), deep=deep, place=place))
        except OSError as error:  # a file that went away, or was cut short
            ids = (first[0].id, other[0].id)
            found.append(Likeness("cannot tell", str(in_one_line(error, subject.model.path)), ids=ids))
    if not found:
        return candidate
    worst = max(found, key=lambda one: (_ORDER.index(one.verdict), one.diagnostics.get("relative-distance", (0.0,))[0]))
    n_more = len(others) - len(found)
    several = f"{worst.ids[0]} and {worst.ids[-1]}, the least alike: " if len(others) > 1 else ""
    left_out = f"; {n_more} further members were not looked at" if n_more else ""
    return replace(candidate, damage=f"{several}{worst.because}{left_out}", likeness=worst)


def _likeness(weights: Sequence[tuple[Weight, Member]], deep: bool, place: Place) -> Likeness:
    try:
        seen = pair(weights, deep=deep, place=place)
    except TieAuditError as error:
        return Likeness("cannot tell", error.message)
    if not math.isfinite(seen.squared_a + seen.squared_b + seen.dot):
        return Likeness("cannot tell", "the tables hold numbers that are not finite, or too large to be squared")
    if not (seen.squared_a > 0.0 and seen.squared_b > 0.0):
        return Likeness("cannot tell", "one of them holds nothing but zeros")
    found = {}
    for name, diagnostic in discover("diagnostics", Diagnostic).items():
        measured = diagnostic.measure(seen)
        if measured is not None:
            found[name] = measured
    verdict = _verdict(seen, found)
    values = {name: (one.value, one.null) for name, one in found.items()}
    return Likeness(verdict, _sentence(verdict, seen, found), values, seen.exact)


def _verdict(seen: Pair, found: dict[str, Measured]) -> str:
    distance, cosine, mapped = (found.get(name) for name in ("relative-distance", "row-cosine", "linear-map"))
    if seen.n_rows_seen == seen.n_rows and distance is not None and distance.value == 0.0:
        return "equal"
    if cosine is None or _SPREADS * cosine.spread > CLOSE:
        return "cannot tell"
    if cosine.value > _SPREADS * cosine.spread:
        if cosine.value >= CLOSE:
            return "close"
        if cosine.value >= RELATED:
            return "related"
    if mapped is not None and mapped.value - mapped.null > _SPREADS * mapped.spread and _beyond(mapped) >= MAPPED:
        return "related by a linear map"
    return "unrelated"


def _beyond(measured: Measured) -> float:
    """What is there beyond chance, 0 … 1."""
    return (measured.value - measured.null) / (1.0 - measured.null) if measured.null < 1.0 else 0.0


_MEANING = {
    "equal": "the numbers are equal",
    "close": "close: one is the other, moved a little, as after fine-tuning",
    "related": "related, but far apart: expect visible damage",
    "related by a linear map": "not alike, but a linear map of one explains the other: tie them through an adapter",
    "unrelated": "unrelated, as independent tables are: one value for both would destroy the model",
    "cannot tell": "too few numbers to tell chance from likeness",
}


def _sentence(verdict: str, seen: Pair, found: dict[str, Measured]) -> str:
    said = []
    for name, label in (
        ("relative-distance", "distance"),
        ("row-cosine", "row cosine"),
        ("linear-map", "linear map R²"),
    ):
        if name in found:
            said.append(f"{label} {found[name].value:.3g} (unrelated: {found[name].null:.3g})")
    sample = "" if seen.exact else f"; from {seen.n_rows_seen:,} of {seen.n_rows:,} rows"
    if seen.n_columns_seen < seen.n_columns:
        sample += f", {seen.n_columns_seen} directions of {seen.n_columns:,} columns"
    return f"{_MEANING[verdict]} ({', '.join(said)}{sample})"
