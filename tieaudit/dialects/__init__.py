"""What the operations of a graph format mean, in one small vocabulary: one file for each dialect.

Recognisers know the vocabulary only. An operation that no dialect knows is `other`: nothing is followed through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Does = Literal[
    "input",
    "output",
    "view",
    "shape",
    "positions",
    "lookup",
    "embed",
    "product",
    "convolve",
    "recur",
    "normalise",
    "attend",
    "experts",
    "softmax",
    "pick",
    "add",
    "subtract",
    "multiply",
    "divide",
    "choose",
    "compare",
    "activate",
    "adjust",
    "root",
    "reduce",
    "join",
    "scatter",
    "other",
]
"""view: the same numbers, cut, turned, repeated or converted · shape: sizes · positions: counted up · lookup: rows of a
table by index · embed: several lookups added and normalised · product: a matrix product · pick: the best of several ·
choose: one or the other by a condition · activate: element-wise and not linear · adjust: any other function of each
element · root: square root or its inverse · join: concatenation · scatter: written into a part of another."""


@dataclass(frozen=True)
class Meaning:
    """One operation type: what it does, and what its input slots are for."""

    does: Does
    data: tuple[int, ...] = ()
    """Slots of what flows; empty for all of them."""
    roles: Mapping[int, str] | None = None
    """Slot → kind of the weight in it, where the operation itself tells."""
    table: int = 0
    indices: int = 1
    """Slots of a lookup."""
    queries: tuple[int, ...] = ()
    """Slots of query, key and value of an attention that is one operation; fewer where they come packed."""
    bias: int | None = None
    """Slot of a vector that is added to what the product, or the operation before, gives."""


@dataclass(frozen=True)
class Dialect:
    """The operation types of one graph format."""

    name: str
    source: str
    """Where the slots are specified."""
    meanings: Mapping[str, Meaning]


OTHER = Meaning("other")


def same(names: str, meaning: Meaning) -> dict[str, Meaning]:
    """One meaning for several operation types."""
    return dict.fromkeys(names.split(), meaning)


def in_domain(domain: str, meanings: Mapping[str, Meaning]) -> dict[str, Meaning]:
    """The same meanings for operations of another domain."""
    return {f"{domain}.{name}": meaning for name, meaning in meanings.items()}
