"""A scale of each column of a head, folded into the gain of the norm before it, where it costs nothing.

x·(W·diag(s))ᵀ = (x·diag(s))·Wᵀ, and of a norm x = g·n + b that nobody else reads, x·diag(s) is (g·s)·n + b·s.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tieaudit.change import Equalise, Gain, Share
from tieaudit.dtypes import dtype
from tieaudit.formats import Format
from tieaudit.merge import Common
from tieaudit.model import Member, Model, Weight, storage_of
from tieaudit.printable import listed
from tieaudit.storage import MemoryStorage


def gain_before(format_: Format, model: Model, head: str, n_columns: int) -> Gain | str:
    """The norm whose only reader is this head, or in one sentence why none is known for certain."""
    if format_.gain is None:
        return f"the format {format_.name} says neither what reads a norm nor how its gain is applied"
    found = format_.gain(model, head)
    if isinstance(found, str):
        return found
    for id in found.ids:
        weight = model.by_id[id]
        reason = _unfit(model, weight, n_columns)
        if reason is not None:
            return f"{id}, the norm before {head}, {reason}"
    return found


def _unfit(model: Model, weight: Weight, n_columns: int) -> str | None:
    """Why the numbers of a gain or bias cannot be changed, as the rest of a sentence."""
    if weight.storage is None:
        return "is not stored"
    if weight.n_elements != n_columns:
        return f"has {weight.n_elements:,} numbers for {n_columns:,} columns"
    if not weight.is_float or dtype(weight.dtype).item_bytes is None:
        return f"is {weight.dtype}, in which a scale cannot be stored"
    if weight.overridable or weight.graph_output:
        return "is an input or an output of its graph too"
    others = [one.id for one in model.weights if one.id != weight.id and one.storage is not None
              and one.storage.region == weight.storage.region]  # fmt: skip
    return f"is one stored tensor with {others[0]}" if others else None


@dataclass(frozen=True)
class Folded:
    """A common value, with what of it went into norms."""

    common: Common
    """Without the corrections that did."""
    edits: tuple[Equalise | Share, ...]
    notes: tuple[str, ...]
    because: str
    """Why a scale did not, as the end of a sentence; empty if all did."""


def folded(format_: Format, model: Model, common: Common, taken: Container[str]) -> Folded:
    """Scales go into the norm before their head where that is free. `taken`: ids that something else changes."""
    edits, notes, kept, because = list[Equalise | Share](), list[str](), dict(common.adjustments), ""
    for id, scale in common.scales.items():
        found = edits_of(format_, model, id, scale)
        names = () if isinstance(found, str) else tuple(one.members[0].id for one in found)
        if isinstance(found, str):
            because = f"; nor can the norm before the head take it: {found}"
        elif any(name in taken for name in names):
            because = f"; nor can the norm before the head take it: another scheme changes {listed(names)}"
        else:
            edits += found
            del kept[id]
            notes.append(
                f"{listed(names)}: takes the scale of {id}, so hidden states behind that norm are scaled as well"
            )
    return Folded(replace(common, adjustments=kept), tuple(edits), tuple(notes), because)


def edits_of(
    format_: Format, model: Model, head: str, scale: NDArray[np.float64]
) -> tuple[Equalise | Share, ...] | str:
    """The edits that put `scale`, [columns], into the norm before the head, or why not. Cost: reads the norm."""
    gain = gain_before(format_, model, head, len(scale))
    if isinstance(gain, str):
        return gain
    edits: list[Equalise | Share] = []
    for index, id in enumerate(gain.ids):
        weight = model.by_id[id]
        kind = dtype(weight.dtype).numpy()
        raw = b"".join(storage_of(weight).read_ranges([(0, weight.n_bytes)]))
        stored = np.frombuffer(raw, kind).astype(np.float64)
        added = gain.added if index == 0 else 0.0
        with np.errstate(over="ignore"):
            made = ((stored + added) * scale - added).astype(kind)
        if not np.isfinite(made.astype(np.float64)).all():
            return f"{id}, the norm before {head}, would have numbers that {weight.dtype} cannot hold"
        values = MemoryStorage(made.tobytes(), f"scaled:{storage_of(weight).region}")
        edit = Equalise if format_.equalises else Share
        edits.append(edit((Member(id),), values, f"takes the scale of each column of {head}"))
    return tuple(edits)
