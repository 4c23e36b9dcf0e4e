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
PLACES = "tieaudit:places"
"""Of the array that says which places are no padding, where there are no gradients to tell it."""
SCORED = "tieaudit:scored"
"""Of those whose scores count."""
ASIDE = frozenset({TARGETS, PLACES, SCORED})
"""Names of what is no input of a model."""
N_SLOPE_ROWS = 64
"""Places from which the scale between a product and the scores made of it is taken."""
IGNORED = -100
"""A target that is none, as PyTorch's cross entropy has it."""
_FIELDS = ("row_weights", "inputs", "gradients")


@dataclass
class Sums:
    """What one site added up."""

    n_tokens: int = 0
    """Places that count: none that is padding."""
    n_targets: int = 0
    """What is predicted from them, if that was said: what the weights of a product's rows and `gradients` belong to."""
    row_weights: Sum | None = None
    """[rows] Counts of ids, Σ g² of the gradients at the results of a product, or Σ p(1 − p) of a head."""
    inputs: Sum | None = None
    """[columns, columns] Σ x xᵀ of what the rows are multiplied with."""
    gradients: Sum | None = None
    """[columns, columns] Σ g gᵀ of the loss at what a lookup gives."""

    def add(self, field: str, value: Sum) -> None:
        """Add to one of the sums."""
        known = getattr(self, field)
        setattr(self, field, value if known is None else known + value)

    def add_ids(self, ids: Array, n_rows: int, kept: Array | None = None) -> None:
        """Ids that were looked up, of any shape; negative ones count from the end, as in ONNX. `kept`: see `places`."""
        flat = _picked(ids.reshape(-1), kept).astype(np.int64)
        self.add("row_weights", np.bincount(np.where(flat < 0, flat + n_rows, flat), minlength=n_rows).astype(float))
        self.n_tokens += flat.size

    def add_inputs(self, x: Array, kept: Array | None = None) -> None:
        """What was multiplied, [..., columns]."""
        rows = _picked(x.reshape(-1, x.shape[-1]), kept).astype(np.float64)
        self.add("inputs", rows.T @ rows)
        self.n_tokens += len(rows)

    def add_scores(self, product: Array, scores: Array, kept: Array | None = None) -> None:
        """What came out, [..., rows], and the scores of a softmax that were made of it by a scale, a cap or a bias."""
        if scores.shape[-1] != product.shape[-1] or scores.size != product.size:
            scores = product
        raw, rows = (_picked(one.reshape(-1, one.shape[-1]), kept).astype(np.float64) for one in (product, scores))
        if len(rows):
            p = np.exp(rows - rows.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            self.add("row_weights", (p * (1.0 - p)).sum(axis=0) * slope(raw, rows) ** 2)
            self.n_targets += len(rows)


def slope(product: Array, scores: Array) -> float:
    """How much scores move with what they are made of, both [places, rows]: least squares over some of the places.

    A softmax does not see what all scores of a place have in common, and a bias is what all places have in common.
    """
    x, y = (one[:N_SLOPE_ROWS].astype(np.float64) for one in (product, scores))
    x, y = (one - one.mean(axis=1, keepdims=True) for one in (x, y))
    if len(x) > 1:
        x, y = (one - one.mean(axis=0) for one in (x, y))
    size = float(np.sum(x * x))
    return float(np.sum(x * y)) / size if size > 0.0 else 1.0


def places(shape: tuple[int, ...], shown: Array | None) -> Array | None:
    """Which of the places of an array [..., columns] count, in one row; None for all, and where it has other places."""
    return None if shown is None or int(np.prod(shape, dtype=np.int64)) != shown.size else shown.reshape(-1) != 0


def _picked(rows: Array, kept: Array | None) -> Array:
    return rows if kept is None else rows[kept]


def packed(sums: Mapping[str, Sums]) -> tuple[dict[str, Any], dict[str, Array]]:
    """As a child answers: the numbers of tokens, and the sums under `key/field`."""
    arrays = {
        f"{key}/{field}": value
        for key, one in sums.items()
        for field in _FIELDS
        if (value := getattr(one, field)) is not None
    }
    counts = {name: {key: getattr(one, name) for key, one in sums.items()} for name in ("n_tokens", "n_targets")}
    return counts, arrays


def unpacked(facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Sums]:
    """What `packed` packed."""
    found = {key: Sums(int(n), int(facts["n_targets"][key])) for key, n in facts["n_tokens"].items()}
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
