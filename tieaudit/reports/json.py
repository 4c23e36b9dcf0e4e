"""The machine-readable reports: schemas `tieaudit/scan/1` and `tieaudit/check/1`, additive only (docs/schema/)."""

from __future__ import annotations

import json as encoder
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass

from tieaudit import __version__
from tieaudit.checked import Checked, Judged, Run
from tieaudit.depth import n_calls, shared_across_depth
from tieaudit.equality import of_buffers
from tieaudit.model import Member, Model, Role, Tie, Weight
from tieaudit.plain import plain
from tieaudit.reports import ReportFormat
from tieaudit.saving import n_parameters_saved
from tieaudit.tally import tally
from tieaudit.verdict import Candidate, CannotTell, Crashed, Finding, Likeness, Report

SCHEMA = "tieaudit/scan/1"
SCHEMA_OF_RUNS = "tieaudit/check/1"
_OF_THE_SCREEN = frozenset({"color", "width"})
_N_MOST_INDENTED = 2000
"""Weights in one document that is still printed with line breaks."""
_NO_ROLE = Role("other", "")


def document(
    reports: Sequence[Report], errors: Sequence[tuple[str, str]], settings: Mapping[str, object]
) -> dict[str, object]:
    """The whole document as plain lists and dictionaries."""
    shown = {key: value for key, value in settings.items() if key not in _OF_THE_SCREEN}
    return {
        "schema": SCHEMA,
        "tool": {"name": "tieaudit", "version": __version__},
        "settings": {key: _setting(value) for key, value in shown.items()},
        "models": [_model(report) for report in reports],
        "errors": [{"path": path, "message": message} for path, message in errors],
    }


def _render(reports: Sequence[Report], errors: Sequence[tuple[str, str]], settings: Mapping[str, object]) -> str:
    # indented for people while people may read it: the standard library is ten times slower with an indent
    indent = 1 if sum(len(report.subject.model.weights) for report in reports) <= _N_MOST_INDENTED else None
    return _text(document(reports, errors, settings), indent)


def _text(document: dict[str, object], indent: int | None) -> str:
    # ASCII only: names from files may hold lone surrogates and control characters, which no terminal should get raw;
    # and no `##`, which a CI service may take for a command where the document is printed to its log
    text = encoder.dumps(document, indent=indent, ensure_ascii=True, allow_nan=False)
    return text.replace("##", "#\\u0023") + "\n"


def _setting(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else plain(value)


def _model(report: Report) -> dict[str, object]:
    model, found = report.subject.model, report.subject.found
    calls = n_calls(model, found)
    return {
        "path": model.path,
        "format": model.format,
        "parts": [part.name for part in model.parts],
        "part_files": {part.name: list(part.paths) for part in model.parts},
        "metadata": dict(model.metadata),
        "notes": list(model.notes),
        "summary": asdict(report.summary),
        "n_by_role": report.n_by_role,
        "weights": [
            {**_weight(report, weight, weight.id in found.constants), "n_calls": calls.get(weight.id)}
            for weight in model.weights
        ],
        "groups": [_group(tie, of_buffers(model, tie)) for tie in found.ties],
        "overlaps": [{"ids": list(one.ids), "because": one.because} for one in found.overlaps],
        "shared_across_depth": [
            {"module": one.module, "n_calls": one.n_calls, "ids": list(one.ids)} for one in shared_across_depth(model)
        ],
        "constant_groups": [list(ids) for ids in found.constant_classes],
        "candidates": [_candidate(model, candidate) for candidate in report.candidates],
        "findings": [_finding(finding) for finding in report.findings],
        "cannot_tell": [_unsure(item) for item in report.cannot_tell],
        "crashed": [_crash(item) for item in report.crashed],
        "n_rules": report.n_rules,
        "n_silenced": report.n_silenced,
    }


def _weight(report: Report, weight: Weight, constant: bool) -> dict[str, object]:
    role = report.subject.roles.get(weight.id, _NO_ROLE)
    return {
        "id": weight.id,
        "name": weight.name,
        "part": weight.part,
        "scope": weight.scope,
        "shape": list(weight.shape),
        "dtype": weight.dtype,
        "n_bytes": weight.n_bytes,
        "parameter": weight.parameter,
        "constant": constant,
        "absent": weight.absent,
        "role": {
            "kind": role.kind,
            "layer": role.layer,
            "side": role.side,
            "expert": role.expert,
            "because": role.because,
            "against": role.against,
        },
    }


def _member(member: Member) -> dict[str, str]:
    shown = {"id": member.id, "view": str(member.view)}
    return {**shown, "use": member.use} if member.use else shown


def _group(tie: Tie, buffers: bool) -> dict[str, object]:
    return {
        "origin": tie.origin,
        "buffers": buffers,
        "members": [_member(member) for member in tie.members],
        "n_bytes_saved": tie.n_bytes_saved,
        "because": tie.because,
    }


def _candidate(model: Model, candidate: Candidate) -> dict[str, object]:
    return {
        "scheme": candidate.scheme,
        "action": candidate.action,
        "members": [_member(member) for member in candidate.members],
        "n_bytes_saved": candidate.n_bytes_saved,
        "n_parameters_saved": n_parameters_saved(model, [candidate]),
        "lossless": candidate.lossless,
        "because": candidate.because,
        "damage": candidate.damage,
        "likeness": _likeness(candidate.likeness) if candidate.likeness is not None else None,
    }


def _likeness(found: Likeness) -> dict[str, object]:
    return {
        "verdict": found.verdict,
        "because": found.because,
        "ids": list(found.ids),
        "exact": found.exact,
        "diagnostics": {
            name: {"value": plain(value), "unrelated": plain(null)} for name, (value, null) in found.diagnostics.items()
        },
    }


def _unsure(item: CannotTell) -> dict[str, object]:
    return {"code": item.code, "because": item.because, "ids": list(item.ids)}


def _crash(item: Crashed) -> dict[str, object]:
    return {"code": item.code, "because": item.because, "traceback": item.traceback}


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "ids": list(finding.ids),
        "message": finding.message,
        "n_bytes": finding.n_bytes,
        "evidence": plain(finding.evidence),
        "fix": asdict(finding.fix) if finding.fix is not None else None,
    }


def document_of_run(run: Run) -> dict[str, object]:
    """A run of the gate as plain lists and dictionaries: all that it holds. Ids and paths are as they are."""
    return {
        "schema": SCHEMA_OF_RUNS,
        "tool": {"name": "tieaudit", "version": __version__},
        "root": run.root,
        "top": run.top,
        "policy": run.policy,
        "facts": plain(run.facts),
        "totals": asdict(tally(run)),
        "models": [_checked(model) for model in run.models],
        "errors": [{"path": path, "message": message} for path, message in run.errors],
        "skipped": [{"path": path, "reason": reason} for path, reason in run.skipped],
    }


def _render_run(run: Run, settings: Mapping[str, object]) -> str:
    short = sum(1 + len(model.findings) + len(model.known) for model in run.models) <= _N_MOST_INDENTED
    return _text(document_of_run(run), 1 if short else None)


def _checked(model: Checked) -> dict[str, object]:
    return {
        "path": model.path,
        "format": model.format,
        "summary": asdict(model.summary) if model.summary is not None else None,
        "findings": [_judged(judged) for judged in model.findings],
        "known": [_judged(judged) for judged in model.known],
        "cannot_tell": [_unsure(item) for item in model.cannot_tell],
        "crashed": [_crash(item) for item in model.crashed],
        "n_rules": model.n_rules,
        "n_silenced": model.n_silenced,
        "n_suppressed": model.n_suppressed,
        "used": list(model.used),
        "ran": list(model.ran),
        "unreadable": model.unreadable,
        "n_bytes_read": model.n_bytes_read,
        "weights_here": model.weights_here,
        "files": list(model.files),
        "cached": model.cached,
    }


def _judged(judged: Judged) -> dict[str, object]:
    place = {"path": judged.place.path, "line": judged.place.line}
    return {**_finding(judged.finding), "place": place, "fingerprint": judged.fingerprint}


json = ReportFormat(
    name="json",
    summary="schemas tieaudit/scan/1 and tieaudit/check/1: everything, additive only, for programs",
    render=_render,
    of_run=_render_run,
)
