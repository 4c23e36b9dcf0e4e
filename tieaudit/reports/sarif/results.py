"""The results of a SARIF log, grouped where there are too many, and what could not be judged as notifications."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from tieaudit.checked import RANK, Checked, Judged, Run
from tieaudit.printable import counted, printable
from tieaudit.reports.sarif.descriptors import LEVELS
from tieaudit.reports.sarif.places import location
from tieaudit.tally import not_read, where

_LONGEST = 2000
_N_MOST_LOCATIONS = 10
"""Of one result, as GitHub's documentation asks."""
_N_MOST_NOTIFICATIONS = 1000


@dataclass(frozen=True)
class Group:
    """Findings that one result stands for: of one rule, one severity, all new or all in the baseline."""

    members: tuple[tuple[Checked, Judged], ...]
    known: bool
    across: bool = False
    """Whether it gathers what is left of many models."""

    @property
    def order(self) -> tuple[bool, int]:
        return self.known, RANK[self.members[0][1].finding.severity]


def grouped(run: Run, n_most: int) -> list[Group]:
    """One group for each finding; over `n_most` one for each rule and model; then the worst, and one for each rule."""
    groups = [Group(((model, judged),), False) for model in run.models for judged in model.findings]
    groups += [Group(((model, judged),), True) for model in run.models for judged in model.known]
    groups.sort(key=lambda group: group.order)
    if len(groups) > n_most:
        keys = [(group.members[0][0].path, *_kind(group)) for group in groups]
        groups = _joined(zip(keys, groups, strict=True), across=False)
    if len(groups) > n_most:
        n_kept = max(n_most - len({_kind(group) for group in groups}), 0)
        rest = _joined(((_kind(group), group) for group in groups[n_kept:]), across=True)
        groups = groups[:n_kept] + rest
    return groups


def _kind(group: Group) -> tuple[str, str, bool]:
    finding = group.members[0][1].finding
    return finding.code, finding.severity, group.known


def _joined(keyed: Iterable[tuple[Hashable, Group]], *, across: bool) -> list[Group]:
    found: dict[Hashable, list[Group]] = {}
    for key, group in keyed:
        found.setdefault(key, []).append(group)
    return [
        Group(tuple(pair for group in groups for pair in group.members), groups[0].known, across)
        for groups in found.values()
    ]


def result(
    group: Group, index: Mapping[str, int], compared: bool, seen: dict[tuple[str, str], int]
) -> dict[str, object]:
    """One `result`. `compared`: a baseline was given; `seen` counts fingerprints of one file, which must differ."""
    model, judged = group.members[0]
    finding = judged.finding
    places: dict[tuple[str, int], Judged] = {}
    for owner, one in group.members:
        places.setdefault((where(one, owner), one.place.line), one)
    found: dict[str, object] = {
        "ruleId": printable(finding.code),
        "ruleIndex": index[printable(finding.code)],
        "level": LEVELS[finding.severity],
        "message": {"text": _message(group)},
        "locations": [
            location(path, line, one.finding.ids) for (path, line), one in list(places.items())[:_N_MOST_LOCATIONS]
        ],
        "partialFingerprints": _fingerprints(group, where(judged, model), seen),
        "properties": {
            "n_findings": len(group.members),
            "n_bytes": sum(one.finding.n_bytes for _, one in group.members),
        },
    }
    if compared:
        found["baselineState"] = "unchanged" if group.known else "new"
    if group.known:
        found["suppressions"] = [{"kind": "external", "status": "accepted", "justification": "in the baseline"}]
    return found


def _message(group: Group) -> str:
    finding = group.members[0][1].finding
    said = printable(finding.message, _LONGEST) or printable(finding.name)
    if len(group.members) > 1:
        n_models = len({owner.path for owner, _ in group.members})
        inside = f"{counted(n_models, 'further model')}" if group.across else "this model"
        said = f"{counted(len(group.members), 'finding')} in {inside}, folded into one; the first: {said}"
    if finding.fix is not None:
        how = "by hand" if finding.fix.safety == "manual" else "fix"
        said += f"\n{how}: {printable(finding.fix.command, _LONGEST)}"
    return said.replace("](", "] (")  # no embedded link (section 3.11.6 of the standard) that a name made up


def _fingerprints(group: Group, path: str, seen: dict[tuple[str, str], int]) -> dict[str, str]:
    """Ours, and the only one that GitHub compares, which must not be the same twice in one file."""
    model, judged = group.members[0]
    ours = judged.fingerprint
    if len(group.members) > 1 or group.across:
        from hashlib import sha256

        owner = "" if group.across else model.path
        key = "\0".join(("folded", judged.finding.code, judged.finding.severity, owner))
        ours = sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    n = seen[path, ours] = seen.get((path, ours), 0) + 1
    return {"tieaudit/v1": printable(ours), "primaryLocationLineHash": f"{printable(ours)}:{n}"}


def notifications(run: Run, index: Mapping[str, int]) -> list[dict[str, object]]:
    """What could not be read, crashed or could not be told, and what was skipped; the worst first."""
    found = [_notification("error", message, path) for path, message in not_read(run)]
    for model in run.models:
        for crash in model.crashed:
            said = _notification("error", f"{crash.code} crashed, a fault of tieaudit: {crash.because}", model.path)
            kind, _, message = crash.because.partition(": ")
            said["exception"] = {"kind": printable(kind), "message": printable(message, _LONGEST)}
            found.append({**said, **_associated(crash.code, index)})
    for model in run.models:
        for unsure in model.cannot_tell:
            said = _notification("warning", f"cannot tell: {unsure.because}", model.path)
            found.append({**said, **_associated(unsure.code, index)})
    found += [_notification("note", f"skipped: {reason}", path) for path, reason in run.skipped]
    n_more = len(found) - _N_MOST_NOTIFICATIONS
    if n_more > 0:
        note: dict[str, object] = {
            "level": "warning",
            "message": {"text": f"and {n_more:,} more notifications; --format json lists all"},
        }
        return [*found[:_N_MOST_NOTIFICATIONS], note]
    return found


def _notification(level: str, said: str, path: str) -> dict[str, object]:
    text = printable(said, _LONGEST).replace("](", "] (")
    return {"level": level, "message": {"text": text}, "locations": [location(path, 0)]}


def _associated(code: str, index: Mapping[str, int]) -> dict[str, object]:
    return {"associatedRule": {"id": printable(code), "index": index[printable(code)]}}
