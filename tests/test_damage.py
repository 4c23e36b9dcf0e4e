"""How alike two tables are: every diagnostic against its null by simulation, and what the numbers are taken to mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tieaudit.damage import likeness
from tieaudit.diagnostics import Diagnostic, Pair
from tieaudit.model import Member, Weight
from tieaudit.pairing import pair
from tieaudit.registry import discover
from tieaudit.view import AS_STORED, TRANSPOSED, View

Array = NDArray[Any]


@dataclass(frozen=True)
class InMemory:
    """Bytes that count how many of them were read."""

    data: bytes
    read: list[int]

    @property
    def n_bytes(self) -> int:
        return len(self.data)

    @property
    def region(self) -> tuple[str, int, int]:
        return (f"memory:{id(self)}", 0, len(self.data))

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        ranges = list(ranges)
        self.read.append(sum(length for _, length in ranges))
        return [self.data[begin : begin + length] for begin, length in ranges]


def members(a: Array, b: Array, view: View = AS_STORED) -> list[tuple[Weight, Member]]:
    weights = [
        Weight(id=name, name=name, shape=one.shape, dtype=str(one.dtype), storage=InMemory(one.tobytes(), []))
        for name, one in (("a", a), ("b", b))
    ]
    return [(weights[0], Member("a")), (weights[1], Member("b", view))]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decaying(n_rows: int, n_columns: int, seed: int) -> Array:
    """A spectrum that falls off, about a common direction, as trained tables have."""
    rng = np.random.default_rng(seed)
    falling = rng.standard_normal((n_rows, n_columns)) * np.linspace(1.0, 0.1, n_columns)
    turned = falling @ np.linalg.qr(rng.standard_normal((n_columns, n_columns)))[0] + 3.0 * rng.standard_normal(
        n_columns
    )
    return np.asarray(turned, np.float32)


@pytest.mark.parametrize("make", [normal, decaying], ids=["isotropic", "decaying spectrum, far from the origin"])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(3000, 32), (800, 64), (700, 12)])
def test_independent_tables_have_the_null_of_every_diagnostic(
    make: Callable[..., Array], n_rows: int, n_columns: int
) -> None:
    draws = [
        pair(members(make(n_rows, n_columns, seed=seed), make(n_rows, n_columns, seed=seed + 100)))
        for seed in range(12)
    ]
    for name, diagnostic in discover("diagnostics", Diagnostic).items():
        found = [diagnostic.measure(one) for one in draws]
        values = [one.value for one in found if one is not None]
        nulls = [one.null for one in found if one is not None]
        if name == "subspace" and n_columns < 8 or name in ("subspace", "relative-distance") and make is decaying:
            continue  # leading directions of a decaying spectrum are random, a common direction is a relation
        assert len(values) == len(draws), name
        # twelve draws: their mean is within a few hundredths of the null, or within a tenth of a small one
        assert math.isclose(np.mean(values), np.mean(nulls), rel_tol=0.12, abs_tol=0.02), (name, values, nulls[:1])


def test_the_nulls_are_the_published_ones_where_there_are_many_more_rows_than_columns() -> None:
    seen = pair(members(normal(20000, 64, seed=1), normal(20000, 64, seed=2)), deep=True)
    found = {name: one.measure(seen) for name, one in discover("diagnostics", Diagnostic).items()}
    nulls = {name: one.null for name, one in found.items() if one is not None}
    assert nulls["linear-map"] == pytest.approx(64 / 20000, rel=1e-3)
    assert nulls["cka"] == pytest.approx(64 / 20000, rel=0.02)
    assert nulls["procrustes"] == pytest.approx(8 / (3 * math.pi) * math.sqrt(64 / 20000), rel=0.03)
    assert nulls["relative-distance"] == pytest.approx(math.sqrt(2), rel=1e-2)
    assert (nulls["row-cosine"], nulls["subspace"]) == (0.0, 1 / 8)


SHAPES = [(4000, 64), (600, 600), (64, 4000), (300, 2048), (50, 7), (512,), (32, 3, 3, 3), (128, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_independent_tables_are_unrelated_whatever_their_shape_and_a_moved_copy_is_close(
    shape: tuple[int, ...],
) -> None:
    for seed in range(5):
        a, b = normal(*shape, seed=seed), normal(*shape, seed=seed + 50)
        assert likeness(members(a, b)).verdict == "unrelated"
        assert likeness(members(a, (a + 0.2 * b).astype(np.float32))).verdict == "close"


def test_a_common_direction_or_common_row_norms_do_not_make_tables_alike() -> None:
    a, b = normal(5000, 64, seed=1), normal(5000, 64, seed=2)
    direction = 4.0 * np.random.default_rng(3).standard_normal(64)
    norms = np.exp(np.random.default_rng(4).standard_normal((5000, 1)))
    columns = np.exp(np.random.default_rng(5).standard_normal(64))
    for one, other in (
        (a + direction, b + direction),
        (a * norms, b * norms),
        (a * norms * columns, b * norms * columns),
    ):
        found = likeness(members(one.astype(np.float32), other.astype(np.float32)))
        assert found.verdict == "unrelated", found.because


def test_a_rotated_copy_is_related_by_a_linear_map_and_not_alike() -> None:
    a = normal(4000, 64, seed=1)
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((64, 64)))[0]
    found = likeness(members(a, (a @ rotation).astype(np.float32)))
    assert found.verdict == "related by a linear map"
    assert found.diagnostics["linear-map"][0] == pytest.approx(1.0, abs=1e-6)
    assert found.diagnostics["procrustes"][0] == pytest.approx(1.0, abs=1e-6)


def test_a_transposed_member_is_compared_in_the_layout_of_the_first() -> None:
    a, b = normal(3000, 48, seed=1), normal(3000, 48, seed=2)
    moved = np.ascontiguousarray((a + 0.1 * b).T)
    straight = likeness(members(a, np.ascontiguousarray(moved.T)))
    turned = likeness(members(a, moved, TRANSPOSED))
    assert turned.verdict == "close"
    for name, values in straight.diagnostics.items():
        assert turned.diagnostics[name] == pytest.approx(values), name


def test_equal_tables_are_equal_and_a_sample_never_says_so() -> None:
    small, large = normal(100, 20), normal(60000, 64)
    assert likeness(members(small, small)).verdict == "equal"
    sampled = likeness(members(large, large))
    assert (sampled.verdict, sampled.exact) == ("close", False)
    assert likeness(members(large, large), deep=True).verdict == "equal"


def test_a_sample_reads_a_bounded_part_and_agrees_with_the_whole() -> None:
    a, b = normal(80000, 64, seed=1), normal(80000, 64, seed=2)
    pairs = members(a, (a + 0.5 * b).astype(np.float32))
    sampled = likeness(pairs)
    storage = pairs[0][0].storage
    assert isinstance(storage, InMemory)
    assert sum(storage.read) <= 2 * 4 * (1 << 21)  # read twice, for the mean row and for the cosines about it
    whole = likeness(pairs, deep=True)
    for name, (value, _) in whole.diagnostics.items():
        assert sampled.diagnostics[name][0] == pytest.approx(value, abs=0.05), name
    assert "of 80,000 rows" in sampled.because
    assert "rows" not in whole.because


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((50, 8), np.float32), normal(50, 8)),
        (np.full((50, 8), np.nan, np.float32), normal(50, 8)),
        (np.full((50, 8), np.inf, np.float32), normal(50, 8)),
        (normal(3, 2), normal(3, 2, seed=1)),
        (np.zeros((50, 8), np.int32), np.ones((50, 8), np.int32)),
    ],
    ids=["zeros", "NaN", "infinite", "six numbers", "integers"],
)
def test_what_has_no_answer_is_cannot_tell(a: Array, b: Array) -> None:
    assert likeness(members(a, b)).verdict == "cannot tell"


def test_linear_map_agrees_with_least_squares_on_the_whole_table() -> None:
    a, b = normal(500, 16, seed=1).astype(np.float64), normal(500, 16, seed=2).astype(np.float64)
    b = b + a @ np.random.default_rng(3).standard_normal((16, 16))
    one, other = a - a.mean(axis=0), b - b.mean(axis=0)
    best = np.linalg.lstsq(one, other, rcond=None)[0]
    expected = 1.0 - np.square(other - one @ best).sum() / np.square(other).sum()
    found = discover("diagnostics", Diagnostic)["linear-map"].measure(pair(members(a, b)))
    assert found is not None
    assert found.value == pytest.approx(expected, abs=1e-9)


def test_a_pair_holds_sums_and_nothing_of_the_size_of_the_tables() -> None:
    seen: Pair = pair(members(normal(60000, 64, seed=1), normal(60000, 64, seed=2)))
    assert seen.gram_a.shape == (64, 64)
    assert (seen.n_rows_seen, seen.exact) == (32768, False)  # 2²¹ numbers of 64 columns


def test_two_norms_near_one_are_close_since_little_changes_if_one_serves_for_both() -> None:
    rng = np.random.default_rng(0)
    one, other = (1.0 + 0.03 * rng.standard_normal(64) for _ in range(2))
    assert likeness(members(one, other)).verdict == "close"


def test_the_sums_of_a_device_are_those_of_numpy() -> None:
    """The path of a GPU, with tensors on the CPU; float64 in both, so only the order of adding differs."""
    pytest.importorskip("torch")
    check_on("cpu")


@pytest.mark.cuda
def test_the_sums_of_a_gpu_are_those_of_numpy() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from tieaudit.placing import place_on

    assert place_on("auto")(np.zeros(2)).device.type == "cuda"
    check_on("cuda")


def check_on(device: str) -> None:
    from tieaudit.placing import tensors_on

    for a, b in ((normal(3000, 48), normal(3000, 48, seed=1)), (decaying(900, 700, 1), decaying(900, 700, 2))):
        usual, placed = (pair(members(a, b), place=place) for place in (np.asarray, tensors_on(device)))
        for name in ("squared_a", "squared_b", "dot", "cosines", "gram_a", "gram_b", "cross"):
            one, other = np.asarray(getattr(usual, name)), np.asarray(getattr(placed, name))
            assert np.abs(one - other).max() <= 1e-11 * np.abs(one).max(), name
        assert usual.n_columns_seen == placed.n_columns_seen
        one, other = likeness(members(a, b)), likeness(members(a, b), place=tensors_on(device))
        assert one.verdict == other.verdict
        for name, values in one.diagnostics.items():
            assert other.diagnostics[name] == pytest.approx(values, rel=1e-8, abs=1e-10)


def test_without_a_gpu_numpy_is_used_and_a_gpu_that_is_asked_for_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tieaudit import placing
    from tieaudit.errors import TieAuditError

    monkeypatch.setattr(placing, "_has_gpu", lambda: False)
    assert placing.place_on("auto") is np.asarray and placing.place_on("cpu") is np.asarray
    monkeypatch.setattr(placing, "find_spec", lambda name: None)
    with pytest.raises(TieAuditError, match="needs the package torch"):
        placing.place_on("cuda")


def scanned(path: object, *words: str) -> tuple[str, dict[str, Any]]:
    import json

    from click.testing import CliRunner

    from tieaudit.cli import main

    said = CliRunner().invoke(main, ["scan", str(path), *words])
    told = CliRunner().invoke(main, ["scan", str(path), *words, "--format", "json"])
    assert (said.exit_code, told.exit_code) == (0, 0), said.output + told.output
    found: dict[str, Any] = json.loads(told.output)
    return said.output, found


def model_of(folder: Any, embedding: Array, head: Array) -> Any:
    """A lookup in [V, d] and a product with the head's transpose, as ONNX."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("Gather", ["e", "ids"], ["h"]), helper.make_node("MatMul", ["h", "u"], ["logits"])],
        "lm",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", len(embedding)])],
        [numpy_helper.from_array(embedding, "e"), numpy_helper.from_array(np.ascontiguousarray(head.T), "u")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "lm.onnx")
    return folder / "lm.onnx"


def test_a_scan_says_how_alike_candidates_are_only_where_it_is_asked(tmp_path: Any) -> None:
    import jsonschema

    a, b = normal(40_000, 64), normal(40_000, 64, seed=1)
    for name, other, verdict in (("far", b, "unrelated"), ("near", (a + 0.2 * b).astype(np.float32), "close")):
        (tmp_path / name).mkdir()
        path = model_of(tmp_path / name, a, other)
        text, told = scanned(path)
        assert "linear-map" not in text and told["models"][0]["candidates"][0]["likeness"] is None
        text, told = scanned(path, "--damage")
        found = told["models"][0]["candidates"][0]["likeness"]
        assert (found["verdict"], found["exact"], found["ids"]) == (verdict, False, ["e", "u"])
        direct = likeness(members(a, np.ascontiguousarray(other.T), TRANSPOSED))
        for kind, values in direct.diagnostics.items():
            assert tuple(found["diagnostics"][kind].values()) == pytest.approx(values)
            assert kind in text
        deep = scanned(path, "--damage", "--deep")[1]["models"][0]["candidates"][0]["likeness"]
        # ‖A − B‖/‖A‖ over all rows; B = A + 0.2·N is 0.2 away, an independent one √2
        delta = np.linalg.norm(a.astype(np.float64) - other) / np.sqrt(np.linalg.norm(a) * np.linalg.norm(other))
        assert deep["exact"] and deep["diagnostics"]["relative-distance"]["value"] == pytest.approx(delta, rel=0.03)
        schema = json_of(Path(__file__).parent.parent / "docs" / "schema" / "scan-1.schema.json")
        jsonschema.validate(told, schema)


def test_of_a_scheme_with_many_classes_the_largest_few_are_compared() -> None:
    from tieaudit.damage import N_MOST_CLASSES, foreseen
    from tieaudit.propose import listed_candidates
    from tieaudit.toy import ramp, toy

    names = [f"layers.{n}.mlp.{part}_proj.weight" for n in range(2) for part in ("gate", "up", "down")]
    weights = {name: ramp(64, 64, seed=seed) for seed, name in enumerate(names)}
    norms = {f"layers.{n}.norm{k}.weight": ramp(64, seed=90 + 9 * n + k) for n in range(2) for k in range(3)}
    subject = toy(weights | norms)
    found = foreseen(subject, listed_candidates(subject), deep=False, place=np.asarray)
    albert = [one for one in found if one.scheme == "albert"]
    compared = [one for one in albert if one.likeness is not None]
    assert (len(albert), len(compared)) == (6, N_MOST_CLASSES)
    assert min(one.n_bytes_saved for one in compared[:3]) == 4 * 64 * 64  # the matrices, and then one of the norms
    assert {one.likeness.verdict for one in compared if one.likeness and one.n_bytes_saved > 256} == {"unrelated"}


def json_of(path: Path) -> Any:
    import json

    return json.loads(path.read_text(encoding="utf-8"))


def test_a_scan_without_damage_reads_no_weights_for_candidates(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tieaudit.damage
    from tieaudit.load import load_one
    from tieaudit.scan import scan

    path = model_of(tmp_path, normal(500, 8), normal(500, 8, seed=1))
    asked: list[bool] = []
    monkeypatch.setattr(tieaudit.damage, "foreseen", lambda subject, found, *, deep, place: asked.append(deep) or found)
    model = load_one(str(path))
    assert scan(model).candidates[0].likeness is None and asked == []
    scan(model, damage="deep", device="cpu")
    assert asked == [True]


def test_deep_and_device_belong_to_damage(tmp_path: Any) -> None:
    from click.testing import CliRunner

    from tieaudit.cli import main

    refused = CliRunner().invoke(main, ["scan", "x.onnx", "--deep"])
    assert refused.exit_code == 2 and "expected --damage with --deep" in refused.output


# ------------------------------------------------------------------------- tables that are not Gaussian


def _common_mean(rng: Any, n: int, d: int) -> Array:
    return rng.standard_normal((n, d)) + 3 * np.random.default_rng(99).standard_normal(d)


def _zipfian(rng: Any, n: int, d: int) -> Array:
    return rng.standard_normal((n, d)) * (np.arange(1, n + 1) ** -0.7)[:, None]


def _dead_rows(rng: Any, n: int, d: int) -> Array:
    table = rng.standard_normal((n, d))
    table[n // 3 :] = 0.0
    return table


def _unused_tokens(rng: Any, n: int, d: int) -> Array:
    table = rng.standard_normal((n, d))
    table[: n // 2] = rng.standard_normal(d) * 0.01  # one vector, as they were initialised
    return table


def _few_directions(rng: Any, n: int, d: int) -> Array:
    table = rng.standard_normal((n, d))
    table[:, :2] *= 30
    return table


def _sparse(rng: Any, n: int, d: int) -> Array:
    return rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.05)


def _heavy(rng: Any, n: int, d: int) -> Array:
    return rng.standard_t(2.1, (n, d))


KINDS = (_common_mean, _zipfian, _dead_rows, _unused_tokens, _few_directions, _sparse, _heavy)


@pytest.mark.parametrize("make", KINDS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("shape", [(1000, 64), (200, 128), (64, 64), (50, 300), (1000, 4), (30, 8), (10, 10)], ids=str)
def test_independent_tables_of_any_make_are_never_called_related(
    make: Callable[[Any, int, int], Array], shape: tuple[int, int]
) -> None:
    for seed in range(4):
        a, b = (make(np.random.default_rng((seed, side)), *shape).astype(np.float32) for side in (1, 2))
        found = likeness(members(a, b))
        assert found.verdict in ("unrelated", "cannot tell"), found.because


@pytest.mark.parametrize("make", KINDS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("shape", [(1000, 64), (64, 64), (50, 300)], ids=str)
def test_a_fine_tuned_child_of_any_make_is_close(
    make: Callable[[Any, int, int], Array], shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(5)
    a = make(rng, *shape)
    b = a * (1.0 + 0.1 * rng.standard_normal(shape))  # what is zero stays zero, as rows without a gradient do
    found = likeness(members(a.astype(np.float32), b.astype(np.float32)))
    assert found.verdict == "close", found.because


def test_few_long_rows_are_explained_by_chance_and_the_null_says_so() -> None:
    # the longest of 1,000 rows hold most of a table: 64 columns explain far more than 64 / 999 = 0.064 of it
    values, nulls = [], []
    for seed in range(8):
        a, b = (_zipfian(np.random.default_rng((seed, side)), 1000, 64) for side in (1, 2))
        measured = likeness(members(a, b), deep=True).diagnostics["linear-map"]
        values.append(measured[0])
        nulls.append(measured[1])
    assert np.mean(values) > 0.7
    assert np.mean(nulls) == pytest.approx(np.mean(values), abs=0.02)


def _rows(name: str, rng: np.random.Generator, n: int) -> Array:
    """How long the rows of both tables are, [rows, 1]."""
    ranks = np.arange(1, n + 1)
    made = {
        "all alike": np.ones(n),
        "lognormal, σ 1": np.exp(rng.standard_normal(n)),
        "lognormal, σ 1.5": np.exp(1.5 * rng.standard_normal(n)),
        "lognormal, σ 2": np.exp(2.0 * rng.standard_normal(n)),
        "Zipf, exponent ½": ranks**-0.5,
        "Zipf, exponent ¾": ranks**-0.75,
        "Zipf": 1.0 / ranks,
        "one row in fifty trained": np.where(ranks < n // 50, 1.0, 0.02),
        "one row in fifty trained, the others dead": np.where(ranks < n // 50, 1.0, 0.0),
    }
    return made[name][:, None]


def _columns(name: str, d: int) -> Array:
    falling, outlier = np.exp(np.linspace(0.0, -4.0, d)), np.ones(d)
    outlier[3] = 300.0 if name.endswith("300") else 1000.0
    return {"all alike": np.ones(d), "falling": falling}.get(name, outlier)


_LENGTHS = [
    "all alike", "lognormal, σ 1", "lognormal, σ 1.5", "lognormal, σ 2", "Zipf, exponent ½", "Zipf, exponent ¾", "Zipf",
    "one row in fifty trained", "one row in fifty trained, the others dead",
]  # fmt: skip
_SHAPES_OF_COLUMNS = ["all alike", "falling", "one column × 300", "one column × 1000"]


@pytest.mark.parametrize("columns", _SHAPES_OF_COLUMNS)
@pytest.mark.parametrize("lengths", _LENGTHS)
def test_independent_tables_are_strangers_whatever_the_lengths_of_their_rows_and_columns(
    lengths: str, columns: str
) -> None:
    said, beyond = set(), []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        size = _rows(lengths, rng, 1201) * _columns(columns, 24)
        a, b = (np.asarray(rng.standard_normal((1201, 24)) * size, np.float32) for _ in "ab")
        said.add(likeness(members(a, b)).verdict)
        found = discover("diagnostics", Diagnostic)["linear-map"].measure(pair(members(a, b)))
        if found is not None:
            beyond.append((found.value - found.null) / max(found.spread, 1e-12))
    # the tempting null, columns/rows = 0.02, stands against a share of 0.1 … 0.9 that rows long in both explain
    assert said <= {"unrelated", "cannot tell"}
    assert not beyond or abs(np.mean(beyond)) < 3.0 and max(beyond) < 5.0, beyond


@pytest.mark.parametrize("columns", ["all alike", "falling", "one column × 300"])
@pytest.mark.parametrize("lengths", _LENGTHS[:6])
def test_heirs_stay_close_and_images_stay_images_whatever_the_lengths_of_rows_and_columns(
    lengths: str, columns: str
) -> None:
    rng = np.random.default_rng(7)
    size = _rows(lengths, rng, 1201) * _columns(columns, 24)
    a, noise = (rng.standard_normal((1201, 24)) * size for _ in "ab")
    child = np.asarray(a + 0.2 * noise, np.float32)
    assert likeness(members(a.astype(np.float32), child)).verdict == "close"
    if columns != "one column × 300":  # of its image, that column is nearly all
        image = np.asarray(a @ rng.standard_normal((24, 24)), np.float32)
        assert likeness(members(a.astype(np.float32), image)).verdict == "related by a linear map"


def test_the_null_of_a_linear_map_is_the_sum_of_leverages_by_lengths() -> None:
    rng = np.random.default_rng(3)
    size = np.exp(rng.standard_normal((300, 1)))
    a, b = (np.asarray(rng.standard_normal((300, 12)) * size, np.float32) for _ in "ab")
    a[:, 4] = a[:, 5]  # rank 11
    seen = pair(members(a, b))
    x, y = (one.astype(np.float64) - one.mean(axis=0, dtype=np.float64) for one in (a, b))
    hat = x @ np.linalg.pinv(x)
    found = discover("diagnostics", Diagnostic)["linear-map"].measure(seen)
    assert found is not None
    assert found.value == pytest.approx(np.square(hat @ y).sum() / np.square(y).sum())
    assert found.null == pytest.approx((np.diag(hat) * np.square(y).sum(axis=1)).sum() / np.square(y).sum())
    # rows of the same lengths in directions at random
    lengths = np.linalg.norm(y, axis=1, keepdims=True)
    draws = []
    for _ in range(400):
        turned = rng.standard_normal((300, 12))
        turned *= lengths / np.linalg.norm(turned, axis=1, keepdims=True)
        draws.append(np.square(hat @ turned).sum() / np.square(turned).sum())
    assert found.null == pytest.approx(np.mean(draws), rel=0.02)
    assert found.spread == pytest.approx(np.std(draws), rel=0.35)
