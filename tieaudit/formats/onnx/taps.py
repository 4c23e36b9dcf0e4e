"""Where the weights of an ONNX graph are used, and a copy of the graph whose inner values are outputs as well.

So a runtime shows what flows through each site; the copy computes the same as the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tieaudit.errors import CorruptFile
from tieaudit.formats.onnx.scopes import first_output
from tieaudit.model import Model, Use

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


_POINTWISE = frozenset("Add Sub Mul Div Tanh Cast Clip Identity Reshape Flatten Squeeze Unsqueeze".split())
"""What stands between a head and the softmax: scales, caps, biases, and changes of type or shape."""


@dataclass(frozen=True)
class Tap:
    """One use of a weight whose inputs can be seen."""

    id: str
    kind: Literal["lookup", "product"]
    value: str
    """What is looked up, or multiplied."""
    result: str
    n_rows: int
    """Rows that are looked up, or results of the product."""
    turned: bool
    """The weight is stored with its rows (in the sense of `Statistics`) as columns."""


def read_graph(source: Path) -> ModelProto:
    """The graph with all tensors that are inside the file. CorruptFile."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto: ModelProto = onnx.ModelProto.FromString(source.read_bytes())
        return proto
    except DecodeError as error:
        raise CorruptFile(f"{source}: expected a serialised ONNX model: {error}") from error


def taps(proto: ModelProto, model: Model, ids: Iterable[str]) -> tuple[list[Tap], dict[str, str]]:
    """Every use of these weights, and why a weight has none that can be seen."""
    nodes = {first_output(node): node for node in proto.graph.node}
    found: list[Tap] = []
    unfit: dict[str, str] = {}
    for id in ids:
        made = [_tap(model, use, nodes) for use in model.uses_of.get(id, ())]
        wrong = next((one for one in made if isinstance(one, str)), "nothing uses it" if not made else "")
        good = [one for one in made if isinstance(one, Tap)]
        if not wrong and len({(one.kind, one.turned) for one in good}) > 1:
            wrong = "it is used in more than one way"
        if wrong:
            unfit[id] = wrong
        else:
            found += good
    return found, unfit


def scores_behind(proto: ModelProto, result: str) -> str:
    """The value that a softmax takes, or the graph gives, of what a head gives: behind its scale, cap and bias."""
    readers: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    given, met = {one.name for one in proto.graph.output}, {""}
    while result not in given and result not in met:
        met.add(result)
        further = [node for node in readers.get(result, ()) if node.op_type in _POINTWISE and not node.domain]
        if len(further) != 1:
            break
        result = further[0].output[0]
    return result


def _tap(model: Model, use: Use, nodes: Mapping[str, NodeProto]) -> Tap | str:
    node, seen = nodes.get(use.node), use.view.shape(model.by_id[use.weight].shape)
    if use.scope or node is None or use.calls or use.box:
        return f"{use.op} @ {use.node} is not in the main graph, or reads a part of it"
    numbers = {one.name: one.i for one in node.attribute}
    if use.op == "Gather" and use.slot == 0 and len(seen) == 2:
        axis = numbers.get("axis", 0) % 2
        return Tap(use.weight, "lookup", node.input[1], use.node, seen[axis], use.view.transposes != bool(axis))
    if use.op in ("MatMul", "Gemm") and use.slot == 1 and len(seen) == 2 and not numbers.get("transA", 0):
        return Tap(use.weight, "product", node.input[0], use.node, seen[1], not use.view.transposes)
    return f"{use.op} @ {use.node} is neither a lookup nor a product with it"


def write_tapped(proto: ModelProto, target: Path, values: Sequence[str]) -> None:
    """Write the graph with these values of the main graph as further outputs; `target` lies beside the data files."""
    known = {one.name for one in (*proto.graph.output, *proto.graph.input)}
    for name in dict.fromkeys(values):
        if name not in known:
            proto.graph.output.add().name = name
    target.write_bytes(proto.SerializeToString())
