"""Calibration data: batches of a model's own inputs with what each place is to predict; from an .npz, or from a text.

An archive holds arrays by input name, rows first; one array of ids in one dimension is a text and cut into rows. The
key `labels` holds, for each place, the token that the scores *at that place* are to predict (not shifted; −100: none).
Without it, each place is to predict the next id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tieaudit.errors import UsageError
from tieaudit.inputs import Sizes, feed_of, read_inputs
from tieaudit.runners import Array, Port, Signature
from tieaudit.summing import IGNORED, PLACES, SCORED

LENGTH = 128
"""Tokens in a row of a text."""
N_MOST_TOKENS = 1 << 17
"""Tokens that are used; what comes after them is left out, and said to be."""
N_MOST_TEXT_BYTES = 1 << 22
"""Of a text this much is read from its beginning: about as many tokens, and eight times so many bytes, at most."""
LABELS = "labels"
_ALIASES = ("input_ids", "ids", "tokens", "arr_0")
_FILLED = re.compile(r"mask|position|token_type|segment|past|cache|seqlens|total_seq", re.IGNORECASE)
"""Inputs that follow from the shape of the others."""


@dataclass(frozen=True)
class Tokens:
    """Rows of inputs, and what is to be predicted."""

    arrays: Mapping[str, Array]
    """By input name; all with the same number of rows."""
    targets: Array | None
    """[rows, length] ids, `IGNORED` where there is none; None where nothing is to be predicted."""
    given: bool
    """The targets are the user's own, not the next ids."""
    source: str
    notes: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        return min(len(one) for one in self.arrays.values())

    @property
    def length(self) -> int:
        """Places in a row; 1 where nothing is a sequence of ids."""
        return self.targets.shape[1] if self.targets is not None else 1

    def rows(self, begin: int, end: int) -> Tokens:
        """Some of the rows."""
        return self._picked(slice(begin, end))

    def halves(self) -> tuple[Tokens, Tokens | None]:
        """Every other row: what policies are fitted to, and by which they are judged; None for one row alone."""
        if self.n_rows < 2:
            return self, None
        return self._picked(slice(0, None, 2)), self._picked(slice(1, None, 2))

    def batches(self, n_rows: int) -> Iterator[Tokens]:
        """So many rows at a time."""
        for begin in range(0, self.n_rows, n_rows):
            yield self.rows(begin, begin + n_rows)

    def _picked(self, which: slice) -> Tokens:
        targets = None if self.targets is None else self.targets[which]
        return replace(self, arrays={name: one[which] for name, one in self.arrays.items()}, targets=targets)


def main_ids(signature: Signature) -> Port | None:
    """The input that holds the tokens whose successors are scored: the decoder's, where there is one."""
    ids = [port for port in signature.inputs if port.dtype.startswith("int") and not _FILLED.search(port.name)]
    decoder = [port for port in ids if "decoder" in port.name]
    return next(iter(decoder or [port for port in ids if port.limit] or ids), None)


def from_archive(path: Path, signature: Signature) -> Tokens:
    """An .npz of arrays. UsageError for what does not fit the model's inputs."""
    arrays = dict(read_inputs(path))
    labels = arrays.pop(LABELS, None)
    main = main_ids(signature)
    names = [port.name for port in signature.inputs]
    alias = next((name for name in _ALIASES if name in arrays and name not in names), None)
    if alias is not None and main is not None and main.name not in arrays:
        arrays[main.name] = arrays.pop(alias)
    known = ", ".join(names) or "none that are known"
    if unknown := next((name for name in arrays if name not in names), None):
        raise UsageError(f"{path}: expected arrays named as the model's inputs ({known}) or labels, found {unknown!r}")
    if not arrays:
        raise UsageError(f"{path}: expected arrays named as the model's inputs ({known}), found none")
    for port in signature.inputs:
        if port.name in arrays:
            arrays[port.name] = _checked(arrays[port.name], port, path)
    if main is not None and main.name in arrays and arrays[main.name].ndim == 1:
        if len(arrays) > 1 or labels is not None:
            raise UsageError(f"{path}: {main.name}: expected [rows, length] beside other arrays, found one dimension")
        return from_ids(arrays[main.name], main, str(path))
    rows = {name: len(one) for name, one in arrays.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise UsageError(f"{path}: expected arrays with equally many rows, and at least one, found {rows}")
    ids = arrays[main.name] if main is not None and main.name in arrays else None
    if labels is not None:
        targets: Array | None = _labels(labels, ids, path)
    else:
        targets = _next(main.name, ids, arrays) if main is not None and ids is not None else None
    return _cut(Tokens(arrays, targets, labels is not None, str(path)))


def from_ids(
    ids: Array, port: Port, source: str, *, first: int | None = None, length: int = LENGTH, what: str = ""
) -> Tokens:
    """One long row of ids, cut into rows of `length`, each behind `first` if there is one. UsageError for too few."""
    fixed = next((dim for dim in port.dims[1:2] if isinstance(dim, int) and dim > 0), None)
    length = fixed or min(length, max(len(ids), 1) + (first is not None))
    n_own = length - (first is not None)
    n_rows = len(ids) // n_own if n_own > 0 else 0
    if n_rows == 0 or length < 2:
        raise UsageError(f"{source}: expected at least {max(n_own, 2):,} tokens, found {len(ids):,}")
    rows = _checked(ids[: n_rows * n_own].reshape(n_rows, n_own), port, Path(source), what)
    if first is not None:
        rows = np.concatenate([np.full((n_rows, 1), first, rows.dtype), rows], axis=1)
    return _cut(Tokens({port.name: rows}, _next(port.name, rows, {}), False, source))


def completed(tokens: Tokens, signature: Signature) -> dict[str, Array]:
    """All inputs of a model: those that follow from the shape of the others are made up. UsageError for one that does
    not."""
    ids = next((one for one in tokens.arrays.values() if one.ndim >= 2), next(iter(tokens.arrays.values())))
    length = ids.shape[1] if ids.ndim >= 2 else 1
    missing = [port for port in signature.inputs if port.name not in tokens.arrays]
    if wrong := [port.name for port in missing if not _FILLED.search(port.name) or not port.dtype]:
        raise UsageError(f"{tokens.source}: expected the model's input {wrong[0]} as well; give it in an .npz")
    sizes = Sizes(batch=tokens.n_rows, sequence=length, past=0, encoder=length)
    made = feed_of(Signature(tuple(missing), (), signature.ranges), sizes).arrays if missing else {}
    kinds = {port.name: port.dtype for port in signature.inputs}
    given = {name: one.astype(kinds[name]) if one.dtype.kind in "iu" else one for name, one in tokens.arrays.items()}
    return {**made, **given}


def _checked(array: Array, port: Port, path: Path, what: str = "") -> Array:
    """As the port takes it. UsageError for another kind of number, and for ids that the model does not have."""
    if port.dtype.startswith(("int", "uint")):
        if array.dtype.kind not in "iu":
            raise UsageError(f"{path}: {port.name}: expected integers, found {array.dtype}")
        n = port.limit
        wrong = (array < 0) | (array >= n) if n is not None else array < 0
        if wrong.any():
            at = tuple(int(one[0]) for one in np.nonzero(wrong))
            found = f"{int(array[at])} at {list(at)}"
            most = f"0 … {n - 1:,}, the model's vocabulary," if n is not None else "no negative one,"
            raise UsageError(f"{path}: {what or port.name}: expected ids {most} found {found}")
        return array
    if port.dtype and array.dtype.kind not in "fiub":
        raise UsageError(f"{path}: {port.name}: expected numbers, found {array.dtype}")
    return array


def _labels(labels: Array, ids: Array | None, path: Path) -> Array:
    if labels.dtype.kind not in "iu" or labels.ndim != 2 or (ids is not None and labels.shape != ids.shape):
        expected = f"integers {list(ids.shape)}" if ids is not None else "integers [rows, length]"
        raise UsageError(f"{path}: labels: expected {expected}, found {labels.dtype} {list(labels.shape)}")
    if ((labels < 0) & (labels != IGNORED)).any():
        raise UsageError(f"{path}: labels: expected ids, or {IGNORED} for none, found {int(labels.min())}")
    counted = labels != IGNORED
    if not counted.any():
        raise UsageError(f"{path}: labels: expected at least one that is not {IGNORED}, found none")
    if ids is not None and ids.shape[1] > 1 and counted.sum() > 1 and (labels[counted] == ids[counted]).all():
        raise UsageError(
            f"{path}: labels: expected what the scores at the same place are to predict, found the ids themselves",
            hint="shift them by one, or leave them out: the next id is what counts without labels",
        )
    return labels.astype(np.int64)


def shown_in(arrays: Mapping[str, Array], signature: Signature, targets: Array | None) -> dict[str, Array]:
    """`PLACES` and `SCORED` of a batch, as far as anything tells which of its places are no padding.

    A place is shown if the mask shows it, and if it does not stand behind the last one of its row from which something
    is predicted; its scores count if something is. Empty for a model without ids, or with two texts of one shape.
    """
    main = main_ids(signature)
    ids = arrays.get(main.name) if main is not None else None
    if main is None or ids is None or ids.ndim != 2:
        return {}
    texts = [port.name for port in signature.inputs if port.dtype.startswith("int") and not _FILLED.search(port.name)]
    if any(name != main.name and name in arrays and arrays[name].shape == ids.shape for name in texts):
        return {} if targets is None else {SCORED: targets != IGNORED}
    mask = _mask(main.name, ids, arrays)
    shown = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    if targets is None:
        return {PLACES: shown, SCORED: shown}
    scored = targets != IGNORED
    return {PLACES: shown & (np.cumsum(scored[:, ::-1], axis=1)[:, ::-1] > 0), SCORED: scored}


def _mask(name: str, ids: Array, arrays: Mapping[str, Array]) -> Array | None:
    """The mask over these ids; that of a decoder says so in its name, as its ids do."""
    fitting = [key for key, one in arrays.items() if "mask" in key and one.shape == ids.shape]
    own = [key for key in fitting if ("decoder" in key) == ("decoder" in name)]
    return arrays[own[0]] if own else None


def _next(name: str, ids: Array, arrays: Mapping[str, Array]) -> Array | None:
    """The next id of each place; none for the last one, and none where a mask hides the place or the next one."""
    if ids.ndim != 2 or ids.shape[1] < 2:
        return None
    targets = np.full(ids.shape, IGNORED, np.int64)
    targets[:, :-1] = ids[:, 1:]
    mask = _mask(name, ids, arrays)
    if mask is not None:
        shown = mask.astype(bool)
        targets[:, :-1][~(shown[:, :-1] & shown[:, 1:])] = IGNORED
    return targets


def _cut(tokens: Tokens) -> Tokens:
    n_rows = max(N_MOST_TOKENS // max(tokens.length, 1), 1)
    if tokens.n_rows <= n_rows:
        return tokens
    note = f"{tokens.source}: the first {n_rows:,} of {tokens.n_rows:,} rows are used"
    return replace(tokens.rows(0, n_rows), notes=(note,))
