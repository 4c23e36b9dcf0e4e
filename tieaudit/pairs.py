"""Weights of two roles, matched layer by layer: what schemes inside a layer share."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Member, Weight
from tieaudit.onevalue import one_value
from tieaudit.stacks import first_uses, in_order
from tieaudit.verdict import Candidate, Refusal, Subject

_Place = tuple[str, str | None, int | None, int]
_Home = tuple[str, str | None, int | None]

_FUSED = {
    ("attention_query", "attention_key"): ("attention_qkv",),
    ("attention_key", "attention_value"): ("attention_qkv", "attention_kv"),
}
"""Kinds of projections that make both."""


def share_within_layers(subject: Subject, scheme: str, kind: str, other_kind: str) -> Iterator[Candidate | Refusal]:
    """One candidate for each pair of weights of these kinds in one place; their biases are pairs of their own."""
    found = False
    for suffix in ("", "_bias"):
        ours, theirs = (_placed(subject, one + suffix) for one in (kind, other_kind))
        for place, weight in ours.items():
            other = theirs.get(place)
            if other is None:
                continue
            found = True
            if weight.shape != other.shape or weight.dtype != other.dtype:
                shapes = f"{list(weight.shape)} {weight.dtype} and {list(other.shape)} {other.dtype}"
                yield Refusal(
                    scheme, (weight.id, other.id), f"{weight.id} and {other.id} have different shapes: {shapes}"
                )
                continue
            yield from _pair(subject, scheme, weight, other)
    if not found:
        yield _none(subject, scheme, kind, other_kind)


def _none(subject: Subject, scheme: str, kind: str, other_kind: str) -> Refusal:
    """Why there is no pair: one projection makes both, or nothing is known to make them."""
    fused = [one.id for one in subject.model.weights if subject.roles[one.id].kind in _FUSED[kind, other_kind]]
    if not fused:
        because = f"no {_words(kind)} with its {_words(other_kind)} was recognised in this model"
        return Refusal(scheme, (), because)
    made = "queries, keys and values" if kind == "attention_query" else "keys and values"
    more = f", as in {len(fused) - 1} more" if len(fused) > 1 else ""
    because = f"{fused[0]} makes {made} together{more}: parts of one tensor cannot be another tensor"
    return Refusal(scheme, tuple(fused), because)


def _pair(subject: Subject, scheme: str, weight: Weight, other: Weight) -> Iterator[Candidate]:
    if weight.storage is None or other.storage is None or weight.storage.region == other.storage.region:
        return
    members = (Member(weight.id), Member(other.id))
    kinds = [_words(subject.roles[one.id].kind) for one in (weight, other)]
    because = f"{kinds[0]} and {kinds[1]} of one attention"
    yield Candidate(scheme, members, other.n_bytes, one_value(subject).holds(members), because)


def _placed(subject: Subject, kind: str) -> dict[_Place, Weight]:
    """By part, side, layer and how many of the kind come before in that layer (cross-attention comes second).

    Where a graph tells the attention that a projection belongs to, by that instead.
    """
    first_use, counted = first_uses(subject), dict[_Home, int]()
    found: dict[_Place, Weight] = {}
    ours = [one for one in subject.model.weights if subject.roles[one.id].kind == kind and one.is_float]
    for weight in sorted(ours, key=lambda one: in_order(subject, one, first_use)):
        role = subject.roles[weight.id]
        if weight.absent:
            continue
        home: _Home = (weight.part, role.side, role.layer)
        if role.attention is not None:
            home = (weight.part, "attention", role.attention)
        counted[home] = counted.get(home, -1) + 1
        found[*home, counted[home]] = weight
    return found


def _words(kind: str) -> str:
    return kind.removeprefix("attention_").replace("_", " ")
