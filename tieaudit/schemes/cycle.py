"""Layers repeat in the same order: ABCABC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.schemes import Scheme
from tieaudit.stacks import halves_and_thirds, number_of, share_layers, whole
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    m = number_of("cycle", argument, "the number M of layers with weights of their own")

    def plan_of(n: int) -> Sequence[int] | str:
        return [layer % m for layer in range(n)] if m <= n else f"fewer than M = {m}"

    yield from share_layers(subject, "cycle", whole, plan_of)


cycle = Scheme(
    name="cycle",
    argument="M",
    worth_comparing=halves_and_thirds,
    merge="mean",
    summary="M sets of weights for N layers, repeated in order: ABCABC",
    source="Takase & Kiyono 2023, Lessons on parameter sharing across layers in Transformers (SustaiNLP), algorithm 2; "
    "repeat-all-over of Liu et al. 2024, MobileLLM (ICML)",
    propose=_propose,
    page="""cycle:M: ABCABC, M distinct layers for N.

Layer ℓ (from 1) uses set ((ℓ − 1) mod M) + 1. Norms are shared like everything else. Relaxed Recursive Transformers
(Bae et al. 2025) start from this map with the mean of the layers.""",
)
