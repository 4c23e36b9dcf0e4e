"""Which input and output of one model is which of another: by name, else by order and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tieaudit.inputs import Feed, Sizes, feed_of
from tieaudit.runners import Array, Port, Signature

_FIRST = ("logits", "prediction_logits", "last_hidden_state", "output")
"""Names of the outputs that matter most, for pairing and for messages."""


@dataclass(frozen=True)
class Matched:
    """Outputs of both sides under common names, and what had no partner."""

    before: dict[str, Array]
    after: dict[str, Array]
    alone: tuple[str, ...]


def outputs(a: Mapping[str, Array], b: Mapping[str, Array]) -> Matched:
    """Pair outputs: equal names first, then the same shape in the same order. Nothing paired: both sides empty."""
    pairs = {name: (name, name) for name in a if name in b}
    if not pairs:
        left = list(b)
        for name in sorted(a, key=_rank):
            partner = next((other for other in sorted(left, key=_rank) if b[other].shape == a[name].shape), None)
            if partner is not None:
                left.remove(partner)
                pairs[f"{name} / {partner}"] = (name, partner)
    paired_a, paired_b = {one for one, _ in pairs.values()}, {other for _, other in pairs.values()}
    alone = (*(n for n in a if n not in paired_a), *(n for n in b if n not in paired_b))
    return Matched(
        {label: a[one] for label, (one, _) in pairs.items()},
        {label: b[other] for label, (_, other) in pairs.items()},
        alone,
    )


def _rank(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def feed_for(feed: Feed, source: Signature, target: Signature) -> Feed | str:
    """The same values for another model, or the reason why it cannot get them.

    Inputs of equal name are the same; with no common name, those at equal places with equal types. What the other
    model needs besides (masks, empty caches) is made up in the sizes that the given inputs have.
    """
    if not target.inputs:
        return feed
    given = dict(feed.arrays)
    if not any(port.name in given for port in target.inputs):
        if len(source.inputs) != len(target.inputs):
            return f"no input of one is an input of the other: {_names(source.inputs)}; {_names(target.inputs)}"
        given = {
            port.name: given[one.name]
            for one, port in zip(source.inputs, target.inputs, strict=True)
            if one.name in given and _alike(one, port)
        }
    missing = [port for port in target.inputs if port.name not in given]
    if missing:
        made = feed_of(target, _sizes(given)).arrays
        needed = [port.name for port in missing if not _neutral(port.name)]
        if needed:
            return f"the input {needed[0]} exists only on one side, and has no neutral value"
        given.update({port.name: made[port.name] for port in missing})
    return Feed({port.name: _as(given[port.name], port) for port in target.inputs}, feed.source)


def narrowed(source: Signature, target: Signature) -> Signature | str:
    """`source` with the sizes that `target` fixes and it leaves free, so that one feed fits both.

    A sentence where both fix a size and differ, or have no input in common: then they are not of one signature.
    """
    partners = {port.name: port for port in target.inputs}
    if target.inputs and not any(port.name in partners for port in source.inputs):
        if len(source.inputs) != len(target.inputs):
            return f"no input of one is an input of the other: {_names(source.inputs)}; {_names(target.inputs)}"
        partners = {one.name: port for one, port in zip(source.inputs, target.inputs, strict=True)}
    symbols: dict[str, int] = {}
    fixed: dict[str, tuple[int | str | None, ...]] = {}
    for port in source.inputs:
        other = partners.get(port.name)
        if other is None:
            continue
        if len(other.dims) != len(port.dims):
            return (
                f"the input {port.name} has {len(port.dims)} dimensions on one side and {len(other.dims)} on the other"
            )
        for own, theirs in zip(port.dims, other.dims, strict=True):
            if isinstance(own, int) and isinstance(theirs, int) and own != theirs:
                return f"the input {port.name} is {list(port.dims)} on one side and {list(other.dims)} on the other"
            if isinstance(own, str) and isinstance(theirs, int):
                symbols[own] = theirs
        fixed[port.name] = tuple(
            theirs if isinstance(theirs, int) else own for own, theirs in zip(port.dims, other.dims, strict=True)
        )
    ports = tuple(
        replace(
            port,
            dims=tuple(
                symbols.get(size, size) if isinstance(size, str) else size for size in fixed.get(port.name, port.dims)
            ),
        )
        for port in source.inputs
    )
    return replace(source, inputs=ports)


def _names(ports: tuple[Port, ...]) -> str:
    return ", ".join(port.name for port in ports[:4])


def _alike(a: Port, b: Port) -> bool:
    return len(a.dims) == len(b.dims) and a.dtype.rstrip("0123456789") == b.dtype.rstrip("0123456789")


def _neutral(name: str) -> bool:
    """Whether the value that is made up for it means *as if it were not there*."""
    return any(sign in name for sign in ("mask", "position", "token_type", "segment", "past", "cache"))


def _sizes(given: Mapping[str, Array]) -> Sizes:
    ids = next((a for n, a in given.items() if a.ndim == 2 and n.endswith(("input_ids", "ids"))), None)
    if ids is None:
        ids = next((a for a in given.values() if a.ndim >= 2), None)
    encoder = given.get("input_ids") if "decoder_input_ids" in given else None
    return Sizes(
        batch=1 if ids is None else ids.shape[0],
        sequence=7 if ids is None else ids.shape[1],
        encoder=5 if encoder is None else encoder.shape[1],
        past=0,
    )


def _as(array: Array, port: Port) -> Array:
    """The other side's integer or float width."""
    from tieaudit.dtypes import dtype

    if not port.dtype or dtype(port.dtype).family == "string":
        return array
    return array.astype(dtype(port.dtype).numpy())
