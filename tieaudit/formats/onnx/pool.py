"""Make the key or value heads of an attention fewer: the projection shrinks, and right behind it each head is repeated.

The heads of a projection lie one after the other along its output axis. Behind the product and its bias the result is
flattened, [tokens, groups, 1, head size], each head expanded, and brought back to its old shape under its old name, so
that the rest of the graph, a cache of keys and values included, stays as it is. How many heads there are is what the
graph says behind the projection: the Reshape that tells heads apart, or an attribute of a fused attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tieaudit.change import Pool, Pooled, SetConfig
from tieaudit.dtypes import dtype
from tieaudit.formats.onnx.bench import Bench, Spot, for_looking
from tieaudit.formats.onnx.correct import Reader, readers
from tieaudit.formats.onnx.flip import Stuck, constant_ints
from tieaudit.formats.onnx.patterns import MICROSOFT, Emit, Reading, stamp
from tieaudit.formats.onnx.scopes import OVERRIDES_SINCE
from tieaudit.formats.onnx.values import int_attribute
from tieaudit.formats.onnx.wire import N_BYTES_INLINE
from tieaudit.formats.onnx.workbench import Body, Op, Piece
from tieaudit.model import Model, Weight, make_id
from tieaudit.pooling import pooled_weight
from tieaudit.view import Cast, Transpose

if TYPE_CHECKING:
    from onnx import NodeProto

PATTERN = "repeated_heads"
_PRODUCTS = frozenset({"MatMul", "Gemm", f"{MICROSOFT}.FusedMatMul"})
_FUSED = {
    f"{MICROSOFT}.MultiHeadAttention": "num_heads",
    f"{MICROSOFT}.GroupQueryAttention": "kv_num_heads",
    "Attention": "kv_num_heads",
}
"""Attentions that take keys and values as [batch, tokens, heads · size] → the attribute that says how many heads."""
_PASSED = frozenset({"Identity", "Cast"})
_N_MOST_PASSED = 20


class Place(NamedTuple):
    """One projection and what stands behind it."""

    spot: Spot
    reader: Reader
    axis: int
    end: Op
    """The product, or the Add of its bias."""
    bias: Weight | None
    n_heads: int


def edits_of(model: Model, id: str, n_groups: int) -> tuple[Pool | SetConfig, ...] | str:
    """As `plan_of`; a graph has no settings, and each projection is pooled by itself."""
    found = plan_of(model, id, n_groups)
    return found if isinstance(found, str) else (found,)


def plan_of(model: Model, id: str, n_groups: int) -> Pool | str:
    """The edit that pools the heads of a projection and of its bias, or why it cannot be made."""
    place = _find(for_looking(model), model, id)
    if isinstance(place, str):
        return place
    if place.n_heads <= n_groups:
        return f"{id} has {place.n_heads} heads, no more than the {n_groups} asked for"
    if place.n_heads % n_groups:
        return f"{id} has {place.n_heads} heads, which {n_groups} groups do not divide"
    weights = [Pooled(id, place.axis), *([Pooled(place.bias.id, 0)] if place.bias is not None else [])]
    because = f"{place.n_heads} heads behind {place.end.handle}"
    return Pool(tuple(weights), place.n_heads, n_groups, because)


def decide(bench: Bench, model: Model, edit: Pool) -> Place | str:
    """Where the heads are repeated; a reason if the graph is not what the edit was planned for."""
    place = _find(bench, model, edit.weights[0].id)
    if isinstance(place, str):
        return place
    ids = [one.id for one in edit.weights[1:]]
    if place.n_heads != edit.n_heads or ids != ([place.bias.id] if place.bias is not None else []):
        return f"{edit.weights[0].id} has {place.n_heads} heads, found a plan for {edit.n_heads}"
    return place if edit.n_heads % edit.n_groups == 0 else f"{edit.n_groups} groups do not divide {edit.n_heads} heads"


def _find(bench: Bench, model: Model, id: str) -> Place | str:
    weight = model.by_id.get(id)
    spot = bench.spot(weight) if weight is not None else None
    reason = _unfit(weight, spot, 2)
    if weight is None or spot is None or reason is not None:
        return f"the heads of {id} cannot be pooled: {reason or 'it is in no graph that can be edited'}"
    found = _behind(model, weight, spot)
    return found if isinstance(found, Place) else f"the heads of {id} cannot be pooled: {found}"


def _unfit(weight: Weight | None, spot: Spot | None, n_axes: int) -> str | None:
    if weight is None or spot is None:
        return "it is in no graph that can be edited"
    if dtype(weight.dtype).family != "float" or dtype(weight.dtype).item_bytes is None:
        return f"it holds {weight.dtype}, of which no mean is computed"
    if weight.overridable or weight.absent or weight.held_as == "sparse_initializer":
        return "it is sparse, not stored, or an input of its graph too"
    if len(weight.shape) != n_axes or spot.turned or weight.name in spot.piece.trained:
        return "it is no matrix that can be changed"
    if spot.piece.opset < 8 or spot.piece.proto.ir_version < OVERRIDES_SINCE:
        return "operator set 8, the first with Expand, and IR version 4 are needed"
    return "it is an output of its graph" if spot.body.returned(weight.name) else None


def _behind(model: Model, weight: Weight, spot: Spot) -> Place | str:
    uses = model.uses_of.get(weight.id, ())
    if any(not isinstance(step, (Transpose, Cast)) for use in uses for step in use.view.steps):
        return "it is read in another shape"
    found = list(readers(spot.piece, spot.body, spot.name, (weight.shape[0], weight.shape[1]), 0))
    if len(uses) != 1 or len(found) != 1:
        return f"{len(uses)} operations read it, expected one product"
    reader = found[0]
    if isinstance(reader, Stuck):
        return reader.because
    op, node = reader.site.op, reader.site.op.proto
    if op.type not in _PRODUCTS or reader.site.slot != 1:
        return f"{op.handle!r} ({op.type}) reads it, expected a product with it as the right factor"
    if any(int_attribute(node, flag, 0) != 0 for flag in ("transA", "transBatchA", "transBatchB")):
        return f"{op.handle!r} turns its left factor"
    axis = 0 if reader.turned ^ bool(int_attribute(node, "transB", 0)) else 1
    width = weight.shape[axis]
    end = _end(model, spot.piece, op, width)
    if isinstance(end, str):
        return end
    n_heads = _n_heads(spot.piece, end[0].body, end[0].proto.output[0], width)
    return n_heads if isinstance(n_heads, str) else Place(spot, reader, axis, *end, n_heads)


def _end(model: Model, piece: Piece, op: Op, width: int) -> tuple[Op, Weight | None] | str:
    """The last node that belongs to the projection, and its bias."""
    node = op.proto
    if op.type == "Gemm" and len(node.input) > 2 and node.input[2]:
        bias = _bias(model, piece, op, node.input[2], width)
        return (op, bias) if isinstance(bias, Weight) else f"its bias {node.input[2]!r} {bias}"
    result = node.output[0]
    sites = op.body.readers(result)
    if len(sites) != 1 or op.body.returned(result) or sites[0].op.type != "Add" or sites[0].op.body is not op.body:
        return op, None
    add = sites[0].op
    other = add.proto.input[1 - sites[0].slot]
    owner = op.body.owner_of(other)
    if owner is None or make_id(other, piece.part, owner.name) not in model.by_id:
        return op, None  # a sum with another branch: the heads are repeated before it
    bias = _bias(model, piece, add, other, width)
    return (add, bias) if isinstance(bias, Weight) else f"its bias {other!r} {bias}"


def _bias(model: Model, piece: Piece, op: Op, name: str, width: int) -> Weight | str:
    owner = op.body.owner_of(name)
    weight = model.by_id.get(make_id(name, piece.part, owner.name)) if owner is not None else None
    if owner is None or weight is None:
        return "is computed"
    reason = _unfit(weight, Spot(piece, owner, name), 1)
    if reason is not None or weight.shape != (width,):
        return f"is {weight.dtype}{list(weight.shape)}, expected a vector of {width}: {reason or 'another shape'}"
    return weight if len(owner.readers(name)) == 1 else "is read by other operations too"


def _n_heads(piece: Piece, body: Body, name: str, width: int) -> int | str:
    """How many heads a value of `width` columns is cut into by what reads it."""
    for _ in range(_N_MOST_PASSED):
        told: set[int | str] = set()
        passed = ""
        for site in body.readers(name):
            op = site.op
            if op.type in _FUSED:
                told.add(int_attribute(op.proto, _FUSED[op.type], 0) or "an attention does not say how many heads")
            elif op.type == "Reshape" and site.slot == 0:
                cut = _cut(piece, op, width)
                if cut is None:
                    passed = op.proto.output[0]
                else:
                    told.add(cut)
            elif op.type in _PASSED:
                passed = op.proto.output[0]
            elif op.type not in ("Shape", "Size"):
                told.add(f"{op.handle!r} ({op.type}) reads its result before any Reshape tells the heads apart")
        if told:
            return _agreed(told, width)
        if not passed:
            break
        name = passed
    return "no Reshape behind it tells the heads apart"


def _agreed(told: set[int | str], width: int) -> int | str:
    reasons = [one for one in told if isinstance(one, str)]
    numbers = {one for one in told if isinstance(one, int)}
    if reasons or len(numbers) != 1:
        return reasons[0] if reasons else f"its readers cut it into {' and '.join(map(str, sorted(numbers)))} heads"
    n_heads = numbers.pop()
    return n_heads if n_heads > 0 and width % n_heads == 0 else f"{n_heads} heads do not divide its {width} columns"


def _cut(piece: Piece, op: Op, width: int) -> int | str | None:
    """How many heads a Reshape makes: its last axis is a head, the one before counts them. None: none, as before."""
    sizes = _sizes(piece, op)
    last = sizes[-1] if sizes else None
    if last == width:
        return 1 if len(sizes) == 4 else None
    if last is None or last <= 0 or width % last:
        return f"the Reshape {op.handle!r} does not say how long a head is"
    before = sizes[-2] if len(sizes) > 1 else None
    if (before or 0) > 0 and before != width // last or len(sizes) > 4:
        return f"the Reshape {op.handle!r} does not cut its result into heads: it makes {sizes}"
    return width // last


def _sizes(piece: Piece, op: Op) -> list[int | None]:
    """The target of a Reshape as far as it is known."""
    asked = _numbers(piece, op.body, op.proto.input[1], 0) if len(op.proto.input) > 1 else []
    known = piece.type_of(op.body, op.proto.output[0])
    if known is None or not known.type.tensor_type.HasField("shape"):
        return asked
    dims: list[int | None] = [
        one.dim_value if one.HasField("dim_value") else None for one in known.type.tensor_type.shape.dim
    ]
    for back in range(1, min(len(asked), len(dims)) + 1):
        want = asked[-back]
        if want is None:  # perhaps several numbers: what comes before it may stand elsewhere
            break
        dims[-back] = want if want > 0 else dims[-back]
    return dims


def _numbers(piece: Piece, body: Body, name: str, depth: int) -> list[int | None]:
    """A shape that a graph puts together; None for what is computed at run time. Empty where nothing is known."""
    given = constant_ints(piece, body, name)
    if given is not None:
        return list(given)
    owner = body.owner_of(name)
    maker = owner.makers.get(name) if owner is not None else None
    if maker is None or depth > _N_MOST_PASSED:
        return []
    if maker.type in ("Unsqueeze", "Identity", "Cast") or maker.type == "Reshape":
        return _numbers(piece, maker.body, maker.proto.input[0], depth + 1) or [None]
    if maker.type != "Concat":
        return []
    found: list[int | None] = []
    for one in maker.proto.input:
        found += _numbers(piece, maker.body, one, depth + 1) or [None]
    return found


def pool(bench: Bench, model: Model, edit: Pool, place: Place) -> None:
    """Make the edit. Only called with what `decide` gave."""
    piece, end, site = place.spot.piece, place.end, place.reader.site
    for one in edit.weights:
        weight = model.by_id[one.id]
        spot = bench.spot(weight)
        tensor = spot.tensor() if spot is not None else None
        assert spot is not None and tensor is not None
        shape, storage = pooled_weight(weight, one, edit)
        home = piece.location_of(tensor) if storage.n_bytes >= N_BYTES_INLINE else None
        piece.put(tensor, storage, home)
        del tensor.dims[:]
        tensor.dims.extend(shape)
        _forget_types(spot.body, spot.name)
    if end is not site.op:
        _forget_types(site.op.body, site.op.proto.output[0], follow=False)
    piece.touched = True
    product, result = (site.op.body.name, site.op.handle, site.slot), str(end.proto.output[0])
    before = [(end.body.name, end.handle, slot) for slot, name in enumerate(end.proto.input) if name]
    bench.records.repeat(edit.weights[0].id, piece.part, product, result)
    nodes = _repeat(place, edit, result)
    new = end.body.replace(end, nodes)
    for scope, _, slot in before:
        bench.records.add(piece.part, (scope, result, slot), (scope, new[0].handle, slot), PATTERN)


def _forget_types(body: Body, name: str, follow: bool = True) -> None:
    """Drop the declared types of a value whose shape changes, and of its views."""
    body.gone.add(name)
    body.changed = True
    for site in body.readers(name) if follow else ():
        if site.op.type in ("Transpose", "Cast", "Identity"):
            _forget_types(site.op.body, site.op.proto.output[0])


def _repeat(place: Place, edit: Pool, result: str) -> Sequence[NodeProto]:
    from onnx import NodeProto

    piece, end = place.spot.piece, place.end
    width = place.spot.tensor()
    assert width is not None
    size = width.dims[place.axis] // edit.n_groups
    kept = NodeProto()
    kept.CopyFrom(end.proto)
    kept.output[0] = piece.fresh(f"{result}_pooled")
    if piece.proto.ir_version < 10:
        kept.doc_string = ""  # where the pattern's name goes
    stamp(kept, PATTERN, piece)
    emit = Emit(Reading(piece, place.reader.site._replace(op=end), (0, 0), 0), PATTERN)
    emit.built.nodes.append(kept)
    heads = emit.node("Reshape", (kept.output[0], emit.ints(-1, edit.n_groups, 1, size)))
    wide = emit.node("Expand", (heads, emit.ints(1, 1, edit.n_heads // edit.n_groups, 1)))
    shape = emit.node("Concat", (emit.leading(kept.output[0]), emit.ints(edit.n_heads * size)), axis=0)
    emit.reshape(wide, shape, result)
    return emit.built.nodes
