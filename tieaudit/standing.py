"""Gate, up and down of a feed-forward told by the shapes of the matrices that stand together, whatever they are called.

Two matrices of which one takes what the other gives are up and down; two alike and one reversed are gate, up and down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tieaudit.model import Weight
from tieaudit.words import FEED, PLAIN, Path

_DOWNS: Mapping[str, str] = {
    "wi": "wo", "fc1": "fc2", "linear1": "linear2", "linear_1": "linear_2", "up_proj": "down_proj", "w1": "w2",
    "input_linear": "output_linear", "lin1": "lin2", "fc_in": "fc_out", "c_fc": "c_proj", "w12": "w3",
}  # fmt: skip
"""Up → down."""
_UPS = re.compile(r"(^|_)up(_|$)")
_GATES = re.compile(r"gate|(^|\.)fc12$")
"""Of fc11 and fc12 (NomicBERT) the second one is activated."""


@dataclass(frozen=True)
class _Matrix:
    id: str
    rest: str
    """Its path inside what holds the feed-forward."""
    n_in: int
    n_out: int


def feed_kinds(
    weights: Iterable[Weight], paths: Mapping[str, Path], widths: frozenset[int], biases: Mapping[tuple[str, ...], int]
) -> dict[str, str]:
    """Weight id → ffn_gate, ffn_up, ffn_gate_up or ffn_down, where the shapes leave one reading.

    `widths`: sizes of the stream, where they are known (columns of a token table); `biases`: module → size of its bias,
    which tells the side of a matrix that is its output. Cost: linear in the weights.
    """
    held: dict[tuple[object, ...], list[_Matrix]] = {}
    for weight in weights:
        path = paths[weight.id]
        holder = holder_of(path)
        if holder is None or path.end != "weight" or len(weight.shape) not in (2, 3) or "norm" in path.leaf:
            continue
        first, second = weight.shape[-2:]
        turned = path.turned
        if first != second and (size := biases.get(path.modules)) in (first, second):
            turned = size == second
        n_out, n_in = (second, first) if turned else (first, second)
        rest = ".".join(path.modules[len(holder) :])
        held.setdefault((holder, len(weight.shape)), []).append(_Matrix(weight.id, rest, n_in, n_out))
    found: dict[str, str] = {}
    for matrices in held.values():
        if len(matrices) in (2, 3):
            told = _read(sorted(matrices, key=lambda one: natural(one.rest)), widths)
            if not any(_says_otherwise(paths[id].leaf, kind) for id, kind in told.items()):
                found.update(told)
    return found


def _says_otherwise(leaf: str, kind: str) -> bool:
    """Whether a plain name contradicts what shapes tell: the matrices are then turned, and only names are left."""
    named = PLAIN.get(leaf, "")
    return named.startswith("ffn_") and (named == "ffn_down") != (kind == "ffn_down")


def holder_of(path: Path) -> tuple[str, ...] | None:
    """The modules down to the innermost one that is called a feed-forward, with the number of its expert."""
    modules = path.modules
    for index in range(len(modules) - 1, -1, -1):
        inner = any(not part.isdigit() for part in modules[index + 1 :])
        if FEED.search(modules[index]) and (inner or index < len(modules) - 1):
            if index + 1 < len(modules) and modules[index + 1].isdigit() and inner:
                return modules[: index + 2]
            return modules[: index + 1]
    return None


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A key by which net.10 comes after net.2."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)|\.", text) if part)


def _read(matrices: list[_Matrix], widths: frozenset[int]) -> dict[str, str]:
    first, *others = matrices
    if not others:
        return {}
    if len(others) == 1:
        for up, down in ((first, others[0]), (others[0], first)):
            if up.n_in == down.n_out and up.n_out in (down.n_in, 2 * down.n_in) and _leads(up, down, widths):
                return {up.id: "ffn_up" if up.n_out == down.n_in else "ffn_gate_up", down.id: "ffn_down"}
        return {}
    for down in matrices:
        alike = [one for one in matrices if one is not down]
        if all((one.n_in, one.n_out) == (down.n_out, down.n_in) for one in alike) and down.n_in != down.n_out:
            gate = _gate(alike)
            return {down.id: "ffn_down", **{one.id: "ffn_gate" if one is gate else "ffn_up" for one in alike}}
    return {}


def _leads(up: _Matrix, down: _Matrix, widths: frozenset[int]) -> bool:
    """Whether the stream goes into `up`: by its width where that is known, else because it is widened."""
    if up.n_in == down.n_in:  # all square: by their order
        return natural(up.rest) < natural(down.rest)
    if (up.n_in in widths) != (down.n_in in widths):
        return up.n_in in widths
    return up.n_out > up.n_in


def _gate(alike: list[_Matrix]) -> _Matrix:
    """Of two that are multiplied: the one that says so, or that comes first in the order of their numbers."""
    for one, other in (alike, alike[::-1]):
        if (
            _GATES.search(one.rest)
            and not _GATES.search(other.rest)
            or _UPS.search(other.rest)
            and not _UPS.search(one.rest)
        ):
            return one
    return alike[0]


def numbered_feed(weight: Weight, path: Path, beside: Mapping[str, Weight], in_feed: bool) -> str | None:
    """w1 … w3, fc1 and fc2, wi and wo, linear1 and linear2: by which of them are there."""
    leaf = path.leaf
    if leaf in ("fc11", "fc12"):
        return "ffn_up" if leaf == "fc11" else "ffn_gate"
    if leaf in ("w1", "w3"):
        return "ffn_up" if "w3" not in beside else "ffn_gate" if leaf == "w1" else "ffn_up"
    if leaf in ("w2", "wo", "fc2", "linear2", "linear_2"):
        partner = {"w2": "w1", "wo": "wi", "fc2": "fc1", "linear2": "linear1", "linear_2": "linear_1"}[leaf]
        return (
            "ffn_down" if partner in beside or f"{partner}1" in beside or f"{partner}_0" in beside or in_feed else None
        )
    return "ffn_gate_up" if doubles(weight, path, beside) else "ffn_up"


def doubles(weight: Weight, path: Path, beside: Mapping[str, Weight]) -> bool:
    """Whether it gives twice what its partner takes: gate and up in one matrix."""
    down = beside.get(_DOWNS.get(path.leaf, ""))
    if down is None or len(down.shape) != len(weight.shape) or len(weight.shape) < 2:
        return False
    outer = set(weight.shape[-2:]) & set(down.shape[-2:])
    return any(
        sorted(weight.shape[-2:]) == sorted((size, 2 * inner))
        for size in outer
        for inner in down.shape[-2:]
        if sorted(down.shape[-2:]) == sorted((size, inner))
    )


def called_feed(weight: Weight, path: Path, beside: Mapping[str, Weight]) -> str | None:
    """Words that mean something only inside a feed-forward, and two in a list."""
    leaf = path.leaf
    if leaf in ("c_proj", "output", "out_proj", "output_linear", "proj_out", "dense2", "ff2", "down"):
        return "ffn_down"
    if leaf in ("input_linear", "dense1", "ff1", "up", "gate", "proj_in", "proj", "dense"):
        doubled = doubles(weight, path, beside)
        return "ffn_gate_up" if doubled else "ffn_gate" if leaf == "gate" else "ffn_up"
    if path.ends_in_number:
        numbers = [int(name) for name in beside if name.isdigit()]
        own = int(path.modules[-1])
        if len(numbers) == 2 and own in numbers:
            return "ffn_up" if own == min(numbers) else "ffn_down"
    return None
