"""Hostile names in what `tieaudit check` prints: every format against every trick, wherever a name may stand."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from gate_readers import READERS, command_in, rendered
from gate_runs import judged, model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tieaudit.checked import Checked, Run
from tieaudit.printable import inert
from tieaudit.registry import discover
from tieaudit.reports import ReportFormat
from tieaudit.toy import ramp, toy
from tieaudit.verdict import CannotTell, Crashed, Fix

FORMATS = sorted(READERS)
HOSTILE = {
    "ansi": "evil\x1b[2J\x1b]0;owned\x07\x9b31m",
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "set-output": "::set-output name=x::y",
    "error": "::error file=a,line=1::forged",
    "blanks before a command": "  \t::warning::forged",
    "old command": "a ##[set-env name=PATH]evil",
    "old command of three": "###[set-env name=PATH]evil",
    "azure": "##vso[task.setvariable variable=x]y",
    "teamcity": "##teamcity[buildStatus status='SUCCESS']",
    "newline": "x\n::error::forged\nFAKE 0 findings",
    "carriage return": "x\r::error::forged\r\nFAKE 0 findings",
    "line separator": "x\u2028::error::forged\u2029FAKE\x85FAKE\x0bFAKE\x0cFAKE",
    "right to left": "safe\u202egnp.exe\u2066\u2067\u200f\u061c",
    "invisible": "a\u200bb\u2060c\ufeffd\u00ade\U000e0041",
    "64 KiB": "n" * 65_536,
    "64 KiB of brackets": "[<" * 32_768,
    "64 KiB of backticks": "`" * 65_536,
    "64 KiB of words": "at @a #1 " * 7_282,
    "lone surrogate": "m\udcff\ud800.onnx",
    "nul": "a\0b\0",
    "noncharacter": "a\ufffe\uffff\x7f",
    "cdata": "]]><x/>&evil;<![CDATA[",
    "entity": "&lt;script&gt;&#60;b&#62;&amp;",
    "backticks": "`` ``` ```` ` a ```sh\nrm -rf /\n```",
    "pipes": "a|b||c\\|d | --- | --- |",
    "mention": "@everyone @org/team user@example.com cc@all #1 !2 &3 ~label $4 %5 GH-6 org/repo#7",
    "image": "![](http://evil.example/x.png) [click](javascript:alert(1)) <http://evil.example>",
    "bare address": "http://evil.example https://evil.example www.evil.example mailto:a@b.example",
    "reference": "[a]: http://evil.example 'x'",
    "percent": "100%0A::error::%25%2C%3A%s%(x)s{0}{{}}",
    "quick action": "/close",
    "list": "1. a",
    "heading": "# a",
    "rule": "---",
    "table": "| a | b |\n|---|---|",
    "emphasis": "**a** __b__ ~~c~~ _d_",
    "quote": "> a",
    "fence": "`````",
    "tilde fence": "~~~",
    "summary": "</code></summary></details><details open><summary>",
    "json": '"},{"severity":"info","x":"\\',
    "only spaces": "   ",
    "leading spaces": "      code",
    "shell": "'; rm -rf / #$(touch x)`touch y`",
    "quotes": "\"'<>&",
    "scheme": "javascript:alert(1)//",
    "up": "../../etc/passwd",
    "root": "//evil.example/share",
    "wide": "重み".join(["e\u0301"] * 20),
}
UNSEEN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff0-\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)
"""Characters that hide, act or break a line, but for the line feed, which is ours."""


def run_of(text: str) -> Run:
    """A run in which everything that can come from a file or its name is `text`."""
    found = judged(
        "TIE101",
        path=text,
        line=3,
        ids=(text, f"b{text}"),
        message=text,
        fix=Fix("safe", text, "dedup"),
        evidence={text: [text]},
    )
    by_hand = judged("TIE999", path=f"{text}x", ids=(text,), message=f"m {text}", fix=Fix("manual", text))
    hurt = model(
        text,
        found,
        by_hand,
        format=text,
        cannot_tell=(CannotTell(text, (text,), "TIE103"),),
        crashed=(Crashed("TIE301", f"{text}: {text}", text),),
        known=(judged("TIE104", path=text, ids=(text,), message=text),),
        used=(text,),
        files=(text,),
        n_suppressed=1,
    )
    return Run(
        models=(hurt, model(f"c{text}"), Checked(text, text)),
        errors=((text, text), ("cut.onnx", text)),
        skipped=((text, text),),
        root=text,
        policy=text,
        facts={"baseline": text, text: [text]},
    )


def shown(name: str, run: Run, **settings: object) -> str:
    return discover("reports", ReportFormat)[name].of_run(run, {"width": 100, "statistics": True, **settings})


def check_harmless(name: str, text: str) -> str:
    """Print a run of `text` and hold it against everything that it may not do."""
    printed = shown(name, run_of(text))
    assert printed.encode("utf-8")
    assert not UNSEEN.search(printed)
    assert len(READERS[name](printed)) == 2  # two findings, whatever they are called
    commands = [command for line in printed.splitlines() if (command := command_in(line))]
    # not read twice, crashed, two findings, cannot tell: these and no other are for GitHub's runner
    assert len(commands) == (6 if name == "github" else 0)
    assert not re.search(r"##(?:vso|teamcity)\[", printed) or name == "github"
    assert not any(line.startswith("FAKE") for line in printed.splitlines())
    return printed


@pytest.mark.parametrize("trick", HOSTILE)
@pytest.mark.parametrize("name", FORMATS)
def test_a_hostile_name_is_harmless(name: str, trick: str) -> None:
    printed = check_harmless(name, HOSTILE[trick])
    if name != "json":  # which holds names as they are
        assert len(printed) < 250_000  # a name of 64 KiB stands at 30 places: 2 MB, were they not cut


@pytest.mark.parametrize("trick", HOSTILE)
def test_markdown_mentions_nobody_links_nowhere_and_begins_no_command(trick: str) -> None:
    printed = shown("markdown", run_of(HOSTILE[trick]))
    page = rendered(printed)
    assert not re.search(r"(?<!\w)[@#!&~$%^][\w\"']|\bGH-\d", page.prose)
    outside = re.sub(r"^(```+)sh\n.*?^\1$", "", printed, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"://|www\.|mailto:|^ *[/>#~*+]|^ *\d+[.)]", outside.replace("### ", "", 1), re.MULTILINE)


@pytest.mark.parametrize("trick", HOSTILE)
def test_json_keeps_names_exactly_and_the_others_hold_text_that_every_reader_takes(trick: str) -> None:
    text = HOSTILE[trick]
    found = json.loads(shown("json", run_of(text)))
    assert found["models"][0]["path"] == found["models"][0]["findings"][0]["ids"][0] == text
    for name in ("gitlab", "sarif"):
        told: Any = json.loads(shown(name, run_of(text)))
        assert json.dumps(told, ensure_ascii=False).encode("utf-8")  # no lone surrogate, which many readers refuse
        assert "\\u0000" not in json.dumps(told)  # nor a NUL, which databases refuse


@pytest.mark.parametrize("trick", HOSTILE)
def test_colours_of_ours_are_the_only_escape_codes(trick: str) -> None:
    printed = shown("text", run_of(HOSTILE[trick]), color=True)
    assert set(re.findall(r"\x1b[^m]*m?", printed)) <= {
        f"\x1b[{code}m" for code in ("0", "1", "2", "31;1", "33;1", "36", "32")
    }
    assert not any(command_in(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in printed.splitlines())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.text(alphabet=st.characters(codec=None), max_size=40) | st.text("`|<>[]()!@#:%*_~\\/&-=\n\r '\"", max_size=60)
)
def test_any_name_is_harmless_in_every_format(text: str) -> None:
    for name in FORMATS:
        check_harmless(name, text)


@pytest.mark.parametrize(
    ("line", "safe"),
    [
        ("::error::x", "\\x3a:error::x"),
        (" \t::error::x", " \t\\x3a:error::x"),
        ("\x1b[1m::error::x", "\x1b[1m\\x3a:error::x"),
        ("a ::error::x", "a ::error::x"),  # not at the start: no command
        ("a##[b]c", "a#\\x23[b]c"),
        ("###[b]c ##vso[x]", "##\\x23[b]c #\\x23vso[x]"),
        ("## a heading", "## a heading"),
    ],
)
def test_a_line_that_a_ci_service_would_obey_is_made_inert_and_others_stay(line: str, safe: str) -> None:
    assert inert(line) == safe
    assert inert(safe) == safe


@pytest.mark.parametrize("trick", ["set-output", "old command", "blanks before a command"])
def test_a_scan_gives_no_command_to_the_service_that_shows_its_log(trick: str) -> None:
    from tieaudit.audit import audit

    name = HOSTILE[trick]
    report = audit(toy({name: ramp(64, 8), "b": ramp(64, 8)}, format="onnx", path=name))
    for form in ("text", "json"):
        printed = discover("reports", ReportFormat)[form].render([report], [(name, name)], {"width": 60})
        assert [line for line in printed.splitlines() if command_in(line)] == []
