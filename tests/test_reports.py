"""The text and JSON reports: goldens, each cross-checked; hostile names; the schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieaudit.audit import audit, rules
from tieaudit.config import Settings
from tieaudit.printable import columns, counted, listed, printable, shorten, size
from tieaudit.propose import listed_candidates
from tieaudit.registry import discover
from tieaudit.reports import ReportFormat
from tieaudit.toy import At, Broken, claim, ramp, toy
from tieaudit.verdict import Crashed, Report, Subject

SCHEMA = Path(__file__).resolve().parent.parent / "docs" / "schema" / "scan-1.schema.json"
E, H = "model.embed_tokens.weight", "lm_head.weight"
W = ramp(64, 8)
ZEROS = np.zeros((160, 160), "float32")
PARTS = {"enc.embed": "encoder_model", "dec.embed": "decoder_model", "head": "decoder_model"}
PARTS |= {"zeros.0": "encoder_model", "zeros.1": "decoder_model"}
SUBJECTS: dict[str, Subject] = {
    "healthy": toy({E: W, H: None}, declared=[(E, H)], metadata={"architecture": "LlamaForCausalLM"}),
    "lost": toy({E: W, H: W.copy(), "norm": ramp(8)}, declared=[(E, H)]),
    "broken": toy({E: W, H: ramp(64, 8, seed=1)}, declared=[(E, H)]),
    "untied": toy({E: W, H: ramp(64, 8, seed=1)}, declared=[claim(E, H, active=False)]),
    "folding": toy({"wte": W}, uses=[("wte", "Gather"), ("wte", "Transpose MatMul")], format="onnx"),
    "parts": toy(
        {"enc.embed": W, "dec.embed": W.copy(), "head": W.T.copy(), "zeros.0": ZEROS, "zeros.1": ZEROS.copy()},
        format="onnx",
        parts=PARTS,
        path="bart-onnx",
    ),
    "aliased": toy({"wte": At(W, 0), "head": At(W, 0)}, format="onnx"),
    "unreadable": toy({E: W, H: Broken((64, 8))}, declared=[(E, H)], notes=("the shard 2 of 3 is missing",)),
    "layers": toy(
        {E: W, H: ramp(64, 8, seed=1)}
        | {f"model.layers.{n}.mlp.up_proj.weight": ramp(16, 16, seed=n) for n in range(4)}
        | {f"model.layers.{n}.mlp.down_proj.weight": ramp(16, 16, seed=4 + n) for n in range(4)}
    ),
}


def look(subject: Subject) -> Report:
    return audit(subject, listed_candidates(subject))


def text(*reports: Report, errors: tuple[tuple[str, str], ...] = (), **settings: object) -> str:
    return discover("reports", ReportFormat)["text"].render(reports, errors, {"width": 100, **settings})


def document(*reports: Report, errors: tuple[tuple[str, str], ...] = (), **settings: object) -> dict[str, Any]:
    printed = discover("reports", ReportFormat)["json"].render(reports, errors, settings)
    assert printed.isascii()
    found: dict[str, Any] = json.loads(printed)
    return found


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    wanted = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(wanted)
    return jsonschema.Draft202012Validator(wanted)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_text_of_a_scan_is_as_agreed(name: str, golden: Callable[[str, str], None]) -> None:
    report = look(SUBJECTS[name])
    printed = text(report)
    golden(f"scan-{name}.txt", printed)
    # a golden is no oracle: what it shows must be what the report holds
    assert re.search(rf"^  stored +{re.escape(size(report.summary.n_bytes))} ", printed, re.MULTILINE)
    assert re.search(rf"^  weights +{report.summary.n_weights}$", printed, re.MULTILINE)
    for kind, n in report.n_by_role.items():  # of these models none has two kinds that are counted as one
        assert re.search(rf"^  roles .*\b{kind} {n}\b", printed, re.MULTILINE)
    assert sum(report.n_by_role.values()) == report.summary.n_weights
    for finding in report.findings:
        assert f"{finding.code} {finding.name}" in printed
    counts = f"{counted(len(report.findings), 'finding')} · {len(report.cannot_tell)} cannot tell · 0 crashed"
    assert printed.splitlines()[-1] == f"{len(rules())} rules · {counts}"


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_json_of_a_scan_fits_its_schema_and_its_columns_add_up(
    name: str, schema: jsonschema.Draft202012Validator
) -> None:
    report = look(SUBJECTS[name])
    found = document(report, errors=(("broken.onnx", "truncated"),), thresholds=Settings(), color=True, width=80)
    schema.validate(found)
    (model,) = found["models"]
    ids = {weight["id"] for weight in model["weights"]}
    assert {member["id"] for group in model["groups"] for member in group["members"]} <= ids
    assert {weight["part"] for weight in model["weights"]} <= set(model["parts"])
    assert model["summary"]["n_weights"] == sum(not weight["absent"] for weight in model["weights"])
    if name != "aliased":  # where two names share one range, the region counts once
        assert model["summary"]["n_bytes"] == sum(weight["n_bytes"] for weight in model["weights"])
    assert found["settings"] == {"thresholds": found["settings"]["thresholds"]}
    assert found["settings"]["thresholds"]["min_n_bytes"] == 1024


def test_the_json_of_a_lost_tie_is_as_agreed(golden: Callable[[str, str], None]) -> None:
    found = document(look(SUBJECTS["lost"]))
    found["tool"]["version"] = "0"
    golden("scan-lost.json", json.dumps(found, indent=1) + "\n")
    assert found["schema"] == "tieaudit/scan/1"
    assert [group["origin"] for group in found["models"][0]["groups"]] == ["measured", "declared"]


def test_a_schema_violation_is_noticed(schema: jsonschema.Draft202012Validator) -> None:
    found = document(look(SUBJECTS["lost"]))
    found["models"][0]["findings"][0]["severity"] = "grave"
    assert not schema.is_valid(found)


def test_evidence_that_json_cannot_hold_becomes_text(schema: jsonschema.Draft202012Validator) -> None:
    report = look(SUBJECTS["lost"])
    odd = replace(report.findings[0], evidence={"worst": float("nan"), "where": Path("x"), "shapes": {(1, 2)}})
    found = document(replace(report, findings=(odd,)))
    schema.validate(found)
    assert found["models"][0]["findings"][0]["evidence"]["worst"] == "nan"


def test_evidence_that_contradicts_is_on_the_screen_and_in_the_json() -> None:
    subject = toy({E: W, H: ramp(64, 8, seed=1)})
    roles = {**subject.roles, H: replace(subject.roles[H], kind="token_embedding", against="output_head")}
    report = look(replace(subject, roles=roles))
    assert f"evidence conflicts about {H}: token_embedding or output_head" in text(report)
    assert [one["role"]["against"] for one in document(report)["models"][0]["weights"]] == ["", "output_head"]
    assert "conflicts" not in text(look(subject))


HOSTILE = "evil\x1b[2J\x07\u202egnp.txt\u200b\n\ud800 real"


def test_a_hostile_name_reaches_neither_the_terminal_nor_the_layout() -> None:
    subject = toy(
        {HOSTILE: W, "b": W.copy()}, format="onnx", path=HOSTILE, metadata={"producer": HOSTILE}, notes=(HOSTILE,)
    )
    printed = text(look(subject), errors=((HOSTILE, HOSTILE),))
    assert printed.encode("utf-8")  # a lone surrogate would raise
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\ud800-\udfff]", printed)
    assert "\\x1b[2J" in printed
    document(look(subject), errors=((HOSTILE, HOSTILE),))


def test_a_very_long_name_is_shortened_in_the_text_and_whole_in_json() -> None:
    name = "a" * 5000 + "end"
    report = look(toy({name: W, "b": W.copy()}, format="onnx"))
    assert "a" * 300 not in text(report)
    assert document(report)["models"][0]["weights"][0]["name"] == name


def test_long_lists_are_cut_and_counted() -> None:
    weights = {f"layer.{i}.{copy}": ramp(64, 8, seed=i) for i in range(30) for copy in range(12)}
    report = look(toy(weights, format="onnx"))
    printed = text(report)
    assert "… and 22 more (--format json lists all)" in printed  # 30 classes, 8 listed
    assert "… and 4 more (--format json lists all)" in printed  # 12 members, 8 listed
    assert "… and 18 more (--format json lists all)" in printed  # 30 findings, 12 listed
    assert len(document(report)["models"][0]["findings"]) == 30
    assert "30 findings" in printed.splitlines()[-1]


def test_lines_fit_the_width_except_names_and_commands() -> None:
    for subject in SUBJECTS.values():
        for line in text(look(subject), width=80).splitlines():
            assert len(line) <= 80 or line.lstrip().startswith("$"), line


def test_colours_appear_only_when_asked_for() -> None:
    report = look(SUBJECTS["broken"])
    assert "\x1b" not in text(report)
    coloured = text(report, color=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text(report)


def test_a_crashed_rule_is_shown_and_counted() -> None:
    report = replace(look(SUBJECTS["healthy"]), crashed=(Crashed("TIE301", "KeyError: 'x'", "Traceback …"),))
    printed = text(report)
    assert "TIE301 KeyError: 'x'" in printed
    assert printed.splitlines()[-1].endswith("· 1 crashed")
    assert document(report)["models"][0]["crashed"][0]["traceback"] == "Traceback …"


def test_paths_that_could_not_be_read_are_counted_beside_the_verdict() -> None:
    printed = text(errors=(("a.onnx", "a.onnx: an empty file"), ("b.onnx", "truncated")))
    assert "  a.onnx: an empty file\n  b.onnx: truncated\n" in printed
    assert printed.splitlines()[-1] == "0 rules · 0 findings · 0 cannot tell · 0 crashed · 2 not read"


def test_silenced_findings_are_counted_not_hidden() -> None:
    small = ramp(8, 8)
    assert "1 finding under the size thresholds" in text(look(toy({"a": small, "b": small.copy()}, format="onnx")))


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (1_048_576, "1.0 MB"),
     (62_500_000, "62.5 MB"), (3 * 10**9, "3.0 GB"), (5 * 10**15, "5,000.0 TB")],
)  # fmt: skip
def test_sizes_are_decimal_and_never_show_a_thousand(n_bytes: int, shown: str) -> None:
    assert size(n_bytes) == shown  # 1,048,576 bytes are 1.0 MB, not "1.0 MiB"; 999,950 is not "1000.0 kB"


def test_names_in_a_sentence_are_joined_and_counted() -> None:
    assert listed(("a",)) == "a"
    assert listed(("a", "b")) == "a and b"
    assert listed(("a", "b", "c")) == "a, b and c"
    assert listed(tuple("abcdef")) == "a, b, c, d and 2 more"
    assert listed(()) == ""


def test_shortening_keeps_both_ends() -> None:
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert shorten("abc", 3) == "abc"


@given(st.text(max_size=600), st.integers(1, 300))
def test_printable_text_is_short_harmless_and_stays_as_it_is(anything: str, n_most: int) -> None:
    shown = printable(anything, n_most)
    assert len(shown) <= n_most
    assert shown.isprintable()
    assert printable(printable(anything, None), None) == printable(anything, None)


@pytest.mark.parametrize(
    ("rows", "align", "lines"),
    [
        ([], "", []),
        ([("a", "1"), ("bcd", "20")], "<>", ["a     1", "bcd  20"]),
        ([("a", ""), ("bcd", "")], "<<", ["a", "bcd"]),
        ([("重み", "1"), ("w", "1")], "<>", ["重み  1", "w     1"]),  # two columns each
        ([("e\u0301t", "1"), ("xyz", "1")], "<>", ["e\u0301t   1", "xyz  1"]),  # a mark takes none
    ],
)
def test_columns_are_as_wide_as_a_terminal_shows_them(
    rows: list[tuple[str, ...]], align: str, lines: list[str]
) -> None:
    assert columns(rows, align) == lines


def test_a_document_about_thousands_of_weights_is_the_same_without_line_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    report = audit(toy({"a": ramp(4, 4), "b": ramp(4, 4), "c": ramp(3, 4)}))
    render = discover("reports", ReportFormat)["json"].render
    short = render([report], [], {})
    monkeypatch.setattr("tieaudit.reports.json._N_MOST_INDENTED", 2)
    long = render([report], [], {})
    assert (short.count("\n") > 50, long.count("\n")) == (True, 1)
    assert json.loads(short) == json.loads(long)
