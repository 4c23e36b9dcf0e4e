"""Layer ℓ of the encoder is layer ℓ of the decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tieaudit.model import Member, Weight
from tieaudit.onevalue import one_value
from tieaudit.schemes import Scheme
from tieaudit.stacks import Slot, Stack, first_uses, in_order, stacks
from tieaudit.verdict import Candidate, Refusal, Subject

_SHARED = ("attention_query", "attention_key", "attention_value", "attention_output", "attention_qkv", "ffn_")
_CROSSES = re.compile(r"cross|enc_?dec|encoder_?att|multihead_attn|inter_?att|src_?att|ctx_?att", re.IGNORECASE)
"""How libraries call an attention to another stack, in the part of a name behind the layer."""
_Held = tuple[Slot, tuple[Weight, ...]]


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    by_side = {stack.side: stack for stack in stacks(subject) if stack.side}
    if set(by_side) != {"encoder", "decoder"}:
        yield Refusal("tied-transformer", (), "no encoder and decoder of several layers each were recognised")
        return
    encoder, decoder = by_side["encoder"], by_side["decoder"]
    if len(encoder.layers) != len(decoder.layers):
        sizes = f"{len(encoder.layers)} and {len(decoder.layers)}"
        yield Refusal("tied-transformer", (), f"encoder and decoder have different numbers of layers: {sizes}")
        return
    for stack in (encoder, decoder):
        for slot, reason in stack.uneven:
            if slot.kind.startswith(_SHARED):
                yield Refusal("tied-transformer", (), f"{slot.name} of {stack.title}: {reason}")
    yield from _tied(subject, encoder, decoder)


def _tied(subject: Subject, encoder: Stack, decoder: Stack) -> Iterator[Candidate | Refusal]:
    """Self-attention and feed-forward; the decoder's cross-attention has no counterpart."""
    ours, theirs = _shared(subject, encoder), _shared(subject, decoder)
    if not ours or not theirs:
        lacking = encoder if not ours else decoder
        because = f"{lacking.title}: none of their weights was recognised as attention or feed-forward"
        yield Refusal("tied-transformer", (), because)
        return
    for slot, weights in ours:
        found = _counterpart(subject, slot, theirs)
        if isinstance(found, str):
            yield Refusal("tied-transformer", (weights[0].id,), found)
            continue
        theirs.remove(found)
        other_slot, others = found
        if weights[0].shape != others[0].shape or weights[0].dtype != others[0].dtype:
            shapes = f"{list(weights[0].shape)} and {list(others[0].shape)}"
            yield Refusal(
                "tied-transformer", (weights[0].id, others[0].id), f"{slot.name} and {other_slot.name}: {shapes}"
            )
            continue
        for layer, weight, other in zip(encoder.layers, weights, others, strict=True):
            if weight.storage is None or other.storage is None or weight.storage.region == other.storage.region:
                continue
            because = f"layer {layer} of the encoder is layer {layer} of the decoder"
            members = (Member(weight.id), Member(other.id))
            lossless = one_value(subject).holds(members)
            yield Candidate("tied-transformer", members, other.n_bytes, lossless, because)


def _shared(subject: Subject, stack: Stack) -> list[_Held]:
    """The slots that the scheme is about, in the order in which the first layer uses them."""
    first_use = first_uses(subject)
    held = [(slot, weights) for slot, weights in stack.slots if slot.kind.startswith(_SHARED)]
    return sorted(held, key=lambda one: in_order(subject, one[1][0], first_use))


def _counterpart(subject: Subject, slot: Slot, theirs: list[_Held]) -> _Held | str:
    """The decoder's weight for a place in the encoder's layer, or why none is known to be it.

    By name, as far as names tell the place inside a layer; else by the graph, whose first attention of a layer is
    self-attention; else whatever is not called cross-attention.
    """
    alike = [one for one in theirs if one[0].kind == slot.kind]
    if not alike:
        return f"the decoder has no {slot.kind} that fits {slot.name}"
    same = [one for one in alike if _place(slot) and _place(one[0]) == _place(slot)]
    if same:
        return same[0]
    if not slot.kind.startswith("attention_") or subject.roles[alike[0][1][0].id].attention is not None:
        return alike[0]
    own = [one for one in alike if not _CROSSES.search(_place(one[0]) or one[0].name)]
    if len(own) == 1 or (own and subject.model.has_graph):
        return own[0]
    names = " or ".join(one[0].name for one in (own or alike)[:3])
    return f"{slot.name} would be {names}: nothing tells which of them is the decoder's self-attention"


def _place(slot: Slot) -> str:
    """What its name says behind the number of the layer; empty where names say nothing."""
    return slot.name.partition("#")[2]


tied_transformer = Scheme(
    name="tied-transformer",
    merge="mean",
    summary="self-attention and feed-forward of encoder layer ℓ are those of decoder layer ℓ",
    source="Xia et al. 2019, Tied Transformers: Neural Machine Translation with Shared Encoder and Decoder (AAAI)",
    propose=_propose,
    page="""tied-transformer: one stack for encoder and decoder.

Encoder and decoder need equally many layers of equal shape. The decoder's cross-attention and all norms stay as they
are. Which attention is the decoder's own its graph says, else its name; where neither does, it is refused. Trained so
from the start, German–English translation gains (33.3 to 35.1 BLEU, IWSLT 2014).""",
)
