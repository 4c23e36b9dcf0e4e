"""The counts of a run of the gate: its last line, and what is said of each rule. Every format counts alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tieaudit.checked import RANK, Checked, Judged, Run
from tieaudit.pointers import KEPT_AWAY
from tieaudit.printable import counted


@dataclass(frozen=True)
class Tally:
    """How often what was said in a run."""

    n_models: int
    n_rules: int
    """Rules that ran, on the model where most did."""
    n_findings: int
    n_cannot_tell: int
    n_crashed: int
    n_not_read: int
    n_skipped: int
    """What was named and is no model."""
    n_suppressed: int
    n_known: int
    """Findings in the baseline."""
    n_silenced: int
    """Findings under their rule's threshold of bytes."""

    @property
    def verdict(self) -> str:
        """The last line of every report for people; what is 0 and need not be is left out."""
        counts = [
            counted(self.n_models, "model"),
            counted(self.n_rules, "rule"),
            counted(self.n_findings, "finding"),
            f"{self.n_cannot_tell:,} cannot tell",
            f"{self.n_crashed:,} crashed",
        ]
        further = ((self.n_not_read, "not read"), (self.n_suppressed, "suppressed"), (self.n_known, "in the baseline"))
        return " · ".join([*counts, *(f"{n:,} {what}" for n, what in further if n)])


@dataclass
class RuleTally:
    """What a run says of one rule."""

    code: str
    name: str = ""
    n_findings: int = 0
    n_known: int = 0
    n_cannot_tell: int = 0
    n_crashed: int = 0
    n_models: int = 0
    """Models with a finding that counts."""
    n_bytes: int = 0
    """Bytes at stake in these findings."""


def tally(run: Run) -> Tally:
    """The counts of a run. What the policy itself is told counts as findings, not as a model."""
    models = run.models
    return Tally(
        n_models=sum(model.summary is not None or not model.weights_here for model in models),
        n_rules=max((model.n_rules for model in models), default=0),
        n_findings=sum(len(model.findings) for model in models),
        n_cannot_tell=sum(len(model.cannot_tell) for model in models) + len(kept_away(run)),
        n_crashed=sum(len(model.crashed) for model in models),
        n_not_read=len(not_read(run)),
        n_skipped=len(run.skipped),
        n_suppressed=sum(model.n_suppressed for model in models),
        n_known=sum(len(model.known) for model in models),
        n_silenced=sum(model.n_silenced for model in models),
    )


def kept_away(run: Run) -> list[str]:
    """Paths of what DVC keeps elsewhere and may be a model: skipped, and not clean."""
    return [path for path, because in run.skipped if because.startswith(KEPT_AWAY)]


def by_rule(run: Run) -> list[RuleTally]:
    """What is said of each rule that had something to say, in the order of their codes."""
    found: dict[str, RuleTally] = {}

    def of(code: str) -> RuleTally:
        return found.setdefault(code, RuleTally(code))

    for model in run.models:
        for judged in (*model.findings, *model.known):
            of(judged.finding.code).name = judged.finding.name
        for judged in model.findings:
            of(judged.finding.code).n_findings += 1
            of(judged.finding.code).n_bytes += judged.finding.n_bytes
        for code in {judged.finding.code for judged in model.findings}:
            of(code).n_models += 1
        for judged in model.known:
            of(judged.finding.code).n_known += 1
        for unsure in model.cannot_tell:
            of(unsure.code).n_cannot_tell += 1
        for crash in model.crashed:
            of(crash.code).n_crashed += 1
    return [found[code] for code in sorted(found)]


def worst_first(run: Run) -> list[tuple[Checked, Judged]]:
    """Every finding with its model, by severity, then in the order of the run."""
    return sorted(run.findings, key=lambda pair: RANK[pair[1].finding.severity])


def not_read(run: Run) -> list[tuple[str, str]]:
    """(path, why) of what could not be read, or not whole where no rule says so: a policy may leave that rule out."""
    parts = [model for model in run.models if model.unreadable and not any(said(model))]
    return [*run.errors, *((model.path, "some of the weights could not be read") for model in parts)]


def quiet(model: Checked) -> bool:
    """Whether there is nothing to say of a model but that it was looked at."""
    return not (model.findings or model.cannot_tell or model.crashed or not model.weights_here)


def where(judged: Judged, model: Checked) -> str:
    """The file to look at: that of the finding, else the model; as it is, to be made harmless by who shows it."""
    return judged.place.path or model.path or "."


def from_the_top(run: Run) -> Run:
    """The run with its paths as services that show a repository want them: from the top of the work tree, where one
    lies in it; whoever starts the check in a folder further down gets the same."""
    if not run.top or run.top == run.root:
        return run
    top = run.top.rstrip("/") + "/"

    def moved(path: str) -> str:
        full = os.path.normpath(os.path.join(run.root, path)) if path else ""
        return full[len(top) :] or "." if f"{full}/".startswith(top) else path

    def placed(found: tuple[Judged, ...]) -> tuple[Judged, ...]:
        return tuple(replace(one, place=replace(one.place, path=moved(one.place.path))) for one in found)

    return replace(
        run,
        models=tuple(
            replace(one, path=moved(one.path), findings=placed(one.findings), known=placed(one.known))
            for one in run.models
        ),
        errors=tuple((moved(path), message) for path, message in run.errors),
        skipped=tuple((moved(path), reason) for path, reason in run.skipped),
        root=run.top,
    )


def said(model: Checked) -> Iterator[str]:
    """Codes of the rules that had something to say of a model, each once."""
    codes = [judged.finding.code for judged in (*model.findings, *model.known)]
    codes += [unsure.code for unsure in model.cannot_tell]
    codes += [crash.code for crash in model.crashed]
    return iter(dict.fromkeys(codes))
