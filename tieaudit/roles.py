"""Stage: Model → roles. What each weight is for, from the graph first, then the class, then its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tieaudit.flow import Flow
from tieaudit.model import Model, Role, Use, Weight
from tieaudit.naming import roles_by_name
from tieaudit.places import NO_LAYER, placed
from tieaudit.recognisers import Reading, Recogniser, in_order
from tieaudit.registry import discover
from tieaudit.spine import Spine

OTHER = Role("other", "no evidence for a more specific role")
_LOOKUPS = (
    "Gather",
    "com.microsoft.GatherBlockQuantized",
    "com.microsoft.EmbedLayerNormalization",
    "embedding",
    "embedding_bag",
    "index_select",
    "index",
)
_PROJECTIONS = (
    "MatMul",
    "Gemm",
    "com.microsoft.FusedMatMul",
    "com.microsoft.MatMulNBits",
    "com.microsoft.TransposeMatMul",
    "MatMulInteger",
    "com.microsoft.DynamicQuantizeMatMul",
    "com.microsoft.FusedGemm",
    "linear",
    "mm",
    "matmul",
    "addmm",
    "einsum",
)
_BIAS_SLOT = {"Gemm": 2, "linear": 2, "addmm": 0}
"""Projection → slot of what it adds; the factors of `addmm` are behind it."""
_VAGUE = ("projection", "bias", "other")
_ONLY_NAMED = ("attention_", "ffn_", "router", "adapter_", "recurrent_")
"""Kinds that a name may tell where the graph is vague; what a tie is about (tables, heads) only the graph tells."""


def roles(model: Model) -> Mapping[str, Role]:
    """A role for every weight of the model, by id.

    Evidence in this order: what flows through the graph, what the class answers, the name with the shape (where there
    is no graph, or the graph says no more than that something is multiplied or added). Where two disagree about the
    role of a weight, the first one counts and `because` says so.
    """
    found: dict[str, Role] = {}
    if model.operations:
        found.update(_by_flow(model))
    elif model.has_graph:
        found.update(_from_graph(model))
    told = model.metadata.get("roles") or f"the class {model.metadata.get('architecture', 'of the model')} says so"
    for id, kind in model.hints.items():
        if id in model.by_id:
            seen = found.setdefault(id, Role(kind, told))
            found[id] = _contradicted(model, id, seen, kind, f"but {told}: {kind}")
    found.update(_by_other_names(model, found))
    named = roles_by_name(model)
    for weight in model.weights:
        found[weight.id] = _agreed(weight, found.get(weight.id), named[weight.id], model)
    return found


def _agreed(weight: Weight, told: Role | None, named: Role, model: Model) -> Role:
    """One role from what the graph or the class tells and what the name says."""
    if weight.parameter is False and (told is None or told.kind == "other"):
        return Role("buffer", weight.because or "not learned")
    surer = named.kind not in _VAGUE and (not model.has_graph or named.kind.startswith(_ONLY_NAMED))
    if told is None:
        told = named if surer or named.kind == "buffer" or not model.has_graph else OTHER
    elif told.kind in _VAGUE and surer:
        seen = f"the graph says no more than {told.kind}: {told.because}"
        told = replace(told, kind=named.kind, because=f"{named.because}; {seen}")
    elif named.kind not in _VAGUE and not told.against:
        told = _contradicted(model, weight.id, told, named.kind, f"its name says {named.kind}")
    if told.kind in NO_LAYER:
        return replace(told, side=told.side or named.side)
    expert = named.expert if told.expert is None else told.expert
    layer = named.layer if told.layer is None and "shared by" not in told.because else told.layer
    return replace(told, layer=layer, side=told.side or named.side, expert=expert)


def _contradicted(model: Model, id: str, told: Role, other: str, because: str) -> Role:
    """The same role, with what contradicts it. One tensor in two uses may be both: neither evidence lies."""
    both = {told.kind, other} == {"token_embedding", "output_head"} and len(model.uses_of.get(id, ())) != 1
    if told.kind in (*_VAGUE, other) or both:
        return told
    return replace(told, because=f"{told.because}; {because}", against=other)


def _by_flow(model: Model) -> Mapping[str, Role]:
    reading = read_graph(model)
    return placed(reading)


def read_graph(model: Model) -> Reading:
    """What the recognisers tell about a graph. Cost: linear in the operations, times the size of a block."""
    flow = Flow(model)
    reading = Reading(flow, Spine(flow))
    for one in in_order(discover("recognisers", Recogniser)):
        one.recognise(reading)
    return reading


def _from_graph(model: Model) -> dict[str, Role]:
    found: dict[str, Role] = {}
    vocabularies: dict[int, str] = {}
    for use in model.uses:
        weight = model.by_id[use.weight]
        if use.reads_ids and use.op in _LOOKUPS and _is_table(weight, use):
            found[weight.id] = Role(
                "token_embedding", f"looked up by integer inputs of the graph ({use.op} @ {use.node})"
            )
            vocabularies.setdefault(use.view.shape(weight.shape)[0], weight.id)
    for use in model.uses:
        weight = model.by_id[use.weight]
        seen = use.view.shape(weight.shape)
        in_blocks = use.op == "com.microsoft.MatMulNBits"  # [N, blocks, bytes], or [N, bytes] in older files
        fits = len(seen) == 2 or in_blocks and len(seen) == 3
        factor = use.slot - 1 if use.op == "addmm" else use.slot
        if use.op not in _PROJECTIONS or factor not in (0, 1) or not use.feeds_output or not fits or weight.id in found:
            continue
        n_outputs = seen[1] if factor == 1 and not in_blocks else seen[0]
        if n_outputs in vocabularies and n_outputs > 2:
            found[weight.id] = Role(
                "output_head",
                f"last projection onto {n_outputs} outputs, the vocabulary of {vocabularies[n_outputs]} "
                f"({use.op} @ {use.node})",
            )
    heads = {
        use.node for use in model.uses if found.get(use.weight, OTHER).kind == "output_head" or is_tied_head(use, found)
    }
    for use in model.uses:
        weight = model.by_id[use.weight]
        is_bias = (_BIAS_SLOT.get(use.op) == use.slot and use.node in heads) or (
            use.op in ("Add", "add") and use.feeds_output
        )
        if is_bias and heads and weight.id not in found and weight.shape[-1:] and weight.n_elements == weight.shape[-1]:
            if weight.shape[-1] in vocabularies and weight.parameter is not False:
                found[weight.id] = Role(
                    "output_head_bias", f"added to the scores of the vocabulary ({use.op} @ {use.node})"
                )
    return found


def _by_other_names(model: Model, found: Mapping[str, Role]) -> dict[str, Role]:
    """The same role for names of the same bytes that the graph does not use: it reads a tie through one name."""
    known = {w.storage.region: w.id for w in model.weights if w.id in found and w.storage is not None}
    others: dict[str, Role] = {}
    for weight in model.weights:
        if weight.storage is not None and weight.id not in found and not model.uses_of.get(weight.id):
            first = known.get(weight.storage.region)
            if first is not None and model.by_id[first].shape == weight.shape:
                others[weight.id] = replace(found[first], because=f"another name of {first}, {found[first].because}")
    return others


def _is_table(weight: Weight, use: Use) -> bool:
    """A lookup table of rows, as the consumer sees it, and not a mask, an index or a sinusoid."""
    shape = use.view.shape(weight.shape)
    ranks = (2, 3) if use.op == "com.microsoft.GatherBlockQuantized" else (2,)  # a row may be cut into its blocks
    if len(shape) not in ranks or use.slot not in (0, 2):
        return False
    return min(shape[0], max(shape[1:])) > 1 and weight.parameter is not False


def projects(use: Use) -> bool:
    """Whether the use multiplies with the weight, as a head does with a table."""
    return use.op in _PROJECTIONS


def is_tied_head(use: Use, found: Mapping[str, Role]) -> bool:
    """An embedding that is its own output head: one stored tensor in both roles."""
    return use.op in _PROJECTIONS and use.feeds_output and found.get(use.weight, OTHER).kind == "token_embedding"
