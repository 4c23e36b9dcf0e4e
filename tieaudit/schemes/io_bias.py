"""The output head's second bias is the first."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.tables import of_kind, share_tables
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    biases = of_kind(subject, "output_head_bias")
    if len(biases) < 2:
        n = "no bias" if not biases else f"one bias, {biases[0].id},"
        yield Refusal("io-bias", (), f"{n} of an output head was recognised: two or more could be one")
        return
    yield from share_tables(subject, "io-bias", biases, "shift the same scores")


io_bias = Scheme(
    name="io-bias",
    merge="mean",
    summary="the biases that an output head has under several names become one tensor",
    source="Devlin et al. 2019, BERT: cls.predictions.bias and cls.predictions.decoder.bias of its masked-LM head",
    propose=_propose,
    page="""io-bias: decoder.bias = predictions.bias.

BERT, RoBERTa and their children keep the bias of the masked-LM head under two names, a tie of its own beside that of
the matrix. A checkpoint in which they differ is loaded with one of them, which depends on the library's version.""",
)
