"""One set of norms for all layers of a stack."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.stacks import NORMS, of_kinds, share_layers
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    yield from share_layers(subject, "norms", of_kinds(*NORMS), lambda n: [0] * n)


norms = Scheme(
    name="norms",
    merge="mean",
    worth_comparing=lambda subject: (),  # only on request
    summary="one set of norms for all layers of a stack; saves next to nothing",
    source="Takase & Kiyono 2023 share norms with the layers (CopyParams of their code); Lin et al. 2022, SPIN (ECCV): "
    "sharing batch norms diverges",
    propose=_propose,
    page="""norms: only on request.

A norm holds as many numbers as the model is wide: sharing them saves next to nothing and is known to hurt.""",
)
