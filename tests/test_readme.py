"""README.md and fixtures/README.md show what is real. Output on the built fixtures is compared by `make check-docs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.refresh_readme import BLOCK, console, printed, refreshed, table

ROOT = Path(__file__).resolve().parent.parent


def test_the_help_in_the_readme_is_the_real_one() -> None:
    assert f"$ tieaudit --help\n{printed('tieaudit --help')}\n```" in (ROOT / "README.md").read_text()


def test_the_table_of_the_fixtures_is_what_they_say_of_themselves(fixtures_dir: Path) -> None:
    assert table(fixtures_dir) in (ROOT / "fixtures" / "README.md").read_text()


def test_every_block_of_the_readme_that_shows_output_is_a_refreshed_one() -> None:
    text = (ROOT / "README.md").read_text()
    assert [match["name"] for match in BLOCK.finditer(text)] == ["scan", "help"]
    assert "$ tieaudit" not in BLOCK.sub("", text)


def test_an_old_block_is_replaced_and_the_text_around_it_kept() -> None:
    page = "before\n<!-- begin: version -->\n```console\n$ tieaudit --version\nold\n```\n<!-- end -->\nafter\n"
    lines = refreshed(page).splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines[3] == "$ tieaudit --version"
    assert lines[4].startswith("tieaudit, version ")
    assert "old" not in lines
    assert refreshed(refreshed(page)) == refreshed(page)


def test_a_block_runs_nothing_but_tieaudit() -> None:
    with pytest.raises(ValueError, match="only tieaudit is run from there"):
        console("```console\n$ rm -rf somewhere\n```\n")


def test_a_command_that_cannot_look_does_not_get_into_the_readme() -> None:
    with pytest.raises(RuntimeError, match="exit code 2"):
        console("```console\n$ tieaudit scan no-such-file.onnx\n```\n")
