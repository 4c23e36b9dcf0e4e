"""The norm before a product of an ONNX graph, found by what flows into the product: its gain, and its bias if any.

Only where the product is the only reader of the norm's result, and of each value on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tieaudit.change import Gain
from tieaudit.model import Model, Operation

_PRODUCTS = frozenset({"MatMul", "Gemm", "com.microsoft.FusedMatMul"})
_PASSED = frozenset({"Identity", "Cast", "Dropout"})
_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "com.microsoft.SimplifiedLayerNormalization": (1,),
    "com.microsoft.SkipLayerNormalization": (2, 3),
    "com.microsoft.SkipSimplifiedLayerNormalization": (2,),
}
"""Operation → its inputs that are the gain and the bias (onnx.ai/onnx/operators, ONNX Runtime's ContribOperators.md).
SimplifiedLayerNormalization is in the default domain where ONNX Runtime wrote it."""
_N_MOST_PASSED = 20


class _Flow(NamedTuple):
    makers: dict[str, Operation]
    readers: dict[str, list[Operation]]


def gain_of(model: Model, head: str) -> Gain | str:
    """The norm before the product with `head`, or why there is none that could be changed for it alone."""
    uses = model.uses_of.get(head, ())
    if len(uses) != 1 or uses[0].op not in _PRODUCTS or uses[0].slot != 1 or uses[0].calls:
        return f"{head} is not read by one product alone"
    flow = _Flow({}, {})
    for one in model.operations:
        flow.makers.update(dict.fromkeys(filter(None, one.outputs), one))
        for name in dict.fromkeys(filter(None, one.inputs)):
            flow.readers.setdefault(name, []).append(one)
    use = uses[0]
    product = next((one for one in model.operations
                    if (one.part, one.scope, one.node) == (use.part, use.scope, use.node)), None)  # fmt: skip
    if product is None or product.attributes.get("transA") or product.attributes.get("transBatchA"):
        return f"what is multiplied with {head} cannot be followed"
    found = _before(model, flow, product.inputs[0])
    if isinstance(found, str):
        return f"{found} before {head}"
    ids = tuple(id for id in found if id)
    shared = next((id for id in ids if len(model.uses_of.get(id, ())) != 1), None)
    return f"{shared}, in the norm before {head}, is read in several places" if shared else Gain(ids)


def _before(model: Model, flow: _Flow, value: str) -> Sequence[str] | str:
    """Gain and bias of the norm that makes a value, or the beginning of a sentence."""
    for _ in range(_N_MOST_PASSED):
        maker = flow.makers.get(value)
        if len(flow.readers.get(value, ())) != 1:
            return "somebody else reads the result of what is"
        if maker is None or maker.outputs[0] != value:
            return "there is no norm"
        if maker.op in _NORMS:
            given = [maker.inputs[slot] for slot in _NORMS[maker.op] if slot < len(maker.inputs)]
            return given if all(one in model.by_id for one in given if one) and given[0] else "the gain is computed"
        if maker.op in ("Add", "Mul"):
            return _spelt(model, flow, maker)
        if maker.op not in _PASSED:
            return f"{maker.op}, and no norm, is"
        value = maker.inputs[0]
    return "too many operations are"


def _spelt(model: Model, flow: _Flow, last: Operation) -> Sequence[str] | str:
    """Of a norm in single operations: Mul(n, gain), or Add(Mul(n, gain), bias), in either order of inputs."""
    biases: list[str] = []
    if last.op == "Add":
        biases, inner = _vectors(model, last)
        maker = flow.makers.get(inner)
        if len(biases) != 1 or maker is None or maker.op != "Mul" or len(flow.readers.get(inner, ())) != 1:
            return "Add, and no norm, is"
        last = maker
    gains, _ = _vectors(model, last)
    return [*gains, *biases] if len(gains) == 1 else "a product, and no gain of a norm, is"


def _vectors(model: Model, one: Operation) -> tuple[list[str], str]:
    """Inputs that are stored vectors, and the last other one."""
    found = [name for name in one.inputs if name in model.by_id and len(model.by_id[name].shape) == 1]
    return found, next((name for name in one.inputs if name not in found), "")
