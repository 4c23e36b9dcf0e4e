"""Small ONNX models at the edges of the format, each with what is true of it, and a dedup that is checked from outside.

A case says which classes are equal in the file, how their members are seen, and whether one copy can serve them. What
the tests compare with is ONNX Runtime on the original and on the result, the checker, and a second reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import run

from tieaudit import structural, untouched
from tieaudit.change import Plan
from tieaudit.find import find
from tieaudit.load import load_one
from tieaudit.model import Model
from tieaudit.plan import Choices, plan
from tieaudit.rewrite import rewrite
from tieaudit.scan import look

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
V, D = 24, 16
"""Rows and columns of the tables."""


def value(name: str, kind: int = F, shape: Sequence[int | str] | None = None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: str, outputs: str, **more: Any) -> onnx.NodeProto:
    """Inputs and outputs separated by spaces; `-` is an input that is left out."""
    return helper.make_node(op, ["" if one == "-" else one for one in inputs.split()], outputs.split(), **more)


def random(*shape: int, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) / 4).astype(np.float32)


def tensor(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name)


E = random(V, D)
IDS = value("ids", I64, ["b", "t"])
LOGITS = value("logits", F, ["b", "t", V])
FEED = {"ids": np.array([[1, 5, V - 1], [0, 2, 2]])}


@dataclass
class Case:
    """A model and its truth."""

    nodes: Sequence[onnx.NodeProto]
    tensors: Sequence[TensorProto]
    inputs: Sequence[Any] = (IDS,)
    outputs: Sequence[Any] = (LOGITS,)
    feed: Mapping[str, Any] = field(default_factory=lambda: dict(FEED))
    equal: Sequence[Mapping[str, str]] = ()
    """Classes that are stored apart: id → view, as a report prints it."""
    refused: str = ""
    """What the one refusal of dedup says; empty: everything becomes one."""
    opset: int = 18
    ir_version: int = 10
    functions: Sequence[Any] = ()
    domains: Sequence[str] = ()
    sparse: Sequence[Any] = ()
    runs: bool = True
    """Whether ONNX Runtime's CPU provider can run it."""
    levels: Sequence[int] = (0, 99)
    """Optimisation levels at which the outputs must agree."""
    name: str = "g"

    def model(self) -> onnx.ModelProto:
        made = helper.make_graph(list(self.nodes), self.name, self.inputs, self.outputs, list(self.tensors))
        made.sparse_initializer.extend(self.sparse)
        imported = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(one, 1) for one in self.domains)]
        return helper.make_model(
            made, opset_imports=imported, ir_version=self.ir_version, functions=list(self.functions)
        )

    def save(self, folder: Path, **options: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.onnx"
        onnx.save(self.model(), str(path), **options)
        return path


def function(name: str, inputs: str, outputs: str, *nodes: onnx.NodeProto, domains: Sequence[str] = ()) -> Any:
    imported = [helper.make_opsetid("", 18), *(helper.make_opsetid(one, 1) for one in domains)]
    return helper.make_function("local", name, inputs.split(), outputs.split(), list(nodes), imported)


def body(
    nodes: Sequence[onnx.NodeProto], tensors: Sequence[TensorProto], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Any:
    return helper.make_graph(list(nodes), "body", list(inputs), list(outputs), list(tensors))


def classes(path: Path) -> list[dict[str, str]]:
    """Every class that is equal and stored apart: id → how it is seen from the first one."""
    found = find(load_one(path))
    assert found.unreadable == {}
    return [{member.id: str(member.view) for member in tie.members} for tie in found.ties if tie.origin == "measured"]


def aliased(path: Path) -> list[list[str]]:
    """Every class that is one stored tensor: its members' uses."""
    return [[member.use for member in tie.members] for tie in find(load_one(path)).ties if tie.origin == "aliased"]


def planned(path: Path, *schemes: str, **more: Any) -> tuple[Model, Plan]:
    subject = look(load_one(path))
    return subject.model, plan(subject, Choices(schemes=schemes or ("dedup",), **more))


def rewritten(path: Path, folder: Path, *schemes: str, **more: Any) -> Path:
    """The result of a plan without refusals, proved by the structural proof and accepted by the checker if it was."""
    model, made = planned(path, *schemes, **more)
    assert made.refusals == ()
    assert made.edits
    folder.mkdir(parents=True, exist_ok=True)
    written, after = rewrite(model, made, folder)
    check = structural.check(model, after, made, written)
    assert check.problems == []
    assert untouched.differences(model, after, made, written, check) == []
    result = folder / path.name
    if accepted(path):
        onnx.checker.check_model(str(result))
    return result


def accepted(path: Path) -> bool:
    """Whether the checker takes the original."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError:
        return False
    return True


def assert_same(one: Path, other: Path, feed: Mapping[str, Any], levels: Sequence[int] = (0, 99)) -> None:
    """The outputs of both under ONNX Runtime, at optimisation levels."""
    for level in levels:
        before, after = run(one, feed, level), run(other, feed, level)
        assert len(before) == len(after) > 0
        for left, right in zip(before, after, strict=True):
            assert left.shape == right.shape
            if left.dtype.kind in "fc":
                np.testing.assert_allclose(right, left, rtol=1e-5, atol=1e-5)
            else:
                assert (left == right).all()


def assert_merged(case: Case, folder: Path) -> Path:
    """Dedup does what the case says; the result where there is one."""
    path = case.save(folder / "in")
    assert classes(path) == list(case.equal)
    if case.refused:
        _, made = planned(path)
        assert [case.refused in one.because for one in made.refusals] == [True]
        assert made.edits == ()
        return path
    result = rewritten(path, folder / "out")
    left = [
        one for one in classes(result) if any(id in member for known in case.equal for member in known for id in one)
    ]
    assert left == []
    if case.runs:
        assert_same(path, result, case.feed, case.levels)
    return result
