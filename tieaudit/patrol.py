"""Stage: what somebody wants checked → Run, exit code and notes.

Policies, lock files, baselines and the caches meet here. What a run that did not change needs is imported first, the
rest only where something has to be read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit.cached import FOLDER, Cache, Moment
from tieaudit.checked import Checked, Run
from tieaudit.govern import forget, policy_for
from tieaudit.policy import Policy, Section
from tieaudit.printable import counted, listed, printable
from tieaudit.remembered import Memory, Remembered, memory
from tieaudit.verdict import Severity
from tieaudit.whereabouts import shown

if TYPE_CHECKING:
    from tieaudit.baseline import Known
    from tieaudit.gate import Gate
    from tieaudit.load import Source
    from tieaudit.overhaul import Fixing
    from tieaudit.repository import Gathered
    from tieaudit.sealed import Locked

N_MOST_JOBS = 8
"""Processes that are used unless more are asked for: each takes what its model and its libraries take."""
BASELINE = "tieaudit-baseline.json"


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
    baseline = _baseline(wanted, ruling)
    steering = [Path(ruling.root, ruling.lock), *([baseline] if baseline is not None else [])]
    steering += [wanted.config] if wanted.config is not None else []
    written = frozenset(os.path.abspath(name) for name in wanted.outputs)
    return memory(_cache_folder(wanted, ruling), asked, _roots(wanted), steering, begun, written)


def _roots(wanted: Wanted) -> list[Path]:
    return [Path(os.path.abspath(path)) for path in wanted.paths or ["."]]


def _looked(wanted: Wanted, ruling: Policy, progress: Progress) -> Patrolled:
    """The run made anew."""
    from tieaudit.gate import Gate, exit_code

    base = Path.cwd()
    notes = _interrupted(wanted)
    gathered = _gathered(wanted, base)
    policies = {source: policy_for(source.path, wanted.config) for source in gathered.sources}
    locks = _Locks(wanted.config)
    gate = Gate(
        base=base,
        policy_of=lambda path: policy_for(path, wanted.config),
        asked=wanted.asked,
        n_jobs=wanted.n_jobs or min(_n_cores(), N_MOST_JOBS),
        several=_several(gathered.sources),
        cache_of=lambda policy: None if wanted.no_cache else Cache(_cache_folder(wanted, policy)),
        locked_of=locks.of,
    )
    run = gate.check(gathered.sources, lambda path: progress(path, len(gathered.sources)))
    run = replace(run, errors=(*gathered.errors, *run.errors), skipped=gathered.skipped, root=str(base))
    run = _with_stale(run, policies, gathered, gate)
    run, said = _with_baseline(run, wanted, ruling, gathered.complete)
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
    fail_on: Severity = ruling.fail_on
    strict = wanted.strict or ruling.strict
    facts = {**run.facts, "fail_on": fail_on, "strict": strict, **({"since": wanted.since} if wanted.since else {})}
    run = replace(run, policy=shown(Path(ruling.file), base) if ruling.file else "", facts=facts)
    code = exit_code(run, fail_on, strict, changed_only=wanted.since is not None)
    if wanted.write_baseline and code == 1:
        code = 0
    code = max(code, int(failed))
    if gathered.complete:
        notes = (*notes, *locks.gone(base), *locks.unlocked(base))
    if code == 2 and not run.models and not run.errors:
        notes = (*notes, f"error: no model was found in {' '.join(wanted.paths) or base}")
    return Patrolled(run, code, notes, failed, locks.files | _consulted(wanted, policies.values()))


def _consulted(wanted: Wanted, policies: Iterable[Policy]) -> frozenset[str]:
    return frozenset(
        file for policy in {one.file: one for one in policies}.values() for file in policy.consults(wanted.asked)
    )


def _interrupted(wanted: Wanted) -> tuple[str, ...]:
    """What a run that was killed while it replaced files has left: put back where files are replaced, else told."""
    from tieaudit.overhaul import begun, put_back

    places = [Path(path) for path in wanted.paths or ["."] if os.path.lexists(path)]
    in_place = wanted.fixing is not None and wanted.fixing.in_place
    return tuple(put_back(places) if in_place else begun(places))


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


def _several(sources: Sequence[Source]) -> frozenset[Path]:
    """Paths that name more than one of these models."""
    counts = Counter(source.path for source in sources)
    return frozenset(path for path, n in counts.items() if n > 1)


def _with_stale(run: Run, policies: dict[Source, Policy], gathered: Gathered, gate: Gate) -> Run:
    """The run, with what is to be said of suppressions that hide nothing: only if it was about all models."""
    from tieaudit.gate import stale
    from tieaudit.judge import of_the_policy

    if not gathered.complete or run.errors:
        return run
    ruled: dict[str, tuple[Policy, list[tuple[str, str]]]] = {}
    for source, policy in policies.items():
        path = gate.known_by(source)
        pair = (shown(path, Path(policy.root)), shown(path, gate.base))
        ruled.setdefault(policy.file, (policy, []))[1].append(pair)
    found_on: dict[str, set[str]] = {}
    for model in run.models:
        for one in model.findings:
            found_on.setdefault(one.finding.code, set()).update(one.finding.ids)
    said = [of_the_policy(policy, found, gate.base, found_on) for policy, found in stale(run, ruled.values())]
    return replace(run, models=(*run.models, *(one for one in said if one is not None)))


def _baseline(wanted: Wanted, ruling: Policy) -> Path | None:
    return wanted.baseline or (Path(ruling.root, ruling.baseline) if ruling.baseline else None)


def _with_baseline(run: Run, wanted: Wanted, ruling: Policy, complete: bool) -> tuple[Run, tuple[str, ...]]:
    """Known findings set apart, or written."""
    from tieaudit.baseline import apart, followed, key_of, read_baseline, write_baseline

    base, named = Path(run.root), _baseline(wanted, ruling)
    if wanted.write_baseline:
        file = named or Path(ruling.root, BASELINE)
        keyed = [(key_of(base / model.path, file), model) for model in run.models]
        seen = {key for key, model in keyed if model.weights_here and not model.unreadable}
        unseen = {key_of(base / path, file) for path, _ in run.errors} | ({key for key, _ in keyed} - seen)
        whole = complete and not unseen
        n = write_baseline(
            file, keyed, None if whole else lambda key: key in unseen or not complete and key not in seen
        )
        note = f"wrote {counted(n, 'known finding')} to {shown(file, base)}"
        unnamed = f'; to have it read, say baseline = "{BASELINE}" in the policy' if named is None else ""
        return run, (note + unnamed,)
    if named is None:
        return run, ()
    known = read_baseline(named)
    keyed = [(key_of(base / model.path, named), model) for model in run.models]
    known = followed(known, keyed, lambda key: os.path.lexists(named.absolute().parent / key))
    models = tuple(apart(model, key, known) for key, model in keyed)
    return replace(run, models=models), _gone(models, known, named, base)


def _gone(models: Sequence[Checked], known: Known, file: Path, base: Path) -> tuple[str, ...]:
    n_left = sum(len(model.known) for model in models)
    n_known = sum(known.values())
    if n_left >= n_known:
        return ()
    return (f"{counted(n_known - n_left, 'known finding')} of {shown(file, base)} no longer found in this run",)


class _Locks:
    """The lock files of a run, each read once, and which of their entries were asked for."""

    def __init__(self, given: Path | None) -> None:
        self._given = given
        """The policy that rules every model; None: each has its own."""
        self._read: dict[Path, dict[str, Locked]] = {}
        self._asked: set[tuple[Path, str]] = set()
        self._not_in: dict[Path, list[Path]] = {}
        self._candidates: dict[str, tuple[Path, ...]] = {}

    @property
    def files(self) -> frozenset[str]:
        """The lock files that were asked for, there or not."""
        return frozenset(map(str, self._read))

    def of(self, policy: Policy, source: Source) -> Locked | None:
        """What is locked of a model: under the name of its first file where it is a variant, else under its own."""
        nearest = None
        if policy.root not in self._candidates:
            self._candidates[policy.root] = tuple(self._files(policy))
        for file in self._candidates[policy.root]:
            if file not in self._read:
                from tieaudit.locked import read_lock

                self._read[file] = read_lock(file) if os.path.lexists(file) else {}
            known = self._read[file]
            nearest = nearest or (file if known else None)
            names = [_locked_as(path, file) for path in (*source.files[:1], source.path)] if known else []
            name = next((name for name in names if name in known), None)
            if name is not None:
                self._asked.add((file, name))
                return known[name]
        if nearest is not None:
            self._not_in.setdefault(nearest, []).append(source.path)
        return None

    def _files(self, policy: Policy) -> Iterator[Path]:
        """Where a model may be locked: beside its own policy, and in the folders above, where `tieaudit lock` may have
        been run for all that lies below; without a policy there up to the top of the repository."""
        home = Path(policy.root)
        yield home / policy.lock
        above = home.parents if self._given is None else ()
        inside = not os.path.lexists(home / ".git") and any(os.path.lexists(one / ".git") for one in above)
        for folder in above:
            outer = policy_for(folder)
            if outer.file and outer.root == str(folder):
                yield folder / outer.lock
            elif inside:
                yield folder / Policy.lock
            inside = inside and not os.path.lexists(folder / ".git")

    def gone(self, base: Path) -> list[str]:
        """Sentences about models that are locked and not there, for a run about everything."""
        left = [
            (file, name)
            for file, known in self._read.items()
            for name in known
            if (file, name) not in self._asked and not os.path.lexists(file.parent / name)
        ]
        return [
            f"{shown(file, base)} holds {printable(name)}, which is not there: if that is meant, run `tieaudit lock`"
            for file, name in left
        ]

    def unlocked(self, base: Path) -> list[str]:
        """Sentences about models that no lock holds, although there is one for them: a tie of theirs can get lost."""
        return [
            f"{shown(file, base)} does not hold {listed(tuple(shown(path, base) for path in paths))}: "
            "if ties are to be kept there, run `tieaudit lock`"
            for file, paths in self._not_in.items()
        ]


def _locked_as(path: Path, file: Path) -> str:
    if not os.path.lexists(path):
        return str(path)
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(file.parent))).as_posix()
