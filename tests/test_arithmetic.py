"""The arithmetic that is compared: settings are made and put back, and loose operations are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tieaudit.arithmetic import WORKSPACE, attempt, exact, held_bytes, timed  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


SWITCHES = """
import sys, torch
from tieaudit.arithmetic import exact

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

def settings():
    return (
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )

exec(sys.argv[1])
before = settings()
with exact():
    inside = settings()
assert "tf32" not in inside[:3] and inside[3:5] == (False, True), inside
assert settings() == before, (before, settings())
print(before)
"""


@pytest.mark.parametrize(
    "switch",
    [
        "pass",
        "matmul.fp32_precision = 'tf32'",  # the newer switch, after which the older ones raise
        "matmul.allow_tf32 = True; cudnn.benchmark = True",
        "torch.set_float32_matmul_precision('medium'); torch.use_deterministic_algorithms(True, warn_only=True)",
    ],
)
def test_settings_are_made_and_put_back_whichever_switch_the_user_had_turned(switch: str) -> None:
    """In a process of its own, for the two kinds of switches must not be mixed."""
    done = subprocess.run(
        [sys.executable, "-c", SWITCHES, switch], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("tf32" in done.stdout.split(",")[0]) is (switch != "pass")


def test_the_workspace_of_cublas_is_set_before_cuda_starts_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    if torch.cuda.is_initialized():
        pytest.skip("CUDA has started in this process")
    monkeypatch.delenv(WORKSPACE[0], raising=False)
    with exact():
        assert os.environ[WORKSPACE[0]] == ":4096:8"
    monkeypatch.setenv(WORKSPACE[0], ":16:8")
    with exact():
        assert os.environ[WORKSPACE[0]] == ":16:8"


def test_an_operation_without_a_deterministic_version_runs_all_the_same_and_is_named() -> None:
    found, where = torch.nn.functional.max_pool2d(torch.randn(1, 1, 4, 4), 2, return_indices=True)
    noted: set[str] = set()
    with exact():
        result = attempt(lambda: torch.nn.functional.max_unpool2d(found, where, 2), noted)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert result.shape == (1, 1, 4, 4)
    assert noted == {"max_unpooling2d_forward_out"}


def test_any_other_error_is_not_swallowed() -> None:
    def fails() -> None:
        raise RuntimeError("shapes do not match")

    noted: set[str] = set()
    with exact(), pytest.raises(RuntimeError, match="shapes do not match"):
        attempt(fails, noted)
    assert noted == set()


def test_a_module_is_measured_where_it_is_and_a_tie_is_counted_once() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False))
    assert held_bytes(module) == 2 * 160
    module[1].weight = module[0].weight
    assert held_bytes(module) == 160  # the tempting wrong answer is 320
    seen: list[bool] = []
    with exact():
        found = timed(lambda: seen.append(torch.are_deterministic_algorithms_enabled()), torch.device("cpu"), 2, 0.0)
        assert torch.are_deterministic_algorithms_enabled()
    assert len(found.seconds) == 2
    assert seen == [False] * 3
