"""Readers of the formats of `tieaudit check`, written from each format's own documents, not from what writes them.

Each checks that the text is well formed and gives what it says: (code, path, line, text) of every finding.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit
from xml.etree import ElementTree

import jsonschema
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
_SARIF = jsonschema.Draft4Validator(json.loads((ROOT / "tests" / "published" / "sarif-schema-2.1.0.json").read_text()))
_CHECK = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "schema" / "check-1.schema.json").read_text()))


class Said(NamedTuple):
    """One finding, as a format tells it."""

    code: str
    path: str
    line: int
    text: str


class Command(NamedTuple):
    """A workflow command, as GitHub's runner takes it from a line of the log."""

    name: str
    properties: dict[str, str]
    data: str


def command_in(line: str) -> Command | None:
    """What the runner makes of a line: `::name key=value,…::data`, else `##[name key=value;…]data` anywhere in it."""
    # actions/runner, src/Runner.Common/ActionCommand.cs: TryParseV2, then TryParse
    started = line.lstrip()
    if started.startswith("::"):
        end = started.find("::", 2)
        if end > 0:
            name, _, given = started[2:end].partition(" ")
            pairs = [one.partition("=") for one in given.strip().split(",") if one]
            properties = {key: _unescaped(value, "%2C", "%3A") for key, _, value in pairs}
            return Command(name, properties, _unescaped(started[end + 2 :]))
    at = line.find("##[")
    if at >= 0 and "]" in line[at:]:
        return Command(
            line[at + 3 : line.index("]", at)].split()[0] if line[at + 3 : line.index("]", at)] else "", {}, ""
        )
    return None


def _unescaped(text: str, *more: str) -> str:
    means = {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ",", "%25": "%"}
    for escape in ("%0D", "%0A", *more, "%25"):
        text = text.replace(escape, means[escape])
    return text


def github(text: str) -> list[Said]:
    """Annotations of findings; every line but the last is a command, and GitHub shows all of them."""
    *lines, verdict = text.rstrip("\n").splitlines()
    assert command_in(verdict) is None
    commands = [command_in(line) for line in lines]
    assert all(command and command.name in ("error", "warning", "notice") for command in commands)
    found = [command for command in commands if command]
    for name in ("error", "warning", "notice"):
        assert sum(command.name == name for command in found) <= 10
    assert all(set(command.properties) <= {"file", "line", "title"} for command in found)
    assert all(int(command.properties.get("line", "1")) >= 1 for command in found)
    return [
        Said(one.properties["title"].split()[0], one.properties["file"], int(one.properties.get("line", 0)), one.data)
        for one in found
        if re.match(r"TIE\d+ (?!crashed|cannot)", one.properties["title"])
    ]


def gitlab(text: str) -> list[Said]:
    """Findings of a Code Quality report: every requirement of docs.gitlab.com, "Code Quality report format"."""
    assert text.isascii()
    assert not text.startswith("\ufeff")
    entries = json.loads(text)
    assert isinstance(entries, list)
    for entry in entries:
        assert all(isinstance(entry[key], str) and entry[key] for key in ("description", "check_name", "fingerprint"))
        assert entry["severity"] in ("info", "minor", "major", "critical", "blocker")
        path, begin = entry["location"]["path"], entry["location"]["lines"]["begin"]
        assert isinstance(path, str) and path and not path.startswith("./")
        assert type(begin) is int and begin >= 1
    assert len({entry["fingerprint"] for entry in entries}) == len(entries)
    return [
        Said(
            one["check_name"].split()[0], one["location"]["path"], one["location"]["lines"]["begin"], one["description"]
        )
        for one in entries
        if re.match(r"TIE\d+ (?!crashed)", one["check_name"])
    ]


def sarif(text: str) -> list[Said]:
    """Results of a log that fits the official schema, GitHub's table of limits, and itself."""
    assert text.isascii()
    log = json.loads(text)
    errors = sorted(_SARIF.iter_errors(log), key=str)
    assert errors == [], errors[:3]
    (run,) = log["runs"]
    rules, results = run["tool"]["driver"]["rules"], run["results"]
    assert len(results) <= 5000 and len(rules) <= 25_000 and len({rule["id"] for rule in rules}) == len(rules)
    for rule in rules:
        assert len(rule["properties"]["tags"]) <= 10
        assert 0 < len(rule["name"]) <= 255
        assert 0 < len(rule["shortDescription"]["text"]) <= 1024 and 0 < len(rule["fullDescription"]["text"]) <= 1024
        assert rule["help"]["text"] and rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
    keys = set()
    for result in results:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"] and not re.search(r"\]\(", result["message"]["text"])
        assert 1 <= len(result["locations"]) <= 10
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        keys.add((result["ruleId"], uri, result["partialFingerprints"]["primaryLocationLineHash"]))
    assert len(keys) == len(results)  # GitHub makes one alert of those that agree in all three
    assert len({"baselineState" in result for result in results}) <= 1
    return [_sarif_result(result) for result in results if not result.get("suppressions")]


def _sarif_result(result: dict[str, Any]) -> Said:
    place = result["locations"][0]["physicalLocation"]
    line = place.get("region", {}).get("startLine", 0)
    return Said(result["ruleId"], path_of(place["artifactLocation"]), line, result["message"]["text"])


def path_of(artifact: dict[str, str]) -> str:
    """The file that a SARIF artifact location means."""
    parts = urlsplit(artifact["uri"])
    assert (parts.netloc, parts.query, parts.fragment) == ("", "", "")
    assert parts.scheme == ("" if "uriBaseId" in artifact else "file")
    assert re.fullmatch(r"(?:[A-Za-z0-9_.~/-]|%[0-9A-F]{2})+", parts.path), parts.path[:200]
    return unquote_to_bytes(parts.path).decode("utf-8", "surrogateescape")


def junit(text: str) -> list[Said]:
    """Failures, by a parser of JUnit; the counts of every suite are those of its cases."""
    raw = text.encode("utf-8")
    ElementTree.fromstring(raw)
    suites = JUnitXml.fromstring(raw)
    found = []
    n_of = {Failure: 0, Error: 0, Skipped: 0}
    for suite in suites:
        cases = list(suite)
        of_suite = {kind: sum(isinstance(one, kind) for case in cases for one in case.result) for kind in n_of}
        assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (len(cases), *of_suite.values())
        for kind, n in of_suite.items():
            n_of[kind] += n
        for case in cases:
            assert len(case.result) <= 1 and case.name and case.classname == suite.name
            found += [
                Said(case.name.split()[0], case._elem.get("file"), 0, one.message)
                for one in case.result
                if isinstance(one, Failure)
            ]
    assert (suites.failures, suites.errors, suites.skipped) == tuple(n_of.values())
    return found


def check_json(text: str) -> list[Said]:
    """Findings of a document that fits the published schema."""
    assert text.isascii()
    found = json.loads(text)
    errors = sorted(_CHECK.iter_errors(found), key=str)
    assert errors == [], errors[:3]
    return [
        Said(one["code"], one["place"]["path"], one["place"]["line"], one["message"])
        for model in found["models"]
        for one in model["findings"]
    ]


class Page(HTMLParser):
    """A rendered page: its elements, its text, and the cells of its table."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.prose = ""
        """Text outside of `code`: where services look for mentions."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert attrs in ([], [("class", "language-sh")]), attrs
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.prose += "\0" if "code" in self.open else data
        if "td" in self.open:
            self.rows[-1][-1] += data


def rendered(text: str) -> Page:
    """Markdown as GitHub and GitLab render it: CommonMark, with tables, links made of addresses, raw HTML."""
    page = Page()
    parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    page.feed(parser.render(text))
    page.close()
    assert page.open == []
    return page


def markdown(text: str) -> list[Said]:
    """Rows of the table; the page fits into a comment and holds no element but those of a plain report."""
    assert len(text) <= 65_536
    page = rendered(text)
    assert page.tags <= {"h3", "table", "thead", "tbody", "tr", "th", "td", "code", "p", "pre", "ul", "li", "details",
                         "summary"}  # fmt: skip
    assert all(len(row) == 4 for row in page.rows)
    found = []
    for row in page.rows[1:]:
        path, line = re.fullmatch(r"(.*?)(?::(\d+))?", row[2], re.DOTALL).groups()  # type: ignore[union-attr]
        found.append(Said(row[1].split()[0], path, int(line or 0), ""))
    return found


def text(printed: str) -> list[Said]:
    """Headlines of findings of the text for people, without colours."""
    head = re.compile(r"^  (?:error|warning|info) +(TIE\d+) \S+(?:  (.*?)(?::(\d+))?)?$")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    assert all(command_in(line) is None for line in lines)
    found, model = [], ""
    for line in lines:
        if line and not line.startswith(" "):
            model = line.split(" · ")[0]
        if said := head.match(line):
            found.append(Said(said[1], said[2] or model, int(said[3] or 0), ""))
    return found


READERS = {
    "github": github,
    "gitlab": gitlab,
    "json": check_json,
    "junit": junit,
    "markdown": markdown,
    "sarif": sarif,
    "text": text,
}
