"""Stage: sources → Run. Many models, each under its own policy, from the cache or by a bounded number of processes."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tieaudit.cached import Cache, Moment, content_of, question
from tieaudit.called import known_by
from tieaudit.checked import RANK, STALE, Checked, Run
from tieaudit.errors import TieAuditError, WeightsNotHere, in_one_line
from tieaudit.formats import Format
from tieaudit.load import Source
from tieaudit.policy import Policy, Section, Suppression, Terms
from tieaudit.registry import choose, discover
from tieaudit.sealed import Locked
from tieaudit.tally import kept_away
from tieaudit.whereabouts import shown

FEW = 4
"""Models that are checked one after the other: a process takes longer to start than a small model to be read."""


@dataclass(frozen=True)
class Job:
    """One model to be judged, in a form that another process understands."""

    path: Path
    format_name: str
    files: tuple[Path, ...]
    terms: Terms
    base: Path
    shown_as: str
    cache: Cache | None
    locked: Locked | None = None
    """What the lock file says of the model."""

    @property
    def asked(self) -> str:
        """The question to which the cache may know the answer."""
        said = (self.terms, self.locked, *((name, content_of(name)) for name in self.terms.consults))
        return question(str(self.path), self.shown_as, self.format_name, self.files, said)


Outcome = Checked | tuple[str, str]
"""An answer, or (path, message) of what could not be read."""


@dataclass(frozen=True)
class Gate:
    """How models are judged: where they are, whose policy rules them, and what may be spent on it."""

    base: Path
    """What paths in the answer are relative to."""
    policy_of: Callable[[Path], Policy]
    asked: Section | None = None
    """What the command line says over every policy."""
    n_jobs: int = 1
    cache_of: Callable[[Policy], Cache | None] = lambda policy: None
    locked_of: Callable[[Policy, Source], Locked | None] = lambda policy, source: None

    def job(self, source: Source) -> Job:
        """What is to be done about one source. UsageError for a policy that cannot be read."""
        policy = self.policy_of(source.path)
        path = known_by(source)
        relative = shown(path, Path(policy.root))
        live = source.format.named is not None and source.format.named(str(source.path))
        return Job(
            source.path,
            source.format.name,
            source.files,
            policy.terms(relative, self.asked),
            self.base,
            str(source.path) if live else shown(path, self.base),
            None if live else self.cache_of(policy),
            self.locked_of(policy, source),
        )

    def check(self, sources: Sequence[Source], progress: Callable[[str], None] = lambda path: None) -> Run:
        """Judge every source. An error about one model is said of that model, and the others are judged.

        Memory: the answers, and what `n_jobs` models take while they are read.
        """
        models: list[Checked] = []
        errors: list[tuple[str, str]] = []
        for outcome in self._outcomes([self.job(source) for source in sources]):
            if isinstance(outcome, Checked):
                models.append(outcome)
            else:
                errors.append(outcome)
            progress(outcome.path if isinstance(outcome, Checked) else outcome[0])
        models.sort(key=lambda model: model.path)
        return Run(tuple(models), tuple(sorted(errors)))

    def _outcomes(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        left: list[Job] = []
        for job in jobs:
            known = job.cache.get(job.asked) if job.cache is not None else None
            if known is not None:
                yield known
            else:
                left.append(job)
        if len(left) < FEW or self.n_jobs < 2:
            yield from map(work, left)
            return
        from tieaudit.workers import spread

        yield from spread(work, left, min(self.n_jobs, len(left)), lambda job, why: (job.shown_as, why))


def work(job: Job) -> Outcome:
    """Read and judge one model, and keep the answer. Whatever goes wrong is the answer."""
    from tieaudit.judge import judge, weights_elsewhere

    begun = Moment.now()
    try:
        source = Source(job.path, choose(discover("formats", Format), job.format_name, "format"), job.files)
        model = source.load()
        checked = judge(model, job.terms, job.base, job.shown_as, job.locked)
    except WeightsNotHere as error:
        return weights_elsewhere(job.shown_as, job.format_name, str(error))
    except Exception as error:  # also what nobody foresaw: the other models are judged all the same
        if os.environ.get("TIEAUDIT_TRACEBACK") and not isinstance(error, TieAuditError):
            traceback.print_exc()
        return (job.shown_as, str(in_one_line(error, str(job.path))))
    files = [*job.files, *(Path(path) for part in model.parts for path in part.paths)]
    checked = replace(checked, files=tuple(dict.fromkeys(map(str, files))))
    if job.cache is not None:
        job.cache.put(job.asked, checked, [*files, *([job.path] if job.path.is_dir() else [])], begun)
    return checked


def stale(
    run: Run, policies: Iterable[tuple[Policy, Sequence[tuple[str, str]]]]
) -> Iterator[tuple[Policy, dict[str, Suppression]]]:
    """Suppressions that hid nothing, by policy; judged only where their rule ran on all models that they speak of, and
    where the rule that says so is selected, on the command line too.

    `policies`: each with the models that it rules in this run: (relative to its root, as the run shows it).
    """
    by_path = {model.path: model for model in run.models}
    for policy, paths in policies:
        found: dict[str, Suppression] = {}
        for one in policy.suppressions:
            concerned = [by_path.get(shown_as) for path, shown_as in paths if policy.concerns(one, path)]
            if all(model is not None and model.weights_here and one.code in model.ran for model in concerned):
                if not any(model is not None and one.key in model.used for model in concerned):
                    found[one.key] = one
        if found and any(STALE in by_path[shown_as].ran for _, shown_as in paths if shown_as in by_path):
            yield policy, found


def exit_code(run: Run, policy_of: Callable[[str], Policy], *, strict: bool = False, changed_only: bool = False) -> int:
    """0 clean · 1 findings that count · 2 the job was not done whole; 2 beats 1.

    Not whole: something unreadable, a crashed rule, nothing to look at, no model whose weights are here; where a policy
    is strict (`strict`: everywhere) a rule that cannot tell, or what DVC keeps elsewhere and may be a model. Named
    files that are no models, and a change that touches none, are no failure. What counts, the policy of each model says
    (`policy_of`: of a path as the run shows it).
    """
    models = [model for model in run.models if model.summary is not None or not model.weights_here]
    if run.errors or any(model.crashed or model.unreadable for model in run.models):
        return 2
    away = kept_away(run)
    if (models or away) and not any(model.weights_here for model in models):
        return 2
    if not models and not run.skipped and not changed_only:
        return 2
    unsure = [*away, *(model.path for model in run.models if model.cannot_tell)]
    if any(strict or policy_of(path).strict for path in unsure):
        return 2
    return int(any(RANK[one.finding.severity] <= RANK[policy_of(model.path).fail_on] for model, one in run.findings))
