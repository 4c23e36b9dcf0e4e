"""Stage: proposals → Plan. Measures what is lossy, merges, asks the format what it can hold, refuses with reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tieaudit.change import Edit, Equalise, Plan, Pool, Respell, SetConfig, Share
from tieaudit.draft import Choices, Draft, anchored, realisable
from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.formats import NEEDS_SETTING, Format
from tieaudit.lossy import equal_apart, merged, of_equal_values, of_merged, refused_together
from tieaudit.merge import policy_of
from tieaudit.merges import Calibrated
from tieaudit.model import Model
from tieaudit.other_names import with_other_names
from tieaudit.placing import Place
from tieaudit.propose import Asked, propose, schemes
from tieaudit.registry import choose, discover
from tieaudit.saving import n_bytes_saved
from tieaudit.unsharing import of_names, of_uses
from tieaudit.verdict import Candidate, Subject

__all__ = ["Choices", "anchored", "plan"]


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
    target = _target(subject.model, format_, choices)
    if choices.merge is not None:
        policy_of(choices.merge, subject.model.by_id)  # misspelt, it would do nothing where nothing is lossy
    draft = Draft(subject, format_, choices, target, calibrated=calibrated, place=place)
    for asked in schemes(choices.schemes):
        _consider_all(draft, asked, only)
    draft.notes.extend(of_merged(draft))
    draft.notes.extend(calibrated.notes if calibrated is not None else ())
    draft.notes.extend(of_equal_values(draft))
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
        merge=choices.merge,
    )


def _target(model: Model, format_: Format, choices: Choices) -> str:
    """What the model is made for. UsageError for a target that the format has not, RewriteRefused if it has none."""
    target = choices.target or format_.targets[0]
    if target not in format_.targets:
        raise UsageError(
            f"{model.path}: expected a target of format {format_.name}, found {target!r}",
            hint=f"one of: {', '.join(format_.targets)}",
        )
    if format_.edit is None:
        raise RewriteRefused(f"{model.path}: the format {format_.name} can be read but not written yet")
    return target


def _consider_all(draft: Draft, asked: Asked, only: Callable[[Candidate], list[Candidate]] | None) -> None:
    """All that one scheme proposes."""
    candidates, refusals = propose(draft.subject, asked)
    draft.refusals.extend(refusals)
    if only is not None:
        candidates = [part for one in candidates for part in only(one)]
    elif not candidates and not refusals and len(draft.choices.schemes) > 1:
        draft.notes.append(
            f"{asked.scheme.name}: nothing to do in the model as it is; schemes look at what was read, not at what "
            "another one makes of it: apply it to the result"
        )
    unequal = [one for one in candidates if not one.lossless and one.action == "share"]
    if len(unequal) > 1 and not draft.choices.allow_lossy:
        draft.refusals.append(refused_together(draft, asked.scheme, unequal))
        candidates = [one for one in candidates if one not in unequal]
    for candidate in candidates:
        _consider(draft, candidate)


def _consider(draft: Draft, candidate: Candidate) -> None:
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
        draft.refuse(candidate, f"{refused.message}; {refused.hint}" if refused.hint else refused.message)
        return
    if edits:
        draft.edits.extend(edit for edit in edits if edit not in draft.edits and not _is_set(draft, edit))
        draft.owners.update({member.id: candidate.scheme for member in candidate.members})


def _is_set(draft: Draft, edit: Edit) -> bool:
    """A setting that two ties need is set once, whatever each of them needs it for."""
    return isinstance(edit, SetConfig) and any(
        isinstance(one, SetConfig) and (one.file, one.key, one.value) == (edit.file, edit.key, edit.value)
        for one in draft.edits
    )


def _share(draft: Draft, candidate: Candidate) -> list[Edit]:
    if draft.choices.share_files is False and len({draft.model.by_id[one.id].part for one in candidate.members}) > 1:
        return _share_apart(draft, candidate)
    if candidate.lossless:
        share = Share(candidate.members, None, candidate.because, lossless=True)
        return realisable(draft, with_other_names(draft.subject, share))
    share, folds = merged(draft, candidate)
    share = with_other_names(draft.subject, share)
    try:
        edits = realisable(draft, share)
    except RewriteRefused as refused:
        edits = [equal_apart(draft, share, refused)]
    edits += [one for fold in folds for one in realisable(draft, fold)]
    draft.owners.update({member.id: candidate.scheme for fold in folds for member in fold.members})
    draft.lossless = False
    return edits


def _share_apart(draft: Draft, candidate: Candidate) -> list[Edit]:
    """What is left of a class that lies in several files where these may share nothing: one class for each file."""
    draft.notes.append("equal weights of several files stay apart; --share-files would store them in a common file")
    found: list[Edit] = []
    for part in draft.model.parts:
        inside = tuple(member for member in candidate.members if draft.model.by_id[member.id].part == part.name)
        if len({member.id for member in inside}) > 1:
            found += _share(draft, replace(candidate, members=anchored(inside, inside[0].id)))
    return found


def _pool(draft: Draft, candidate: Candidate) -> list[Edit]:
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


def _fit(draft: Draft, candidate: Candidate) -> list[Edit]:
    raise RewriteRefused(f"{candidate.because}; nothing writes that")


def _respell(draft: Draft, candidate: Candidate) -> list[Edit]:
    return realisable(draft, Respell(candidate.members[0].id, candidate.because))


def _declare(draft: Draft, candidate: Candidate) -> list[Edit]:
    if draft.format.switch is None:
        raise RewriteRefused(f"the format {draft.format.name} has no settings that could declare a tie")
    ids = tuple(member.id for member in candidate.members)
    tied = any(set(ids) <= set(tie.ids) for tie in draft.subject.found.ties if tie.origin == "measured")
    settings = draft.format.switch(draft.model, ids, tied, draft.target)
    if isinstance(settings, str):
        raise RewriteRefused(settings)
    return list(settings)


def _unshare(draft: Draft, candidate: Candidate) -> list[Edit]:
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
