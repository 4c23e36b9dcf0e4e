"""docs/reports.md shows what the formats really print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gate_runs import BROKEN, model

from tieaudit.checked import Run
from tieaudit.registry import discover
from tieaudit.reports import ReportFormat

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reports.md"
RUN = Run(models=(model("models/bert", n_rules=12), model("models/opt", BROKEN, n_rules=12)), policy="tieaudit.toml")
_BLOCK = re.compile(r"(<!-- shown: (\w+) -->\n)(?:\n(````?)\w+\n.*?\n\3\n)?", re.DOTALL)
_LANGUAGE = {"json": "json", "gitlab": "json", "sarif": "json", "junit": "xml", "markdown": "markdown"}


def shown(name: str) -> str:
    """The block of a format: what it prints, of SARIF the result, of JSON one model."""
    text = discover("reports", ReportFormat)[name].of_run(RUN, {"width": 100, "statistics": True})
    if name == "sarif":
        result = json.loads(text)["runs"][0]["results"][0]
        assert result.pop("ruleIndex") >= 0  # changes with every new rule
        text = json.dumps(result, indent=1) + "\n"
    if name == "json":
        text = json.dumps(json.loads(text)["models"][1], indent=1) + "\n"
    fence = "````" if "```" in text else "```"
    return f"\n{fence}{_LANGUAGE.get(name, 'text')}\n{text}{fence}\n"


def refreshed(page: str) -> str:
    return _BLOCK.sub(lambda block: block[1] + shown(block[2]), page)


def test_the_page_shows_every_format_and_what_it_really_prints(request: pytest.FixtureRequest) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(refreshed(page), encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
    assert sorted(block[2] for block in _BLOCK.finditer(page)) == sorted(discover("reports", ReportFormat))
    assert refreshed(page) == page, "run this test with --update-goldens and read what it wrote"


def test_an_old_block_is_replaced_and_the_text_around_it_kept() -> None:
    page = "a\n\n<!-- shown: github -->\n\n```text\nold\n```\n\nb\n"
    assert refreshed(page) == f"a\n\n<!-- shown: github -->\n{shown('github')}\nb\n"
    assert refreshed(refreshed(page)) == refreshed(page)
