"""Weights that differ and are to be one: refused with what they differ by, or merged with what that needs beside it."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.change import Edit, Equalise, Share
from tieaudit.damage import likeness
from tieaudit.draft import Draft, anchored
from tieaudit.errors import RewriteRefused
from tieaudit.merge import aligned, common_value, difference
from tieaudit.printable import counted
from tieaudit.registry import choose, discover
from tieaudit.saving import n_bytes_saved
from tieaudit.scaling import Folded, folded
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal
from tieaudit.view import AS_STORED

_N_MOST_CLASSES = 4
"""Classes that are named one by one in the notes."""


def merged(draft: Draft, candidate: Candidate) -> tuple[Share, tuple[Equalise | Share, ...]]:
    """A share of unequal weights, and what is folded into norms for it: refused unless the user allowed it."""
    model = draft.model
    weights = [(model.by_id[member.id], member) for member in candidate.members]
    first = weights[0][0]
    usual = choose(discover("schemes", Scheme), candidate.scheme, "scheme").merge
    if not draft.choices.allow_lossy:
        one = aligned(first, AS_STORED, first.shape)
        other = aligned(weights[1][0], weights[1][1].view, first.shape)
        raise RewriteRefused(
            f"{weights[1][0].id} and {first.id} are different tensors: {difference(one, other)}; tying them would "
            f"change the model's outputs (--allow-lossy does it knowingly, --merge says how, by default {usual})"
        )
    policy = draft.choices.merge or usual
    kinds = {id: role.kind for id, role in draft.subject.roles.items()}
    found = folded(draft.format, draft.model, common_value(weights, kinds, policy, draft.calibrated), draft.owners)
    common = found.common
    if common.adjustments:
        _check_adjustments(draft, candidate, policy, found)
    draft.notes.extend(found.notes)
    members = candidate.members
    if common.kept is not None:
        members = anchored(members, common.kept)
    decided = f" ({common.because})" if common.because else ""
    if common.prediction is not None:
        draft.predictions.append(common.prediction)
    draft.merged.setdefault(f"--merge {policy}{decided}", []).append(tuple(weight.id for weight, _ in weights))
    return Share(members, common.values, candidate.because, common.adjustments), found.edits


def refused_together(draft: Draft, scheme: Scheme, candidates: list[Candidate]) -> Refusal:
    """One refusal for all classes of a scheme that hold different tensors: how many of them are alike in any way."""
    model, verdicts = draft.model, dict[str, int]()
    for candidate in candidates:
        pair = [(model.by_id[member.id], member) for member in candidate.members[:2]]
        said = likeness(pair, place=draft.place).verdict
        verdicts[said] = verdicts.get(said, 0) + 1
    counted = ", ".join(f"{n} {said}" for said, n in sorted(verdicts.items(), key=lambda one: -one[1]))
    ids = tuple(dict.fromkeys(member.id for candidate in candidates for member in candidate.members))
    because = (
        f"{len(candidates)} classes of {len(ids)} weights hold different tensors ({counted}, by two members of each); "
        f"tying them would change the model's outputs (--allow-lossy does it knowingly, --merge says how, by default "
        f"{scheme.merge})"
    )
    return Refusal(scheme.name, ids, because)


def _check_adjustments(draft: Draft, candidate: Candidate, policy: str, found: Folded) -> None:
    """RewriteRefused where the format has no place for corrections, or they cost more than the tie saves."""
    common = found.common
    if not draft.format.holds_adjustments:
        raise RewriteRefused(
            f"--merge {policy}: the correction of {', '.join(common.adjustments)} is an operation of its own, and the "
            f"format {draft.format.name} holds weights only (an ONNX model and a live module have a place for it)"
            + found.because
        )
    n_added = sum(one.n_bytes for one in common.adjustments.values())
    n_saved = n_bytes_saved(draft.model, [Share(candidate.members)])
    if n_added >= n_saved:
        raise RewriteRefused(
            f"--merge {policy}: its corrections would take {n_added:,} bytes, and the tie saves only {n_saved:,}"
        )


def equal_apart(draft: Draft, share: Share, refused: RewriteRefused) -> Edit:
    """One value under each name, for a tie that nobody would restore; `refused` again where even that cannot be."""
    one = Equalise(share.members, share.values, share.because)
    if not draft.format.equalises or draft.format.can_realise is None:
        raise refused
    if draft.format.can_realise(draft.model, one, draft.target) is not None:
        raise refused
    draft.apart.append(refused.message)
    return one


def of_merged(draft: Draft) -> Iterator[str]:
    """What gets one value, and how: class by class where they are few."""
    for policy, found in draft.merged.items():
        if len(found) <= _N_MOST_CLASSES:
            yield from (f"lossy: {' and '.join(ids)} get one value by {policy}" for ids in found)
        else:
            n_weights = sum(len(ids) for ids in found)
            yield f"lossy: {len(found)} classes of {n_weights} weights get one value each by {policy}"


def of_equal_values(draft: Draft) -> Iterator[str]:
    """What classes with one value under each name are to whoever loads them."""
    found = [edit for edit in draft.edits if isinstance(edit, Equalise) and len(edit.members) > 1]
    if not found:
        return
    n_names = sum(len(edit.members) for edit in found)
    yield (
        f"{counted(n_names, 'name')} of {counted(len(found), 'class', 'classes')} are written with equal values, each "
        f"stored: no byte is saved, because {draft.apart[0]}"
    )
    if draft.format.held_by is not None:
        yield draft.format.held_by(draft.model)
