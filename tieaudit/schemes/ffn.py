"""One feed-forward network for all layers of a stack."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.stacks import FEED_FORWARD, of_kinds, share_layers
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    yield from share_layers(subject, "ffn", of_kinds(FEED_FORWARD), lambda n: [0] * n)


ffn = Scheme(
    name="ffn",
    merge="mean",
    summary="one feed-forward network for all layers of a stack",
    source="Pires, Lopes, Assogba & Setiawan 2023, One Wide Feedforward is All You Need (WMT), section 2.2",
    propose=_propose,
    page="""ffn: all layers of the encoder use one FFN, all of the decoder another.

Of Transformer-Big, sharing the encoder's FFN saves 42 million parameters and costs 0.2 BLEU, both 84 million and 0.9;
the attention must not be shared in the same way (decoder self-attention: −9 BLEU).""",
)
