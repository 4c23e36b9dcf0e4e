"""Ties that a runtime undoes: one stored matrix, read as it is in one place and through a Transpose node in another.

ONNX Runtime (BASIC and above), onnxsim and onnx-graphsurgeon fold `Transpose(W)` of a constant into a second stored
matrix, at load time or on disk. A transB attribute, FusedMatMul or Gather(axis=1) is never folded apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tieaudit.model import Model, Use


def folded_apart(model: Model, one_value: Iterable[tuple[str, ...]] = ()) -> Mapping[str, tuple[Use, ...]]:
    """Weight id → its uses through a Transpose *node*, for weights that are also used without one.

    `one_value`: classes of ids that are becoming one stored tensor, so that the other use may be another member's.
    Cost: one pass over the uses.
    """
    class_of = {id: ids for ids in one_value for id in ids}
    found: dict[str, tuple[Use, ...]] = {}
    for id, uses in model.uses_of.items():
        weight = model.by_id[id]
        if weight.parameter is False or len(weight.shape) != 2 or min(weight.shape) < 2:
            continue
        through = tuple(use for use in uses if use.transposes)
        if not through:
            continue
        every = [use for other in class_of.get(id, (id,)) for use in model.uses_of.get(other, ())]
        if not all(use.transposes for use in every):
            found[id] = through
    return found
