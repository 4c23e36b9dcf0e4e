"""Every input that once failed under a fuzzer, through the same checks; and a few changed ones of every kind."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.boxes import FILE, PIPE, pack
from fuzz.guard import Violation, guarded
from fuzz.targets import TARGETS
from tieaudit.errors import UsageError
from tieaudit.formats.onnx import wire

pytest.importorskip("safetensors")
SEEDS = sorted(path for path in (Path(__file__).parent / "seeds").rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def _a_limit_and_small_tensors_left_in_the_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader that waits for a pipe would wait for ever; small tensors shall be left out as large ones are."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Violation("did not end")

    monkeypatch.setattr(wire, "N_BYTES_INLINE", 24)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_failed_is_read_or_refused_now(seed: Path) -> None:
    assert TARGETS[seed.parent.name].check(seed.read_bytes()) is None


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_to_begin_with_is_read_or_refused(name: str) -> None:
    for data in TARGETS[name].seeds():
        assert TARGETS[name].check(data) is None


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_structural_changes_break_no_reader(name: str) -> None:
    # Each example changes one input to begin with a few times; `make fuzz` does the same for minutes.
    target = TARGETS[name]
    inputs = list(target.seeds())
    if not inputs:
        pytest.skip("the library that makes them is not installed")

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, len(inputs) - 1), st.integers(0, 2**32 - 1), st.integers(1, 4))
    def check(index: int, number: int, n_changes: int) -> None:
        rng, data = random.Random(number), inputs[index]
        for _ in range(n_changes):
            data = target.mutated(data, rng, target.n_most, lambda part: part[: rng.randrange(len(part) + 1)])
        assert target.check(data) is None

    check()


def test_the_checks_notice_a_reader_that_opens_another_file_or_writes(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.write_bytes(b"secret")
    with pytest.raises(Violation, match="other"), guarded(home):
        other.read_bytes()
    with pytest.raises(Violation, match="new"), guarded(home):
        (home / "new").write_bytes(b"")
    with pytest.raises(Violation, match="took"), guarded(home, seconds=-1):
        pass


def test_the_checks_notice_a_reader_that_sees_another_model_than_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from tieaudit.formats.onnx import read, tensors
    from tieaudit.formats.safetensors import header

    onnx_file, checkpoint = next(iter(TARGETS["onnx"].seeds())), next(iter(TARGETS["safetensors"].seeds()))
    with monkeypatch.context() as patch:
        patch.setattr(read, "find_uses", lambda *_: iter(()))
        with pytest.raises(Violation, match="uses differ"):
            TARGETS["onnx"].check(onnx_file)
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "shape_of", lambda dims, where: tuple(dims)[::-1])
        with pytest.raises(Violation, match="shape"):
            TARGETS["onnx"].check(onnx_file)
    with monkeypatch.context() as patch:
        patch.setattr(header, "_check_layout", lambda *_: None)
        with pytest.raises(Violation, match="read what the library refuses"):
            TARGETS["safetensors"].check(checkpoint + b"left over")


def test_the_checks_notice_a_checkpoint_that_is_read_otherwise_than_torch_reads_it_or_looks_a_class_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    import pickle

    from tieaudit.formats.torch_checkpoint import read

    tied = next(iter(TARGETS["checkpoint"].seeds()))
    with monkeypatch.context() as patch:
        patch.setattr(read, "is_row_major", lambda *_: True)
        with pytest.raises(Violation, match="other bytes than torch's"):
            TARGETS["checkpoint"].check(tied)
    unpickled = pickle.dumps(Path)

    def opens(path: Path, key: str) -> None:
        pickle.loads(unpickled)
        raise UsageError("read by unpickling")

    with monkeypatch.context() as patch:
        patch.setattr(read, "read", opens)
        with pytest.raises(Violation, match="looked up pathlib"):
            TARGETS["checkpoint"].check(tied)


def test_a_folder_of_pipes_is_refused_without_waiting() -> None:
    names = ("model.safetensors", "a.safetensors.index.json", "genai_config.json", "m.onnx", "m.onnx_data", "m.data")
    pipes = [(PIPE, name, b"") for name in names]
    for name in TARGETS:
        if name in ("folder", "scan"):
            assert TARGETS[name].check(pack([(FILE, "config.json", b"{}"), *pipes])) is None
            assert TARGETS[name].check(pack([(PIPE, "config.json", b""), *pipes])) is None
