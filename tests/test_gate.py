"""The gate: what a policy makes of findings, over one model and over many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gate_models import OTHER, H, W, folder, save

from tieaudit.checked import Checked, Judged, Place, Run
from tieaudit.errors import CorruptFile, UsageError
from tieaudit.gate import exit_code
from tieaudit.judge import fingerprint, judged
from tieaudit.load import Source
from tieaudit.model import Model
from tieaudit.patrol import Patrolled, Wanted, patrol
from tieaudit.policy import Policy, Section, Suppression, Terms
from tieaudit.tally import tally
from tieaudit.toy import claim, ramp, toy
from tieaudit.verdict import CannotTell, Crashed, Demands, Finding, Severity, Subject, Summary
from tieaudit.whereabouts import lines_of_keys

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BROKEN = toy({EMBED: W, HEAD: OTHER}, declared=[(EMBED, HEAD)])
TWICE = toy({"a": W, "b": W.copy()}, format="onnx")
SUMMARY = Summary(1, 1, 1, 4, 0)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(subject: Subject, terms: Terms, home: Path) -> Checked:
    return judged(replace(subject, demands=terms.demands), terms, home, "model")


def codes(checked: Checked) -> list[str]:
    return [one.finding.code for one in checked.findings]


def run(**wanted: object) -> Patrolled:
    return patrol(Wanted(no_cache=True, **wanted))  # type: ignore[arg-type]


def test_a_policy_selects_ranks_and_suppresses(tmp_path: Path) -> None:
    assert codes(said(BROKEN, Terms(), tmp_path)) == ["TIE101"]
    assert codes(said(BROKEN, Terms(ignore=("TIE1",)), tmp_path)) == []
    ranked = said(BROKEN, Terms(severity={"broken-tie": "info"}), tmp_path)
    assert [one.finding.severity for one in ranked.findings] == ["info"]
    hidden = said(BROKEN, Terms(suppressions=(Suppression("TIE101", "lm_head.*", "on purpose"),)), tmp_path)
    assert (codes(hidden), hidden.n_suppressed, hidden.used) == ([], 1, ("TIE101 lm_head.*",))
    other = said(BROKEN, Terms(suppressions=(Suppression("TIE102", "lm_head.*", "on purpose"),)), tmp_path)
    assert (codes(other), other.n_suppressed, other.used) == (["TIE101"], 0, ())


def test_rules_that_are_not_selected_do_not_run(tmp_path: Path) -> None:
    every, some = said(TWICE, Terms(), tmp_path), said(TWICE, Terms(select=("TIE202", "TIE201")), tmp_path)
    assert every.n_rules > 10
    assert some.n_rules == 2


def test_thresholds_of_the_policy_silence_and_are_counted(tmp_path: Path) -> None:
    # 2,048 bytes are stored again: at a threshold of 2,048 that is said, at 2,049 it is silenced
    for threshold, said_codes, n_silenced in ((2048, ["TIE201"], 0), (2049, [], 1)):
        terms = Terms(settings=replace(Terms().settings, min_n_bytes=threshold))
        found = said(TWICE, terms, tmp_path)
        assert (codes(found), found.n_silenced) == (said_codes, n_silenced)


def test_a_fingerprint_knows_code_names_and_shapes_and_neither_order_nor_values(tmp_path: Path) -> None:
    def first(subject: Subject) -> str:
        (one,) = judged(subject, Terms(), tmp_path, "model").findings
        return one.fingerprint

    assert first(toy({"a": W, "b": W.copy()}, format="onnx")) == first(
        toy({"b": OTHER, "a": OTHER.copy()}, format="onnx")
    )
    longer = ramp(80, 8)
    assert first(toy({"a": W, "b": W.copy()}, format="onnx")) != first(
        toy({"a": longer, "b": longer.copy()}, format="onnx")
    )
    assert first(TWICE) != first(toy({"a": W, "c": W.copy()}, format="onnx"))
    assert fingerprint(TWICE.model, Finding(("a",), "x", code="TIE101")) != fingerprint(
        TWICE.model, Finding(("a",), "x", code="TIE102")
    )
    # without ids the sentence tells: 3 parameters too many are another finding than 4
    assert fingerprint(TWICE.model, Finding((), "3", code="A")) != fingerprint(TWICE.model, Finding((), "4", code="A"))


def test_names_that_hold_what_parts_names_are_told_from_each_other() -> None:
    one, two = toy({"a": W, "b": W}), toy({"a\tfloat32\t[64, 8]\nb": W})
    joined = tuple(two.model.by_id)
    assert fingerprint(one.model, Finding(("a", "b"), "m")) != fingerprint(two.model, Finding(joined, "m"))
    quoted = toy({'a", "float32", [64, 8]], ["b': W})
    assert fingerprint(one.model, Finding(("a", "b"), "m")) != fingerprint(
        quoted.model, Finding(tuple(quoted.model.by_id), "m")
    )


def test_a_finding_about_a_setting_points_to_its_line(tmp_path: Path) -> None:
    home = folder(tmp_path / "m", True, OTHER)
    (model,) = run(paths=(str(home),)).run.models
    (one,) = [one for one in model.findings if one.finding.code == "TIE101"]
    lines = (home / "config.json").read_text().splitlines()
    assert one.place.path == "m/config.json"
    assert "tie_word_embeddings" in lines[one.place.line - 1]


def test_a_finding_about_bytes_points_to_the_file_that_holds_them(tmp_path: Path) -> None:
    save(tmp_path / "a" / "w.safetensors", {"a": W, "b": W.copy()})
    (model,) = run().run.models
    assert [(one.finding.code, one.place) for one in model.findings] == [("TIE201", Place("a/w.safetensors"))]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1,\n "b": {"c": 2,\n  "d": 3}}', {"a": 1, "b": 2, "b.c": 2, "b.d": 3}),
        ('{"l": [{"x": 1},\n {"y": 2}],\n "z": 3}', {"l": 1, "z": 3}),  # keys inside of lists have no one path
        ('{"a\\"b": 1,\n"t": "x: {",\n"u": 1}', {'a\\"b': 1, "t": 2, "u": 3}),
        ('{"a": 1,\n"a": 2}', {"a": 2}),  # a reader takes the last one
        ("}{][::\n,", {}),
        ('{"a": {"b": [}', {"a": 1, "a.b": 1}),
    ],
)
def test_lines_of_keys(text: str, lines: dict[str, int]) -> None:
    assert lines_of_keys(text) == lines


def test_lines_of_keys_of_a_deep_text_take_linear_time() -> None:
    assert lines_of_keys('{"a":' * 2000)["a"] == 1


def test_suppressions_that_hide_nothing_are_findings_with_their_line(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W, "b": W.copy()})
    entry = '[[suppress]]\ncode = "{}"\nweight = "a"\nreason = "so it is"\n'
    (tmp_path / "tieaudit.toml").write_text(entry.format("TIE201") + entry.format("TIE202"))
    found = run()
    assert [(m.path, codes(m)) for m in found.run.models] == [("w.safetensors", []), ("tieaudit.toml", ["TIE901"])]
    (one,) = found.run.models[-1].findings
    assert (one.place, found.exit_code) == (Place("tieaudit.toml", 5), 1)
    assert "TIE202 on a hides nothing any more (so it is)" in one.finding.message


@pytest.mark.parametrize(
    ("select", "ignore", "stale"),
    [
        (None, (), True),
        (("TIE201",), (), False),  # the rule of the suppression did not run
        (("TIE202",), (), False),  # it did, and the rule that would say so was not selected
        (("TIE202", "TIE901"), (), True),
        (None, ("TIE901",), False),
        (None, ("TIE202",), False),
    ],
)
def test_the_command_line_decides_about_stale_suppressions_too(
    tmp_path: Path, select: tuple[str, ...] | None, ignore: tuple[str, ...], stale: bool
) -> None:
    save(tmp_path / "w.safetensors", {"a": W, "b": W.copy()})
    (tmp_path / "tieaudit.toml").write_text('[[suppress]]\ncode = "TIE202"\nweight = "a"\nreason = "so it is"\n')
    said = [code for model in run(asked=Section(select=select, ignore=ignore)).run.models for code in codes(model)]
    assert ("TIE901" in said) is stale


def test_a_suppression_of_one_weight_hides_its_pair_and_no_copy_that_joins_later(tmp_path: Path) -> None:
    def judged_with(*weights: str) -> tuple[list[str], int]:
        known = tuple(Suppression("TIE201", weight, "a copy on purpose") for weight in weights)
        found = said(toy({"a": W, "b": W.copy(), "c": W.copy()}, format="onnx"), Terms(suppressions=known), tmp_path)
        return codes(found), len(found.used)

    pair = said(TWICE, Terms(suppressions=(Suppression("TIE201", "b", "a copy on purpose"),)), tmp_path)
    assert (codes(pair), pair.n_suppressed) == ([], 1)
    # of three, two are copies: both have to be accepted, by two entries or by a pattern; one that fits is never stale
    assert judged_with("b") == (["TIE201"], 1)
    assert judged_with("b", "c") == ([], 2)
    assert judged_with("[bc]") == (["TIE201"], 0)
    assert judged_with("?") == ([], 1)


def test_one_model_with_a_fault_that_nobody_foresaw_is_told_and_the_others_are_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", {"a": W, "b": W.copy()})
    load = Source.load

    def failing(source: Source) -> Model:
        if source.path.name == "a.safetensors":
            raise ValueError("unforeseen")
        return load(source)

    monkeypatch.setattr(Source, "load", failing)
    found = run()
    assert found.exit_code == 2
    assert [(path, "ValueError: unforeseen" in said) for path, said in found.run.errors] == [("a.safetensors", True)]
    assert [(model.path, codes(model)) for model in found.run.models] == [("b.safetensors", ["TIE201"])]


def test_a_repository_of_which_dvc_keeps_everything_is_not_clean(tmp_path: Path) -> None:
    (tmp_path / "models.dvc").write_text("outs:\n- md5: 0.dir\n  path: models\n")
    (tmp_path / "tieaudit.toml").touch()
    found = run()
    assert found.exit_code == 2
    ((path, because),) = found.run.skipped
    assert (path, because) == (
        "models.dvc",
        "cannot tell: DVC keeps models, which no model is known by; run `dvc pull` to see",
    )
    assert tally(found.run).n_cannot_tell == 1
    # beside a model that was judged it is one more thing that cannot be told
    save(tmp_path / "w.safetensors", {"a": W})
    assert run().exit_code == 0
    assert run(strict=True).exit_code == 2
    # what is here and is no model, or is excluded, is no question
    (tmp_path / "models").mkdir()
    assert run(strict=True).exit_code == 0
    (tmp_path / "models").rmdir()
    (tmp_path / "tieaudit.toml").write_text('exclude = ["models.dvc"]')
    assert run(strict=True).exit_code == 0


def test_a_run_about_some_models_does_not_call_a_suppression_stale(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W, "b": OTHER})
    save(tmp_path / "x.safetensors", {"a": W, "b": W.copy()})
    (tmp_path / "tieaudit.toml").write_text('[[suppress]]\ncode = "TIE201"\nweight = "a"\nreason = "so it is"\n')
    part, whole = run(paths=("w.safetensors",)), run()
    assert (part.exit_code, [m.path for m in part.run.models]) == (0, ["w.safetensors"])
    assert (whole.exit_code, [m.path for m in whole.run.models]) == (0, ["w.safetensors", "x.safetensors"])


def test_nothing_is_stale_where_a_model_could_not_be_read(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W})
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:40])
    (tmp_path / "tieaudit.toml").write_text('[[suppress]]\ncode = "TIE201"\nweight = "a"\nreason = "so it is"\n')
    found = run()
    assert found.exit_code == 2
    assert [codes(model) for model in found.run.models] == [[]]


def test_the_stale_rule_can_be_switched_off_like_any_other(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W})
    text = '[[suppress]]\ncode = "TIE201"\nweight = "a"\nreason = "so it is"\n'
    (tmp_path / "tieaudit.toml").write_text('ignore = ["stale-suppression"]\n' + text)
    assert run().exit_code == 0


def test_each_model_is_ruled_by_the_policy_next_to_it(tmp_path: Path) -> None:
    save(tmp_path / "a" / "w.safetensors", {"a": W, "b": W.copy()})
    save(tmp_path / "b" / "w.safetensors", {"a": W, "b": W.copy()})
    (tmp_path / "b" / "tieaudit.toml").write_text('ignore = ["TIE201"]')
    assert [(model.path, codes(model)) for model in run().run.models] == [
        ("a/w.safetensors", ["TIE201"]),
        ("b/w.safetensors", []),
    ]


def test_limits_and_expectations_come_from_the_policy(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W, "b": W.copy()})
    (tmp_path / "tieaudit.toml").write_text(
        'max-duplicate-bytes = 2047\nmax-parameters = 511\nselect = ["TIE108", "TIE109"]'
    )
    (model,) = run().run.models
    # a bare file cannot declare, so equal tensors are one parameter: 512, not 1,024
    assert [one.finding.evidence for one in model.findings] == [
        {"n_bytes": 2048, "limit": 2047},
        {"n_parameters": 512, "limit": 511},
    ]
    (tmp_path / "tieaudit.toml").write_text("max-duplicate-bytes = 2048\nmax-parameters = 512\nignore = ['TIE201']")
    assert run().exit_code == 0


@pytest.mark.parametrize(
    ("tied", "head", "code"),
    [(True, W.copy(), None), (False, W.copy(), "TIE107"), (False, OTHER, "TIE107")],
)
def test_an_expected_tie_is_there_when_the_loader_makes_it(
    tmp_path: Path, tied: bool, head: object, code: str | None
) -> None:
    folder(tmp_path / "m", tied, head)  # type: ignore[arg-type]
    (tmp_path / "tieaudit.toml").write_text('expect = ["io"]\nselect = ["TIE107"]')
    (model,) = run().run.models
    assert codes(model) == ([code] if code else [])
    assert model.cannot_tell == ()


def test_an_absent_head_of_an_unknown_class_is_no_proof_of_a_tie(tmp_path: Path) -> None:
    folder(tmp_path / "m", True, None)
    (tmp_path / "tieaudit.toml").write_text('expect = ["io"]\nselect = ["TIE107"]')
    (model,) = run().run.models
    assert (codes(model), [one.code for one in model.cannot_tell]) == ([], ["TIE107"])


def judged_as(severity: Severity) -> Judged:
    return Judged(Finding((), "", severity=severity), Place("m"), "0")


@pytest.mark.parametrize(
    ("models", "errors", "fail_on", "strict", "code"),
    [
        ([Checked("m", "onnx", summary=SUMMARY)], [], "info", False, 0),
        ([Checked("m", "onnx", (judged_as("info"),), summary=SUMMARY)], [], "info", False, 1),
        ([Checked("m", "onnx", (judged_as("info"),), summary=SUMMARY)], [], "warning", False, 0),
        ([Checked("m", "onnx", (judged_as("warning"),), summary=SUMMARY)], [], "warning", False, 1),
        ([Checked("m", "onnx", (judged_as("warning"),), summary=SUMMARY)], [], "error", False, 0),
        ([Checked("m", "onnx", (judged_as("error"),), summary=SUMMARY)], [("x", "bad")], "info", False, 2),
        ([Checked("m", "onnx", crashed=(Crashed("A", "", ""),), summary=SUMMARY)], [], "info", False, 2),
        ([Checked("m", "onnx", unreadable=True, summary=SUMMARY)], [], "info", False, 2),
        ([Checked("m", "onnx", cannot_tell=(CannotTell(""),), summary=SUMMARY)], [], "info", False, 0),
        ([Checked("m", "onnx", cannot_tell=(CannotTell(""),), summary=SUMMARY)], [], "info", True, 2),
        ([Checked("m", "onnx", weights_here=False)], [], "info", False, 2),  # nothing else was checked
        ([Checked("m", "onnx", weights_here=False), Checked("n", "onnx", summary=SUMMARY)], [], "info", False, 0),
        ([], [], "info", False, 2),
    ],
)
def test_exit_codes(
    models: list[Checked], errors: list[tuple[str, str]], fail_on: Severity, strict: bool, code: int
) -> None:
    policy = Policy("", fail_on=fail_on, strict=strict)
    assert exit_code(Run(tuple(models), tuple(errors)), lambda path: policy) == code


def test_a_change_that_touches_no_model_and_a_file_that_is_none_are_no_failure() -> None:
    assert exit_code(Run(()), lambda path: Policy(""), changed_only=True) == 0
    assert exit_code(Run((), skipped=(("README.md", "no model"),)), lambda path: Policy("")) == 0


def test_a_baseline_keeps_what_is_known_and_lets_new_findings_count(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W, "b": W.copy()})
    written = run(write_baseline=True)
    setting = 'baseline = "tieaudit-baseline.json"'
    note = "wrote 1 known finding to tieaudit-baseline.json"
    assert (written.exit_code, written.notes) == (0, (f"{note}; to have it read, say {setting} in the policy",))
    assert run().exit_code == 1  # nobody said that it is to be read
    (tmp_path / "tieaudit.toml").write_text(setting)
    assert run(write_baseline=True).notes == (note,)
    known = run()
    assert (known.exit_code, [len(model.known) for model in known.run.models], known.notes) == (0, [1], ())
    save(tmp_path / "w.safetensors", {"c": OTHER, "d": OTHER.copy(), "b": W, "a": W.copy()})  # in another order
    found = run()
    assert found.exit_code == 1
    assert [one.finding.ids for _, one in found.run.findings] == [("c", "d")]
    save(tmp_path / "w.safetensors", {"a": W})
    assert run().notes == ("1 known finding of tieaudit-baseline.json no longer found in this run",)


def test_a_baseline_knows_a_finding_by_its_model_too(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"a": W, "b": W.copy()})
    run(write_baseline=True)
    save(tmp_path / "copy.safetensors", {"a": W, "b": W.copy()})
    found = run(baseline=tmp_path / "tieaudit-baseline.json")
    assert [model.path for model, _ in found.run.findings] == ["copy.safetensors"]


def test_a_baseline_is_written_in_one_order_one_finding_a_line(tmp_path: Path) -> None:
    for name in "ba":
        save(tmp_path / f"{name}.safetensors", {"a": W, "b": W.copy()})
    run(write_baseline=True)
    text = (tmp_path / "tieaudit-baseline.json").read_text()
    assert [json.loads(line.strip(" ,"))["path"] for line in text.splitlines()[2:4]] == [
        "a.safetensors",
        "b.safetensors",
    ]
    run(write_baseline=True)
    assert (tmp_path / "tieaudit-baseline.json").read_text() == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "tieaudit/baseline/1", "findings": [3]}', "[" * 100_000])
def test_another_file_is_no_baseline(tmp_path: Path, text: str) -> None:
    save(tmp_path / "w.safetensors", {"a": W})
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"b\.json"):
        run(baseline=tmp_path / "b.json")
    with pytest.raises(UsageError, match="--write-baseline"):
        run(baseline=tmp_path / "absent.json")


def test_models_are_judged_by_several_processes_as_by_one(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / f"{index:02d}.safetensors", {"a": W, "b": W.copy() if index % 3 else OTHER})
    (tmp_path / "12.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    one, several = run(n_jobs=1), run(n_jobs=3)
    assert one.run == several.run
    assert (len(one.run.models), len(one.run.errors), one.exit_code) == (12, 1, 2)


def test_a_third_party_rule_that_crashes_is_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tieaudit import judge
    from tieaudit.audit import rules

    def explode(subject: Subject) -> Iterator[Finding]:
        raise ValueError("boom")
        yield

    broken = replace(rules()["TIE201"], check=explode)
    everything: Callable[[], object] = lambda: {"TIE201": broken}  # noqa: E731
    monkeypatch.setattr(judge, "rules", everything)
    save(tmp_path / "w.safetensors", {"a": W})
    found = run(n_jobs=1)
    assert found.exit_code == 2
    assert [crash.code for crash in found.run.models[0].crashed] == ["TIE201"]


def test_the_claim_of_a_configuration_that_is_off_is_no_tie(tmp_path: Path) -> None:
    off = toy({EMBED: W, H: W.copy()}, declared=[claim(EMBED, H, active=False)])
    found = said(off, Terms(select=("TIE107",), demands=Demands(expect=("io",))), tmp_path)
    assert codes(found) == ["TIE107"]
    fix = found.findings[0].finding.fix
    assert fix is not None
    assert fix.scheme in ("dedup", "")


def test_the_formats_of_the_help_are_those_that_show_a_run_and_others_may_join() -> None:
    from tieaudit.commands.check import FORMATS
    from tieaudit.registry import discover
    from tieaudit.reports import ReportFormat, no_runs

    shown = {name for name, one in discover("reports", ReportFormat).items() if one.of_run is not no_runs}
    assert set(FORMATS) == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "sariff"], "did you mean sarif?"),
        (["--report", "markdwn=x"], "did you mean markdown?"),
        (["--report", "sarif"], "expected FORMAT=FILE"),
        (["--select", "broken-tye"], "did you mean broken-tie?"),
        (["--expect", "thre-way"], "did you mean three-way?"),
        (["--fix"], "expected --to DIR or --in-place with --fix"),
        (["--fix", "--to", "a", "--in-place"], "one of them"),
        (["--in-place"], "expected --fix with --in-place"),
        (["--diff", "--to", "a"], "expected --diff without --to"),
        (["--unsafe-fixes"], "expected --fix with --unsafe-fixes"),
    ],
)
def test_what_is_misspelt_or_does_not_go_together_is_one_line(arguments: list[str], said: str) -> None:
    from click.testing import CliRunner

    from tieaudit.cli import main

    done = CliRunner().invoke(main, ["check", *arguments])
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output


def test_models_of_one_name_under_two_policies_are_not_taken_for_each_other(tmp_path: Path) -> None:
    # a hides a finding in its w.safetensors, b has nothing to hide: each policy calls its model w.safetensors
    for name, copy in (("a", W.copy()), ("b", OTHER)):
        save(tmp_path / name / "w.safetensors", {"a": W, "b": copy})
        text = '[[suppress]]\ncode = "TIE201"\nweight = "a"\nreason = "so it is"\n'
        (tmp_path / name / "tieaudit.toml").write_text(text)
    assert [(m.path, codes(m)) for m in run().run.models if m.findings] == [("b/tieaudit.toml", ["TIE901"])]
