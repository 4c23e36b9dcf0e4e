"""A plan in the making: what the user chose, and what has been decided so far."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from tieaudit.change import Edit, Prediction
from tieaudit.errors import RewriteRefused
from tieaudit.formats import Format
from tieaudit.merges import Calibrated
from tieaudit.model import Member, Model
from tieaudit.placing import Place
from tieaudit.verdict import Candidate, Refusal, Subject


@dataclass(frozen=True)
class Choices:
    """What the user chose on the command line."""

    schemes: tuple[str, ...] = ("dedup",)
    target: str | None = None
    allow_lossy: bool = False
    merge: str | None = None
    transposed_as: Literal["auto", "gemm", "gather", "fused"] = "auto"
    share_files: bool | None = None
    """False: every file stays whole by itself. True or None: the parts of a model may share a data file."""
    optimizer: Literal["adjust", "keep"] = "adjust"
    """Whether an optimizer's state in a checkpoint follows the parameters that are tied."""


@dataclass
class Draft:
    """What has been decided so far."""

    subject: Subject
    format: Format
    choices: Choices
    target: str
    edits: list[Edit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    """Weight id → scheme that already decided about it."""
    lossless: bool = True
    merged: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    """Policy → the classes of unequal weights that get one value by it."""
    calibrated: Calibrated | None = None
    place: Place = np.asarray
    """Where weights are compared."""
    predictions: list[Prediction] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    """Why classes get one value under each name, and are not one stored tensor."""

    @property
    def model(self) -> Model:
        return self.subject.model

    def refuse(self, candidate: Candidate, because: str) -> None:
        """Note a refusal; candidates of one scheme that are refused for one reason are one refusal."""
        ids = tuple(dict.fromkeys(member.id for member in candidate.members))
        for at, known in enumerate(self.refusals):
            if (known.scheme, known.because) == (candidate.scheme, because):
                self.refusals[at] = replace(known, ids=tuple(dict.fromkeys((*known.ids, *ids))))
                return
        self.refusals.append(Refusal(candidate.scheme, ids, because))


def anchored(members: tuple[Member, ...], kept: str) -> tuple[Member, ...]:
    """The same class with `kept` first, seen as stored; views of the others follow (a transpose is its own inverse)."""
    anchor = next(member for member in members if member.id == kept)
    rest = [member for member in members if member.id != kept]
    return (Member(kept), *(Member(member.id, anchor.view.compose(member.view)) for member in rest))


def realisable(draft: Draft, edit: Edit) -> list[Edit]:
    """The edit, with the settings it needs; RewriteRefused with the format's reason if it cannot be made."""
    settings = draft.format.settings(draft.model, edit, draft.target)
    if isinstance(settings, str):
        raise RewriteRefused(settings)
    return [*settings, edit]
