"""Every rule against its own examples, and laws that hold for all of them."""

from __future__ import annotations

import random
import shlex
from dataclasses import replace

import numpy as np
import pytest

from tieaudit.audit import audit, rules
from tieaudit.cli import main as cli
from tieaudit.explain import HEADINGS, sections
from tieaudit.find import find
from tieaudit.merge import policy_of
from tieaudit.model import Model
from tieaudit.registry import discover
from tieaudit.roles import roles
from tieaudit.rules import Rule
from tieaudit.schemes import Scheme
from tieaudit.toy import UNKNOWN_CLASS, At, Broken, claim, ramp, toy
from tieaudit.verdict import Finding, Subject
from tieaudit.view import TRANSPOSED

W = ramp(64, 8)
EXAMPLES = [
    pytest.param(rule, kind, subject, id=f"{code}-{kind}-{index}")
    for code, rule in rules().items()
    for kind in ("bad", "good", "unsure")
    for index, subject in enumerate(getattr(rule.examples, kind))
]
BAD = [entry for entry in EXAMPLES if entry.values[1] == "bad"]


def codes(subject: Subject) -> list[str]:
    return [finding.code for finding in audit(subject).findings]


def only(rule: str, subject: Subject) -> Finding:
    findings = [finding for finding in audit(subject).findings if finding.code == rule]
    assert len(findings) == 1
    return findings[0]


@pytest.mark.parametrize(("rule", "kind", "subject"), EXAMPLES)
def test_an_example_is_judged_as_its_rule_promises(rule: Rule, kind: str, subject: Subject) -> None:
    report = audit(subject, only={rule.code: rule})
    assert report.crashed == ()
    said = (bool(report.findings), bool(report.cannot_tell))
    assert said == {"bad": (True, False), "good": (False, False), "unsure": (False, True)}[kind]


@pytest.mark.parametrize("rule", rules().values(), ids=list(rules()))
def test_a_rule_has_a_bad_and_a_good_example_and_a_page_with_every_heading(rule: Rule) -> None:
    assert rule.examples.bad
    assert rule.examples.good
    text = sections(rule.page)
    assert tuple(text) == ("", *HEADINGS)
    assert all(text.values())


@pytest.mark.parametrize(("rule", "kind", "subject"), BAD)
def test_the_command_of_a_finding_is_one_that_the_command_line_takes(rule: Rule, kind: str, subject: Subject) -> None:
    checked = 0
    for finding in audit(subject, only={rule.code: rule}).findings:
        assert finding.fix is not None
        commands = [str(value) for key, value in finding.evidence.items() if key == "to_make_the_tie_true"]
        if finding.fix.safety != "manual":
            commands.append(finding.fix.command)
        for command in commands:
            program, name, *words = shlex.split(command)
            assert (program, name) == ("tieaudit", "apply")
            top = cli.make_context("tieaudit", [name, *words])  # its settings reach the command, as they do in a shell
            given = cli.commands[name].make_context(name, words, parent=top).params
            assert given["path"] == subject.model.path
            assert set(given["schemes"]) <= set(discover("schemes", Scheme))
            assert given["merge"] is None or policy_of(given["merge"])
        checked += 1
    assert checked


@pytest.mark.parametrize(("rule", "kind", "subject"), BAD)
def test_findings_stay_when_the_weights_are_shuffled(rule: Rule, kind: str, subject: Subject) -> None:
    weights = list(subject.model.weights)
    random.Random(3).shuffle(weights)
    model = replace(subject.model, weights=tuple(weights))
    shuffled = replace(subject, model=model, found=find(model), roles=roles(model))
    before = audit(subject, only={rule.code: rule}).findings
    after = audit(shuffled, only={rule.code: rule}).findings
    assert [(f.code, sorted(f.ids), f.n_bytes) for f in before] == [(f.code, sorted(f.ids), f.n_bytes) for f in after]


def test_one_class_of_equal_weights_is_reported_by_one_rule() -> None:
    across = {"a": "one", "b": "two", "c": "two"}
    assert codes(toy({"a": W, "b": W.copy()}, format="onnx")) == ["TIE201"]
    assert codes(toy({"a": W, "b": W.copy(), "c": W.T.copy()}, format="onnx")) == ["TIE202"]
    assert codes(toy({"a": W, "b": W.copy(), "c": W.T.copy()}, format="onnx", parts=across)) == ["TIE203"]
    assert codes(toy({"a": W, "b": W.copy()}, declared=[("a", "b")])) == ["TIE102"]
    assert codes(toy({"a": W, "b": W.copy()}, declared=[claim("a", "b", active=False)])) == ["TIE104"]
    assert codes(toy({"a": W, "b": W.copy()})) == ["TIE103"]


def test_negative_zero_is_not_zero_so_the_tie_is_broken() -> None:
    minus = W.copy()
    minus[0, 0] = 0.0
    plus = minus.copy()
    plus[0, 0] = -0.0  # == says equal, the bits say not
    assert (minus == plus).all()
    assert codes(toy({"e": minus, "h": plus}, declared=[("e", "h")])) == ["TIE101"]


def test_equal_nan_payloads_are_equal_so_the_tie_holds() -> None:
    values = W.copy()
    values[2, 3] = np.nan  # NaN != NaN, but the bits are the same
    assert codes(toy({"e": values, "h": values.copy()}, declared=[("e", "h")])) == ["TIE102"]


def test_a_declared_pair_of_equal_constants_is_no_broken_tie() -> None:
    zeros = np.zeros((64, 8), "float32")
    assert "TIE101" not in codes(toy({"e": zeros, "h": zeros.copy()}, declared=[("e", "h")]))


def test_two_unrelated_biases_of_zeros_are_no_tie() -> None:
    zeros = np.zeros(4096, "float32")
    report = audit(toy({"a.bias": zeros, "b.bias": zeros.copy()}, format="onnx"))
    assert [finding.code for finding in report.findings] == []
    assert report.n_silenced == 1  # TIE205: 16,384 bytes of constants are under the threshold of 65,536


def test_a_broken_tie_says_what_each_version_of_transformers_does() -> None:
    message = only("TIE101", toy({"e": W, "h": ramp(64, 8, seed=1)}, declared=[("e", "h")])).message
    assert "transformers 4.57 discards h and uses e" in message
    assert "transformers 5.x keeps both and runs untied" in message


def test_a_broken_tie_without_a_switch_cannot_be_declared_away() -> None:
    tied = claim("e", "h", condition="")
    fix = only("TIE101", toy({"e": W, "h": ramp(64, 8, seed=1)}, declared=[tied])).fix
    assert fix is not None
    assert fix.safety == "manual"


def test_overlapping_declarations_are_one_class_not_pairs() -> None:
    # shared-enc and shared-dec: one finding about three weights, 2 further copies of 2,048 bytes, not 2 findings of 1
    pairs = [("shared", "enc"), ("shared", "dec")]
    finding = only("TIE102", toy({"shared": W, "enc": W.copy(), "dec": W.copy()}, declared=pairs))
    assert set(finding.ids) == {"shared", "enc", "dec"}
    assert finding.n_bytes == 4096


def test_a_copy_that_no_loader_restores_is_to_be_kept() -> None:
    fix = only("TIE102", toy({"e": W, "h": W.copy()}, declared=[claim("e", "h", restores=False)])).fix
    assert fix is not None
    assert fix.safety == "manual"


def test_a_pair_tied_by_another_active_claim_is_not_called_untied() -> None:
    off = claim("e", "h", active=False)
    assert codes(toy({"e": W, "h": W.copy()}, declared=[off, claim("e", "h")])) == ["TIE102"]


def test_an_undeclared_equal_pair_of_layers_is_never_offered_a_command() -> None:
    fix = only("TIE103", toy({"layers.0.w": W, "layers.1.w": W.copy()})).fix
    assert fix is not None
    assert fix.safety == "manual"
    assert "randomly" in fix.command


def test_equal_weights_of_an_unknown_class_are_a_cannot_tell_not_a_finding() -> None:
    report = audit(toy({"a": W, "b": W.copy()}, metadata=UNKNOWN_CLASS))
    assert report.findings == ()
    assert [item.code for item in report.cannot_tell] == ["TIE103"]


def test_a_square_matrix_equal_on_its_diagonal_only_is_no_copy() -> None:
    square = ramp(24, 24)
    other = ramp(24, 24, seed=1)
    np.fill_diagonal(other, np.diagonal(square))
    assert codes(toy({"a": square, "b": other}, format="onnx")) == []


def test_an_alias_across_parts_is_the_best_several_files_can_do() -> None:
    parts = {"e": "encoder_model", "d": "decoder_model"}
    assert codes(toy({"e": At(W, 0), "d": At(W, 0)}, format="onnx", parts=parts)) == []


def test_many_copies_across_the_same_parts_are_one_finding() -> None:
    names = [f"layer.{index}" for index in range(20)]
    weights = {f"{name}.{part}": ramp(64, 8, seed=i) for i, name in enumerate(names) for part in ("first", "past")}
    parts = {name: "decoder_model" if name.endswith("first") else "decoder_with_past_model" for name in weights}
    finding = only("TIE203", toy(weights, format="onnx", parts=parts))
    assert finding.n_bytes == 20 * 64 * 8 * 4
    assert len(finding.ids) == 40


def test_an_overridable_copy_is_reported_but_not_offered_for_merging() -> None:
    fix = only("TIE201", toy({"a": W, "b": W.copy()}, format="onnx", overridable=["b"])).fix
    assert fix is not None
    assert fix.safety == "manual"


def test_a_gemm_with_trans_b_through_an_identity_is_not_folded() -> None:
    subject = toy({"e": W}, uses=[("e", "Gather"), ("e", "Identity Gemm")], format="onnx")
    assert subject.model.uses[1].view == TRANSPOSED
    assert codes(subject) == []


def test_unreadable_bytes_are_an_error_and_not_clean() -> None:
    report = audit(toy({"e": W, "h": Broken((64, 8))}, declared=[("e", "h")]))
    assert [(finding.code, finding.severity) for finding in report.findings] == [("TIE902", "error")]
    assert [item.code for item in report.cannot_tell] == ["TIE101"]


def test_a_path_with_blanks_and_quotes_survives_the_shell() -> None:
    path = "my model's $(folder)"
    fix = only("TIE102", toy({"e": W, "h": W.copy()}, declared=[("e", "h")], path=path)).fix
    assert fix is not None
    assert shlex.split(fix.command) == ["tieaudit", "apply", path, "--scheme", "dedup", "--to", "OUT"]


def test_a_path_that_looks_like_an_option_is_still_a_path() -> None:
    fix = only("TIE102", toy({"e": W, "h": W.copy()}, declared=[("e", "h")], path="-rf")).fix
    assert fix is not None
    assert shlex.split(fix.command)[2] == "./-rf"


def test_an_empty_model_is_silent() -> None:
    model = Model(path="empty.onnx", format="onnx", parts=(), weights=())
    report = audit(Subject(model, find(model), roles(model)))
    assert (report.findings, report.cannot_tell, report.crashed) == ((), (), ())
