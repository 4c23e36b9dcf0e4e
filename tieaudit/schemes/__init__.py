"""Schemes: which weights should be one. One file each; a scheme names classes and never touches a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tieaudit.verdict import Candidate, Refusal, Subject


@dataclass(frozen=True)
class Scheme:
    """A named way of tying or untying."""

    name: str
    summary: str
    """One line."""
    source: str
    """Paper and section, or the practice it stands for."""
    propose: Callable[[Subject], Iterator[Candidate | Refusal]]
    """Candidates, and refusals where the model cannot take the scheme, with the reason."""
    page: str = ""
    """The text of `tieaudit explain NAME`."""
    listed_by_scan: bool = False
    """Whether `scan` lists its candidates (dedup repeats the ties, untie proposes no saving: not listed)."""
