"""The formats of `tieaudit check`: goldens, each read by an independent reader; limits; nothing dropped uncounted."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gate_readers import READERS, command_in, github, gitlab, junit, markdown, rendered, sarif
from gate_runs import BROKEN, BY_HAND, MIXED, RUNS, E, judged, many, model

from tieaudit.audit import rules
from tieaudit.checked import STALE, Checked, Judged, Place, Run
from tieaudit.errors import UsageError
from tieaudit.judge import chosen
from tieaudit.policy import Terms
from tieaudit.registry import discover
from tieaudit.reports import ReportFormat
from tieaudit.tally import tally
from tieaudit.verdict import CannotTell, Crashed, Finding, Fix, Summary

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = {
    "github": "github.txt",
    "gitlab": "gitlab.json",
    "json": "json",
    "junit": "junit.xml",
    "markdown": "md",
    "sarif": "sarif",
    "text": "txt",
}
"""Format → what its golden is called behind `check-RUN.`."""


def shown(name: str, run: Run, **settings: object) -> str:
    return discover("reports", ReportFormat)[name].of_run(run, {"width": 100, **settings})


def log_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown("sarif", run))["runs"][0]
    return found


def lasting(name: str, text: str) -> str:
    """What does not change when a rule is added, or its page, or the version of the tool."""
    text = re.sub(r'(?<="version": ")\d+\.\d+\.\d+[^"]*(?=",\n *"rules)', "0", text)
    if name == "json":
        text = re.sub(r'(?<="name": "tieaudit",\n  "version": ")[^"]*', "0", text)
    if name == "sarif":
        log = json.loads(text)
        (run,) = log["runs"]
        used = {result.pop("ruleIndex") for result in run["results"]}
        for note in run["invocations"][0]["toolExecutionNotifications"]:
            note.get("associatedRule", {}).pop("index", None)
        driver = run["tool"]["driver"]
        driver["version"] = "0"
        driver["rules"] = [{"id": driver["rules"][index]["id"]} for index in sorted(used)]
        text = json.dumps(log, indent=1) + "\n"
    return text


def test_every_format_has_a_reader_and_a_golden() -> None:
    assert set(discover("reports", ReportFormat)) == set(READERS) == set(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_shown_as_agreed_and_an_independent_reader_finds_the_same_in_it(
    kind: str, name: str, golden: Callable[[str, str], None]
) -> None:
    run = RUNS[kind]
    text = shown(name, run, statistics=True)
    golden(f"check-{kind}.{GOLDENS[name]}", lasting(name, text))
    # a golden is no oracle: each format must tell of the same findings, at the same places
    found = sorted((said.code, said.path, said.line) for said in READERS[name](text))
    wanted = sorted((one.finding.code, one.place.path, one.place.line) for _, one in run.findings)
    if name == "gitlab":  # which has no place without a line
        wanted = [(code, path, max(line, 1)) for code, path, line in wanted]
    if name == "junit":  # which has no lines
        wanted = [(code, path, 0) for code, path, _ in wanted]
    assert found == wanted
    assert len(found) == (4 if kind == "mixed" else 0)


@pytest.mark.parametrize("name", ["text", "github", "markdown"])
def test_the_verdict_counts_everything(name: str) -> None:
    # of the policy's own file a finding counts, but it is no model: 5 models, not 6
    wanted = (
        "5 models · 3 rules · 4 findings · 1 cannot tell · 1 crashed · 1 not read · 1 suppressed · 1 in the baseline"
    )
    text = shown(name, MIXED)
    assert tally(MIXED).verdict == wanted
    assert text.splitlines()[0 if name == "markdown" else -1].endswith(wanted)
    clean = shown(name, RUNS["clean"]).splitlines()[0 if name == "markdown" else -1]
    assert clean.endswith("2 models · 3 rules · 0 findings · 0 cannot tell · 0 crashed")


# --- text ---


def test_a_clean_run_is_a_line_for_each_model_while_they_are_few_and_one_for_all_when_they_are_many() -> None:
    few = Run(tuple(model(f"m/{i}") for i in range(5)))
    assert shown("text", few).splitlines()[:5] == [f"m/{i} · no finding" for i in range(5)]
    many_models = Run(tuple(model(f"m/{i}") for i in range(6)))
    assert shown("text", many_models).splitlines()[:2] == ["6 models without findings", ""]
    assert len(shown("text", many_models).splitlines()) == 3


def test_what_cannot_be_told_of_many_models_is_said_once_and_before_any_finding() -> None:
    unsure = [model(f"m/{i}", cannot_tell=(CannotTell("whether io is there", (), "TIE107"),)) for i in range(7)]
    other = model("m/8", cannot_tell=(CannotTell("of another thing", (), "TIE107"),))
    text = shown("text", Run((model("a", BROKEN), *unsure, other)))
    assert text.splitlines()[:3] == [
        "7 models",
        "  m/0, m/1, m/2, m/3, m/4 and 2 more",  # 7 - 5
        "  cannot tell TIE107 whether io is there",
    ]
    assert text.count("whether io is there") == 1
    assert text.index("of another thing") < text.index("TIE101 broken-tie")
    assert text.splitlines()[-1].endswith("1 finding · 8 cannot tell · 0 crashed")


def test_how_many_findings_have_a_safe_fix_is_said_above_the_verdict_and_nothing_where_none_has() -> None:
    text = shown("text", Run((model("a", BROKEN, BY_HAND),)))
    assert text.splitlines()[-3] == "1 finding with a safe fix: --diff shows it, --fix makes it"
    assert "safe fix" not in shown("text", Run((model("a", BY_HAND),)))


def test_what_hides_findings_of_a_model_is_said_also_where_none_is_left() -> None:
    run = Run((model("m", n_suppressed=2, known=(BROKEN,)),))
    assert shown("text", run).startswith("m · no finding · 2 suppressed · 1 in the baseline\n")


def test_a_command_that_mends_several_findings_is_shown_once() -> None:
    fix = Fix("safe", "tieaudit apply m --to OUT", "dedup")
    run = Run((model("m", *(judged("TIE201", path="m", ids=(f"a{i}", "b"), fix=fix) for i in range(3))),))
    text = shown("text", run)
    assert text.count("$ tieaudit apply m --to OUT") == 1
    assert text.count("    the same command mends it\n") == 2


def test_findings_beyond_what_the_settings_list_are_counted() -> None:
    run = Run((model("m", *(judged("TIE201", ids=(f"a{i}", "b")) for i in range(30))),))
    assert "… and 18 more (--format json lists all)" in shown("text", run)  # 30 - 12
    assert "30 findings" in shown("text", run).splitlines()[-1]


def test_lines_fit_the_width_except_names_and_commands() -> None:
    for line in shown("text", MIXED, width=70, statistics=False).splitlines()[:-1]:
        assert len(line) <= 70 or line.lstrip().startswith(("$", "info", "warning", "error")), line


def test_colours_appear_only_when_asked_for_and_change_nothing_else() -> None:
    plain, coloured = shown("text", MIXED, statistics=True), shown("text", MIXED, statistics=True, color=True)
    assert "\x1b" not in plain
    assert "\x1b[31;1merror  \x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_the_statistics_add_up_and_are_left_out_when_not_asked_for() -> None:
    text = shown("text", MIXED, statistics=True)
    table = text[text.index("\nrule ") + 1 :].partition("\n\n")[0].splitlines()
    counts = [re.split(r"  +", line)[2:] for line in table[1:]]
    # findings 4, cannot tell 1, crashed 1, in the baseline 1: as the verdict says
    assert sum(int(row[0]) for row in counts) == tally(MIXED).n_findings == 4
    assert [sum(int(row[column]) for row in counts) for column in (3, 4, 5)] == [1, 1, 1]
    assert {len(line) for line in table} == {len(table[0])}  # aligned: the last column ends in one place
    assert "\nrule " not in shown("text", MIXED)


# --- JSON ---


def test_the_json_of_a_run_holds_every_field_of_every_noun() -> None:
    found = json.loads(shown("json", MIXED))
    names = {field.name for field in dataclasses.fields(Run)} - {"models"}
    assert names | {"models", "schema", "tool", "totals"} == set(found)
    for entry, one in zip(found["models"], MIXED.models, strict=True):
        assert set(entry) == {field.name for field in dataclasses.fields(Checked)}
        for key in ("path", "format", "n_rules", "n_silenced", "n_suppressed", "unreadable", "weights_here", "cached"):
            assert entry[key] == getattr(one, key)
    (first,) = found["models"][0]["findings"]
    flat = {field.name for kind in (Finding, Judged) for field in dataclasses.fields(kind)} - {"finding"}
    assert set(first) == flat
    assert set(first["place"]) == {field.name for field in dataclasses.fields(Place)}
    assert set(found["models"][1]["summary"]) == {field.name for field in dataclasses.fields(Summary)}
    assert found["totals"] == dataclasses.asdict(tally(MIXED))


def test_a_document_that_breaks_the_schema_is_noticed() -> None:
    found = json.loads(shown("json", MIXED))
    found["models"][0]["findings"][0]["severity"] = "grave"
    with pytest.raises(AssertionError):
        READERS["json"](json.dumps(found))


def test_evidence_that_json_cannot_hold_becomes_text() -> None:
    odd = judged(evidence={"worst": float("nan"), "where": Path("x"), "shapes": {(1, 2)}})
    text = shown("json", Run((model("m", odd),), facts={"since": Path("y")}))
    READERS["json"](text)
    assert json.loads(text)["models"][0]["findings"][0]["evidence"]["worst"] == "nan"


# --- GitHub's annotations ---


def test_the_escapes_are_those_that_the_runner_undoes() -> None:
    one = judged("TIE101", path="a,b:c%2C=1.onnx", line=3, message="100% of a::b, all")
    lines = shown("github", Run((model("m", one),))).splitlines()
    assert lines[0].startswith("::error file=a%2Cb%3Ac%252C=1.onnx,line=3,title=TIE101 broken-tie::100%25 of a::b, all")
    (said,) = github("\n".join(lines))
    assert (said.path, said.line, said.text) == ("a,b:c%2C=1.onnx", 3, "100% of a::b, all")


def test_more_annotations_than_github_shows_are_cut_the_worst_first_and_counted() -> None:
    findings = [judged("TIE205", path="m", ids=(f"c{i}", "d")) for i in range(12)]
    findings += [judged("TIE101", path="m", ids=(f"a{i}", "b")) for i in range(13)]
    run = Run((model("m", *findings),), errors=(("cut.onnx", "truncated"),))
    lines = shown("github", run).splitlines()
    commands = [command_in(line) for line in lines[:-1]]
    names = [command.name for command in commands if command]
    # 14 errors are 13 findings and what was not read: 10 are shown, that one first; of 12 notices 9, and one more
    assert (names.count("error"), names.count("notice"), names.count("warning")) == (10, 10, 0)
    assert commands[0] is not None and commands[0].properties["title"] == "tieaudit: not read"
    assert commands[-1] is not None
    assert commands[-1].data.endswith(
        "and 4 errors, 3 notices more: GitHub shows 10 annotations of each kind for one step; --format json lists all"
    )


def test_a_clean_run_annotates_nothing() -> None:
    assert shown("github", RUNS["clean"]) == "2 models · 3 rules · 0 findings · 0 cannot tell · 0 crashed\n"


# --- GitLab's code quality ---


def test_two_models_with_the_same_finding_keep_two_fingerprints_from_run_to_run() -> None:
    same = judged("TIE102", path="shared/config.json", line=2)
    run = Run((model("a", same), model("b", same, same)))
    found = json.loads(shown("gitlab", run))
    assert len({entry["fingerprint"] for entry in found}) == 3
    turned = json.loads(shown("gitlab", Run(run.models[::-1])))
    assert {entry["fingerprint"] for entry in turned} == {entry["fingerprint"] for entry in found}


def test_what_could_not_be_judged_is_in_the_report_of_gitlab_too() -> None:
    found = {entry["check_name"]: entry for entry in json.loads(shown("gitlab", MIXED))}
    assert found["not-read"]["severity"] == found["TIE301 crashed"]["severity"] == "blocker"
    assert found["TIE101"]["description"] == "cannot tell: the weights are not here: a git-LFS pointer"
    assert gitlab(shown("gitlab", RUNS["clean"])) == []


# --- SARIF ---


def test_every_rule_is_in_the_log_with_its_page_whether_it_found_something_or_not() -> None:
    listed = {rule["id"]: rule for rule in log_of(RUNS["clean"])["tool"]["driver"]["rules"]}
    assert set(listed) == set(rules())
    assert "**Cannot tell when**" in listed["TIE101"]["help"]["markdown"]
    assert listed["TIE101"]["defaultConfiguration"]["level"] == "error"
    assert listed["TIE205"]["defaultConfiguration"]["level"] == "note"
    assert "TIE999" in {rule["id"] for rule in log_of(MIXED)["tool"]["driver"]["rules"]}


def test_a_result_points_at_the_line_of_the_cause_and_names_its_tensors() -> None:
    (result,) = [one for one in log_of(MIXED)["results"] if one["ruleId"] == "TIE101"]
    (place,) = result["locations"]
    assert place["physicalLocation"] == {
        "artifactLocation": {"uri": "models/opt/config.json", "uriBaseId": "%SRCROOT%"},
        "region": {"startLine": 14},
    }
    assert [one["fullyQualifiedName"] for one in place["logicalLocations"]] == list(BROKEN.finding.ids)
    assert result["partialFingerprints"]["tieaudit/v1"] == BROKEN.fingerprint
    (other,) = [one for one in log_of(MIXED)["results"] if one["ruleId"] == "TIE102"]
    assert "region" not in other["locations"][0]["physicalLocation"]  # a file of weights has no lines


def test_findings_in_the_baseline_are_suppressed_and_unchanged_and_the_others_new() -> None:
    states = {
        one["ruleId"]: (one["baselineState"], len(one.get("suppressions", ()))) for one in log_of(MIXED)["results"]
    }
    assert states.pop("TIE104") == ("unchanged", 1)
    assert set(states.values()) == {("new", 0)}
    without = log_of(Run((model("m", BROKEN),)))["results"]
    assert "baselineState" not in without[0]


def test_a_run_that_could_not_do_the_whole_job_says_so_in_its_invocation() -> None:
    (invocation,) = log_of(MIXED)["invocations"]
    assert invocation["executionSuccessful"] is False
    notes = [
        (note["level"], note["message"]["text"].partition(":")[0]) for note in invocation["toolExecutionNotifications"]
    ]
    assert notes == [
        ("error", "models/cut.onnx"),
        ("error", "TIE301 crashed, a fault of tieaudit"),
        ("warning", "cannot tell"),
        ("note", "skipped"),
    ]
    assert log_of(RUNS["clean"])["invocations"][0] == {"executionSuccessful": True, "toolExecutionNotifications": []}


def test_an_absolute_path_is_a_file_uri_and_a_name_that_is_not_utf8_keeps_its_bytes() -> None:
    for path, uri in (
        ("/data/m x.onnx", "file:///data/m%20x.onnx"),
        (os.fsdecode(b"m\xff:#?.onnx"), "m%FF%3A%23%3F.onnx"),
        ("//evil.example/x", "file:////evil.example/x"),
    ):
        (said,) = sarif(shown("sarif", Run((model("m", judged(path=path)),))))
        assert said.path == path
        assert uri in shown("sarif", Run((model("m", judged(path=path)),)))


def n_told(run: Run) -> int:
    return sum(result["properties"]["n_findings"] for result in log_of(run)["results"])


def test_more_results_than_fit_are_folded_by_model_and_rule_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 models with 6 findings of 3 rules are 60; folded by model and rule they are 30
    monkeypatch.setattr("tieaudit.reports.sarif.log._N_MOST_RESULTS", 59)
    run = many(10, 6)
    sarif(shown("sarif", run))
    found = log_of(run)
    assert len(found["results"]) == 30
    assert found["properties"]["n_findings_folded"] == 30
    assert n_told(run) == 60
    assert found["results"][0]["message"]["text"].startswith("2 findings in this model, folded into one; the first: ")


def test_models_that_still_do_not_fit_are_folded_by_rule_the_worst_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 models with 3 findings each: 120 of three rules, 40 of them errors; 50 - 3 stay apart
    monkeypatch.setattr("tieaudit.reports.sarif.log._N_MOST_RESULTS", 50)
    run = many(40, 3)
    sarif(shown("sarif", run))
    results = log_of(run)["results"]
    assert len(results) == 49  # not 50: no error is left to fold
    assert n_told(run) == 120
    assert {one["level"] for one in results[:40]} == {"error"}
    assert "further models, folded into one" in results[-1]["message"]["text"]


def test_the_limit_is_that_of_github() -> None:
    results = log_of(many(4000, 3))["results"]
    assert len(results) == 4999
    assert sum(result["properties"]["n_findings"] for result in results) == 12_000


def test_fingerprints_of_folded_results_do_not_change_with_the_number_of_findings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tieaudit.reports.sarif.log._N_MOST_RESULTS", 40)
    few, more = log_of(many(10, 6))["results"][0], log_of(many(10, 9))["results"][0]
    assert few["message"] != more["message"]
    assert few["partialFingerprints"] == more["partialFingerprints"]


def test_names_that_agree_when_shortened_are_named_once() -> None:
    ids = tuple("a" * 300 + f"{i}" + "b" * 300 for i in range(4))
    sarif(shown("sarif", Run((model("m", judged(ids=ids, message="m")),))))
    assert len(log_of(Run((model("m", judged(ids=ids)),)))["results"][0]["locations"][0]["logicalLocations"]) == 1


def test_names_that_do_not_compress_are_folded_until_the_file_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tieaudit.reports.sarif.log._N_MOST_BYTES", 100_000)
    run = Run(
        tuple(
            model(f"m{i}", judged(ids=(os.urandom(90).hex(),) * 8, message=os.urandom(900).hex())) for i in range(200)
        )
    )
    text = shown("sarif", run)
    sarif(text)
    assert len(gzip.compress(text.encode())) <= 100_000
    assert n_told(run) == 200


# --- JUnit ---


def test_where_every_rule_ran_each_has_a_case_of_its_own() -> None:
    of_models = set(chosen(Terms()))  # not the rule about stale suppressions, which runs on the policy
    text = shown("junit", Run((model("m", BROKEN, n_rules=len(of_models)),)))
    junit(text)
    assert set(re.findall(r'<testcase classname="m" name="(TIE\d+) ', text)) == of_models == set(rules()) - {STALE}
    # of a policy that chose three, which ones were silent is not known
    assert '<testcase classname="m" name="2 other rules" time="0"/>' in shown("junit", Run((model("m", BROKEN),)))


def test_each_answer_of_a_rule_has_its_own_element() -> None:
    text = shown("junit", MIXED)
    assert '<error type="crashed" message="KeyError: &#39;wte&#39;"' in text.replace("'wte'", "&#39;wte&#39;")
    assert '<skipped type="cannot-tell" message="the weights are not here: a git-LFS pointer">' in text
    assert '<error type="not-read"' in text
    assert '<skipped type="skipped" message="belongs to no model">' in text
    assert "<system-out>in the baseline: warning models/opt/config.json:14: " in text


def test_a_rule_with_several_findings_is_one_failure_that_lists_them() -> None:
    run = Run((model("m", *(judged("TIE201", ids=(f"a{i}", "b")) for i in range(120))),))
    text = shown("junit", run)
    (said,) = junit(text)
    assert said.text.endswith(" (and 119 more)")
    assert "and 20 more findings; --format json lists all" in text  # 120 - 100


# --- Markdown ---


def test_the_comment_fits_and_counts_what_it_leaves_out() -> None:
    text = shown("markdown", many(2000, 3))
    found = markdown(text)
    page = rendered(text)
    assert len(found) == 50
    assert "… and 5,950 more findings." in page.text  # 6,000 - 50
    n_detailed = page.text.count("tieaudit apply models/")
    assert n_detailed > 100
    assert f"… and {6000 - n_detailed:,} more findings." in page.text


def test_entries_that_cannot_be_read_do_not_push_out_the_findings() -> None:
    errors = tuple((f"broken/{i}.onnx", "the file is truncated: " + "x" * 500) for i in range(500))
    text = shown("markdown", Run((model("m", BROKEN),), errors=errors, skipped=errors))
    assert markdown(text)[0].code == "TIE101"
    assert BROKEN.finding.fix is not None and BROKEN.finding.fix.command in text
    assert re.search(r"… and \d+ more\.", text)


# --- all of them ---


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(("n_models", "n_findings"), [(2000, 3), (1, 10_000)])
def test_thousands_of_models_or_of_findings_take_well_under_a_second(name: str, n_models: int, n_findings: int) -> None:
    run = many(n_models, n_findings)
    started = time.process_time()
    text = shown(name, run, statistics=True)
    seconds = time.process_time() - started
    n = n_models * n_findings
    assert f"{n:,} findings" in text or text.count("TIE") >= min(n, 5000) or f"and {n // 3:,} more" in text
    assert seconds < 2.0  # measured: 0.05 to 0.25 s for 2,000 models; anything quadratic takes minutes


@pytest.mark.parametrize("name", sorted(set(GOLDENS) - {"text", "json"}))
def test_a_format_of_the_gate_refuses_scans_and_says_what_to_use(name: str) -> None:
    with pytest.raises(UsageError, match=r"tieaudit check.*use text or json"):
        discover("reports", ReportFormat)[name].render([], [], {})


def test_a_crash_without_findings_is_no_clean_model_in_any_format() -> None:
    run = Run(
        (
            model(
                "m", crashed=(Crashed("TIE101", "ValueError: x", "…"),), cannot_tell=(CannotTell("y", (E,), "TIE102"),)
            ),
        )
    )
    for name in GOLDENS:
        text = shown(name, run)
        READERS[name](text)
        assert "ValueError" in text, name


@pytest.mark.parametrize("name", sorted(set(GOLDENS) - {"json"}))
def test_a_model_that_was_not_read_whole_is_not_clean_also_where_the_rule_that_says_so_is_left_out(name: str) -> None:
    text = shown(name, Run((model("models/cut", unreadable=True),)))
    READERS[name](text)
    said = text.partition('"invocations"')[2] or text  # of SARIF without the pages of the rules, which say many things
    assert "some of the weights could not be read" in said
    assert "models/cut" in said
    assert "no finding" not in said
    # said once, where a rule says it
    text = shown(name, Run((model("models/cut", judged("TIE902", message="cut"), unreadable=True),)))
    assert "some of the weights could not be read" not in (text.partition('"invocations"')[2] or text)
