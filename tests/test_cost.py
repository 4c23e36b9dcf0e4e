"""Times are called different only where they are, and every printed number has its spread."""

from __future__ import annotations

from typing import Any

import pytest

from tieaudit import evidence
from tieaudit.cost import Cost, costs, differs
from tieaudit.machine import forget_peak, peak_since, repeated, resident_bytes


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 1.1, 1.2, 1.3], [1.05, 1.15, 1.25, 1.35], False),
        ([1.0, 1.01, 1.02, 1.03], [2.0, 2.01, 2.02, 2.03], True),
        ([2.0, 2.01, 2.02, 2.03], [1.0, 1.01, 1.02, 1.03], True),
        # the middle halves lie apart, but by less than a tenth
        ([1.0, 1.0, 1.0, 1.0], [1.05, 1.05, 1.05, 1.05], False),
        # a neighbour kept the processor busy: the fastest runs are alike
        ([1.0, 1.1, 1.1, 1.1], [1.02, 9.0, 9.0, 9.0], False),
        ([1.0], [1.0], False),
    ],
)
def test_times_differ_beyond_their_spread_or_not(one: list[float], other: list[float], expected: bool) -> None:
    assert differs(one, other) is expected


def cost(*seconds: float, n_bytes: int = 1 << 20, peak: int = 1 << 25, on_gpu: bool = False) -> Cost:
    return Cost(seconds, "A Chip", n_bytes, peak, on_gpu)


def test_a_difference_within_the_spread_is_printed_as_none() -> None:
    lines = evidence.fact_lines(costs(cost(0.001, 0.002, 0.003), cost(0.0011, 0.0019, 0.0031)), packs=False)
    assert lines[-1] == (
        "  time per run on A Chip: no measurable difference: 2 ms (middle half of 3 runs 1.5 … 2.5) before, "
        "1.9 ms (middle half of 3 runs 1.5 … 2.5) after"
    )


def test_a_real_difference_has_an_arrow_and_its_spread() -> None:
    lines = evidence.fact_lines(costs(cost(0.004, 0.004, 0.004), cost(0.002, 0.002, 0.002)), packs=False)
    assert lines[-1] == (
        "  time per run on A Chip: 4 ms (middle half of 3 runs 4 … 4) → 2 ms (middle half of 3 runs 2 … 2)"
    )


def test_device_memory_is_named_with_its_device_and_small_growth_of_a_process_is_not_shown() -> None:
    facts: dict[str, Any] = {"on_cuda": costs(cost(1.0, on_gpu=True), cost(1.0, peak=1 << 24, on_gpu=True))}
    assert facts["on_cuda"]["n_bytes_device_peak_before"] == 1 << 25
    assert "  device memory at most (A Chip): 33.6 MB → 16.8 MB" in evidence.fact_lines(facts, packs=False)
    small = evidence.fact_lines(costs(cost(1.0, peak=1 << 20), cost(1.0, peak=1 << 10)), packs=False)
    assert not any("memory of the process" in line for line in small)
    large = evidence.fact_lines(costs(cost(1.0), cost(1.0)), packs=False)
    assert any("memory of the process at most" in line for line in large)


def test_a_loose_operation_is_named_in_the_text() -> None:
    (line,) = evidence.fact_lines({"not_deterministic": ["cumsum_cuda_kernel"]}, packs=False)
    assert line.startswith("  no deterministic algorithm in PyTorch for cumsum_cuda_kernel")


def test_runs_are_repeated_for_the_time_given_and_the_peak_is_what_the_first_took() -> None:
    calls: list[int] = []
    assert len(repeated(lambda: calls.append(1), 5, 0.0).seconds) == 5
    assert len(calls) == 6  # one more, to warm up
    assert len(repeated(lambda: None, 1, 30.0).seconds) == 100
    if resident_bytes() is None or peak_since() is None:
        pytest.skip("this system does not say how much memory a process has")
    forget_peak()
    taken: list[Any] = []
    found = repeated(lambda: taken or taken.append(bytearray(b"x" * (64 << 20))), 1, 0.0)
    assert found.n_bytes_peak is not None and found.n_bytes_peak > 60 << 20
