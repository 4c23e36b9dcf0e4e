"""Policies: where they are found, what they may say, and what that means for one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tieaudit import govern
from tieaudit.audit import rules
from tieaudit.config import DEFAULTS
from tieaudit.errors import UsageError
from tieaudit.govern import policy_for
from tieaudit.policy import Policy, Section, Suppression, Terms, matches

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    govern.forget()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str, name: str = "tieaudit.toml", folder: str = "") -> Path:
        home = tmp_path / folder
        home.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        return home

    return put


def refused(home: Path) -> str:
    with pytest.raises(UsageError) as caught:
        policy_for(home)
    return str(caught.value).replace(str(home), "")


def test_the_nearest_file_upwards_from_a_model_rules_it(write: Write) -> None:
    top = write('ignore = ["TIE205"]')
    inner = write('[tool.tieaudit]\nignore = ["TIE301"]', "pyproject.toml", "a/b")
    (inner / "model.onnx").write_bytes(b"")
    (top / "a" / "other.onnx").write_bytes(b"")
    assert policy_for(inner / "model.onnx").everywhere.ignore == ("TIE301",)
    assert policy_for(inner / "model.onnx").root == str(inner)
    assert policy_for(top / "a" / "other.onnx").everywhere.ignore == ("TIE205",)


def test_a_pyproject_that_says_nothing_of_tieaudit_is_passed_over(write: Write) -> None:
    top = write('ignore = ["TIE205"]')
    inner = write("[tool.ruff]\nline-length = 100", "pyproject.toml", "a")
    assert policy_for(inner).file == str(top / "tieaudit.toml")


def test_of_two_files_in_one_folder_the_own_one_rules(write: Write) -> None:
    write('[tool.tieaudit]\nignore = ["TIE301"]', "pyproject.toml")
    home = write('ignore = ["TIE205"]')
    assert policy_for(home).everywhere.ignore == ("TIE205",)


def test_every_key_is_read(write: Write) -> None:
    home = write(
        """
select = ["TIE1", "transposed-copy"]
extend-select = ["TIE3"]
ignore = ["TIE104"]
expect = ["io", "cycle:2"]
max-duplicate-bytes = "1.5 MB"
max-parameters = 125_000_000
exclude = ["vendor/"]
respect-gitignore = false
fail-on = "warning"
strict = true
baseline = "known.json"
lock = "ties.lock"

[severity]
TIE1 = "error"
transposed-copy = "info"

[thresholds]
min-n-bytes = "4 kB"

[per-path."old/**"]
expect = []
ignore = ["TIE2"]

[[suppress]]
code = "broken-tie"
weight = "lm_head.*"
reason = "trained apart on purpose"
path = "old/**"
"""
    )
    policy = policy_for(home)
    section = policy.everywhere
    assert (section.select, section.extend_select, section.ignore) == (
        ("TIE1", "transposed-copy"),
        ("TIE3",),
        ("TIE104",),
    )
    assert (section.expect, section.max_duplicate_bytes, section.max_parameters) == (
        ("io", "cycle:2"),
        1_500_000,
        125_000_000,
    )
    assert (policy.exclude, policy.respect_gitignore, policy.fail_on, policy.strict) == (
        ("vendor/",),
        False,
        "warning",
        True,
    )
    assert (policy.baseline, policy.lock) == ("known.json", "ties.lock")
    assert section.severity == {"TIE1": "error", "transposed-copy": "info"}
    assert section.thresholds == {"min_n_bytes": 4000}
    assert policy.suppressions == (Suppression("TIE101", "lm_head.*", "trained apart on purpose", "old/**", 26),)
    old, new = policy.terms("old/a/model.onnx"), policy.terms("new/model.onnx")
    assert (old.demands.expect, new.demands.expect) == ((), ("io", "cycle:2"))
    assert (old.demands.max_parameters, len(old.suppressions), len(new.suppressions)) == (125_000_000, 1, 0)
    assert (old.selects("TIE202", "transposed-copy"), new.selects("TIE202", "transposed-copy")) == (True, True)
    assert (old.selects("TIE101", "broken-tie"), new.selects("TIE104", "untied-but-equal")) == (True, False)
    assert new.settings.min_n_bytes == 4000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('ignor = ["TIE205"]', ":1: ignor is no key of a policy (did you mean ignore?)"),
        ('\n\nmax_parameters = 1', ":3: max_parameters is no key of a policy (did you mean max-parameters?)"),
        ('ignore = ["TIE999"]', ":1: ignore: expected ALL, a code (TIE101)"),
        ('ignore = ["broken-tye"]', "did you mean broken-tie?"),
        ('ignore = "TIE205"', 'expected a list of texts such as ["a", "b"], found \'TIE205\''),
        ('expect = ["thre-way"]', "did you mean three-way?"),
        ('expect = ["dedup"]', "expected schemes that tie certain weights"),
        ('expect = ["io:3"]', "which takes nothing behind a colon"),
        ('max-duplicate-bytes = "3 parsecs"', "expected bytes, or a text such as"),
        ("max-parameters = -1", "expected a whole number of 0 or more, found -1"),
        ("max-parameters = true", "expected a whole number of 0 or more, found True"),
        ('strict = "yes"', "expected true or false, found 'yes'"),
        ('fail-on = "fatal"', "expected one of error, warning, info, found 'fatal'"),
        ('[severity]\nTIE101 = "off"', "expected one of error, warning, info"),
        ("[thresholds]\nmin-bytes = 3", "did you mean min-n-bytes?"),
        ('[per-path."a"]\nexclude = ["x"]', "exclude is no key of a policy"),
        ('[[suppress]]\ncode = "TIE101"\nweight = "a"', "suppress.[0]: expected a suppression with a reason"),
        ('[[suppress]]\ncode = "TIE1"\nweight = "a"\nreason = "b"', "expected the code of one rule, found 'TIE1'"),
        ('[[suppress]]\ncode = "TIE101"\nweight = "*"\nreason = "b"', "found one of every weight (*)"),
        ('[[suppress]]\ncode = "TIE101"\nweight = "a"\nreason = " "', "expected a text, found ' '"),
        ('[per-path."a**\\\\"]\nexpect = []', "expected a pattern of paths as in a .gitignore"),
        ("suppress = 3", "expected entries [[suppress]]"),
        ("a = [", "expected TOML, found an error"),
    ],
)  # fmt: skip
def test_what_no_policy_can_say_is_refused_with_its_place(write: Write, text: str, said: str) -> None:
    message = refused(write(text))
    assert said in message
    assert message.startswith("/tieaudit.toml")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1_000", 1000),
        ('"1 MB"', 10**6),
        ('"1MB"', 10**6),
        ('"1.5 MB"', 1_500_000),
        ('" 2 KB "', 2000),
        ('"2 kB"', 2000),
        ('"1 MiB"', 1_048_576),
        ('"0.5 KiB"', 512),
        ('"4.35 kB"', 4350),  # not 4349, which the nearest binary fraction gives
        ('"3 B"', 3),
    ],
)
def test_sizes_are_read_in_the_units_that_people_write(write: Write, text: str, n_bytes: int) -> None:
    home = write(f"max-duplicate-bytes = {text}")
    assert policy_for(home).everywhere.max_duplicate_bytes == n_bytes


@pytest.mark.parametrize("text", ['"1 mb"', '"MB"', '"1"', '"-1 MB"', '"1e3 MB"', '"nan MB"', '"1 MB MB"', '"1,5 MB"'])
def test_another_size_is_refused(write: Write, text: str) -> None:
    assert "expected bytes, or a text such as" in refused(write(f"max-duplicate-bytes = {text}"))


def test_a_table_of_pyproject_in_a_file_of_our_own_is_told_where_it_belongs(write: Write) -> None:
    home = write('[tool.tieaudit]\nselect = ["ALL"]')
    with pytest.raises(UsageError, match="tool is no key of a policy") as found:
        policy_for(home)
    assert "in tieaudit.toml the keys stand at the top" in found.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a" * 10 + b"\x00", b"a = " + b"[" * 100_000])
def test_a_policy_that_is_no_text_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tieaudit.toml").write_bytes(content)
    assert "expected TOML" in refused(tmp_path)


def test_a_policy_that_is_given_must_be_there_and_speak_of_tieaudit(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a policy file, found none"):
        policy_for(tmp_path, tmp_path / "absent.toml")
    home = write("[tool.ruff]\n", "pyproject.toml")
    with pytest.raises(UsageError, match=r"expected a table \[tool.tieaudit\], found none"):
        policy_for(tmp_path, home / "pyproject.toml")


@pytest.mark.parametrize(
    ("select", "ignore", "code", "runs"),
    [
        (("ALL",), (), "TIE101", True),
        (("TIE1",), (), "TIE202", False),
        (("ALL",), ("TIE1",), "TIE101", False),
        (("ALL", "TIE101"), ("TIE1",), "TIE101", True),  # the more exact word wins
        (("TIE101",), ("TIE101",), "TIE101", False),  # of two equally exact ones, ignore
        (("TIE1",), ("broken-tie",), "TIE101", False),  # a name is as exact as a code
    ],
)
def test_the_more_exact_word_decides_whether_a_rule_runs(
    select: tuple[str, ...], ignore: tuple[str, ...], code: str, runs: bool
) -> None:
    assert Terms(select, ignore).selects(code, rules()[code].name) is runs


def test_the_command_line_has_the_last_word() -> None:
    policy = Policy(".", everywhere=Section(select=("TIE2",), ignore=("TIE101", "TIE205"), expect=("io",)))
    asked = policy.terms("model.onnx", Section(select=("TIE101",), expect=("three-way",)))
    assert asked.selects("TIE101", "broken-tie")
    assert not asked.selects("TIE202", "transposed-copy")
    assert asked.demands.expect == ("three-way",)
    assert policy.terms("model.onnx", Section(ignore=("TIE202",))).selects("TIE201", "duplicate-weights")


def test_the_most_exact_severity_counts() -> None:
    terms = Terms(severity={"ALL": "info", "TIE1": "warning", "broken-tie": "error"})
    assert terms.severity_of("TIE101", "broken-tie", "info") == "error"
    assert terms.severity_of("TIE102", "stored-twice", "error") == "warning"
    assert terms.severity_of("TIE202", "transposed-copy", "error") == "info"
    assert Terms().severity_of("TIE202", "transposed-copy", "error") == "error"
    assert Terms().settings == DEFAULTS


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("models/a/model.onnx", "models/a", True),
        ("models/a/model.onnx", "models/*", True),
        ("models/a/model.onnx", "models/**", True),
        ("models/a/model.onnx", "**/model.onnx", True),
        ("models/a/model.onnx", "model.onnx", True),
        ("models/a/model.onnx", "a/", True),
        ("models/a/model.onnx", "b", False),
        ("models/a/model.onnx", "other/**", False),
        ("models/abc/model.onnx", "models/a", False),
        ("model.onnx", "**/model.onnx", True),
        ("mycorp/llama/big", "**/llama/big", True),
        ("xllama/big", "**/llama/big", False),  # a name is matched whole
        ("a/b", "a/**/b", True),  # no folder in between is one of the ways, as in git
        ("a/x/y/b", "a/**/b", True),
        ("a/xb", "a/**/b", False),
        ("models/a", "./models/a", True),
        ("models/a/model.onnx", "./models/a", True),
        ("models/a", "models/a/", True),
        ("models/a", "models/**", True),
        ("models", "models/**", True),  # a folder that is a model itself
        ("other/models", "models/**", False),
        ("models/a/b.onnx", "models/*.onnx", False),  # a star stays in its folder
        ("models/a.onnx", "models/*.onnx", True),
        ("models/m[1]", "models/m[1]", True),  # spelt out
        ("models/m1", "models/m[1]", True),
        ("!a", "!a", True),
        ("#a/b", "#a", True),
        ("a", "!b", False),
        ("../elsewhere/m", "**/m", True),
        (".", "**", True),
    ],
)
def test_patterns_of_paths(path: str, pattern: str, fits: bool) -> None:
    assert matches(path, pattern) is fits


def test_a_pattern_that_means_every_folder_above_takes_no_power_of_the_depth() -> None:
    path, begun = "/".join(["a"] * 1500), time.process_time()
    assert not matches(path, "**/a/**/a/**/a/**/a/**/b")
    assert time.process_time() - begun < 5  # 1500^4 steps would take years


@pytest.mark.parametrize(
    ("weight", "ids", "hides"),
    [
        ("lm_head.weight", ["lm_head.weight"], True),
        ("lm_head.*", ["a", "lm_head.weight"], True),
        ("a[0].*", ["a[0].weight"], True),  # brackets are names' own, no sets of characters
        ("lm_head", ["lm_head.weight"], False),
    ],
)
def test_a_suppression_speaks_of_ids(weight: str, ids: list[str], hides: bool) -> None:
    assert bool(Suppression("TIE101", weight, "because").named("TIE101", ids)) is hides
    assert not Suppression("TIE101", weight, "because").named("TIE102", ids)


def test_a_policy_that_is_given_by_way_of_the_folder_above_rules_by_path_all_the_same(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write('[per-path."sub/**"]\nexpect = ["io"]\n').resolve()
    (home / "sub").mkdir()
    monkeypatch.chdir(home / "sub")
    policy = govern.policy_for(Path("m.onnx"), Path("../tieaudit.toml"))
    assert policy.root == str(home)
    assert policy.terms("sub/m.onnx").demands.expect == ("io",)


def test_the_page_names_every_key() -> None:
    page = govern.page()
    assert all(f"| `{key.name}` |" in page for key in (*govern.KEYS, *govern._TABLES, *govern._OF_A_SUPPRESSION))


def test_groups_that_a_policy_names_lie_beside_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write('expect = ["custom:ties.toml"]', folder="inner")
    (home / "ties.toml").write_text('[[group]]\nrole = "ffn_up"\nlayers = [0, 1]\n')
    monkeypatch.chdir(tmp_path)
    assert policy_for(home).everywhere.expect == (f"custom:{Path('inner', 'ties.toml')}",)
