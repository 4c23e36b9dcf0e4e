"""Stage: a model and its findings → the mended model. Plans for the given findings alone, applies, and looks again.

A fix is safe (no value and no meaning changes), unsafe (somebody must know what was meant) or by hand. Nothing here
gives unequal weights one value. What is not among the given findings, because it was suppressed or not selected, stays
as it is: of every proposal of a scheme only what concerns a given finding is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tieaudit.apply import Applied, apply, apply_in_place
from tieaudit.audit import audit
from tieaudit.change import Equalise, Plan, Respell, SetConfig, Share
from tieaudit.errors import RewriteRefused, UsageError
from tieaudit.model import Model, classes
from tieaudit.plan import Choices, anchored, plan
from tieaudit.rewrite import Stamps, read_back, stamps
from tieaudit.scan import look
from tieaudit.verdict import Candidate, Finding, Report

_FIRST = ("declare",)
"""Schemes that come before others: they say what the others must hold true."""
UNSAFE = "its fix is unsafe, because only the author of the model knows what was meant: --unsafe-fixes makes it"


@dataclass(frozen=True)
class Left:
    """A finding that is not mended, and why."""

    finding: Finding
    because: str


@dataclass(frozen=True)
class Mending:
    """What is to be done about the findings of one model. Nothing has been written yet."""

    report: Report
    plan: Plan | None
    """All fixes as one plan; None if there is nothing to fix."""
    mends: tuple[Finding, ...]
    """What the plan mends."""
    left: tuple[Left, ...]
    seen: Stamps
    """The files as they were when it was planned."""

    @property
    def model(self) -> Model:
        return self.report.subject.model


@dataclass(frozen=True)
class Mended:
    """What came of it."""

    mending: Mending
    done: Applied | None
    """Plan, proof and where the result and its receipt lie; None: there was nothing to do, nothing was written."""
    after: Report
    """Of the model that is there now."""

    @property
    def fixed(self) -> tuple[Finding, ...]:
        """Findings that the plan was for, and that are gone."""
        now = {_key(finding) for finding in self.after.findings}
        return tuple(finding for finding in self.mending.mends if _key(finding) not in now)

    @property
    def remaining(self) -> tuple[Finding, ...]:
        """Findings of the model that is there now, suppressed ones included."""
        return self.after.findings

    @property
    def new(self) -> tuple[Finding, ...]:
        """Those of them that were not there before."""
        before = {_key(finding) for finding in self.mending.report.findings}
        return tuple(finding for finding in self.after.findings if _key(finding) not in before)


def _key(finding: Finding) -> tuple[str, frozenset[str]]:
    return finding.code, frozenset(finding.ids)


def mending(
    report: Report,
    findings: Sequence[Finding] | None = None,
    *,
    unsafe: bool = False,
    target: str | None = None,
) -> Mending:
    """The plan that mends these findings of a report (by default all), and nothing else.

    `unsafe`: make fixes too that are right only if what the finding says is what was meant; they change settings and
    never a value. `target`: as `plan.Choices.target`. UsageError for a finding that is not the report's, and for an
    unknown target. Cost: that of `plan.plan` for the schemes that the findings name.
    """
    chosen = list(report.findings if findings is None else findings)
    if any(finding not in report.findings for finding in chosen):
        raise UsageError(f"{report.subject.model.path}: expected findings of this report, found others")
    seen = stamps(report.subject.model)
    left = [Left(finding, because) for finding in chosen if (because := _why_not(finding, unsafe))]
    wanted = [finding for finding in chosen if not _why_not(finding, unsafe)]
    if not wanted:
        return Mending(report, None, (), tuple(left), seen)
    schemes = sorted({scheme_of(finding) for finding in wanted}, key=lambda name: (name not in _FIRST, name))
    offered: set[int] = set()
    suppressed = [finding for finding in report.findings if finding not in chosen]

    def only(candidate: Candidate) -> list[Candidate]:
        parts = _parts(candidate, [one for one in wanted if scheme_of(one) == candidate.scheme], suppressed)
        ids = {member.id for part in parts for member in part.members}
        offered.update(n for n, one in enumerate(wanted) if scheme_of(one) == candidate.scheme and ids & {*one.ids})
        return parts

    try:
        made = plan(report.subject, Choices(tuple(schemes), target), only=only)
    except RewriteRefused as refused:
        return Mending(report, None, (), (*left, *(Left(one, refused.message) for one in wanted)), seen)
    reasons = [_not_planned(finding, made, number in offered) for number, finding in enumerate(wanted)]
    left += [Left(finding, because) for finding, because in zip(wanted, reasons, strict=True) if because]
    mends = tuple(finding for finding, because in zip(wanted, reasons, strict=True) if not because)
    return Mending(report, made if made.edits else None, mends, tuple(left), seen)


def scheme_of(finding: Finding) -> str:
    """The scheme that would mend a finding; empty for one that is mended by hand, or not at all."""
    return finding.fix.scheme if finding.fix is not None else ""


def _why_not(finding: Finding, unsafe: bool) -> str:
    """Why a finding is not even planned for; empty if it is."""
    fix = finding.fix
    if fix is None:
        return "no fix is known"
    if fix.safety == "manual" or not fix.scheme:
        return f"by hand: {fix.command}"
    return UNSAFE if fix.safety == "unsafe" and not unsafe else ""


def _parts(candidate: Candidate, wanted: Iterable[Finding], suppressed: Iterable[Finding]) -> list[Candidate]:
    """What of a proposal concerns these findings: all of it, or one proposal for each class that they speak of."""
    ids = tuple(dict.fromkeys(member.id for member in candidate.members))
    concerned = [finding for finding in wanted if not {*ids}.isdisjoint(finding.ids)]
    exact = any({*finding.ids} == {*ids} for finding in concerned)
    if not concerned or any({*finding.ids} == {*ids} for finding in suppressed) and not exact:
        return []
    if any({*ids} <= {*finding.ids} for finding in concerned):
        return [candidate]
    groups = classes([id for id in finding.ids if id in ids] for finding in concerned)
    found = []
    for group in (group for group in groups if len(group) > 1):
        inside = tuple(member for member in candidate.members if member.id in group)
        names = " and ".join(dict.fromkeys(finding.code for finding in concerned))
        because = f"{names}: {len(group)} of the {len(ids)} weights that are one"
        found.append(replace(candidate, members=anchored(inside, inside[0].id), because=because))
    return found


def _not_planned(finding: Finding, made: Plan, offered: bool) -> str:
    """Why a plan for a finding does not mend it; empty if it does."""
    ids = {*finding.ids}
    for refusal in made.refusals:
        if refusal.scheme == scheme_of(finding) and (not refusal.ids or not ids.isdisjoint(refusal.ids)):
            return refusal.because
    if not offered:
        return f"the scheme {scheme_of(finding)} proposes nothing for it"
    return "" if any(_mends(edit, ids) for edit in made.edits) else "no edit of the plan concerns it"


def _mends(edit: object, ids: set[str]) -> bool:
    if isinstance(edit, Share | Equalise):
        return len(ids & {member.id for member in edit.members}) > 1
    return isinstance(edit, SetConfig) or isinstance(edit, Respell) and edit.weight in ids


def mend(
    what: Mending,
    destination: Path | None,
    *,
    require: str | None = None,
    device: str = "auto",
    again: Callable[[Model], Report] | None = None,
) -> Mended:
    """Make a mending at `destination`, which must not exist; None: in the place of the model's own files.

    `require`, `device`: as in `apply.apply`, whose proof must hold first. `again`: how the result is looked at; by
    default as a scan does, with the demands of the report. Where there is nothing to do nothing is written.

    Raises what `apply.apply` and `apply.apply_in_place` raise; then nothing is delivered and every file is as it was.
    Cost: a copy of the model's files, the proof, and a scan of the result.
    """
    model = what.model
    if what.plan is None or not what.plan.edits:
        return Mended(what, None, what.report)
    if destination is None:
        done = apply_in_place(model, what.plan, require=require, device=device, seen=what.seen)
    else:
        done = apply(model, what.plan, destination, require=require, device=device, seen=what.seen)
    return Mended(what, done, (again or _as_before(what.report))(_mended(model, done)))


def _mended(model: Model, done: Applied) -> Model:
    """The model that was delivered, read from where it lies now."""
    path = done.delivered.path
    renamed = Path(model.path).is_file() and path.is_file() and path.name != Path(model.path).name
    if renamed:
        from tieaudit.load import load_one

        return load_one(path, key=model.metadata.get("key_given", ""))
    home = path.absolute().parent if path.is_file() else path
    return read_back(model, done.plan, home)


def _as_before(report: Report) -> Callable[[Model], Report]:
    def look_again(model: Model) -> Report:
        return audit(replace(look(model), demands=report.subject.demands), report.candidates[:0])

    return look_again


def place_in(folder: Path, model: Path, named: Path) -> Path:
    """Where in `folder` the mended form of a model goes: as it lies below what the user named.

    A folder that the user named becomes `folder` itself, a file that the user named lies in it.
    """
    inside = model.absolute()
    root = named.absolute()
    if inside == root:
        return folder / model.name if inside.is_file() else folder
    return folder / (inside.relative_to(root) if inside.is_relative_to(root) else Path(model.name))
