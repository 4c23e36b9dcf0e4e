"""The page of peers' cases: every test that it names exists, and every test of a case is on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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


def test_a_test_with_the_id_of_a_case_in_its_name_stands_in_the_row_of_that_case() -> None:
    for id, text in rows():
        mine = {name for name in defined(TESTS / "peers") if f"_{id.replace('-', '_')}_" in name}
        assert mine <= set(re.findall(r"`(test_\w+)`", text)), id
