"""Stage: a run with findings → every model mended, as far as its findings have a fix.

Only what counts is mended: what the policy ignores, suppresses or knows from the baseline stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tieaudit.audit import audit
from tieaudit.checked import Checked, Run
from tieaudit.errors import ParityFailed, TieAuditError, in_one_line
from tieaudit.gate import Gate, Job
from tieaudit.journal import has_ended, interrupted, recover
from tieaudit.judge import chosen
from tieaudit.load import Source
from tieaudit.mend import Mended, Mending, mend, mending, place_in
from tieaudit.model import Model
from tieaudit.preview import preview, shown
from tieaudit.printable import N_MOST_MESSAGE, counted, printable, size
from tieaudit.scan import look
from tieaudit.verdict import Report
from tieaudit.whereabouts import shown as shown_path


@dataclass(frozen=True)
class Fixing:
    """What is to be done with findings that have a fix."""

    in_place: bool = False
    destination: Path | None = None
    """Folder for the mended models; nothing is written without it, unless in place."""
    unsafe: bool = False
    only_show: bool = False
    require: str | None = None
    """The least level of proof; None: as `apply` has it."""


@dataclass(frozen=True)
class Overhauled:
    """What came of it."""

    said: tuple[str, ...]
    """For people: what was mended, what was not and why, or what would be done."""
    fixed: frozenset[tuple[str, str]] = frozenset()
    """(path of the model as the run shows it, fingerprint) of findings that are gone."""
    failed: bool = False
    """Whether a fix was tried and could not be delivered."""


def put_back(paths: Iterable[Path]) -> list[str]:
    """Sentences about replacements that a killed run had begun in these places, after putting everything back.

    RewriteRefused if somebody may be at work there.
    """
    return [printable(sentence, N_MOST_MESSAGE) for path in paths for sentence in recover(path)]


def begun(paths: Iterable[Path]) -> list[Path]:
    """Folders of such replacements, without touching them: what is read there may be half of each."""
    found = {folder.parent.absolute() for path in paths for folder in interrupted(path) if not has_ended(folder)}
    return sorted(found)


def overhaul(
    run: Run,
    sources: Sequence[Source],
    gate: Gate,
    fixing: Fixing,
    named: Sequence[Path],
) -> Overhauled:
    """Mend every model of a run that has findings with a fix; a failure with one model leaves the others be.

    `named`: the paths that the user gave, below which a destination repeats the tree. Cost: a copy, a proof and a scan
    of each model that is mended.
    """
    by_path = {model.path: model for model in run.models}
    said: list[str] = []
    fixed: set[tuple[str, str]] = set()
    delivered: list[Path] = []
    failed = False
    for source in sources:
        job = gate.job(source)
        model = by_path.get(job.shown_as)
        if model is None or not any(_mendable(model, fixing.unsafe)):
            continue
        try:
            place = _place(fixing, source, named)
            if place is not None and any(place.is_relative_to(one) for one in delivered):
                # another model of its folder was written there and this one came along: it is mended where it lies now
                source, place = _moved(source, place), None
            made = _planned(source, job, model, fixing.unsafe)
            if fixing.only_show:
                said.append(shown(preview(made)))
            elif made.plan is not None:
                done = mend(
                    made,
                    place,
                    require=fixing.require,
                    again=partial(_look, job=job),
                )
                if place is not None and done.done is not None and source.path.is_dir():
                    delivered.append(place)
                there = {(finding.code, frozenset(finding.ids)) for finding in done.remaining}
                prints = [one for one in model.findings if (one.finding.code, frozenset(one.finding.ids)) not in there]
                fixed |= {(model.path, one.fingerprint) for one in prints}
                said += _told(model, done, [one.finding.code for one in prints], gate.base)
                left = [one for one in made.left if (one.finding.code, frozenset(one.finding.ids)) in there]
                made = replace(made, left=tuple(left))
            said += [] if fixing.only_show else _left(model, made)
        except (TieAuditError, OSError, RecursionError, MemoryError) as error:
            failed = True
            found = in_one_line(error, str(source.path))
            kind = "its proof failed" if isinstance(found, ParityFailed) else "refused"
            said.append(printable(f"not mended, {kind}: {found}", N_MOST_MESSAGE))
    return Overhauled(tuple(said), frozenset(fixed), failed)


def without(run: Run, fixed: frozenset[tuple[str, str]]) -> Run:
    """The run, less what was mended."""
    models = tuple(
        replace(model, findings=tuple(one for one in model.findings if (model.path, one.fingerprint) not in fixed))
        for model in run.models
    )
    return replace(run, models=models, facts={**run.facts, "n_fixed": len(fixed)})


def _mendable(model: Checked, unsafe: bool) -> Iterable[bool]:
    safeties = ("safe", "unsafe") if unsafe else ("safe",)
    return (one.finding.fix is not None and one.finding.fix.safety in safeties for one in model.findings)


def _planned(source: Source, job: Job, model: Checked, unsafe: bool) -> Mending:
    """The plan for what counts, on the model as it is now."""
    report = _look(source.load(), job)
    counts = {(one.finding.code, frozenset(one.finding.ids)) for one in model.findings}
    wanted = [finding for finding in report.findings if (finding.code, frozenset(finding.ids)) in counts]
    return mending(report, wanted, unsafe=unsafe)


def _look(model: Model, job: Job) -> Report:
    """A model under the terms of the run: thresholds, demands and lock included."""
    subject = replace(look(model), demands=job.terms.demands, locked=job.locked)
    return audit(subject, (), job.terms.settings, only=chosen(job.terms))


def _place(fixing: Fixing, source: Source, named: Sequence[Path]) -> Path | None:
    if fixing.destination is None:
        return None
    roots = {os.path.abspath(path) for path in named}
    # of several the folder that holds them all: two of them may have models of one name
    root = Path(os.path.commonpath(roots)) if roots else Path.cwd()
    return place_in(fixing.destination, source.path, root)


def _moved(source: Source, place: Path) -> Source:
    """A model that came along with another one of its folder, at its place there."""
    home, there = (source.path, place) if source.path.is_dir() else (source.path.parent, place.parent)
    return replace(source, path=place, files=tuple(there / file.relative_to(home) for file in source.files))


def _told(model: Checked, done: Mended, gone: Sequence[str], base: Path) -> list[str]:
    if done.done is None:
        return []
    codes = ", ".join(sorted(set(gone)))
    levels = [level.name for level in done.done.proof.levels if level.outcome == "held"]
    proof = " and ".join([", ".join(levels[:-1]), levels[-1]] if len(levels) > 1 else levels)
    saved = done.done.plan.n_bytes_saved
    where = printable(shown_path(done.done.delivered.path, base), None)
    line = f"mended {printable(model.path, None)}: {codes or 'nothing'}"
    line += f"; {size(saved)} less" if saved > 0 else ""
    line += f"; proof held: {proof}" if proof else ""
    line += f"; written to {where}" if where != printable(model.path, None) else ""
    new = [f"  new since: {finding.code} {printable(finding.message, 300)}" for finding in done.new]
    return [line, f"  receipt: {printable(shown_path(done.done.delivered.receipt, base), None)}", *new]


def _left(model: Checked, made: Mending) -> list[str]:
    if not made.left:
        return []
    lines = [f"not mended in {printable(model.path, None)}: {counted(len(made.left), 'finding')}"]
    return [*lines, *(f"  {one.finding.code}: {printable(one.because, 300)}" for one in made.left[:8])]
