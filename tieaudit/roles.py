"""Stage: Model → roles. What each weight is for, from the graph first, then the class, then its name.

This version tells token_embedding, output_head, output_head_bias and buffer; everything else is *other*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tieaudit.model import Model, Role, Use, Weight

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
_EMBEDDING_NAME = re.compile(
    r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|token_embeddings?|token_embd|shared|embeddings?\.word"
    r"_embeddings|embed_token|tokens_embed)\.weight$"
)
_HEAD_NAME = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output_projection|cls\.predictions\.decoder|generator_lm_head|predictions\.decoder)\.(weight|bias)$"
)


def roles(model: Model) -> Mapping[str, Role]:
    """A role for every weight of the model, by id."""
    found: dict[str, Role] = {}
    if model.has_graph:
        found.update(_from_graph(model))
    told = model.metadata.get("roles") or f"the class {model.metadata.get('architecture', 'of the model')} says so"
    for id, kind in model.hints.items():
        if id in model.by_id:
            found.setdefault(id, Role(kind, told))
    if not model.has_graph:
        for weight in model.weights:
            if weight.id not in found and (role := _from_name(weight)) is not None:
                found[weight.id] = role
    for weight in model.weights:
        if weight.parameter is False and found.get(weight.id, OTHER).kind == "other":
            found[weight.id] = Role("buffer", weight.because or "not learned")
        found.setdefault(weight.id, OTHER)
    return found


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
        use.node for use in model.uses if found.get(use.weight, OTHER).kind == "output_head" or _tied_head(use, found)
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
    found.update(_by_other_names(model, found))
    return found


def _by_other_names(model: Model, found: Mapping[str, Role]) -> dict[str, Role]:
    """The same role for names of the same bytes that the graph does not use: it reads a tie through one name."""
    known = {w.storage.region: w.id for w in model.weights if w.id in found and w.storage is not None}
    others: dict[str, Role] = {}
    for weight in model.weights:
        if weight.storage is not None and weight.id not in found and not model.uses_of.get(weight.id):
            first = known.get(weight.storage.region)
            if first is not None and model.by_id[first].shape == weight.shape:
                others[weight.id] = Role(found[first].kind, f"another name of {first}, {found[first].because}")
    return others


def _is_table(weight: Weight, use: Use) -> bool:
    """A lookup table of rows, as the consumer sees it, and not a mask, an index or a sinusoid."""
    shape = use.view.shape(weight.shape)
    ranks = (2, 3) if use.op == "com.microsoft.GatherBlockQuantized" else (2,)  # a row may be cut into its blocks
    if len(shape) not in ranks or use.slot not in (0, 2):
        return False
    return min(shape[0], max(shape[1:])) > 1 and weight.parameter is not False


def _tied_head(use: Use, found: Mapping[str, Role]) -> bool:
    """An embedding that is its own output head: one stored tensor in both roles."""
    return use.op in _PROJECTIONS and use.feeds_output and found.get(use.weight, OTHER).kind == "token_embedding"


def _from_name(weight: Weight) -> Role | None:
    if _HEAD_NAME.search(weight.name) and len(weight.shape) <= 2:
        kind = "output_head" if weight.name.endswith("weight") else "output_head_bias"
        return Role(kind, f"by its name {weight.name}")
    if len(weight.shape) == 2 and _EMBEDDING_NAME.search(weight.name):
        return Role("token_embedding", f"by its name {weight.name}")
    return None
