"""A matrix and its transpose, bit for bit."""

from __future__ import annotations

from tieaudit.relations import Relation
from tieaudit.view import TRANSPOSED, Shape, View


def _fits(a: Shape, b: Shape) -> View | None:
    return TRANSPOSED if len(a) == 2 and a == b[::-1] and min(a) > 1 else None


transposed = Relation(
    name="transposed",
    summary="a matrix stored a second time with its axes swapped, bit for bit",
    source="exporters and ONNX Runtime's constant folding turn Transpose(W) of a tied head into a second initializer "
    "(huggingface/transformers#12985, k2-fsa/sherpa-onnx#328)",
    precedence=1,
    key=lambda shape: tuple(sorted(shape)),
    fits=_fits,
)
