"""Stage: what somebody wants checked → Run, exit code and notes.

Policies, lock files, baselines and the cache meet here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tieaudit.baseline import Known, apart, key_of, read_baseline, write_baseline
from tieaudit.cached import FOLDER, Cache
from tieaudit.checked import Checked, Run
from tieaudit.gate import Gate, exit_code, stale
from tieaudit.govern import policy_for
from tieaudit.load import Source
from tieaudit.policy import Policy, Section
from tieaudit.printable import counted
from tieaudit.repository import Gathered, gather
from tieaudit.verdict import Severity
from tieaudit.whereabouts import shown

N_MOST_JOBS = 8
"""Processes that are used unless more are asked for: each takes what its model and its libraries take."""
BASELINE = "tieaudit-baseline.json"


@dataclass(frozen=True)
class Wanted:
    """One run as it was asked for."""

    paths: Sequence[str] = ()
    config: Path | None = None
    asked: Section | None = None
    since: str | None = None
    baseline: Path | None = None
    write_baseline: bool = False
    n_jobs: int | None = None
    cache_dir: Path | None = None
    no_cache: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Patrolled:
    """What came of it."""

    run: Run
    exit_code: int
    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()


Progress = Callable[[str, int], None]
"""(path that was done, how many there are)"""


def patrol(wanted: Wanted, progress: Progress = lambda path, n: None) -> Patrolled:
    """Find the models, judge each under its policy, and say what that means.

    UsageError for a policy, a baseline or a lock file that cannot be read. Cost: that of a scan of each model which
    the cache does not know.
    """
    base = Path.cwd()
    ruling = policy_for(base, wanted.config)
    gathered = _gathered(wanted, base)
    policies = {source: policy_for(source.path, wanted.config) for source in gathered.sources}
    locks = _Locks()
    gate = Gate(
        base=base,
        policy_of=lambda path: policy_for(path, wanted.config),
        asked=wanted.asked,
        n_jobs=wanted.n_jobs or min(_n_cores(), N_MOST_JOBS),
        cache_of=lambda policy: _cache(wanted, policy),
        locked_of=locks.of,
    )
    run = gate.check(gathered.sources, lambda path: progress(path, len(gathered.sources)))
    run = replace(run, errors=(*gathered.errors, *run.errors), skipped=gathered.skipped, root=str(base))
    run = _with_stale(run, policies, gathered, base)
    run, notes = _with_baseline(run, policies, wanted, ruling)
    fail_on: Severity = ruling.fail_on
    strict = wanted.strict or ruling.strict
    facts = {"fail_on": fail_on, "strict": strict, **({"since": wanted.since} if wanted.since else {})}
    run = replace(run, policy=shown(Path(ruling.file), base) if ruling.file else "", facts=facts)
    code = exit_code(run, fail_on, strict, changed_only=wanted.since is not None)
    if wanted.write_baseline and code == 1:
        code = 0
    if code == 2 and not run.models and not run.errors:
        notes = (*notes, f"error: no model was found in {' '.join(map(str, wanted.paths)) or base}")
    return Patrolled(run, code, gathered.sources, notes)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gathered(wanted: Wanted, base: Path) -> Gathered:
    """The models of all paths, each path under the exclusions of its own policy."""
    by_policy: dict[str, tuple[Policy, list[str]]] = {}
    for path in wanted.paths or [""]:
        policy = policy_for(Path(path) if path and os.path.lexists(path) else base, wanted.config)
        by_policy.setdefault(policy.file, (policy, []))[1].append(path)
    found: list[Gathered] = []
    for policy, paths in by_policy.values():
        found.append(
            gather(
                [path for path in paths if path],
                root=base,
                exclude=policy.exclude,
                respect_gitignore=policy.respect_gitignore,
                since=wanted.since,
            )
        )
    sources = {(source.path, source.files): source for one in found for source in one.sources}
    return Gathered(
        tuple(sorted(sources.values(), key=lambda source: str(source.path))),
        tuple(error for one in found for error in one.errors),
        tuple(skip for one in found for skip in one.skipped),
        all(one.complete for one in found),
    )


def _cache(wanted: Wanted, policy: Policy) -> Cache | None:
    if wanted.no_cache:
        return None
    return Cache(wanted.cache_dir or Path(policy.root) / FOLDER)


def _with_stale(run: Run, policies: dict[Source, Policy], gathered: Gathered, base: Path) -> Run:
    """The run, with what is to be said of suppressions that hide nothing: only if it was about all models."""
    from tieaudit.judge import of_the_policy

    if not gathered.complete or run.errors:
        return run
    ruled: dict[str, tuple[Policy, list[str]]] = {}
    keys: dict[str, str] = {}
    for source, policy in policies.items():
        relative = shown(source.path, Path(policy.root))
        ruled.setdefault(policy.file, (policy, []))[1].append(relative)
        keys[relative] = shown(source.path, base)
    said = [of_the_policy(policy, found, base) for policy, found in stale(run, ruled.values(), keys)]
    return replace(run, models=(*run.models, *(one for one in said if one is not None)))


def _with_baseline(
    run: Run, policies: dict[Source, Policy], wanted: Wanted, ruling: Policy
) -> tuple[Run, tuple[str, ...]]:
    """Known findings set apart, or written."""
    base = Path(run.root)
    named = wanted.baseline or (Path(ruling.root, ruling.baseline) if ruling.baseline else None)
    if wanted.write_baseline:
        file = named or Path(ruling.root, BASELINE)
        n = write_baseline(file, ((key_of(base / model.path, file), model) for model in run.models))
        return run, (f"wrote {counted(n, 'known finding')} to {shown(file, base)}",)
    if named is None:
        return run, ()
    known = read_baseline(named)
    models = tuple(apart(model, key_of(base / model.path, named), known) for model in run.models)
    return replace(run, models=models), _gone(models, known, named, base)


def _gone(models: Sequence[Checked], known: Known, file: Path, base: Path) -> tuple[str, ...]:
    n_left = sum(len(model.known) for model in models)
    n_known = sum(known.values())
    if n_left >= n_known:
        return ()
    return (f"{counted(n_known - n_left, 'known finding')} of {shown(file, base)} no longer found in this run",)


class _Locks:
    """Lock files, each read once."""

    def __init__(self) -> None:
        self._read: dict[str, object] = {}

    def of(self, policy: Policy, path: Path) -> None:
        return None
