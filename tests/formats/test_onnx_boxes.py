"""A weight that is cut into parts is used once; one of which a part is read twice is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.onnx_files import graph, read, save, tensor
from onnx import helper

from tieaudit.find import find

GATES = [(0, 4), (4, 8), (8, 12)]


def cut(path: Path, *bounds: tuple[int, int], old: bool = False, **more: Any) -> Any:
    """A [12, 3] matrix of which each Slice reads some rows, put together again for one product."""
    nodes, tensors = [], [tensor("w", np.arange(36, dtype=np.float32).reshape(12, 3))]
    for index, (begin, end) in enumerate(bounds):
        if old:  # before opset 10
            nodes.append(helper.make_node("Slice", ["w"], [f"s{index}"], starts=[begin], ends=[end], axes=[0]))
            continue
        given = {"starts": [begin], "ends": [end], "axes": [0], "steps": [1]} | more
        names = [f"{name}{index}" for name in given]
        tensors += [tensor(name, values, np.int64) for name, values in zip(names, given.values(), strict=True)
                    if isinstance(values, list)]  # fmt: skip
        inputs = [name if isinstance(values, list) else str(values)
                  for name, values in zip(names, given.values(), strict=True)]  # fmt: skip
        nodes.append(helper.make_node("Slice", ["w", *inputs], [f"s{index}"]))
    nodes.append(helper.make_node("Concat", [f"s{index}" for index in range(len(bounds))], ["whole"], axis=0))
    nodes.append(helper.make_node("MatMul", ["whole", "x"], ["y"]))
    return read(save(path / "m.onnx", graph(nodes, tensors, ["x", "computed"])))


def shared(model: Any) -> list[int]:
    return [len(tie.members) for tie in find(model).ties if tie.origin == "aliased"]


@pytest.mark.parametrize("old", [True, False])
def test_gates_cut_out_of_one_matrix_are_one_use(tmp_path: Path, old: bool) -> None:
    # silero's recurrent cell: three Slices, a Concat in another order, one LSTM
    model = cut(tmp_path, *GATES, old=old)
    assert sorted(use.box[0] for use in model.uses if use.weight == "w") == GATES
    assert shared(model) == []


def test_a_matrix_that_is_cut_up_twice_is_shared(tmp_path: Path) -> None:
    assert shared(cut(tmp_path, *GATES, *GATES)) == [6]


def test_parts_with_a_row_in_common_are_shared(tmp_path: Path) -> None:
    assert shared(cut(tmp_path, (0, 5), (4, 12))) == [2]


def test_bounds_from_the_end_and_beyond_it_are_those_of_the_operation(tmp_path: Path) -> None:
    model = cut(tmp_path, (-12, -8), (4, -4), (8, 2**40))
    assert [use.box for use in model.uses if use.weight == "w"] == [(bounds, (0, 3)) for bounds in GATES]
    assert shared(model) == []


@pytest.mark.parametrize("more", [{"ends": "computed"}, {"axes": "computed"}, {"steps": "computed"}, {"steps": [2]}])
def test_parts_that_cannot_be_told_are_uses_of_the_whole(tmp_path: Path, more: dict[str, Any]) -> None:
    assert shared(cut(tmp_path, *GATES, **more)) == [3]
