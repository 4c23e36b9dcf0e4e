"""Layer ℓ of the encoder is layer ℓ of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.model import Member
from tieaudit.schemes import Scheme
from tieaudit.stacks import Stack, stacks
from tieaudit.verdict import Candidate, Refusal, Subject

_SHARED = ("attention_query", "attention_key", "attention_value", "attention_output", "attention_qkv", "ffn_")


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
    yield from _tied(encoder, decoder)


def _tied(encoder: Stack, decoder: Stack) -> Iterator[Candidate | Refusal]:
    """Self-attention and feed-forward; the decoder's first of a kind is self-attention, its second cross-attention."""
    theirs: dict[str, list[int]] = {}
    for index, (slot, _) in enumerate(decoder.slots):
        theirs.setdefault(slot.kind, []).append(index)
    for slot, weights in encoder.slots:
        if not slot.kind.startswith(_SHARED):
            continue
        if not theirs.get(slot.kind):
            yield Refusal("tied-transformer", (weights[0].id,), f"the decoder has no {slot.kind} that fits {slot.name}")
            continue
        other_slot, others = decoder.slots[theirs[slot.kind].pop(0)]
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
            yield Candidate("tied-transformer", (Member(weight.id), Member(other.id)), other.n_bytes, False, because)


tied_transformer = Scheme(
    name="tied-transformer",
    merge="mean",
    summary="self-attention and feed-forward of encoder layer ℓ are those of decoder layer ℓ",
    source="Xia et al. 2019, Tied Transformers: Neural Machine Translation with Shared Encoder and Decoder (AAAI)",
    propose=_propose,
    page="""tied-transformer: one stack for encoder and decoder.

Encoder and decoder need equally many layers of equal shape. The decoder's cross-attention and all norms stay as they
are. Trained so from the start, German–English translation gains (33.3 to 35.1 BLEU, IWSLT 2014).""",
)
