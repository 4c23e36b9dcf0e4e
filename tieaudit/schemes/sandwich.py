"""The middle layers share, the first and the last keep their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.schemes import Scheme
from tieaudit.stacks import blocks, number_of, share_layers
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    k = number_of("sandwich", argument or "1", "the number of layers at each end that keep their own weights")

    def plan_of(n: int) -> Sequence[int] | str:
        if n < 2 * k + 2:
            return f"nothing is left to share between {k} at each end"
        return [layer if layer < k else k if layer < n - k else layer for layer in range(n)]

    yield from share_layers(subject, "sandwich", blocks, plan_of)


sandwich = Scheme(
    name="sandwich",
    argument="K",
    merge="mean",
    summary="all layers but the first and the last K (1) use one set of weights; norms stay private",
    source="Reid, Marrese-Taylor & Matsuo 2021, Subformer (Findings of EMNLP), section 2.2",
    propose=_propose,
    page="""sandwich: A BBBB C.

The first and the last layer (sandwich:K, the first and the last K) keep their own weights, those between them share one
set. Every layer keeps its norms: sharing them saves nothing and hurts (SPIN, Lin et al. 2022).""",
)
