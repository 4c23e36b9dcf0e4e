"""Token tables and output heads told by names and shapes: what embeds a vocabulary, and what scores one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tieaudit.model import Weight
from tieaudit.words import HEAD, PERHAPS_HEAD, Path

_SCORES = re.compile(
    r"logit|vocab|unembed|generator|classif|predict|(^|_)(lm|head|output|out|cls|fc|proj(ection)?)(_|$)"
)
_NO_HEAD = re.compile(r"emb(?!.*unembed)|codebook|quantiz|norm|tim(e|es?tep)|class_?label|lookup|table")
_N_FEWEST_ROWS = 3


class Vocabularies:
    """What token tables of a model there are, and which of its matrices score one of them. Cost: linear."""

    def __init__(self, tables: Mapping[str, Weight]) -> None:
        self.rows = {weight.shape[0] for weight in tables.values() if len(weight.shape) == 2}
        self.shapes = {weight.shape for weight in tables.values()}
        self.widths = frozenset(shape[1] for shape in self.shapes if len(shape) == 2)
        self.heads: dict[str, str] = {}
        """Weight id → output_head, of those told by shape."""
        self.tables = tables
        """Weight id → the table."""

    def find_heads(
        self, weights: Mapping[str, Weight], paths: Mapping[str, Path], is_open: Callable[[Weight], bool]
    ) -> None:
        """Which matrices score the vocabulary; `is_open` says whether a name leaves it open and no layer holds it.

        One that is called a head, an output or logits does where it has as many outputs as a table has rows. One that
        is called something else does only where it is the one matrix beside the tables that has a table's own shape.
        """
        unnamed, n_named = [], 0
        for id, weight in weights.items():
            path = paths[id]
            if (
                id in self.tables
                or len(weight.shape) != 2
                or weight.shape[0] == weight.shape[1]
                or not weight.n_elements
            ):
                continue
            called = path.leaf if path.end == "weight" else path.end
            n_named += called in HEAD
            straight, across = weight.shape in self.shapes, weight.shape[::-1] in self.shapes
            wide = any(n in self.rows and n > 2 * other for n, other in (weight.shape, weight.shape[::-1]))
            if not (straight or across or wide) or max(weight.shape) < _N_FEWEST_ROWS:
                continue
            if _NO_HEAD.search(called) or not is_open(weight):
                continue
            says = called in PERHAPS_HEAD or any(_SCORES.search(part) for part in (called, *path.modules[-2:-1]))
            if says:
                self.heads[id] = "output_head"
            elif straight or across:
                unnamed.append(id)
        if len(unnamed) == 1 and not self.heads and not n_named:
            self.heads[unnamed[0]] = "output_head"


def table_beside_a_head(
    weights: Mapping[str, Weight], paths: Mapping[str, Path], is_open: Callable[[Weight], bool]
) -> dict[str, Weight]:
    """The one matrix of the very shape of the one head, in a model without a table by name: what it scores is embedded.

    `is_open` as in `Vocabularies.find_heads`. Empty where there are several, or where rows are not the longer side.
    """
    flat = {id: weight for id, weight in weights.items() if len(weight.shape) == 2}
    heads = [weight for id, weight in flat.items() if paths[id].leaf in HEAD and paths[id].end == "weight"]
    if len(heads) != 1:
        return {}
    (head,) = heads
    n_rows, n_columns = sorted(head.shape, reverse=True)
    alike = {
        id: weight
        for id, weight in flat.items()
        if weight is not head and weight.shape == (n_rows, n_columns) and is_open(weight)
    }
    return alike if len(alike) == 1 and n_rows > 2 * n_columns else {}
