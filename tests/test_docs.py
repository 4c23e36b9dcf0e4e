"""The generated pages: fresh, complete, and able to go stale."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from tieaudit import govern
from tieaudit.audit import rules
from tieaudit.cli import main as cli
from tieaudit.explain import HEADINGS, pages
from tieaudit.verdict import Demands

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


OF_THE_GATE = ("TIE107", "TIE108", "TIE109", "TIE206", "TIE207", "TIE901")
E, H = "model.embed_tokens.weight", "lm_head.weight"
ONE, OTHER = (np.random.default_rng(seed).standard_normal((64, 8)).astype(np.float32) for seed in (0, 1))


def test_rules_that_need_a_policy_or_a_lock_are_shown_by_the_gate_and_all_others_by_a_scan(
    make_docs: ModuleType,
) -> None:
    assert sorted(make_docs.OF_THE_GATE) == sorted(OF_THE_GATE)
    for code in rules():
        page = (ROOT / "docs" / "rules" / f"{code}.md").read_text()
        assert ("`tieaudit scan` on such a model prints" in page) is (code not in OF_THE_GATE), code
        assert ("`tieaudit check`" in page.partition("## Example")[2].partition("## Fix")[0]) is (code in OF_THE_GATE)


def policy_on(code: str) -> str:
    """The policy that the page of a rule shows."""
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs" / "rules" / f"{code}.md").read_text(), re.M | re.S)
    return str(shown)


@pytest.mark.parametrize(
    ("code", "weights"),
    [
        ("TIE107", {E: ONE, H: ONE}),  # equal, in a file that cannot declare it
        ("TIE108", {"a": ONE, "b": ONE}),  # 64 · 8 · 4 = 2,048 bytes again; the page allows 2,047
        ("TIE109", {E: ONE, H: OTHER}),  # 2 · 64 · 8 = 1,024 parameters; the page allows 512
    ],
)
def test_the_policy_on_the_page_of_a_rule_makes_it_speak_and_without_it_nothing_does(
    code: str, weights: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(weights, "model.safetensors")
    check = ["check", "--no-cache", "--jobs", "1", "--select", code]
    silent = CliRunner().invoke(cli, check)
    (tmp_path / "tieaudit.toml").write_text(policy_on(code))
    said = CliRunner().invoke(cli, check)
    assert (silent.exit_code, said.exit_code) == (0, 1), silent.output + said.output
    assert f"{code} {rules()[code].name}" in said.output


@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        ("TIE206", {E: ONE, H: ONE}, {E: ONE, H: OTHER}),
        ("TIE207", {E: ONE, H: OTHER}, {E: ONE, H: ONE}),
    ],
)
def test_what_changed_since_the_lock_is_found_as_the_page_says(
    code: str,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tieaudit.toml").write_text("")
    check = ["check", "--no-cache", "--jobs", "1", "--select", code]
    save_file(before, "model.safetensors")
    assert CliRunner().invoke(cli, ["lock"]).exit_code == 0
    silent = CliRunner().invoke(cli, check)
    save_file(after, "model.safetensors")
    said = CliRunner().invoke(cli, check)
    assert (silent.exit_code, said.exit_code) == (0, 1), silent.output + said.output
    assert f"{code} {rules()[code].name}" in said.output


@pytest.mark.parametrize(("weight", "question"), [("lm_haed.weight", "did you mean lm_head.weight?"), ("x", "")])
def test_a_suppression_that_hides_nothing_is_found_and_of_a_misspelt_weight_the_nearest_is_named(
    weight: str, question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({E: ONE, H: OTHER}, "model.safetensors")
    entry = f'[[suppress]]\ncode = "TIE107"\nweight = "{weight}"\nreason = "trained apart on purpose"\n'
    (tmp_path / "tieaudit.toml").write_text(f'expect = ["io"]\n{entry}')
    said = CliRunner().invoke(cli, ["check", "--no-cache", "--jobs", "1", "--select", "TIE107,TIE901"])
    assert said.exit_code == 1
    sentence = f"the suppression of TIE107 on {weight} hides nothing any more (trained apart on purpose)"
    shown = " ".join(said.output.split())
    assert sentence in shown
    assert ("did you mean" in shown) is bool(question)
    assert question in shown


def test_the_policy_on_its_page_says_what_its_comments_say(tmp_path: Path) -> None:
    (tmp_path / "tieaudit.toml").write_text(govern.EXAMPLE)
    assert govern.EXAMPLE in (ROOT / "docs" / "policy.md").read_text()
    govern.forget()
    policy = govern.policy_for(tmp_path)
    usual, special = policy.terms("models/chat"), policy.terms("experiments/a/model.onnx")
    assert usual.demands == Demands(expect=("io",), max_duplicate_bytes=1_000_000)
    assert special.demands == Demands(max_duplicate_bytes=1_000_000)
    assert not usual.selects("TIE205", "duplicate-constants")
    assert usual.severity_of("TIE103", "hidden-tie", "warning") == "info"
    assert usual.settings.min_n_bytes == 4096
    assert [one.weight for one in usual.suppressions] == [H]


def test_every_page_is_reached_from_the_front_page_of_its_folder() -> None:
    for folder in ("", "decisions"):
        front = (ROOT / "docs" / folder / "README.md").read_text()
        pages_there = {path.name for path in (ROOT / "docs" / folder).glob("*.md")} - {"README.md"}
        assert {name for name in pages_there if f"({name})" not in front} == set()
        assert len(pages_there) > 15


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
