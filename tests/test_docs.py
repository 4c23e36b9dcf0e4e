"""The generated pages: fresh, complete, and able to go stale."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tieaudit.audit import rules
from tieaudit.explain import HEADINGS, pages

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docs"] = module
    spec.loader.exec_module(module)
    return module


def test_every_generated_page_is_fresh(make_docs: ModuleType) -> None:
    assert make_docs.stale(ROOT / "docs", make_docs.pages()) == [], "run `make docs`"


def test_a_changed_a_missing_and_a_left_over_page_are_noticed_and_mended(make_docs: ModuleType, tmp_path: Path) -> None:
    wanted = make_docs.pages()
    make_docs.write(tmp_path, wanted)
    assert make_docs.stale(tmp_path, wanted) == []
    (tmp_path / "rules" / "TIE101.md").write_text("old")
    (tmp_path / "cli.md").unlink()
    (tmp_path / "rules" / "TIE000.md").write_text("retired")
    assert sorted(make_docs.stale(tmp_path, wanted)) == [
        "cli.md: missing",
        "rules/TIE000.md: nothing generates it any more",
        "rules/TIE101.md: not up to date",
    ]
    make_docs.write(tmp_path, wanted)
    assert make_docs.stale(tmp_path, wanted) == []


@pytest.mark.parametrize("code", rules())
def test_the_page_of_a_rule_shows_what_its_bad_example_prints(code: str) -> None:
    page = (ROOT / "docs" / "rules" / f"{code}.md").read_text()
    assert [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")] == [
        *HEADINGS,
        "Threshold",
    ]
    assert re.search(rf"(error|warning|info) +{code} {rules()[code].name}", page)
    assert "1 rule · 1 finding · 0 cannot tell · 0 crashed" in page
    assert "1 rule · 0 findings · 0 cannot tell · 0 crashed" in page


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} → {target}")
    assert broken == []


@pytest.mark.parametrize("name", pages())
def test_everything_that_can_be_explained_has_a_page(name: str) -> None:
    assert all(len(page()) > 40 for page in pages()[name])
