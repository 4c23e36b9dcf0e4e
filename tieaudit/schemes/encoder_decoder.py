"""The encoder's and the decoder's token embeddings become one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.tables import both_sides, share_tables
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    sides = both_sides(subject, "encoder-decoder")
    if isinstance(sides, Refusal):
        yield sides
        return
    yield from share_tables(subject, "encoder-decoder", sides, "embed the tokens of encoder and decoder")


encoder_decoder = Scheme(
    name="encoder-decoder",
    merge="mean",
    summary="the token embeddings of encoder and decoder become one tensor, the output head stays its own",
    source="Raffel et al. 2020, T5 (JMLR), and its v1.1; nematus --tie_encoder_decoder_embeddings "
    "(Sennrich et al. 2017)",
    propose=_propose,
    page="""encoder-decoder: one embedding for both sides, a head of its own.

Needs one vocabulary for source and target: two vocabularies of one size are not one vocabulary, which no shape can
tell. T5 v1.1 and mT5 are tied in this way.""",
)
