"""The page of peers' cases: every test that it names exists, and every test of a case is on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "peer-cases.md"
ROW = re.compile(r"^\| ([A-Z]+(?:-\w+)*) \|(.*)\|$", re.MULTILINE)


def defined(folder: Path) -> set[str]:
    return {
        node.name
        for path in folder.rglob("test_*.py")
        if path != Path(__file__).resolve()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows() -> list[tuple[str, str]]:
    found = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 150
    return found


def named() -> set[str]:
    return {name for _, text in rows() for name in re.findall(r"`(test_\w+)`", text)}


def test_every_test_that_the_page_names_exists() -> None:
    assert named() - defined(TESTS) == set()


def test_every_test_of_a_peer_s_case_is_on_the_page() -> None:
    assert defined(TESTS / "peers") - named() == set()


def test_every_case_has_a_test_or_a_reason_and_one_row() -> None:
    ids = [id for id, _ in rows()]
    assert [id for id in ids if ids.count(id) > 1] == []
    assert [id for id, text in rows() if "`test_" not in text and "out of scope: " not in text] == []


def listed(cases: str) -> set[str]:
    """Every id of a list of cases: first cells of tables (`A-1 (L3)`, `A-11/12`) and, in running text, `A-1 …; 2 …`."""
    found: set[str] = set()
    for prefix, first, second in re.findall(r"^\| ([A-Z]+)-(\w+)(?:/(\d+))?[ |(]", cases, re.MULTILINE):
        found |= {f"{prefix}-{number}" for number in (first, second) if number}
    for paragraph in re.findall(r"^- .*$", cases, re.MULTILINE):
        for prefix, rest in re.findall(r"\b([A-Z]{2,4})-(?=\d)(.*?)(?=\b[A-Z]{2,4}-\d|$)", paragraph):
            for begin, end in re.findall(r"(?:^|[;.,] )(\d+)(?:-(\d+))? (?=[^\d])", rest):
                last = int(end) if end and int(begin) < int(end) < 40 else int(begin)
                found |= {f"{prefix}-{number}" for number in range(int(begin), last + 1)}
    return found


def test_every_case_of_the_peers_list_is_on_the_page(corpus: Path) -> None:
    path = corpus / "PEER_CASES.md"
    if not path.is_file():
        pytest.skip("no list of peers' cases in this corpus")
    cases = listed(path.read_text(encoding="utf-8"))
    assert len(cases) > 150
    assert cases - {id for id, _ in rows()} == set()


def test_a_list_of_cases_is_read_with_its_abbreviations() -> None:
    text = "| A-1 (L3) | x |\n| A-11/12 | y |\n| B-gap | z |\n- AB @ `x.py` L3: AB-1 one; 2 two; 5-7 more. CD-3 x 12"
    assert listed(text) == {"A-1", "A-11", "A-12", "B-gap", "AB-1", "AB-2", "AB-5", "AB-6", "AB-7", "CD-3"}


def test_a_test_with_the_id_of_a_case_in_its_name_stands_in_the_row_of_that_case() -> None:
    of_peers = defined(TESTS / "peers")
    for id, text in rows():
        mine = {name for name in of_peers if f"_{id.replace('-', '_')}_" in name}
        assert mine <= set(re.findall(r"`(test_\w+)`", text)), id
