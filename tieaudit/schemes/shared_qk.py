"""Query and key projection of each layer are one."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.pairs import share_within_layers
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    yield from share_within_layers(subject, "shared-qk", "attention_query", "attention_key")


shared_qk = Scheme(
    name="shared-qk",
    merge="mean",
    summary="the query and the key projection of each attention are one tensor",
    source="Kitaev, Kaiser & Levskaya 2020, Reformer (ICLR), section 2, Shared-QK Transformer",
    propose=_propose,
    page="""shared-qk: W_Q = W_K in each attention.

Scores become symmetric. Reformer normalises the keys, which this rewrite does not add; in causal language models it is
known to break the model (Kayyam et al. 2026).""",
)
