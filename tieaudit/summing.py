"""What calibration adds up at one site, and the loss of each token, over arrays; for children that run models.

Only sums are kept, [rows] and [columns, columns] per site: memory does not grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Sum = NDArray[np.float64]
TARGETS = "tieaudit:targets"
"""Name of the array of targets beside the inputs of a model."""
IGNORED = -100
"""A target that is none, as PyTorch's cross entropy has it."""
_FIELDS = ("row_weights", "inputs", "gradients")


@dataclass
class Sums:
    """What one site added up."""

    n_tokens: int = 0
    row_weights: Sum | None = None
    """[rows] Counts of ids, Σ p(1 − p) of scores, or Σ g² of the gradients at the results of a product."""
    inputs: Sum | None = None
    """[columns, columns] Σ x xᵀ of what the rows are multiplied with."""
    gradients: Sum | None = None
    """[columns, columns] Σ g gᵀ of the loss at what a lookup gives."""

    def add(self, field: str, value: Sum) -> None:
        """Add to one of the sums."""
        known = getattr(self, field)
        setattr(self, field, value if known is None else known + value)

    def add_ids(self, ids: Array, n_rows: int) -> None:
        """Ids that were looked up, of any shape; negative ones count from the end, as in ONNX."""
        flat = ids.reshape(-1).astype(np.int64)
        self.add("row_weights", np.bincount(np.where(flat < 0, flat + n_rows, flat), minlength=n_rows).astype(float))
        self.n_tokens += flat.size

    def add_inputs(self, x: Array) -> None:
        """What was multiplied, [..., columns]."""
        rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
        self.add("inputs", rows.T @ rows)
        self.n_tokens += len(rows)

    def add_scores(self, scores: Array) -> None:
        """What came out, [..., rows], as scores of a softmax."""
        rows = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
        p = np.exp(rows - rows.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        self.add("row_weights", (p * (1.0 - p)).sum(axis=0))


def packed(sums: Mapping[str, Sums]) -> tuple[dict[str, Any], dict[str, Array]]:
    """As a child answers: the numbers of tokens, and the sums under `key/field`."""
    arrays = {
        f"{key}/{field}": value
        for key, one in sums.items()
        for field in _FIELDS
        if (value := getattr(one, field)) is not None
    }
    return {"n_tokens": {key: one.n_tokens for key, one in sums.items()}}, arrays


def unpacked(facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Sums]:
    """What `packed` packed."""
    found = {key: Sums(int(n)) for key, n in facts["n_tokens"].items()}
    for name, value in arrays.items():
        key, _, field = name.rpartition("/")
        found[key].add(field, value)
    return found


def scores_among(outputs: Mapping[str, Any], targets: Array) -> str:
    """The output that scores a vocabulary at the places of the targets: `logits`, or the first one whose shape fits.

    `outputs`: anything with a shape. ValueError if none fits.
    """
    n = targets.size
    shapes = {name: tuple(one.shape) for name, one in outputs.items()}
    fitting = [
        name
        for name, shape in shapes.items()
        if len(shape) >= 2 and shape[-1] > 2 and int(np.prod(shape[:-1], dtype=np.int64)) == n
        and "float" in str(outputs[name].dtype)
    ]  # fmt: skip
    if "logits" in fitting:
        return "logits"
    if not fitting:
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:4])
        raise ValueError(f"no output scores a vocabulary at each of the {list(targets.shape)} places: {shown}")
    return fitting[0]


def token_losses(scores: Array, targets: Array) -> Sum:
    """−log softmax(scores)[target] in nats, in float64, of every target that is one, in order; one row at a time.

    `scores`: [..., vocabulary], `targets`: integers of the same leading size, `IGNORED` where there is none.
    """
    rows, wanted = scores.reshape(-1, scores.shape[-1]), targets.reshape(-1)
    places = np.flatnonzero(wanted != IGNORED)
    if places.size and int(wanted[places].max()) >= rows.shape[1]:
        raise ValueError(f"target {int(wanted[places].max())} has no score: the output scores {rows.shape[1]:,} tokens")
    found = np.empty(len(places))
    for index, place in enumerate(places):
        one = rows[place].astype(np.float64)
        top = one.max()
        found[index] = top + np.log(np.exp(one - top).sum()) - one[wanted[place]]
    return found
