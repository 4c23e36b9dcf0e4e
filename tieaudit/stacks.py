"""Layers of one kind as a table: what depth schemes share. A stack is a row of layers, a slot one weight of each.

`literature`: with g(ℓ) the set of weights that layer ℓ uses, a depth scheme is nothing but the map g (Takase & Kiyono
2023, Lessons on parameter sharing across layers in Transformers, section 3).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from tieaudit.errors import UsageError
from tieaudit.model import Member, Weight
from tieaudit.onevalue import OneValue, one_value
from tieaudit.places import NO_LAYER
from tieaudit.printable import counted
from tieaudit.verdict import Candidate, Refusal, Subject

_NEVER = 1 << 62
ATTENTION = "attention_"
FEED_FORWARD = "ffn_"
NORMS = ("norm_scale", "norm_bias")


@dataclass(frozen=True)
class Slot:
    """One place in a layer."""

    name: str
    """The weight's name without the layer's number; where names tell nothing, its kind and how many came before."""
    kind: str
    is_vector: bool = False


@dataclass(frozen=True)
class Stack:
    """Layers of one part and side that hold the same slots."""

    part: str
    side: str | None
    layers: tuple[int, ...]
    """Layer indices, in order."""
    slots: tuple[tuple[Slot, tuple[Weight, ...]], ...]
    """Slot → its weight in each layer."""
    uneven: tuple[tuple[Slot, str], ...]
    """Slots that some layers lack, or have in another shape or type, and which."""

    @property
    def title(self) -> str:
        """For messages: what this stack is."""
        side = f"the {self.side}'s" if self.side else "the"
        return f"{side} {len(self.layers)} layers" + (f" of {self.part}" if self.part else "")


def stacks(subject: Subject) -> tuple[Stack, ...]:
    """The stacks of two layers or more, by part and side. Cost: that of the weights' names, once; nothing is read."""
    if "stacks" not in subject.worked_out:
        subject.worked_out["stacks"] = _stacks(subject)
    return cast("tuple[Stack, ...]", subject.worked_out["stacks"])


def _stacks(subject: Subject) -> tuple[Stack, ...]:
    first_use, found = first_uses(subject), []
    for (part, side, _), by_layer in _rows(subject).items():
        if len(by_layer) > 1:
            found.append(_stack(subject, part, side, by_layer, first_use))
    return tuple(found)


_Row = tuple[str, str | None, object]
"""Part, side, and what tells two towers of one side apart."""


def _rows(subject: Subject) -> dict[_Row, dict[int, list[Weight]]]:
    """Rows of layers: by the stream of the graph, else by the path before the number.

    Paths that count the same layers are one row (XLM's attentions.0 and ffns.0); a text tower of 12 layers beside one
    of 24 for images is not. Tables and heads belong to no layer.
    """
    rows: dict[_Row, dict[int, list[Weight]]] = {}
    for weight in subject.model.weights:
        role = subject.roles[weight.id]
        learned = weight.is_float and weight.parameter is not False and not weight.absent
        if role.layer is not None and learned and role.kind not in NO_LAYER:
            number = _numbered(weight.name, role.layer)
            path: object = role.stream if role.stream is not None else weight.name[: number.start()] if number else ""
            rows.setdefault((weight.part, role.side, path), {}).setdefault(role.layer, []).append(weight)
    found: dict[_Row, dict[int, list[Weight]]] = {}
    for (part, side, path), by_layer in rows.items():
        together = found.setdefault((part, side, path if isinstance(path, int) else frozenset(by_layer)), {})
        for layer, weights in by_layer.items():
            together.setdefault(layer, []).extend(weights)
    return found


def _numbered(name: str, layer: int) -> re.Match[str] | None:
    """Where a name has its layer's number: a part of the path, alone or as in `layer_2`; never the 2 of wav2vec2."""
    return re.search(rf"(?<![A-Za-z0-9])(?:[A-Za-z]+_)?{layer}(?![A-Za-z0-9])", name)


def _stack(
    subject: Subject, part: str, side: str | None, by_layer: dict[int, list[Weight]], first_use: dict[str, int]
) -> Stack:
    layers = tuple(sorted(by_layer))
    held = _slotted(subject, by_layer, first_use)
    slots, uneven = [], []
    for slot in dict.fromkeys(slot for layer in layers for slot in held[layer]):
        weights = [held[layer].get(slot) for layer in layers]
        there = [weight for weight in weights if weight is not None]
        if len(there) == 1:
            continue  # what one layer alone has (T5's relative positions are its first layer's) nobody could share
        if len(there) < len(layers):
            lacking = [layer for layer, weight in zip(layers, weights, strict=True) if weight is None]
            uneven.append((slot, f"layers {_spelled(lacking)} have none"))
        elif len({(weight.shape, weight.dtype) for weight in there}) > 1:
            shapes = sorted({f"{list(weight.shape)} {weight.dtype}" for weight in there})
            uneven.append((slot, f"the layers have different shapes or types: {', '.join(shapes[:4])}"))
        else:
            slots.append((slot, tuple(there)))
    return Stack(part, side, layers, tuple(slots), tuple(uneven))


def _slotted(
    subject: Subject, by_layer: dict[int, list[Weight]], first_use: dict[str, int]
) -> dict[int, dict[Slot, Weight]]:
    """Layer → its slots: by name where the names of layers agree but for the number, else by kind and first use.

    An exporter's optimiser keeps the names of biases and calls matrices by numbers: such a layer has some of both.
    """
    named = {layer: _by_name(subject, weights, layer) for layer, weights in by_layer.items()}
    n_having = Counter(slot for slots in named.values() for slot in slots)
    whole_layers = all(len(named[layer]) == len(weights) for layer, weights in by_layer.items())
    # few names in all are names that repeat; of many only those that every layer has are no chance
    n_least = 2 if len(n_having) < 2 * max(len(weights) for weights in by_layer.values()) else len(by_layer)
    found = {}
    for layer, weights in by_layer.items():
        agreed = {slot: one for slot, one in named[layer].items() if whole_layers and n_having[slot] >= n_least}
        known = {one.id for one in agreed.values()}
        found[layer] = agreed | _by_order(subject, [one for one in weights if one.id not in known], first_use)
    return found


def _by_name(subject: Subject, weights: list[Weight], layer: int) -> dict[Slot, Weight]:
    found = {}
    for one in weights:
        at = _numbered(one.name, layer) or re.search(rf"(?<!\d){layer}(?!\d)", one.name)
        name = one.name[: at.end() - len(str(layer))] + "#" + one.name[at.end() :] if at else one.name
        found[Slot(name, subject.roles[one.id].kind, len(one.shape) < 2)] = one
    return found


def _by_order(subject: Subject, weights: list[Weight], first_use: dict[str, int]) -> dict[Slot, Weight]:
    counted: dict[tuple[str, int | None], int] = {}
    found = {}
    for weight in sorted(weights, key=lambda one: in_order(subject, one, first_use)):
        role = subject.roles[weight.id]
        n = counted[role.kind, role.expert] = counted.get((role.kind, role.expert), -1) + 1
        expert = "" if role.expert is None else f" of expert {role.expert}"
        found[Slot(f"{role.kind}{expert} {n}", role.kind, len(weight.shape) < 2)] = weight
    return found


def first_uses(subject: Subject) -> dict[str, int]:
    """Weight → its first use in the graph, as a number: by the order in which operations run. Empty without a graph.

    The uses of a model are in no such order: those of an ONNX file are in that of its initializers.
    """
    if "first uses" not in subject.worked_out:
        model = subject.model
        at = {(one.part, one.scope, one.node): index for index, one in enumerate(model.operations)}
        found: dict[str, int] = {}
        for index, use in enumerate(model.uses):
            runs = at.get((use.part, use.scope, use.node), len(at) + index)
            found[use.weight] = min(runs, found.get(use.weight, runs))
        subject.worked_out["first uses"] = found
    return cast("dict[str, int]", subject.worked_out["first uses"])


def in_order(subject: Subject, weight: Weight, first_use: dict[str, int]) -> tuple[int, int]:
    """Where a weight stands among those of its kind; weights of no graph stay in the file's order.

    By its attention (a decoder may make the keys of what it attends to before its own), then by its first use.
    """
    attention = subject.roles[weight.id].attention
    return -1 if attention is None else attention, first_use.get(weight.id, _NEVER)


Chosen = Callable[[Slot], bool]


def whole(slot: Slot) -> bool:
    """Everything a layer holds."""
    return True


def blocks(slot: Slot) -> bool:
    """Everything but the norms, of which each layer keeps its own (SPIN, Subformer: sharing norms diverges).

    A vector of which nothing is known may be a norm's.
    """
    return slot.kind not in NORMS and not (slot.is_vector and slot.kind == "other")


def of_kinds(*beginnings: str) -> Chosen:
    """Slots whose kind begins with one of these."""
    return lambda slot: slot.kind.startswith(beginnings)


def share_layers(
    subject: Subject, scheme: str, chosen: Chosen, plan_of: Callable[[int], Sequence[int] | str]
) -> Iterator[Candidate | Refusal]:
    """One candidate for each slot and each set of layers that share it.

    `plan_of(n_layers)` gives g: for each layer, in order, the number of the set it uses; or why this many layers cannot
    be shared so. Weights that already are one are not proposed again.
    """
    everything = stacks(subject)
    if not everything:
        alone = any(role.layer is not None for role in subject.roles.values())
        found = "only one layer was" if alone else "no repeated layers were"
        yield Refusal(scheme, (), f"{found} recognised in this model" + (", with none to share with" if alone else ""))
    for stack in everything:
        plan = plan_of(len(stack.layers))
        if isinstance(plan, str):
            yield Refusal(scheme, (), f"{stack.title}: {plan}")
            continue
        if len(set(plan)) == len(plan):
            yield Refusal(scheme, (), f"{stack.title}: each would be a set of its own, so that none is shared")
            continue
        picked = [(slot, weights) for slot, weights in stack.slots if chosen(slot)]
        if not picked:
            yield Refusal(
                scheme, (), f"{stack.title} hold nothing of the kinds that this scheme shares{_unknown(stack)}"
            )
        for slot, reason in stack.uneven:
            if chosen(slot):
                yield Refusal(scheme, (), f"{slot.name} of {stack.title}: {reason}")
        for slot, weights in picked:
            yield from _shared(scheme, stack, slot, weights, plan, one_value(subject))


def _unknown(stack: Stack) -> str:
    """Of a refusal: how many places in a layer may be what was looked for, for all that is known."""
    vague = [slot.name for slot, _ in stack.slots if slot.kind in ("other", "projection", "bias")]
    if not vague:
        return ""
    told = f"; nothing tells what {counted(len(vague), 'place')} of each layer are for, {vague[0]} among them"
    return f"{told} (a graph would, or a class; custom shares by name)"


def _shared(
    scheme: str, stack: Stack, slot: Slot, weights: tuple[Weight, ...], plan: Sequence[int], known: OneValue
) -> Iterator[Candidate]:
    for group in dict.fromkeys(plan):
        at = [index for index, number in enumerate(plan) if number == group]
        members = [weights[index] for index in at]
        ids = tuple(Member(id) for id in dict.fromkeys(weight.id for weight in members))
        regions = {weight.storage.region: weight.n_bytes for weight in members if weight.storage is not None}
        if len(ids) < 2 or len(regions) < 2:
            continue
        because = f"{slot.name}: layers {_spelled([stack.layers[index] for index in at])} of {stack.title} use one"
        saved = sum(regions.values()) - max(regions.values())
        yield Candidate(scheme, ids, saved, known.holds(ids), because)


def halves_and_thirds(subject: Subject) -> list[str]:
    """Numbers of distinct layers worth comparing: a half and a third of the layers, where they divide them."""
    lengths = {len(stack.layers) for stack in stacks(subject)}
    return sorted({str(n // part) for n in lengths for part in (2, 3) if n % part == 0 and n > part}, key=int)


def number_of(scheme: str, argument: str, what: str) -> int:
    """The whole number behind the colon. UsageError."""
    if not argument.isascii() or not argument.isdigit() or int(argument[:9]) < 1:
        given = f"found {argument!r}" if argument else "found none"
        raise UsageError(f"--scheme {scheme}: expected {what} behind a colon, {given}", hint=f"{scheme}:2, for example")
    return int(argument[:9])


def _spelled(layers: Sequence[int]) -> str:
    """0–3, 7: runs of neighbours are named by their ends."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
