"""Quantisation annotations of a graph when tensors are merged: they go with the tensor, or stand in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tieaudit.formats.onnx.bench import Spot
from tieaudit.formats.onnx.workbench import Body

if TYPE_CHECKING:
    from onnx import TensorAnnotation


def clash(keeper: Spot | None, others: Sequence[tuple[Spot, bool]]) -> str | None:
    """Why merging would lose an annotation. `others`: (spot, whether its readers will see it transposed)."""
    known = _of(keeper.body, keeper.name) if keeper is not None else None
    for spot, turned in others:
        found = _of(spot.body, spot.name)
        if found is None:
            continue
        if turned:
            return f"{spot.id} has a quantization annotation for this layout"
        if known is not None and _content(known) != _content(found):
            return f"{spot.id} has another quantization annotation than what it would become"
        known = found
    return None


def hand_over(body: Body, old: str, owner: Body, new: str) -> None:
    """A value is known by another name from now on, in another graph perhaps."""
    if (owner, new) == (body, old):
        return
    for seeing in (body, *(inner for inner in body.inner() if inner.owner_of(old) is body)):
        for annotation in seeing.graph.quantization_annotation:
            for entry in annotation.quant_parameter_tensor_names:
                if entry.value == old:
                    entry.value = new
    found = _of(body, old)
    if found is None:
        return
    if _of(owner, new) is None:
        copy = owner.graph.quantization_annotation.add()
        copy.CopyFrom(found)
        copy.tensor_name = new
    kept = [item for item in body.graph.quantization_annotation if item.tensor_name != old]
    del body.graph.quantization_annotation[:]
    body.graph.quantization_annotation.extend(kept)


def _of(body: Body, name: str) -> TensorAnnotation | None:
    return next((item for item in body.graph.quantization_annotation if item.tensor_name == name), None)


def _content(annotation: TensorAnnotation) -> list[tuple[str, str]]:
    return sorted((entry.key, entry.value) for entry in annotation.quant_parameter_tensor_names)
