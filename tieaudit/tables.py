"""Token embeddings and output heads of a model: what embedding schemes share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tieaudit.model import Member, Weight
from tieaudit.onevalue import one_value
from tieaudit.verdict import Candidate, Refusal, Subject
from tieaudit.view import AS_STORED, TRANSPOSED, View


def of_kind(subject: Subject, kind: str) -> list[Weight]:
    """Weights of one role, in the model's order."""
    return [weight for weight in subject.model.weights if subject.roles[weight.id].kind == kind and not weight.absent]


def heads(subject: Subject) -> list[Weight]:
    """Output heads that are tensors of their own, not embeddings seen a second time."""
    return of_kind(subject, "output_head")


def embeddings(subject: Subject) -> list[Weight]:
    """Token embeddings, one for each that is stored, the encoder's first."""
    order = {"encoder": 0, None: 1, "decoder": 2}
    found = sorted(of_kind(subject, "token_embedding"), key=lambda one: order[subject.roles[one.id].side])
    regions = {weight.storage.region: weight for weight in reversed(found) if weight.storage is not None}
    return [weight for weight in found if weight.storage is not None and regions[weight.storage.region] is weight]


_SIDES = (re.compile(r"(?<![a-z])(enc|src|source)", re.I), re.compile(r"(?<![a-z])(dec|tgt|trg|target)", re.I))
"""How names tell the two sides, where no layers do (recurrent translation models)."""


def both_sides(subject: Subject, scheme: str) -> list[Weight] | Refusal:
    """The token embeddings of an encoder and of a decoder; a refusal where the tables are not those of two sides.

    Several tables are not two sides: a decoder of four codebooks has four, and so do two models in one file. Where no
    side is known, two tables and a head are taken for a translation model.
    """
    tables = embeddings(subject)
    sides = {subject.roles[one.id].side for one in tables}
    if len(tables) < 2:
        return Refusal(scheme, (), "no second token embedding was recognised: an encoder's and a decoder's")
    if {"encoder", "decoder"} <= sides or all(any(one.search(table.id) for table in tables) for one in _SIDES):
        return tables
    if len(tables) == 2 and None in sides and heads(subject):
        return tables
    because = f"{len(tables)} token embeddings were recognised, not an encoder's and a decoder's"
    return Refusal(scheme, tuple(one.id for one in tables), because)


def seen_as(subject: Subject, weight: Weight, first: Weight) -> View | None:
    """The view under which `weight` has the layout of `first`; None if it fits neither as it is nor transposed.

    Square ones fit both ways: where the two are one value, it is the way in which they are.
    """
    if weight.dtype != first.dtype or not weight.is_float:
        return None
    if weight.shape == first.shape:
        return one_value(subject).view(first.id, weight.id) or AS_STORED
    return TRANSPOSED if len(first.shape) == 2 and weight.shape == first.shape[::-1] else None


def share_tables(subject: Subject, scheme: str, weights: Sequence[Weight], what: str) -> Iterator[Candidate | Refusal]:
    """One candidate for all that fit the first; a refusal for each that does not. Nothing for what is one already."""
    first = weights[0]
    members = [Member(first.id)]
    for weight in weights[1:]:
        view = seen_as(subject, weight, first)
        if view is None:
            shapes = f"{list(weight.shape)} {weight.dtype} does not fit {list(first.shape)} {first.dtype}"
            yield Refusal(scheme, (first.id, weight.id), f"{weight.id} cannot be one with {first.id}: {shapes}")
        else:
            members.append(Member(weight.id, view))
    known = {one.id: one for one in subject.model.weights}
    regions = {storage.region: storage.n_bytes for one in members if (storage := known[one.id].storage) is not None}
    if len(members) < 2 or len(regions) < 2:
        return
    lossless = one_value(subject).holds(members)
    because = f"{' and '.join(one.id for one in members)} {what}"
    yield Candidate(scheme, tuple(members), sum(regions.values()) - max(regions.values()), lossless, because)
