"""What a run of the gate found, for people. What matters most stands last, where the eye is when the prompt is back:
first what is quiet, skipped or cannot be told, then findings model by model, what could not be read, and the totals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tieaudit.audit import rules as known_rules
from tieaudit.checked import Checked, Judged, Run
from tieaudit.printable import columns, counted, listed, printable, size
from tieaudit.reports.text.page import LONGEST, Page, more, page_of, printed, reasons
from tieaudit.tally import RuleTally, by_rule, not_read, quiet, tally, where
from tieaudit.verdict import CannotTell, Crashed

_N_MOST_QUIET = 5
"""Models without findings that are named; more of them are counted."""
_N_MOST_SKIPPED = 12


def of_run(run: Run, settings: Mapping[str, object]) -> str:
    """A run as text; settings: color, width, statistics, thresholds.

    Cost: linear in what is said; nothing is said twice.
    """
    page = page_of(settings)
    looked_at = [model for model in run.models if model.summary is not None and not model.unreadable]
    lines = _quiet([model for model in looked_at if quiet(model)], page)
    if run.skipped:
        lines += [page.paint("Skipped", "title"), *reasons(run.skipped[:_N_MOST_SKIPPED], page)]
        lines += [*more(len(run.skipped) - _N_MOST_SKIPPED, "  "), ""]
    loud = [model for model in run.models if not quiet(model)]
    lines += _alike([model for model in loud if _only_unsure(model)], page)
    for model in loud:
        if not _only_unsure(model):
            lines += [*_model(model, page), ""]
    if unread := not_read(run):
        lines += [page.paint("Not read", "title"), *reasons(unread, page), ""]
    if settings.get("statistics"):
        lines += _statistics(by_rule(run), page)
    notes = list(_notes(run))
    return printed([*lines, *notes, *([""] if notes else []), tally(run).verdict])


def _notes(run: Run) -> Iterator[str]:
    """What a reader may want to know before the verdict."""
    if n_silenced := tally(run).n_silenced:
        yield f"{counted(n_silenced, 'finding')} under the size thresholds (docs/thresholds.md)"
    fixes = [one.finding.fix for model in run.models for one in model.findings]
    n_safe = sum(fix is not None and fix.safety == "safe" for fix in fixes)
    if n_safe and "n_fixed" not in run.facts:  # else it was tried, and what became of it was said
        yield f"{counted(n_safe, 'finding')} with a safe fix: --diff shows it, --fix makes it"


def _only_unsure(model: Checked) -> bool:
    return not model.findings and not model.crashed and not model.unreadable


def _alike(models: Sequence[Checked], page: Page) -> list[str]:
    """Models of which the same cannot be told: said once, for what a policy asks of a whole repository."""
    groups: dict[tuple[object, ...], list[Checked]] = {}
    for model in models:
        said = tuple((one.code, one.because) for one in model.cannot_tell)
        groups.setdefault((said, model.weights_here, _hidden(model)), []).append(model)
    lines: list[str] = []
    for alike in groups.values():
        title, *lines_of = _model(alike[0], page)
        if len(alike) > 1:
            title = page.paint(f"{len(alike):,} models", "title") + _hidden(alike[0])
            lines_of = [*page.wrap(listed(tuple(model.path for model in alike), _N_MOST_QUIET), "  "), *lines_of]
        lines += [title, *lines_of, ""]
    return lines


def _quiet(models: Sequence[Checked], page: Page) -> list[str]:
    """Models that nothing is said of: named while they are few."""
    if len(models) > _N_MOST_QUIET:
        return [page.paint(f"{len(models):,} models without findings", "quiet"), ""]
    lines = [page.paint(f"{printable(model.path)} · no finding{_hidden(model)}", "quiet") for model in models]
    return [*lines, ""] if lines else []


def _hidden(model: Checked) -> str:
    counts = ((model.n_suppressed, "suppressed"), (len(model.known), "in the baseline"))
    return "".join(f" · {n:,} {what}" for n, what in counts if n)


def _model(model: Checked, page: Page) -> list[str]:
    n_found = f" · {counted(len(model.findings), 'finding')}" if model.findings else ""
    kind = f" · {printable(model.format)}" if model.format else ""
    lines = [page.paint(printable(model.path), "title") + kind + n_found + _hidden(model)]
    if not model.weights_here:
        lines += page.wrap("only pointers to the weights are here (git-LFS, DVC): their bytes were not judged", "  ")
    commands: set[str] = set()
    for judged in model.findings[: page.most.n_most_findings]:
        lines += _finding(model, judged, page, commands)
    lines += more(len(model.findings) - page.most.n_most_findings, "  ")
    return [*lines, *_unsure(model.cannot_tell, page), *_crashed(model.crashed, page)]


def _finding(model: Checked, judged: Judged, page: Page, commands: set[str]) -> list[str]:
    """`commands`: those that were shown already; one command mends many findings and is worth reading once."""
    finding = judged.finding
    head = page.paint(f"{finding.severity:<7}", finding.severity)
    place = printable(where(judged, model)) + (f":{judged.place.line}" if judged.place.line else "")
    at = "" if place == printable(model.path) else f"  {page.paint(place, 'quiet')}"
    lines = [f"  {head} {printable(finding.code)} {printable(finding.name)}{at}"]
    lines += page.wrap(printable(finding.message, LONGEST), "    ")
    if finding.fix is None:
        return lines
    command = printable(finding.fix.command, LONGEST)
    shown = command in commands
    commands.add(command)
    if finding.fix.safety == "manual":
        return lines if shown else [*lines, *page.wrap(f"by hand: {command}", "    ")]
    if shown:
        return [*lines, "    the same command mends it"]
    note = "" if finding.fix.safety == "safe" else "  # changes what the model computes for some loaders"
    return [*lines, "    $ " + page.paint(command, "command") + note]  # never wrapped: it is there to be pasted


def _unsure(unsure: Sequence[CannotTell], page: Page) -> list[str]:
    lines: list[str] = []
    for item in unsure[: page.most.n_most_findings]:
        lines += page.wrap(f"cannot tell {printable(item.code)} {printable(item.because, LONGEST)}", "  ")
    return [*lines, *more(len(unsure) - page.most.n_most_findings, "  ")]


def _crashed(crashed: Sequence[Crashed], page: Page) -> list[str]:
    lines: list[str] = []
    for crash in crashed:
        said = f"{printable(crash.code)} {printable(crash.because, LONGEST)}"
        lines += page.wrap(f"crashed {said}: a fault of tieaudit, please report it (--format json has the trace)", "  ")
    return lines


def _statistics(rules: Sequence[RuleTally], page: Page) -> list[str]:
    """One row for each rule that had something to say, and their sums."""
    if not rules:
        return []
    head = ("rule", "", "findings", "models", "bytes", "baseline", "cannot tell", "crashed")
    names = {code: rule.name for code, rule in known_rules().items()}
    rows = [head, *(_row(one, names.get(one.code, one.name)) for one in rules)]
    table = columns(rows, "<<" + ">" * (len(head) - 2))
    return [page.paint(table[0], "title"), *table[1:], ""]


def _row(one: RuleTally, name: str) -> tuple[str, ...]:
    counts = (f"{one.n_findings:,}", f"{one.n_models:,}", size(one.n_bytes), f"{one.n_known:,}")
    return (printable(one.code), printable(name), *counts, f"{one.n_cannot_tell:,}", f"{one.n_crashed:,}")
