"""First and last layer keep their own weights, those between repeat M sets in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.schemes import Scheme
from tieaudit.stacks import number_of, share_layers, whole
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    m = number_of("middle-cycle", argument, "the number M of sets that the middle layers repeat")

    def plan_of(n: int) -> Sequence[int] | str:
        if n - 2 <= m:
            return f"the {max(n - 2, 0)} layers between the first and the last are no more than M = {m}"
        return [0, *(1 + layer % m for layer in range(n - 2)), n]

    yield from share_layers(subject, "middle-cycle", whole, plan_of)


middle_cycle = Scheme(
    name="middle-cycle",
    argument="M",
    worth_comparing=lambda subject: ("1", "2"),
    merge="mean",
    summary="first and last layer keep their own weights, those between repeat M sets: A BCBC D",
    source="Bae et al. 2025, Mixture-of-Recursions (NeurIPS), section 2.2, Middle-Cycle",
    propose=_propose,
    page="""middle-cycle:M: A BC BC BC D.

The recursion that Mixture-of-Recursions prefers: the first and the last layer are unlike the others and stay as they
are.""",
)
