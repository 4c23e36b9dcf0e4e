"""The same canonical bytes under the same shape and element type."""

from __future__ import annotations

from tieaudit.relations import Relation
from tieaudit.view import AS_STORED, Shape, View


def _fits(a: Shape, b: Shape) -> View | None:
    return AS_STORED if a == b else None


equal = Relation(
    name="equal",
    summary="same element type, same shape, same bytes: 0.0 is not -0.0, NaN payloads count, integers are exact",
    source="torch.onnx writes one initializer per name of a tied parameter (pytorch/pytorch#108342); "
    "save_pretrained(state_dict=...) writes every tied name (huggingface/transformers#48972)",
    precedence=0,
    key=lambda shape: shape,
    fits=_fits,
)
