"""Schemes: which weights should be one. One file each; a scheme names classes and never touches a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    propose: Callable[[Subject, str], Iterator[Candidate | Refusal]]
    """(subject, argument) → candidates, and refusals where the model cannot take the scheme, with the reason.

    The argument is what stands behind the colon in `cycle:3`, empty if nothing does. UsageError if it is none.
    """
    argument: str = ""
    """What stands behind the colon, for people: `M`; empty for a scheme that takes nothing."""
    worth_comparing: Callable[[Subject], Iterable[str]] = lambda subject: ("",)
    """Arguments that a comparison of schemes tries on this model."""
    merge: str = "keep:head"
    """The policy that unequal weights get where the user names none."""
    page: str = ""
    """The text of `tieaudit explain NAME`."""
    listed_by_scan: bool = True
    """Whether `scan` lists its candidates: not those of dedup, which repeat the ties."""
