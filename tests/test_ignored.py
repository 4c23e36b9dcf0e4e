"""Patterns of `.gitignore`: what pathspec reads, in a time that no pattern and no name can raise to a power."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gate_models import W, save
from hypothesis import given
from hypothesis import strategies as st
from pathspec import GitIgnoreSpec

from tieaudit.ignored import patterns
from tieaudit.repository import gather

PIECES = st.sampled_from(["*", "**", "?", "a", "b", "/", "[ab]", ".", "\\*"])
PATHS = st.text("aab./", min_size=1, max_size=12)


@given(st.lists(PIECES, min_size=1, max_size=9).map("".join), st.lists(PATHS, min_size=4, max_size=4))
def test_a_pattern_means_what_pathspec_makes_of_it(pattern: str, paths: list[str]) -> None:
    plain = GitIgnoreSpec.from_lines([pattern], backend="simple")
    ours = patterns([pattern])
    for path in paths:
        assert ours.check_file(path).include == plain.check_file(path).include


@given(st.lists(PIECES, min_size=1, max_size=6).map("".join), st.lists(PIECES, min_size=1, max_size=6).map("".join))
def test_the_last_of_two_patterns_decides_as_in_pathspec(first: str, second: str) -> None:
    lines = [first, f"!{second}", f"{first}/"]
    plain, ours = GitIgnoreSpec.from_lines(lines, backend="simple"), patterns(lines)
    for path in ("a", "a/b", "b/a/ab", "ab/a/b/a", "a.b/b/"):
        assert ours.check_file(path).include == plain.check_file(path).include


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("*a*a*b", "xaxaxb", True),
        ("*a*a*b", "xaxbxb", False),
        ("*a*a*b", "xa/xaxb", False),  # a star ends at a slash
        ("**/a*/**/b/**/c", "x/ay/z/b/c", True),
        ("**/a*/**/b/**/c", "x/ay/z/c/b", False),
        ("a/**/a/**/b", "a/a/a/b", True),
        ("*[!a]*b", "a/bb", True),
        ("x*[!a]*b", "xa/b", False),  # a set of other characters holds no slash, as in git (pathspec takes it for one)
        ("x*[!a]*b", "xabcb", True),
        ("*a*[]]*b", "a]b", True),
    ],
)
def test_what_stars_between_names_match(pattern: str, path: str, ignored: bool) -> None:
    assert bool(patterns([pattern]).check_file(path).include) is ignored


@pytest.mark.parametrize(
    "pattern",
    ["*a*a*a*a*a*a*b", "**a**a**a**a**a**b", "**/a/**/a/**/a/**/a/**/b", "*a*/*a*a*a*a/**/*a*a*a*a*b/c"],
)
def test_no_pattern_takes_a_power_of_a_long_name(pattern: str) -> None:
    # pathspec alone: 60 letters take C(60, 6) = 50 million steps for the first pattern, 250 letters 3 · 10^11
    spec, begun = patterns([pattern]), time.process_time()
    for path in ("a" * 250, "/".join(["a" * 60] * 60), "/".join(["a"] * 2000)):
        assert spec.check_file(path).include is None
    assert time.process_time() - begun < 10


def test_an_ignore_file_of_a_repository_holds_up_no_search(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("*a*a*a*a*a*a*b\n")
    kept = save(tmp_path / f"{'a' * 200}.safetensors", {"w": W})
    begun = time.process_time()
    assert [source.path for source in gather([], root=tmp_path).sources] == [kept]
    assert time.process_time() - begun < 10
