"""Each block is used k times in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.schemes import Scheme
from tieaudit.stacks import number_of, share_layers, whole
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    k = number_of("immediate", argument or "2", "how many layers in a row share")

    def plan_of(n: int) -> Sequence[int] | str:
        return [layer // k for layer in range(n)] if n % k == 0 else f"{k} does not divide {n}"

    yield from share_layers(subject, "immediate", whole, plan_of)


immediate = Scheme(
    name="immediate",
    argument="K",
    merge="mean",
    summary="each set of weights serves K (2) layers in a row: AABBCC",
    source="Liu et al. 2024, MobileLLM (ICML), section 2.2.4, immediate block-wise sharing",
    propose=_propose,
    page="""immediate:K: AABB…, each block is computed K times before the next one.

The weights of a block stay in the cache while it is computed again: MobileLLM-LS doubles its depth for 3 % more
latency. immediate:K is sequence:N/K under the name of its paper.""",
)
