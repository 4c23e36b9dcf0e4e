"""The benchmark suite: its models are what they claim, its judgements can fail, and the page is what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import checkpoint, measure, models, page, peers, run, spelling
from benchmarks.parts import Goal, bend, fitted, one_gigabyte, same_shape

SMALL: dict[str, int] = {"n_layers": 3, "vocabulary": 60, "hidden": 8, "inner": 16}


def arrays_of_onnx(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert all(one.HasField("raw_data") for one in model.graph.initializer)
    return {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}


def arrays_of_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    library = pytest.importorskip("safetensors.numpy")
    return dict(library.load_file(path))


def related(arrays: dict[str, np.ndarray[Any, Any]]) -> set[frozenset[str]]:
    """Pairs that are equal or transposed, by comparing all with all."""
    return {
        frozenset((one, other))
        for one, other in combinations(arrays, 2)
        if np.array_equal(arrays[one], arrays[other]) or np.array_equal(arrays[one], arrays[other].T)
    }


@pytest.mark.parametrize("form", ["external", "inline", "safetensors"])
def test_the_tied_model_holds_a_transposed_and_an_equal_pair_in_every_spelling(form: str, tmp_path: Path) -> None:
    matrices = models.language_model(tied=True, **SMALL)
    models.SPELLINGS[form](lambda: matrices)(tmp_path)
    found = (
        arrays_of_safetensors(tmp_path / "model.safetensors")
        if form == "safetensors"
        else arrays_of_onnx(tmp_path / "model.onnx")
    )
    assert (tmp_path / "model.onnx.data").exists() == (form == "external")
    assert len(found) == 2 + 3 * 6
    assert np.array_equal(found["head.weight"], found["embed.weight"].T)
    assert related(found) == {
        frozenset(("embed.weight", "head.weight")),
        frozenset(("layers.1.0.weight", "layers.2.0.weight")),
    }


def test_the_model_without_duplicates_has_none(tmp_path: Path) -> None:
    spelling.write_inline(tmp_path / "model.onnx", models.language_model(tied=False, **SMALL))
    assert related(arrays_of_onnx(tmp_path / "model.onnx")) == set()


def test_thousands_of_one_shape_are_all_different(tmp_path: Path) -> None:
    spelling.write_inline(tmp_path / "model.onnx", models.one_shape(300, side=4))
    found = arrays_of_onnx(tmp_path / "model.onnx")
    assert {one.shape for one in found.values()} == {(4, 4)}
    assert len({one.tobytes() for one in found.values()}) == 300


def test_the_large_model_has_98_tensors_and_the_size_that_its_page_says() -> None:
    matrices = models.language_model(tied=True)
    # 2 × 32,000 × 1,024 × 4 = 262,144,000 for embedding and head; 96 × 1,024 × 2,048 × 4 = 805,306,368
    assert (len(matrices), sum(one.n_bytes for one in matrices)) == (98, 1_067_450_368)
    names = {one.name for one in matrices}
    assert names >= one_gigabyte.EQUAL | one_gigabyte.TRANSPOSED


def test_the_largest_checkpoint_has_the_size_that_its_page_says() -> None:
    full, narrow = checkpoint.layout(90_000), checkpoint.layout(90_000, shrink=4)
    assert abs(full.n_tensors - 90_000) < 900
    assert len(full.shards) == 163
    assert 6.5e11 < full.n_bytes < 7.2e11
    assert narrow.n_tensors == full.n_tensors
    assert 15 < full.n_bytes / narrow.n_bytes < 17


def test_a_checkpoint_is_sparse_valid_and_without_constants_or_duplicates(tmp_path: Path) -> None:
    from tieaudit.formats.safetensors.sharded import read_checkpoint

    laid_out = checkpoint.layout(1_000, shrink=8)
    checkpoint.write(tmp_path, laid_out)
    found = read_checkpoint(tmp_path / "model.safetensors.index.json")
    assert len(found.entries) == laid_out.n_tensors
    seen = set()
    for _, entry in found.entries.values():
        ranges = checkpoint.written(entry.storage.n_bytes)
        written = b"".join(entry.storage.read_ranges(ranges))
        assert len(set(written)) > 1
        seen.add((entry.shape, written))
    assert len(seen) == laid_out.n_tensors
    allocated = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.safetensors"))
    assert allocated < laid_out.n_bytes / 4


def test_a_model_is_built_once_and_again_when_its_description_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        spelling.write_safetensors(folder / "model.safetensors", models.one_shape(2, side=2))

    monkeypatch.setattr(models, "BUILT", tmp_path)
    monkeypatch.setitem(models.MODELS, "tiny_safetensors", build)
    path = models.build("tiny_safetensors")
    assert path.is_file() and models.build("tiny_safetensors") == path and len(calls) == 1
    monkeypatch.setattr(models, "FORMAT_VERSION", "other")
    assert models.build("tiny_safetensors") == path and len(calls) == 2


def test_a_program_that_fails_or_hangs_is_one_line_without_a_place_of_this_machine() -> None:
    code = f"import sys; sys.exit('{measure.ROOT}/benchmarks/x.onnx: cannot be read')"
    failed = measure.repeated([sys.executable, "-c", code], 2)
    assert (failed.error, failed.seconds) == ("benchmarks/x.onnx: cannot be read", ())
    hung = measure.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert hung.error.startswith("not finished after ") and hung.seconds < 30


def test_memory_and_repeats_are_those_of_the_process() -> None:
    # from a small process, as the runner is one: what a child's peak begins with is its parent's
    code = (
        "import sys\nfrom benchmarks import measure\n"
        "done = measure.repeated([sys.executable, '-c', 'block = bytearray(150_000_000); print(len(block))'], 2)\n"
        "print(len(done.seconds), done.peak_bytes, done.stdout.strip())"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=measure.ROOT, capture_output=True, text=True, check=True)
    n_runs, peak_bytes, printed = map(int, told.stdout.split())
    assert (n_runs, printed) == (2, 150_000_000)
    assert 150e6 < peak_bytes < 250e6


def test_what_tieaudit_imports_is_seen() -> None:
    seen = measure.observe(["--version"])
    assert {"tieaudit", "click"} <= seen.packages
    assert "onnx" not in seen.packages


@pytest.mark.parametrize(
    ("kept", "equal", "transposed", "wrong"),
    [
        ({"embed.weight", "head.weight", "layers.1.0.weight", "layers.15.0.weight", "x"}, False, False, []),
        ({"embed.weight", "head.weight", "layers.1.0.weight", "x"}, True, False, []),
        ({"embed.weight", "layers.1.0.weight", "x"}, True, True, []),
        ({"embed.weight", "layers.1.0.weight"}, True, True, ["x"]),
    ],
)
def test_what_a_peer_found_is_judged_from_what_it_left(
    kept: set[str], equal: bool, transposed: bool, wrong: list[str]
) -> None:
    names = {"embed.weight", "head.weight", "layers.1.0.weight", "layers.15.0.weight", "x"}
    groups = peers.found(json.dumps({"kept": sorted(kept)}), names)
    assert one_gigabyte.judged(groups) == {"equal": equal, "transposed": transposed, "wrong": wrong}


def test_a_straight_line_and_a_parabola_are_told_apart() -> None:
    x = [float(n) for n in same_shape.NUMBERS]
    straight, parabola = [0.2 + 3e-5 * one for one in x], [0.2 + 3e-9 * one * one for one in x]
    assert fitted(x, straight).slope == pytest.approx(3e-5)
    assert fitted(x, straight).r_squared == pytest.approx(1)
    assert bend(x, straight) == pytest.approx(1)
    # (10,000² − 3,000²) / 7,000 = 13,000 over (3,000² − 1,000²) / 2,000 = 4,000
    assert bend(x, parabola) == pytest.approx(3.25) and bend(x, parabola) > same_shape.BEND
    assert fitted(x, parabola).r_squared > 0.95  # which is why R² alone does not decide


def made_up(seconds: float, peak_bytes: float, equal: bool = True) -> dict[str, Any]:
    """Figures of the 1.07 GB model, with a peer that takes 3 s."""
    own = {"name": "`tieaudit scan`", "does": "", "seconds": [seconds], "peak_bytes": peak_bytes}
    own |= {"equal": equal, "transposed": True, "wrong": []}
    peer = {**own, "name": one_gigabyte.PEER, "seconds": [3.0], "transposed": False}
    broken = {"name": "another peer", "does": "", "error": "TypeError: no <file>"}
    return {"versions": {"onnx-ir": "1"}, "forms": {form: [own, peer, broken] for form in one_gigabyte.FORMS}}


def holding(goals: Sequence[Goal]) -> list[bool | None]:
    return [goal.holds for goal in goals]


def test_a_goal_is_judged_by_time_by_memory_and_by_what_was_found() -> None:
    goals = one_gigabyte.PART.goals
    assert holding(goals(made_up(0.4, 100e6))) == [True, True, True]
    assert holding(goals(made_up(0.6, 100e6))) == [False, False, False]
    assert holding(goals(made_up(0.4, 240e6))) == [False, False, True]  # inline ONNX may take 250 MB
    assert holding(goals(made_up(0.4, 100e6, equal=False))) == [False, False, False]


def result(data: Any, load: float = 0.0) -> dict[str, Any]:
    """An entry of results.json."""
    return {"measured_on": "2026-01-01", "load": load, "n_repeats": 1, "machine": run.machine(), "data": data}


def test_the_page_says_what_fails_what_is_missing_and_that_others_were_at_work() -> None:
    text = page.rendered({"one-gigabyte": result(made_up(0.6, 100e6), load=3.0)}, run.PARTS, "Tried nothing.")
    assert "**does not hold** | 5.0×, 100 MB, both pairs found" in text
    assert "| another peer | failed: TypeError: no &lt;file> |" in text
    assert "> **Not quiet**: the load average was 3.00" in text
    assert "Not measured: `make bench BENCH_ARGS='--only cold-start'`." in text
    assert text.endswith("Tried nothing.\n")
    quiet = page.rendered({"one-gigabyte": result(made_up(0.4, 100e6))}, run.PARTS, "")
    assert "Not quiet" not in quiet and "does not hold" not in quiet


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    results = run.read_results(page.RESULTS)
    expected = page.rendered(results, run.PARTS, page.TRIED.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == expected, "run `make bench-page`"
    assert str(page.ROOT) not in page.RESULTS.read_text(encoding="utf-8")
