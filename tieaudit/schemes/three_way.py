"""Encoder embedding, decoder embedding and output head become one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.tables import both_sides, heads, share_tables
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    sides, scores = both_sides(subject, "three-way"), heads(subject)
    if isinstance(sides, Refusal):
        yield sides
        return
    if not scores:
        yield Refusal(
            "three-way", (), "no output head was recognised: three-way needs an encoder, a decoder and a head"
        )
        return
    yield from share_tables(subject, "three-way", [*sides, *scores], "embed the tokens of both sides and score them")


three_way = Scheme(
    name="three-way",
    summary="encoder embedding, decoder embedding and output head become one tensor",
    source="Press & Wolf 2017, Using the Output Embedding to Improve Language Models (EACL), section 3.3 (TWWT); "
    "Vaswani et al. 2017, Attention is all you need (NeurIPS), section 3.4",
    propose=_propose,
    page="""three-way: one matrix for source tokens, target tokens and scores.

Needs one vocabulary for source and target. English–French translation loses half its parameters (168 to 80 million) and
no BLEU when trained so from the start. After training the head's values survive by default.""",
)
