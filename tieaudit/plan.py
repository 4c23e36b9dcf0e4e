"""Stage: proposals → Plan. Measures what is lossy, merges, asks the format what it can hold, refuses with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tieaudit.change import Edit, Equalise, Plan, Pool, Prediction, Respell, SetConfig, Share
from tieaudit.damage import likeness
from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.formats import NEEDS_SETTING, Format
from tieaudit.merge import aligned, common_value, difference, policy_of
from tieaudit.merges import Calibrated
from tieaudit.model import Member, Model
from tieaudit.other_names import with_other_names
from tieaudit.placing import Place
from tieaudit.printable import counted
from tieaudit.propose import propose, schemes
from tieaudit.registry import choose, discover
from tieaudit.saving import n_bytes_saved
from tieaudit.scaling import Folded, folded
from tieaudit.schemes import Scheme
from tieaudit.unsharing import of_names, of_uses
from tieaudit.verdict import Candidate, Refusal, Subject
from tieaudit.view import AS_STORED

_N_MOST_CLASSES = 4
"""Classes that are named one by one in the notes."""


@dataclass(frozen=True)
class Choices:
    """What the user chose on the command line."""

    schemes: tuple[str, ...] = ("dedup",)
    target: str | None = None
    allow_lossy: bool = False
    merge: str | None = None
    transposed_as: Literal["auto", "gemm", "gather", "fused"] = "auto"
    share_files: bool | None = None
    """False: every file stays whole by itself. True or None: the parts of a model may share a data file."""
    optimizer: Literal["adjust", "keep"] = "adjust"
    """Whether an optimizer's state in a checkpoint follows the parameters that are tied."""


@dataclass
class _Draft:
    """A plan in the making; the noun that the functions below fill."""

    subject: Subject
    format: Format
    choices: Choices
    target: str
    edits: list[Edit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    """Weight id → scheme that already decided about it."""
    lossless: bool = True
    merged: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    """Policy → the classes of unequal weights that get one value by it."""
    calibrated: Calibrated | None = None
    place: Place = np.asarray
    """Where weights are compared."""
    predictions: list[Prediction] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    """Why classes get one value under each name, and are not one stored tensor."""

    @property
    def model(self) -> Model:
        return self.subject.model

    def refuse(self, candidate: Candidate, because: str) -> None:
        """Note a refusal; candidates of one scheme that are refused for one reason are one refusal."""
        ids = tuple(dict.fromkeys(member.id for member in candidate.members))
        for at, known in enumerate(self.refusals):
            if (known.scheme, known.because) == (candidate.scheme, because):
                self.refusals[at] = replace(known, ids=tuple(dict.fromkeys((*known.ids, *ids))))
                return
        self.refusals.append(Refusal(candidate.scheme, ids, because))


def plan(
    subject: Subject,
    choices: Choices,
    as_format: Format | None = None,
    *,
    calibrated: Calibrated | None = None,
    place: Place = np.asarray,
    only: Callable[[Candidate], list[Candidate]] | None = None,
) -> Plan:
    """The plan for one model. UsageError for unknown schemes, targets and policies; everything else is a refusal.

    `as_format`: the format whose word counts for what can be made, where the model becomes another one. `calibrated`:
    what flows through the weights, see `calibrating`. `place`: where weights are compared, see `placing`. `only`: what
    is left of a proposal, where not all that the schemes propose is wanted.
    """
    format_ = as_format or choose(discover("formats", Format), subject.model.format, "format")
    target = choices.target or format_.targets[0]
    if target not in format_.targets:
        raise UsageError(
            f"{subject.model.path}: expected a target of format {format_.name}, found {target!r}",
            hint=f"one of: {', '.join(format_.targets)}",
        )
    if format_.edit is None:
        raise RewriteRefused(f"{subject.model.path}: the format {format_.name} can be read but not written yet")
    if choices.merge is not None:
        policy_of(choices.merge)
    draft = _Draft(subject, format_, choices, target, calibrated=calibrated, place=place)
    for asked in schemes(choices.schemes):
        candidates, refusals = propose(subject, asked)
        draft.refusals.extend(refusals)
        if only is not None:
            candidates = [part for one in candidates for part in only(one)]
        elif not candidates and not refusals and len(choices.schemes) > 1:
            draft.notes.append(
                f"{asked.scheme.name}: nothing to do in the model as it is; schemes look at what was read, not at what "
                "another one makes of it: apply it to the result"
            )
        unequal = [one for one in candidates if not one.lossless and one.action == "share"]
        if len(unequal) > 1 and not choices.allow_lossy:
            draft.refusals.append(_unequal(draft, asked.scheme, unequal))
            candidates = [one for one in candidates if one not in unequal]
        for candidate in candidates:
            _consider(draft, candidate)
    draft.notes.extend(_of_merged(draft))
    draft.notes.extend(calibrated.notes if calibrated is not None else ())
    draft.notes.extend(_of_equal_values(draft))
    if format_.notes is not None:
        draft.notes.extend(format_.notes(draft.model, draft.edits, choices.optimizer == "adjust"))
    return Plan(
        path=subject.model.path,
        target=target,
        schemes=choices.schemes,
        edits=tuple(draft.edits),
        n_bytes_saved=n_bytes_saved(draft.model, draft.edits),
        lossless=draft.lossless,
        refusals=tuple(draft.refusals),
        notes=tuple(dict.fromkeys(draft.notes)),
        transposed_as=choices.transposed_as,
        share_files=choices.share_files,
        optimizer=choices.optimizer,
        predictions=tuple(draft.predictions),
    )


def _consider(draft: _Draft, candidate: Candidate) -> None:
    decided = {draft.owners[member.id] for member in candidate.members if member.id in draft.owners}
    if decided and candidate.action == "pool" and decided == {candidate.scheme}:
        return  # heads that one setting counts are pooled together
    if decided:
        covered = any(
            isinstance(edit, (Share, Equalise)) and {m.id for m in candidate.members} <= {m.id for m in edit.members}
            for edit in draft.edits
        )
        if covered and candidate.action == "share":
            return
        if not (covered and candidate.action == "respell"):
            draft.refuse(candidate, f"conflicts with what {', '.join(sorted(decided))} already does to these weights")
            return
    make = {"share": _share, "unshare": _unshare, "respell": _respell, "declare": _declare, "pool": _pool, "fit": _fit}
    try:
        edits = make[candidate.action](draft, candidate)
    except RewriteRefused as refused:
        draft.refuse(candidate, refused.message)
        return
    if edits:
        draft.edits.extend(edit for edit in edits if edit not in draft.edits and not _is_set(draft, edit))
        draft.owners.update({member.id: candidate.scheme for member in candidate.members})


def _is_set(draft: _Draft, edit: Edit) -> bool:
    """A setting that two ties need is set once, whatever each of them needs it for."""
    return isinstance(edit, SetConfig) and any(
        isinstance(one, SetConfig) and (one.file, one.key, one.value) == (edit.file, edit.key, edit.value)
        for one in draft.edits
    )


def _share(draft: _Draft, candidate: Candidate) -> list[Edit]:
    if draft.choices.share_files is False and len({draft.model.by_id[one.id].part for one in candidate.members}) > 1:
        return _share_apart(draft, candidate)
    if candidate.lossless:
        return _realisable(draft, with_other_names(draft.subject, Share(candidate.members, None, candidate.because)))
    share, folds = _lossy(draft, candidate)
    share = with_other_names(draft.subject, share)
    try:
        edits = _realisable(draft, share)
    except RewriteRefused as refused:
        edits = [_equal(draft, share, refused)]
    edits += [one for fold in folds for one in _realisable(draft, fold)]
    draft.owners.update({member.id: candidate.scheme for fold in folds for member in fold.members})
    draft.lossless = False
    return edits


def _equal(draft: _Draft, share: Share, refused: RewriteRefused) -> Edit:
    """One value under each name, for a tie that nobody would restore; `refused` again where even that cannot be."""
    one = Equalise(share.members, share.values, share.because)
    if not draft.format.equalises or draft.format.can_realise is None:
        raise refused
    if draft.format.can_realise(draft.model, one, draft.target) is not None:
        raise refused
    draft.apart.append(refused.message)
    return one


def _of_merged(draft: _Draft) -> Iterator[str]:
    """What gets one value, and how: class by class where they are few."""
    for policy, found in draft.merged.items():
        if len(found) <= _N_MOST_CLASSES:
            yield from (f"lossy: {' and '.join(ids)} get one value by {policy}" for ids in found)
        else:
            n_weights = sum(len(ids) for ids in found)
            yield f"lossy: {len(found)} classes of {n_weights} weights get one value each by {policy}"


def _of_equal_values(draft: _Draft) -> Iterator[str]:
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


def _unequal(draft: _Draft, scheme: Scheme, candidates: list[Candidate]) -> Refusal:
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


def _share_apart(draft: _Draft, candidate: Candidate) -> list[Edit]:
    """What is left of a class that lies in several files where these may share nothing: one class for each file."""
    draft.notes.append("equal weights of several files stay apart; --share-files would store them in a common file")
    found: list[Edit] = []
    for part in draft.model.parts:
        inside = tuple(member for member in candidate.members if draft.model.by_id[member.id].part == part.name)
        if len({member.id for member in inside}) > 1:
            found += _share(draft, replace(candidate, members=anchored(inside, inside[0].id)))
    return found


def _lossy(draft: _Draft, candidate: Candidate) -> tuple[Share, tuple[Equalise | Share, ...]]:
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


def _check_adjustments(draft: _Draft, candidate: Candidate, policy: str, found: Folded) -> None:
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


def anchored(members: tuple[Member, ...], kept: str) -> tuple[Member, ...]:
    """The same class with `kept` first, seen as stored; views of the others follow (a transpose is its own inverse)."""
    anchor = next(member for member in members if member.id == kept)
    rest = [member for member in members if member.id != kept]
    return (Member(kept), *(Member(member.id, anchor.view.compose(member.view)) for member in rest))


def _realisable(draft: _Draft, edit: Edit) -> list[Edit]:
    """The edit, with the settings it needs; RewriteRefused with the format's reason if it cannot be made."""
    settings = draft.format.settings(draft.model, edit, draft.target)
    if isinstance(settings, str):
        raise RewriteRefused(settings)
    return [*settings, edit]


def _pool(draft: _Draft, candidate: Candidate) -> list[Edit]:
    if draft.format.pool is None:
        raise RewriteRefused(
            f"the format {draft.format.name} holds no graph that could change with the shape of a weight: an ONNX "
            "model does"
        )
    if draft.choices.merge not in (None, "mean"):
        raise RewriteRefused(f"--merge {draft.choices.merge}: heads are pooled by their mean")
    edits = draft.format.pool(draft.model, candidate.members[0].id, candidate.n_groups)
    if isinstance(edits, str):
        raise RewriteRefused(edits)
    for one in edits:
        because = draft.format.can_realise(draft.model, one, draft.target) if draft.format.can_realise else "read only"
        if because is not None:
            raise RewriteRefused(because)
    pools = [one for one in edits if isinstance(one, Pool)]
    taken = {id: draft.owners[id] for one in pools for id in _ids(one) if id in draft.owners}
    if taken:
        id, owner = next(iter(taken.items()))
        raise RewriteRefused(f"{id} is pooled with these, which conflicts with what {owner} already does to it")
    edit = pools[0]
    if not draft.choices.allow_lossy:
        raise RewriteRefused(
            f"{edit.n_heads} heads would become {edit.n_groups}, each the mean of {edit.n_heads // edit.n_groups}: "
            "that changes the model's outputs unless these are equal (--allow-lossy does it knowingly)"
        )
    draft.lossless = False
    draft.owners.update({id: candidate.scheme for one in pools for id in _ids(one)})
    return list(edits)


def _ids(pool: Pool) -> tuple[str, ...]:
    return tuple(one.id for one in pool.weights)


def _fit(draft: _Draft, candidate: Candidate) -> list[Edit]:
    raise RewriteRefused(f"{candidate.because}; nothing writes that")


def _respell(draft: _Draft, candidate: Candidate) -> list[Edit]:
    return _realisable(draft, Respell(candidate.members[0].id, candidate.because))


def _declare(draft: _Draft, candidate: Candidate) -> list[Edit]:
    if draft.format.switch is None:
        raise RewriteRefused(f"the format {draft.format.name} has no settings that could declare a tie")
    ids = tuple(member.id for member in candidate.members)
    tied = any(set(ids) <= set(tie.ids) for tie in draft.subject.found.ties if tie.origin == "measured")
    settings = draft.format.switch(draft.model, ids, tied, draft.target)
    if isinstance(settings, str):
        raise RewriteRefused(settings)
    return list(settings)


def _unshare(draft: _Draft, candidate: Candidate) -> list[Edit]:
    model = draft.model
    ids = [member.id for member in candidate.members]
    if model.has_graph and len(set(ids)) == 1:
        edits: list[Edit] = of_uses(model, ids[0], candidate.because)
    else:
        edits = of_names(model, list(dict.fromkeys(ids)), candidate.because)
    for edit in edits:
        because = draft.format.can_realise(model, edit, draft.target) if draft.format.can_realise else "read only"
        if because is not None and not because.startswith(NEEDS_SETTING):
            raise RewriteRefused(because)
    if draft.format.switch is not None:
        settings = draft.format.switch(model, tuple(dict.fromkeys(ids)), False, draft.target)
        if isinstance(settings, str):
            raise RewriteRefused(settings)
        edits = [*settings, *edits]
    return edits
