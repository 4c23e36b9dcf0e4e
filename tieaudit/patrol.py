"""Stage: what somebody wants checked → Run, exit code and notes.

Policies, lock files, baselines and the caches meet here. What a run that did not change needs is imported first, the
rest only where something has to be read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.cached import FOLDER, Cache, Moment
from tieaudit.checked import Run
from tieaudit.errors import UnreadableModel
from tieaudit.govern import forget, policy_for, steered_by
from tieaudit.policy import Policy, Section
from tieaudit.remembered import Memory, Remembered, memory
from tieaudit.whereabouts import shown, work_tree

if TYPE_CHECKING:
    from tieaudit.gate import Gate
    from tieaudit.load import Source
    from tieaudit.overhaul import Fixing
    from tieaudit.repository import Gathered

N_MOST_JOBS = 8
"""Processes that are used unless more are asked for: each takes what its model and its libraries take."""


@dataclass(frozen=True)
class Wanted:
    """One run as it was asked for."""

    paths: tuple[str, ...] = ()
    config: Path | None = None
    asked: Section | None = None
    """What the command line says over every policy."""
    since: str | None = None
    baseline: Path | None = None
    write_baseline: bool = False
    strict: bool = False
    n_jobs: int | None = None
    cache_dir: Path | None = None
    no_cache: bool = False
    outputs: tuple[str, ...] = ()
    """Files that the caller is going to write: nothing rests on them."""
    fixing: Fixing | None = None
    """What is done with findings that have a fix; None: nothing."""


@dataclass(frozen=True)
class Patrolled:
    """What came of it."""

    run: Run
    exit_code: int
    notes: tuple[str, ...] = ()
    """Sentences for people, that are no part of the result."""
    failed: bool = False
    """Whether a fix was tried and could not be delivered: no finding, which --exit-zero would let pass."""
    consulted: frozenset[str] = frozenset()
    """Files, there or not, on which it rests besides policies and models."""


Progress = Callable[[str, int], None]
"""(path that was done, how many there are)"""


def patrol(wanted: Wanted, progress: Progress = lambda path, n: None) -> Patrolled:
    """Find the models, judge each under its policy, and say what that means.

    UsageError for a policy, a baseline or a lock file that cannot be read. Cost: a walk where nothing changed since
    the last run with the same arguments, else that of a scan of each model of which the cache does not know the answer.
    """
    begun = Moment.now()
    forget()
    ruling = policy_for(Path.cwd(), wanted.config)
    before = _memory(wanted, ruling, begun)
    known = before.recall() if before is not None else None
    if known is not None:
        return Patrolled(known.run, known.exit_code, known.notes)
    found = _looked(wanted, ruling, progress)
    if before is not None:
        remembered = Remembered(found.run, found.exit_code, found.notes)
        before.keep(remembered, _memory(wanted, ruling, begun), found.consulted)
    return found


def _memory(wanted: Wanted, ruling: Policy, begun: Moment) -> Memory | None:
    """Where this run is kept; None for one that is about more than files that lie still."""
    if wanted.no_cache or wanted.since is not None or wanted.write_baseline or wanted.fixing is not None:
        return None
    if not all(os.path.lexists(path) for path in wanted.paths):
        return None  # a glob, a live module, or nothing at all
    asked = repr((wanted.paths, wanted.config, wanted.asked, wanted.baseline, wanted.strict))
    steering = [Path(ruling.root, ruling.lock), *(one for one in (wanted.baseline, wanted.config) if one is not None)]
    written = frozenset(os.path.abspath(name) for name in wanted.outputs)
    return memory(_cache_folder(wanted, ruling), asked, _roots(wanted), steering, begun, written)


def _roots(wanted: Wanted) -> list[Path]:
    """Where a run looks, absolute: of a file that steers it, the folder whose models that concerns."""
    paths = [Path(os.path.abspath(path)) for path in wanted.paths or ["."]]
    return [path if path.is_dir() else steered_by(path, wanted.config) or path for path in paths]


def _looked(wanted: Wanted, ruling: Policy, progress: Progress) -> Patrolled:
    """The run made anew."""
    from tieaudit.gate import Gate, exit_code
    from tieaudit.known import set_apart, written
    from tieaudit.locks import Locks

    base = Path.cwd()

    def policy_of(path: str) -> Policy:
        return policy_for(base / path, wanted.config)

    notes = _put_back(wanted)
    gathered = _gathered(wanted, base)
    policies = {source: policy_for(source.path, wanted.config) for source in gathered.sources}
    locks = Locks(wanted.config)
    gate = Gate(
        base=base,
        policy_of=lambda path: policy_for(path, wanted.config),
        asked=wanted.asked,
        n_jobs=wanted.n_jobs or min(_n_cores(), N_MOST_JOBS),
        cache_of=lambda policy: None if wanted.no_cache else Cache(_cache_folder(wanted, policy)),
        locked_of=locks.of,
    )
    run = gate.check(gathered.sources, lambda path: progress(path, len(gathered.sources)))
    run = replace(
        run,
        errors=(*_unended(wanted, gathered, base), *gathered.errors, *run.errors),
        skipped=gathered.skipped,
        root=str(base),
        top=work_tree(base),
    )
    run = _with_stale(run, policies, gathered, gate)
    if wanted.write_baseline:
        notes = (*notes, *written(run, wanted.baseline, policy_of, ruling, gathered.complete))
    else:
        run, said = set_apart(run, wanted.baseline, policy_of)
        notes = (*notes, *said)
    failed = False
    if wanted.fixing is not None:
        run, said, failed = _fixed(run, wanted, wanted.fixing, gathered, gate)
        notes = (*notes, *said)
        if wanted.fixing.in_place and run.facts.get("n_fixed"):  # what is there now, in the words of the rules
            again = _looked(replace(wanted, fixing=None), ruling, progress)
            facts = {**again.run.facts, "n_fixed": run.facts["n_fixed"]}
            return replace(again, run=replace(again.run, facts=facts), notes=(*notes, *again.notes), failed=failed,
                           exit_code=max(again.exit_code, int(failed)))  # fmt: skip
    run = replace(run, policy=shown(Path(ruling.file), base) if ruling.file else "")
    run = replace(run, facts={**run.facts, **_facts(wanted, policies.values() or [ruling], base)})
    code = exit_code(run, policy_of, strict=wanted.strict, changed_only=wanted.since is not None)
    if wanted.write_baseline and code == 1:
        code = 0
    code = max(code, int(failed))
    if gathered.complete:
        notes = (*notes, *locks.gone(base), *locks.unlocked(base))
    if code == 2 and not run.models and not run.errors:
        notes = (*notes, f"error: no model was found in {' '.join(wanted.paths) or base}")
    return Patrolled(run, code, notes, failed, locks.files | _consulted(wanted, policies.values()))


def _facts(wanted: Wanted, policies: Iterable[Policy], base: Path) -> dict[str, object]:
    """What decides about the exit code: one word where all policies say the same, else each policy's."""
    each = {shown(Path(one.file), base) if one.file else "": one for one in policies}
    said: dict[str, dict[str, object]] = {
        "fail_on": {file: one.fail_on for file, one in each.items()},
        "strict": {file: wanted.strict or one.strict for file, one in each.items()},
    }
    since = {"since": wanted.since} if wanted.since else {}
    return {name: next(iter(of.values())) if len({*of.values()}) == 1 else of for name, of in said.items()} | since


def _consulted(wanted: Wanted, policies: Iterable[Policy]) -> frozenset[str]:
    """Files besides policies and models on which a run under these policies rests."""
    from tieaudit.known import named_by

    each = {one.file: one for one in policies}.values()
    baselines = {str(file) for one in each if (file := named_by(one)) is not None}
    return frozenset(baselines).union(*(one.consults(wanted.asked) for one in each))


def _put_back(wanted: Wanted) -> tuple[str, ...]:
    """Sentences about what a run that was killed while it replaced files had begun, and what is put back now, where
    files are replaced again."""
    if wanted.fixing is None or not wanted.fixing.in_place:
        return ()
    from tieaudit.overhaul import put_back

    return tuple(put_back(place for path in wanted.paths or ["."] for place in _there(path)))


def _unended(wanted: Wanted, gathered: Gathered, base: Path) -> list[tuple[str, str]]:
    """(path, message) of every replacement that was begun and not put back: nobody can judge files that are half of
    the old and half of the new ones, whatever the rules say of them."""
    from tieaudit.overhaul import begun

    places = [place for path in wanted.paths or ["."] for place in _there(path)]
    if not all(place.is_dir() for place in places):  # a file stands for its model, which has others
        places += [source.path for source in gathered.sources]
    said = "a replacement of its files was begun and has not ended: `tieaudit check --fix --in-place` puts them back"
    return [(home, f"{home}: {said}") for home in (shown(one, base) for one in begun(places))]


def _there(path: str) -> list[Path]:
    """What is there of a path or a glob."""
    if os.path.lexists(path):
        return [Path(path)]
    from tieaudit.load import expand

    with suppress(UnreadableModel):  # a live module, or what is said to be not there when it is looked for
        return expand(path)
    return []


def _fixed(
    run: Run, wanted: Wanted, fixing: Fixing, gathered: Gathered, gate: Gate
) -> tuple[Run, tuple[str, ...], bool]:
    """The run less what was mended, what is to be said, and whether a fix failed."""
    from tieaudit.overhaul import overhaul, without

    done = overhaul(run, gathered.sources, gate, fixing, [Path(path) for path in wanted.paths])
    return without(run, done.fixed), done.said, done.failed


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gathered(wanted: Wanted, base: Path) -> Gathered:
    """The models of all paths, each path under the exclusions of its own policy."""
    from tieaudit.repository import Gathered, gather

    by_policy: dict[str, tuple[Policy, list[str]]] = {}
    for path in wanted.paths or [""]:
        policy = policy_for(Path(path) if path and os.path.lexists(path) else base, wanted.config)
        by_policy.setdefault(policy.root, (policy, []))[1].append(path)
    found: list[Gathered] = []
    for policy, paths in by_policy.values():
        root = Path(os.path.relpath(policy.root))
        named = [path for path in paths if path] or ([] if str(root) == "." else ["."])
        found.append(
            gather(
                named,
                root=root,
                exclude=policy.exclude,
                respect_gitignore=policy.respect_gitignore,
                since=wanted.since,
                steered_by=lambda file: steered_by(file, wanted.config),
            )
        )
    sources = {
        (source.path, source.files): source
        for root, one in zip(by_policy, found, strict=True)
        for source in one.sources
        if not excluded_by_its_own(source, policy_for(source.path, wanted.config), root)
    }
    return Gathered(
        tuple(sorted(sources.values(), key=lambda source: str(source.path))),
        tuple(error for one in found for error in one.errors),
        tuple(skip for one in found for skip in one.skipped),
        all(one.complete for one in found),
    )


def excluded_by_its_own(source: Source, policy: Policy, root: str) -> bool:
    """Whether a policy nearer to a model than that of `root`, under which it was found, leaves it out: a model is
    judged the same from wherever the check is started."""
    from tieaudit.repository import leaves_out

    return policy.root != root and leaves_out(Path(policy.root), policy.exclude, source)


def _cache_folder(wanted: Wanted, policy: Policy) -> Path:
    return wanted.cache_dir or Path(policy.root) / FOLDER


def _with_stale(run: Run, policies: dict[Source, Policy], gathered: Gathered, gate: Gate) -> Run:
    """The run, with what is to be said of suppressions that hide nothing: only if it was about all models."""
    from tieaudit.called import known_by
    from tieaudit.gate import stale
    from tieaudit.judge import of_the_policy

    if not gathered.complete or run.errors:
        return run
    ruled: dict[str, tuple[Policy, list[tuple[str, str]]]] = {}
    for source, policy in policies.items():
        path = known_by(source)
        pair = (shown(path, Path(policy.root)), shown(path, gate.base))
        ruled.setdefault(policy.file, (policy, []))[1].append(pair)
    found_on: dict[str, set[str]] = {}
    for model in run.models:
        for one in model.findings:
            found_on.setdefault(one.finding.code, set()).update(one.finding.ids)
    said = [of_the_policy(policy, found, gate.base, found_on) for policy, found in stale(run, ruled.values())]
    return replace(run, models=(*run.models, *(one for one in said if one is not None)))
