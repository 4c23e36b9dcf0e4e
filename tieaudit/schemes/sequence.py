"""Neighbouring layers share: AABBCC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.schemes import Scheme
from tieaudit.stacks import halves_and_thirds, number_of, share_layers, whole
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    m = number_of("sequence", argument, "the number M of layers with weights of their own")

    def plan_of(n: int) -> Sequence[int] | str:
        if m > n or n % m:
            return f"M must divide the number of layers, and {m} does not divide {n}"
        return [layer // (n // m) for layer in range(n)]

    yield from share_layers(subject, "sequence", whole, plan_of)


sequence = Scheme(
    name="sequence",
    argument="M",
    worth_comparing=halves_and_thirds,
    merge="mean",
    summary="M sets of weights for N layers, neighbours share: AABBCC",
    source="Takase & Kiyono 2023, Lessons on parameter sharing across layers in Transformers (SustaiNLP), algorithm 1",
    propose=_propose,
    page="""sequence:M: AABBCC, M distinct layers for N.

Layer ℓ (from 1) uses set ⌊(ℓ − 1)/(N/M)⌋ + 1; M must divide N. Norms are shared like everything else, as the authors'
code does.""",
)
