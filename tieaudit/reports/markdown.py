"""A comment on a pull request, in GitHub's and GitLab's Markdown: the verdict, a table, and the details folded.

Source of the limit: GitHub refuses a comment of more than 65,536 characters ("body is too long").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from tieaudit.checked import Checked, Judged, Run
from tieaudit.printable import counted, inert, printable
from tieaudit.reports import ReportFormat
from tieaudit.tally import Tally, not_read, tally, where, worst_first
from tieaudit.verdict import Severity

_N_MOST = 65_536
"""Characters of a comment."""
_N_RESERVED = 1000
"""Characters kept free for what says how much was cut."""
_N_MOST_ROWS = 50
"""Findings in the table; a longer one is no summary."""
_LONGEST = 1000
_LONGEST_PATH = 120
_MARKS: Mapping[Severity, str] = {"error": "❌", "warning": "⚠", "info": "ℹ"}

_MARKUP = r"[!#$%&*:<=>?@\[\\\]^_`{|}~]|(?<=[wW])\."
"""Punctuation that may mean something to Markdown or HTML, of `http://` and `www.` what would make them a link."""
_IN_A_NAME = re.compile(_MARKUP)
_IN_A_SENTENCE = re.compile(rf"^(?:\d+[.)]|[-+/])|{_MARKUP}")
"""Also what would begin a list, a rule, or a quick action of GitLab at the start of a line."""
_MEANS_SOMEBODY = re.compile(r"[@#!&~$%^](?=[\w\"'])|(?<=\bGH)-(?=\d)", re.IGNORECASE)


def _of_run(run: Run, settings: Mapping[str, object]) -> str:
    """The comment. What does not fit is left out, the least bad first, and counted."""
    counts = tally(run)
    found = worst_first(run)
    head = [f"### {_mark(run, counts)} tieaudit: {counts.verdict}", ""]
    room = _N_MOST - _N_RESERVED - _n_characters(head)
    table = _table(found, room // 3)
    rest = _rest(run, room // 3)
    details = _findings(found, room - _n_characters(table) - _n_characters(rest))
    return "\n".join([*head, *table, *details, *rest]).rstrip("\n") + "\n"


def _mark(run: Run, counts: Tally) -> str:
    if counts.n_not_read or counts.n_crashed:
        return _MARKS["error"]
    worst = next((judged.finding.severity for _, judged in worst_first(run)), None)
    return _MARKS[worst] if worst else "✅"


def _n_characters(lines: Sequence[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def _table(found: Sequence[tuple[Checked, Judged]], room: int) -> list[str]:
    if not found:
        return []
    lines = ["| | rule | place | model |", "|---|---|---|---|"]
    for model, judged in found[:_N_MOST_ROWS]:
        finding = judged.finding
        rule = f"{_code(printable(finding.code, 40))} {_prose(printable(finding.name, 60))}"
        owner = "" if where(judged, model) == model.path else _path(model.path)
        line = f"| {_MARKS[finding.severity]} | {rule} | {_place(model, judged)} | {owner} |"
        if _n_characters([*lines, line]) > room:
            break
        lines.append(line)
    n_more = len(found) - (len(lines) - 2)
    return [*lines, "", *([f"… and {counted(n_more, 'more finding')}.", ""] if n_more > 0 else [])]


def _findings(found: Sequence[tuple[Checked, Judged]], room: int) -> list[str]:
    """One folded block; findings that leave `room`, in characters, are counted."""
    if not found:
        return []
    blocks = (_finding(model, judged) for model, judged in found)
    shown = _fitting(blocks, len(found), room, "more finding", "more findings")
    return ["<details><summary>Details</summary>", "", *shown, "</details>", ""]


def _finding(model: Checked, judged: Judged) -> list[str]:
    finding = judged.finding
    head = f"{_MARKS[finding.severity]} {_code(printable(finding.code, 40))} in {_place(model, judged)}"
    lines = [head, "", _prose(printable(finding.message, _LONGEST)), ""]
    if finding.fix is None:
        return lines
    command = printable(finding.fix.command, _LONGEST)
    if finding.fix.safety == "manual":
        return [*lines, f"By hand: {_prose(command)}", ""]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    return [*lines, f"{fence}sh", inert(command), fence, ""]


def _rest(run: Run, room: int) -> list[str]:
    """What could not be judged, and what was skipped, each in a folded list."""
    lists = {
        "Not read": [f"- {_path(path)}: {_prose(printable(why, _LONGEST))}" for path, why in not_read(run)],
        "Crashed, a fault of tieaudit": [
            f"- {_path(model.path)}: {_code(printable(one.code, 40))} {_prose(printable(one.because, _LONGEST))}"
            for model in run.models
            for one in model.crashed
        ],
        "Cannot tell": [
            f"- {_path(model.path)}: {_code(printable(one.code, 40))} {_prose(printable(one.because, _LONGEST))}"
            for model in run.models
            for one in model.cannot_tell
        ],
        "Skipped": [f"- {_path(path)}: {_prose(printable(why, _LONGEST))}" for path, why in run.skipped],
    }
    lines: list[str] = []
    n_lists = sum(bool(items) for items in lists.values())
    for title, items in lists.items():
        if items:
            lines += [f"<details><summary>{title} ({len(items):,})</summary>", ""]
            lines += [*_fitting(([item] for item in items), len(items), room // n_lists, "more", "more")]
            lines += ["", "</details>", ""]
    return lines


def _fitting(blocks: Iterator[list[str]], n: int, room: int, noun: str, plural: str) -> Iterator[str]:
    """As many blocks as fit into `room` characters, then how many did not."""
    for position, block in enumerate(blocks):
        room -= _n_characters(block)
        if room < 0:
            yield from ("", f"… and {counted(n - position, noun, plural)}.", "")
            return
        yield from block


def _place(model: Checked, judged: Judged) -> str:
    line = f":{judged.place.line}" if judged.place.line else ""
    return _code(printable(where(judged, model), _LONGEST_PATH) + line)


def _path(path: str) -> str:
    return _code(printable(path, _LONGEST_PATH) or ".")


def _code(text: str) -> str:
    """A name: in `<code>` nobody is mentioned and no number is an issue, and entities are text, never markup."""
    return f"<code>{_IN_A_NAME.sub(_entities, text)}</code>"


def _prose(text: str) -> str:
    """A sentence with names in it: no markup, no command, and no sign that mentions a person or an issue beside a word.

    Mentions are looked for in the finished page, after entities have become characters, but not inside `<code>`.
    """
    parts, at, text = [], 0, text.strip()
    for sign in _MEANS_SOMEBODY.finditer(text):
        parts += [_IN_A_SENTENCE.sub(_entities, text[at : sign.start()]), _code(sign.group())]
        at = sign.end()
    return "".join([*parts, _IN_A_SENTENCE.sub(_entities, text[at:])])


def _entities(found: re.Match[str]) -> str:
    """The marks of a match as entities: text, whatever stands around them (CommonMark, section 2.5)."""
    return "".join(one if one.isalnum() else f"&#{ord(one)};" for one in found.group())


markdown = ReportFormat(
    name="markdown",
    summary="a comment for a pull request: the verdict, a table, the details folded",
    of_run=_of_run,
)
