"""The rule engine, the totals, and the set algebra under them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieaudit.audit import audit, rules
from tieaudit.config import Settings, page, rows
from tieaudit.equality import Equality, declared, n_bytes_covered
from tieaudit.errors import UsageError
from tieaudit.explain import explain
from tieaudit.rules import Examples, Rule, rule
from tieaudit.storage import Region
from tieaudit.toy import At, Broken, claim, ramp, toy
from tieaudit.verdict import CannotTell, Finding, Subject

W = ramp(64, 8)


def made(code: str, *said: object, crash: Exception | None = None, severity: str = "warning") -> Rule:
    def check(subject: Subject) -> Iterator[Finding | CannotTell]:
        yield from said  # type: ignore[misc]
        if crash is not None:
            raise crash

    return rule(code, code.lower(), severity=severity, since="0", examples=Examples)(check)  # type: ignore[arg-type]


def test_a_crashed_rule_is_reported_with_its_traceback_and_keeps_what_it_said() -> None:
    broken = made("TIE999", Finding(("a",), "first"), CannotTell("second"), crash=KeyError("no such thing"))
    report = audit(toy({"a": W}), only={"TIE999": broken})
    assert [finding.message for finding in report.findings] == ["first"]
    assert [item.because for item in report.cannot_tell] == ["second"]
    assert [(crash.code, crash.because) for crash in report.crashed] == [("TIE999", "KeyError: 'no such thing'")]
    assert "in check" in report.crashed[0].traceback


def test_one_crashed_rule_does_not_stop_the_others() -> None:
    report = audit(toy({"a": W}), only={"A": made("A", crash=ValueError()), "B": made("B", Finding(("a",), "seen"))})
    assert [finding.message for finding in report.findings] == ["seen"]
    assert report.n_rules == 2


def test_a_rule_that_says_something_else_has_crashed() -> None:
    report = audit(toy({"a": W}), only={"A": made("A", "just a string")})
    assert report.findings == ()
    assert "expected a Finding or CannotTell, found 'just a string'" in report.crashed[0].because


def test_the_engine_stamps_code_name_and_severity_whatever_the_rule_says() -> None:
    forged = Finding(("a",), "m", code="TIE000", name="forged", severity="info")
    (finding,) = audit(toy({"a": W}), only={"A": made("A", forged, severity="error")}).findings
    assert (finding.code, finding.name, finding.severity) == ("A", "a", "error")


def test_findings_are_sorted_by_severity_then_by_bytes() -> None:
    some = made("B", Finding(("small",), "", n_bytes=1), Finding(("large",), "", n_bytes=9))
    grave = made("C", Finding(("grave",), "", n_bytes=0), severity="error")
    report = audit(toy({"a": W}), only={"B": some, "C": grave})
    assert [finding.ids[0] for finding in report.findings] == ["grave", "large", "small"]


def test_a_threshold_silences_the_finding_but_neither_the_tie_nor_the_total() -> None:
    small = ramp(8, 8)  # 8 * 8 * 4 = 256 bytes, under the default of 1,024
    subject = toy({"a": small, "b": small.copy()}, format="onnx")
    report = audit(subject)
    assert report.findings == ()
    assert report.n_silenced == 1
    assert [tie.origin for tie in report.subject.found.ties] == ["measured"]
    assert report.summary.n_bytes_duplicate == 256
    assert [finding.code for finding in audit(subject, settings=Settings(min_n_bytes=256)).findings] == ["TIE201"]
    assert audit(subject, settings=Settings(min_n_bytes=257)).n_silenced == 1


def test_every_code_in_the_table_of_thresholds_is_a_rule() -> None:
    assert {code for row in rows() for code in row.silences} <= set(rules())
    assert all(f"`{row.name}`" in page() for row in rows())


def test_explain_finds_a_rule_by_code_and_by_name_and_suggests_the_nearest() -> None:
    assert explain("tie101") == explain("broken-tie")
    assert "Cannot tell when" in explain("TIE101")
    assert "Press & Wolf" in explain("io")
    with pytest.raises(UsageError, match="no rule, scheme, merge policy or relation is called 'brokn-tie'") as caught:
        explain("brokn-tie")
    assert caught.value.hint == "did you mean broken-tie?"


# Totals. W has 64 * 8 = 512 elements and 2,048 bytes.


def test_a_declared_tie_of_equal_copies_counts_once_and_its_copy_is_duplicate() -> None:
    total = audit(toy({"e": W, "h": W.copy()}, declared=[("e", "h")])).summary
    assert (total.n_parameters, total.n_parameters_named) == (512, 1024)  # 512, not the 1,024 of the names
    assert (total.n_bytes, total.n_bytes_duplicate) == (4096, 2048)


def test_an_absent_member_counts_by_name_but_not_as_a_parameter_nor_as_bytes() -> None:
    total = audit(toy({"e": W, "h": None}, declared=[("e", "h")])).summary
    assert (total.n_weights, total.n_parameters, total.n_parameters_named, total.n_bytes) == (1, 512, 1024, 2048)


def test_an_absent_member_that_nobody_restores_is_a_parameter_of_its_own() -> None:
    # the live model has a randomly initialised head of its own: 1,024, not 512
    total = audit(toy({"e": W, "h": None}, declared=[claim("e", "h", active=False)])).summary
    assert total.n_parameters == 1024


def test_a_declared_tie_of_different_tensors_counts_twice() -> None:
    total = audit(toy({"e": W, "h": ramp(64, 8, seed=1)}, declared=[("e", "h")])).summary
    assert (total.n_parameters, total.n_bytes_duplicate) == (1024, 0)


def test_undeclared_equal_weights_of_a_folder_count_twice_and_are_duplicate_bytes() -> None:
    # the live model has two parameters that happen to be equal: 1,024, not 512
    total = audit(toy({"a": W, "b": W.copy()})).summary
    assert (total.n_parameters, total.n_bytes_duplicate) == (1024, 2048)


def test_in_onnx_equal_and_transposed_weights_count_once() -> None:
    total = audit(toy({"a": W, "b": W.copy(), "c": W.T.copy()}, format="onnx")).summary
    assert (total.n_parameters, total.n_parameters_named, total.n_bytes_duplicate) == (512, 1536, 4096)


def test_equal_constants_count_by_name_because_they_are_no_tie() -> None:
    ones = np.ones(64, "float32")
    total = audit(toy({"norm.0": ones, "norm.1": ones.copy()}, format="onnx")).summary
    assert (total.n_parameters, total.n_bytes, total.n_bytes_duplicate) == (128, 512, 0)


def test_buffers_are_bytes_but_no_parameters() -> None:
    total = audit(toy({"w": W, "mask": ramp(64, 8, seed=1)}, buffers=["mask"])).summary
    assert (total.n_weights, total.n_parameters, total.n_bytes) == (2, 512, 4096)


def test_two_names_of_one_byte_range_are_one_parameter_and_one_region() -> None:
    total = audit(toy({"a": At(W, 0), "b": At(W, 0)}, format="onnx")).summary
    assert (total.n_weights, total.n_parameters, total.n_bytes, total.n_bytes_duplicate) == (2, 512, 2048, 0)


def test_overlapping_ranges_are_counted_once() -> None:
    # bytes 0..2048 and 1024..2048 cover 2,048 bytes, not 3,072
    total = audit(toy({"a": At(W, 0), "b": At(W[32:], 1024)}, format="onnx")).summary
    assert total.n_bytes == 2048


def test_a_weight_that_may_be_a_buffer_makes_the_count_unknown_with_a_reason() -> None:
    total = audit(toy({"a": W, "b": ramp(3)}, unknown=["b"])).summary
    assert (total.n_parameters, total.n_parameters_named) == (None, None)
    assert "1 weights are parameters or buffers" in total.n_parameters_because


def test_the_count_of_the_class_itself_wins_and_the_difference_is_told() -> None:
    total = audit(toy({"a": W}, metadata={"n_parameters_live": "600"})).summary
    assert total.n_parameters == 600
    assert "600" in total.n_parameters_because
    assert "512" in total.n_parameters_because


def test_unreadable_bytes_are_still_counted_as_stored() -> None:
    total = audit(toy({"a": W, "b": Broken((64, 8))}, format="onnx")).summary
    assert (total.n_bytes, total.n_bytes_duplicate, total.n_parameters) == (4096, 0, 1024)


# Classes.


def test_sameness_is_unknown_not_false_where_bytes_cannot_be_read() -> None:
    subject = toy({"a": W, "b": Broken((64, 8)), "c": ramp(64, 8, seed=1)})
    equality = Equality(subject.model, subject.found)
    assert equality.same("a", "b") is None
    assert equality.same("a", "c") is False
    assert equality.same("b", "b") is True


def test_two_empty_tensors_of_one_shape_are_equal() -> None:
    empty = np.zeros((0, 8), "float32")
    subject = toy({"a": empty, "b": empty.copy(), "c": np.zeros((0, 9), "float32")})
    equality = Equality(subject.model, subject.found)
    assert (equality.same("a", "b"), equality.same("a", "c")) == (True, False)


def test_a_note_beside_the_weights_does_not_take_away_what_the_class_restores() -> None:
    note = replace(claim("e", "h", restores=False, condition=""), claimed_by="model.safetensors __metadata__")
    (one,) = declared(toy({"e": W, "h": None}, declared=[claim("e", "h"), note]).model, active=True)
    assert one.restores
    assert one.condition == "config.json:tie_word_embeddings"


regions = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(0, 12)).map(lambda r: (r[0], r[1], r[1] + r[2])),
    max_size=12,
)


@given(regions)
def test_covered_bytes_agree_with_counting_every_byte(found: list[Region]) -> None:
    assert n_bytes_covered(found) == len({(where, byte) for where, a, b in found for byte in range(a, b)})
