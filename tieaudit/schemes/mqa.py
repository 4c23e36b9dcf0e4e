"""One key and one value head for all."""

from __future__ import annotations

from collections.abc import Iterator

from tieaudit.schemes import Scheme
from tieaudit.schemes.gqa import SOURCE, pooled
from tieaudit.verdict import Candidate, Refusal, Subject


def _propose(subject: Subject, argument: str) -> Iterator[Candidate | Refusal]:
    yield from pooled(subject, "mqa", 1)


mqa = Scheme(
    name="mqa",
    listed_by_scan=False,
    merge="mean",
    summary="one key and one value head for all, the mean of all heads (ONNX, Hugging Face folders)",
    source=f"Shazeer 2019, Fast Transformer Decoding (arXiv 1911.02150); {SOURCE}",
    propose=_propose,
    page="""mqa: multi-query attention by mean pooling: gqa:1.

See `tieaudit explain gqa`.""",
)
