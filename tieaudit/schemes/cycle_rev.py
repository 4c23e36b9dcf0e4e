"""Layers repeat in order, the last M reversed: ABC ABC CBA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.schemes import Scheme
from tieaudit.stacks import halves_and_thirds, number_of, share_layers, whole
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    m = number_of("cycle-rev", argument, "the number M of layers with weights of their own")

    def plan_of(n: int) -> Sequence[int] | str:
        if 2 * m > n:
            return f"at least 2·M = {2 * m} layers are needed: M in order, and M reversed at the end"
        return [layer % m if layer < n - m else n - 1 - layer for layer in range(n)]

    yield from share_layers(subject, "cycle-rev", whole, plan_of)


cycle_rev = Scheme(
    name="cycle-rev",
    argument="M",
    worth_comparing=halves_and_thirds,
    merge="mean",
    summary="M sets of weights for N layers, repeated in order, the last M layers reversed: ABC ABC CBA",
    source="Takase & Kiyono 2023, Lessons on parameter sharing across layers in Transformers (SustaiNLP), algorithm 3",
    propose=_propose,
    page="""cycle-rev:M: ABCDEF ABCDEF FEDCBA for N = 18, M = 6.

As cycle:M, except that the last M layers go backwards. (One Wide FFN, Pires et al. 2023, writes this map as
m = N/M − i, which holds for N = 2·M alone.)""",
)
