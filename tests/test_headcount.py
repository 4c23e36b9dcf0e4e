"""Fewer heads in the comparison of schemes: what they save by the closed form, what they change by brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from onnx_cases import saved
from test_gqa import HEADS, SIZE, D, attention

from tieaudit.comparison import Choice, compare
from tieaudit.headcount import fewer_heads
from tieaudit.model import Model
from tieaudit.pooling import pooled, repeated
from tieaudit.propose import propose, schemes
from tieaudit.scan import look
from tieaudit.toy import ramp, toy


def choices(model: Model, *, deep: bool = False) -> dict[str, Choice]:
    return {one.scheme: one for one in compare(look(model), deep=deep) if one.scheme.startswith(("gqa", "mqa"))}


@pytest.mark.parametrize("gemm", [False, True])
def test_pooled_heads_stand_in_the_table_with_what_they_save_and_change(gemm: bool, tmp_path: Path) -> None:
    proto = attention(gemm=gemm)  # Gemm keeps its heads in rows, MatMul along them
    values = {one.name: numpy_helper.to_array(one).astype(np.float64) for one in proto.graph.initializer}
    found = choices(saved(proto, tmp_path))
    assert set(found) == {"gqa:2", "mqa"}  # 8 and 4 are no fewer than the four that there are
    for name, n_groups in (("gqa:2", 2), ("mqa", 1)):
        change = size = 0.0
        for which in "kv":
            for end in ("weight", "bias"):
                one = values[f"{which}.{end}"]
                axis = 0 if gemm or end == "bias" else 1
                seen = repeated(pooled(one, axis, HEADS, n_groups), axis, HEADS, n_groups)
                change, size = change + np.square(one - seen).sum(), size + np.square(one).sum()
        assert found[name].changed == pytest.approx(change / size, rel=1e-9)
        # two projections of D × HEADS·SIZE with a bias each, of which n_groups heads of HEADS are left
        assert found[name].n_parameters_saved == 2 * (D + 1) * SIZE * (HEADS - n_groups)
        assert found[name].n_bytes_saved == 4 * found[name].n_parameters_saved
        assert found[name].exact and found[name].n_classes == 2


def test_equal_heads_are_seen_to_cost_nothing(tmp_path: Path) -> None:
    assert choices(saved(attention(equal=True), tmp_path))["gqa:2"].changed == 0.0


@pytest.mark.parametrize("gemm", [False, True])
def test_a_sample_has_the_same_places_of_every_head(gemm: bool, tmp_path: Path) -> None:
    proto = attention(gemm=gemm, equal=True)
    model = saved(proto, tmp_path)
    candidates = propose(look(model), schemes(["gqa:2"])[0])[0]
    for n_numbers in (1, 50, 200):
        found = fewer_heads(model, candidates, n_numbers)
        assert found is not None and not found.exact
        assert found.changed == 0.0  # the heads of a pair are equal: any other places would differ


def test_what_the_format_cannot_pool_is_in_no_table() -> None:
    names = [f"model.layers.0.self_attn.{one}_proj.weight" for one in "qkv"]
    subject = toy({name: ramp(16, 16, seed=seed) for seed, name in enumerate(names)}, format="safetensors")
    candidates = propose(subject, schemes(["gqa:2"])[0])[0]
    assert len(candidates) == 2  # a key and a value
    assert fewer_heads(subject.model, candidates, None) is None
