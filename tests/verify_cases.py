"""Rewrites with a planted fault, for the tests of the proof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx_cases import D, V, model_of, node, plan, rewritten, saved, table, tensor, tie, value

from tieaudit.change import Plan, Share, Written
from tieaudit.formats.onnx.read import load
from tieaudit.model import Model

Mutation = Callable[[onnx.ModelProto], None]


def language_model(kind: str = "float32", *, head: Any = None, **options: Any) -> onnx.ModelProto:
    """ids → Gather(E) → MatMul(D) → Tanh → MatMul(W) → logits, W = Eᵀ unless `head` is given."""
    element = {"float32": 1, "float16": 10, "bfloat16": 16}[kind]
    embedding = table(kind)
    return model_of(
        [
            node("Gather", ["E", "input_ids"], ["x"]),
            node("MatMul", ["x", "M"], ["y"]),
            node("Tanh", ["y"], ["z"]),
            node("MatMul", ["z", "W"], ["logits"]),
        ],
        [value("input_ids", 7, ["batch", "sequence"])],
        [value("logits", element, ["batch", "sequence", V])],
        [
            tensor("E", embedding),
            tensor("W", embedding.T if head is None else head),
            tensor("M", table(kind, 1, (D, D))),
        ],
        **options,
    )


def share(**more: Any) -> Share:
    return tie("E", "W", turned=["W"], **more)


def case(folder: Path, proto: onnx.ModelProto, **more: Any) -> tuple[Model, Model, Plan, Written]:
    """A model, its rewritten form, and what both were made by."""
    before = saved(proto, folder / "before")
    (folder / "after").mkdir()
    edits = more.pop("edits", (share(),))
    written, after, _ = rewritten(before, folder / "after", *edits, **more)
    return before, after, plan(before, *edits, **more), written


def broken(after: Model, mutate: Mutation) -> Model:
    """The written file with a fault, read again."""
    path = Path(after.path)
    proto = onnx.load(str(path))
    mutate(proto)
    onnx.save(proto, str(path))
    return load(path, (path,))
