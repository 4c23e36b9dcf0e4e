"""What a scan found, for people: one screen per model, the verdict last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tieaudit.depth import shared_across_depth
from tieaudit.equality import of_buffers
from tieaudit.model import Member, Model, Origin, Role, Tie
from tieaudit.printable import columns, counted, printable, shorten, size
from tieaudit.reports.text.page import LONGEST, Page, more, page_of, printed, reasons
from tieaudit.saving import n_parameters_saved
from tieaudit.verdict import Candidate, Finding, Report

_MEANING: dict[Origin, str] = {
    "measured": "equal bytes, stored more than once",
    "aliased": "one stored tensor, several names or uses",
    "absent": "not stored, restored by the loader",
    "declared": "claimed by the configuration or the class, true or not",
    "proposed": "proposed",
}
_PLACES = (
    *("token_embedding", "position_embedding", "type_embedding", "output_head", "output_head_bias"),
    *(f"attention_{part}" for part in ("query", "key", "value", "qkv", "kv", "output")),
    *(f"ffn_{part}" for part in ("gate", "up", "gate_up", "down")),
    *("router", "adapter_a", "adapter_b", "convolution", "recurrent_input", "recurrent_hidden", "norm_scale"),
    *("norm_bias", "projection", "bias", "buffer", "other"),
)
"""The order in which kinds of roles are counted on the screen."""
_TABLES = ("token_embedding", "output_head", "output_head_bias", "position_embedding")
"""Kinds of which somebody may have meant two to be one: each such candidate is shown by itself."""
_MIN_NAME = 20
_SHORT_ROLE = 24
_N_MOST_USES = 3
"""Uses listed of one stored tensor: further ones tell less than further names."""


def of_scans(reports: Sequence[Report], errors: Sequence[tuple[str, str]], settings: Mapping[str, object]) -> str:
    """Scans as text; settings: color, width, thresholds."""
    page = page_of(settings)
    lines: list[str] = []
    for report in reports:
        lines += [*_model(report, page), ""]
    if errors:
        lines.append(page.paint("Not read", "title"))
        lines += reasons(errors, page)
        lines.append("")
    return printed([*lines, _verdict(reports, errors)])


def _verdict(reports: Sequence[Report], errors: Sequence[tuple[str, str]]) -> str:
    n_rules = max((report.n_rules for report in reports), default=0)
    counts = [
        counted(n_rules, "rule"),
        counted(sum(len(report.findings) for report in reports), "finding"),
        f"{sum(len(report.cannot_tell) for report in reports):,} cannot tell",
        f"{sum(len(report.crashed) for report in reports):,} crashed",
    ]
    if errors:
        counts.append(f"{len(errors):,} not read")
    return " · ".join(counts)


def _model(report: Report, page: Page) -> list[str]:
    model = report.subject.model
    lines = [page.paint(printable(model.path), "title") + " · " + _kind(model)]
    lines += _totals(report, page)
    for section in (_ties(report, page), _candidates(report, page), _findings(report, page), _unsure(report, page)):
        lines += ["", *section] if section else []
    return lines


def _kind(model: Model) -> str:
    facts = [printable(model.format)]
    facts += [printable(model.metadata[key]) for key in ("architecture", "producer") if model.metadata.get(key)]
    if len(model.parts) > 1:
        facts.append(f"{len(model.parts)} parts: {', '.join(printable(part.name, 40) for part in model.parts[:6])}")
        facts[-1] += " …" if len(model.parts) > 6 else ""
    n_files = sum(len(part.paths) for part in model.parts)
    if n_files > len(model.parts):
        facts.append(counted(n_files, "file"))
    if model.metadata.get("key"):
        facts.append(f"key {printable(model.metadata['key'], 60)}")
    if model.metadata.get("beside"):
        facts.append(f"not read: {printable(model.metadata['beside'], 120)}")
    if model.metadata.get("placeholders"):
        facts.append(f"not loaded, only named: {printable(model.metadata['placeholders'], 120)}")
    if model.metadata.get("alternative_of"):
        facts.append(f"alternative of {printable(model.metadata['alternative_of'])}")
    if model.metadata.get("alternatives"):
        facts.append(f"not read, alternatives: {printable(model.metadata['alternatives'], 80)}")
    return " · ".join(facts)


def _totals(report: Report, page: Page) -> list[str]:
    total = report.summary
    once = "unknown" if total.n_parameters is None else f"{total.n_parameters:,}"
    named = "unknown" if total.n_parameters_named is None else f"{total.n_parameters_named:,}"
    rows = [
        ("weights", f"{total.n_weights:,}", ""),
        ("parameters", once, f"{named} counted by name" if named != once else ""),
        ("stored", size(total.n_bytes), f"{size(total.n_bytes_duplicate)} of it stored twice"),
    ]
    if not total.n_bytes_duplicate:
        rows[2] = (*rows[2][:2], "nothing stored twice")
    lines = ["  " + line for line in columns(rows, "<><")]
    if total.n_parameters_because:
        lines += page.wrap(printable(total.n_parameters_because, LONGEST), "  ")
    lines += _roles(report, page)
    uses = report.subject.model.metadata.get("uses", "")
    return lines + (page.wrap(f"uses come {printable(uses, LONGEST)}", "  ") if uses else [])


def _roles(report: Report, page: Page) -> list[str]:
    """How many weights are of each kind, from a model's inputs to its outputs; then what evidence contradicts."""
    counts: dict[str, int] = {}
    for kind, n in report.n_by_role.items():
        counts[_family(kind)] = counts.get(_family(kind), 0) + n
    if not counts:
        return []
    order = sorted(counts, key=lambda kind: _PLACES.index(kind) if kind in _PLACES else len(_PLACES) - 2)
    text = "\N{NO-BREAK SPACE}· ".join(f"{printable(kind)}\N{NO-BREAK SPACE}{counts[kind]:,}" for kind in order)
    label = f"  {'roles':<12}"
    wrapped = page.wrap(text, " " * len(label))
    lines = [label + wrapped[0].lstrip(), *wrapped[1:]]
    against = [(id, role) for id, role in report.subject.roles.items() if role.against]
    if against:
        id, role = against[0]
        rest = f", and of {len(against) - 1:,} more (--format json lists all)" if len(against) > 1 else ""
        said = f"evidence conflicts about {printable(id)}: {role.kind} or {role.against}{rest}"
        lines += [page.paint(line, "quiet") for line in page.wrap(said, " " * len(label))]
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _family(kind: str) -> str:
    """Biases of matrices are counted as one kind, so that a line holds them."""
    is_bias = kind.endswith("bias") and kind not in ("norm_bias", "output_head_bias")
    return "bias" if is_bias else kind


def _ties(report: Report, page: Page) -> list[str]:
    by_origin: dict[Origin, list[Tie]] = {origin: [] for origin in _MEANING}
    seen: set[frozenset[str]] = set()
    buffers = _equal_buffers(report)
    apart = {tie.ids for tie in buffers}
    for origin in _MEANING:
        for tie in (tie for tie in report.subject.found.ties if tie.origin == origin):
            if origin == "measured" and tie.ids in apart:
                continue
            # a declared tie of the very weights that are already shown adds nothing to look at
            if origin != "declared" or frozenset(tie.ids) not in seen:
                by_origin[origin].append(tie)
            seen.add(frozenset(tie.ids))
    lines: list[str] = []
    for origin, ties in by_origin.items():
        ties.sort(key=lambda tie: (-tie.n_bytes_saved, -_largest(report, tie)))
        if ties:
            title = page.paint(f"Ties, {origin}", "title") + f" ({len(ties):,}): {_MEANING[origin]}"
            lines += [title, *_tie_lines(report, ties[: page.most.n_most_ties], page)]
            lines += more(len(ties) - page.most.n_most_ties, "  ")
    lines = lines or ["No tie of any origin."]
    return [*lines, *_repeated(report, page), *_buffer_lines(report, buffers, page), *_slices(report, page)]


def _repeated(report: Report, page: Page) -> list[str]:
    """Modules called several times: sharing that no name and no memory shows."""
    model, found = report.subject.model, shared_across_depth(report.subject.model)
    if not found:
        return []
    lines = ["", page.paint("Shared across depth", "title") + f" ({len(found):,}): one module, called several times"]
    rows = [
        (
            printable(one.module),
            counted(len(one.ids), "weight"),
            size(sum(model.by_id[id].n_bytes for id in one.ids)),
            f"used in {one.n_calls:,} calls",
        )
        for one in found[: page.most.n_most_ties]
    ]
    return [*lines, *("  " + line for line in columns(rows, "<>><")), *more(len(found) - len(rows), "  ")]


def _slices(report: Report, page: Page) -> list[str]:
    """Names that share some of their bytes: no tie, but what changes one changes the other."""
    found = report.subject.found.overlaps
    if not found:
        return []
    lines = ["", page.paint("Slices", "title") + f" ({len(found):,}): names that share some of their stored bytes"]
    for one in found[: page.most.n_most_ties]:
        shown = ", ".join(printable(id) for id in one.ids[: page.most.n_most_members])
        shown += f" and {len(one.ids) - page.most.n_most_members:,} more" * (len(one.ids) > page.most.n_most_members)
        lines += page.wrap(f"{shown}: {printable(one.because, LONGEST)}", "  ")
    return [*lines, *more(len(found) - page.most.n_most_ties, "  ")]


def _equal_buffers(report: Report) -> list[Tie]:
    """Measured classes in which nothing is trained, the largest waste first."""
    model, ties = report.subject.model, report.subject.found.ties
    found = [tie for tie in ties if tie.origin == "measured" and of_buffers(model, tie)]
    return sorted(found, key=lambda tie: -tie.n_bytes_saved)


def _buffer_lines(report: Report, buffers: Sequence[Tie], page: Page) -> list[str]:
    """One line for each: equal masks and shapes are bytes, and must not drown the ties."""
    if not buffers:
        return []
    shown = buffers[: page.most.n_most_ties]
    rows = [list(_member_row(report, tie, tie.members[0], True)) for tie in shown]
    for row, tie in zip(rows, shown, strict=True):
        row[1:3] = [f"and {counted(len(tie.members) - 1, 'equal one')}"]
    title = page.paint("Equal buffers", "title") + f" ({len(buffers):,}): masks, shapes or tables; bytes, no parameters"
    lines = ["  " + line for line in _fitted(rows, page.width - 2)]
    return ["", title, *lines, *more(len(buffers) - len(shown), "  ")]


def _largest(report: Report, tie: Tie) -> int:
    """Stored bytes of the largest member: among ties that waste nothing the embedding matters more than a bias."""
    return max(
        (report.subject.model.by_id[id].n_bytes for id in tie.ids if id in report.subject.model.by_id), default=0
    )


def _tie_lines(report: Report, ties: Sequence[Tie], page: Page) -> list[str]:
    shown = [
        [_member_row(report, tie, member, index == 0) for index, member in enumerate(_first(tie, page))] for tie in ties
    ]
    table = iter(_fitted([row for group in shown for row in group], page.width - 2))
    lines: list[str] = []
    for tie, group in zip(ties, shown, strict=True):
        lines += ["  " + next(table) for _ in group]
        lines += more(len(tie.members) - len(group), "    ")
        lines += [page.paint(line, "quiet") for line in page.wrap(printable(tie.because, LONGEST), "    ")]
    return lines


def _fitted(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The table of members; names give way first, then roles, so that a line fits where it can."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = width - sum(widths[1:]) - 2 * (len(widths) - 1)
    if room < _MIN_NAME:
        room += max(widths[1] - _SHORT_ROLE, 0)
        rows = [(row[0], shorten(row[1], _SHORT_ROLE), *row[2:]) for row in rows]
    named = [(shorten(row[0], max(room, _MIN_NAME)), *row[1:]) for row in rows]
    return columns(named, "<" * (len(widths) - 1) + ">")


def _first(tie: Tie, page: Page) -> Sequence[Member]:
    n_most = page.most.n_most_members
    return tie.members[: min(n_most, _N_MOST_USES) if tie.members[0].use else n_most]


def _member_row(report: Report, tie: Tie, member: Member, first: bool) -> tuple[str, ...]:
    weight = report.subject.model.by_id.get(member.id)
    role = report.subject.roles.get(member.id)
    kind = printable(member.use, 40) if member.use else _role(role)
    shape = "×".join(map(str, weight.shape)) or "scalar" if weight is not None else ""
    saved = f"saves {size(tie.n_bytes_saved)}" if first and tie.n_bytes_saved else ""
    name = printable(member.id) if first or not member.use else "  and"
    view = "not stored" if weight is not None and weight.absent else str(member.view)
    return name, kind, view, f"{weight.dtype} {shape}" if weight is not None else "", saved


def _role(role: Role | None) -> str:
    if role is None or role.kind == "other":
        return "–"
    where = " ".join(
        text for text in (role.side or "", f"layer {role.layer}" if role.layer is not None else "") if text
    )
    return f"{role.kind} ({where})" if where else role.kind


def _candidates(report: Report, page: Page) -> list[str]:
    lines: list[str] = []
    known = [set(tie.ids) for tie in report.subject.found.ties if tie.origin == "measured"]
    chosen = [
        one for one in report.candidates if not any({member.id for member in one.members} <= ids for ids in known)
    ]
    chosen.sort(key=lambda candidate: -candidate.n_bytes_saved)
    tables = [one for one in chosen if report.subject.roles[one.members[0].id].kind in _TABLES]
    for candidate in tables[: page.most.n_most_ties]:
        lines += _candidate(candidate, page)
    lines += more(len(tables) - page.most.n_most_ties, "  ")
    lines += _by_scheme(report, [one for one in chosen if one not in tables], page)
    title = (
        page.paint("Candidates", "title")
        + f" ({counted(len(chosen), 'class', 'classes')}): could be one tensor, are not"
    )
    return [title, *lines] if chosen else []


def _by_scheme(report: Report, candidates: list[Candidate], page: Page) -> list[str]:
    """What schemes would share of the layers, in sums: nobody meant these weights to be one."""
    sums = []
    for scheme in dict.fromkeys(one.scheme for one in candidates):
        own = [one for one in candidates if one.scheme == scheme]
        n_parameters = n_parameters_saved(report.subject.model, own)
        sums.append(f"{scheme} {n_parameters:,} ({size(sum(one.n_bytes_saved for one in own))})")
        verdicts = [one.likeness.verdict for one in own if one.likeness is not None]
        if verdicts:
            sums[-1] += f", {len(verdicts)} of {len(own)} compared: {', '.join(dict.fromkeys(verdicts))}"
        sums[-1] += ", lossless" if all(one.lossless for one in own) else ""
    if not sums:
        return []
    what = "in layers, parameters (bytes) less by scheme, values change; tieaudit plan tells the damage: "
    return page.wrap(what + " · ".join(sums), "  ")


def _candidate(candidate: Candidate, page: Page) -> list[str]:
    ids = " = ".join(
        printable(member.id) + (f" ({member.view})" if member.view.steps else "")
        for member in candidate.members[: page.most.n_most_members]
    )
    cost = "lossless" if candidate.lossless else "changes values"
    saves = f"saves {size(candidate.n_bytes_saved)}, {cost}"
    if candidate.action == "fit":
        saves = f"would save {size(candidate.n_bytes_saved)}, but their shapes differ"
    text = f"{candidate.scheme}: {ids}; {saves}"
    reason = f"{candidate.because}. {candidate.damage}" if candidate.damage else candidate.because
    return [
        *page.wrap(text, "  "),
        *(page.paint(line, "quiet") for line in page.wrap(printable(reason, LONGEST), "    ")),
        *(page.paint(line, "quiet") for line in page.wrap(_diagnostics(candidate), "    ") if candidate.likeness),
    ]


def _diagnostics(candidate: Candidate) -> str:
    """All numbers of a comparison, each beside what unrelated tables have."""
    found = candidate.likeness.diagnostics if candidate.likeness is not None else {}
    return "measured (unrelated): " + ", ".join(f"{name} {one:.3g} ({null:.3g})" for name, (one, null) in found.items())


def _findings(report: Report, page: Page) -> list[str]:
    lines: list[str] = []
    said: set[str] = set()
    for finding in report.findings[: page.most.n_most_findings]:
        lines += _finding(finding, page, said)
    lines += more(len(report.findings) - page.most.n_most_findings, "  ")
    if report.n_silenced:
        what = counted(report.n_silenced, "more finding" if report.findings else "finding")
        lines.append(f"  {what} under the size thresholds (docs/thresholds.md)")
    return [page.paint("Findings", "title") + f" ({len(report.findings):,})", *lines] if lines else []


def _finding(finding: Finding, page: Page, said: set[str]) -> list[str]:
    """`said`: commands that were shown already; one command mends many findings and is worth reading once."""
    head = page.paint(f"{finding.severity:<7}", finding.severity)
    lines = [f"  {head} {finding.code} {finding.name}", *page.wrap(printable(finding.message, LONGEST), "    ")]
    if finding.fix is None:
        return lines
    text = printable(finding.fix.command, None)
    if text in said:
        return [*lines, "    the same command mends it"] if finding.fix.safety != "manual" else lines
    said.add(text)
    if finding.fix.safety == "manual":
        return [*lines, *page.wrap(f"by hand: {text}", "    ")]
    note = "" if finding.fix.safety == "safe" else "  # changes what the model computes for some loaders"
    return [*lines, "    $ " + page.paint(text, "command") + note]  # never wrapped: it is there to be pasted


def _unsure(report: Report, page: Page) -> list[str]:
    lines: list[str] = []
    if report.cannot_tell:
        lines.append(page.paint("Cannot tell", "title") + f" ({len(report.cannot_tell):,})")
        for item in report.cannot_tell[: page.most.n_most_findings]:
            lines += page.wrap(f"{item.code} {printable(item.because, LONGEST)}", "  ")
        lines += more(len(report.cannot_tell) - page.most.n_most_findings, "  ")
    if report.crashed:
        lines += [""] if lines else []
        lines.append(
            page.paint("Crashed", "title") + f" ({len(report.crashed):,}): a fault of tieaudit, please report it"
        )
        for crash in report.crashed:
            lines += page.wrap(
                f"{crash.code} {printable(crash.because, LONGEST)} (--format json has the traceback)", "  "
            )
    return lines
