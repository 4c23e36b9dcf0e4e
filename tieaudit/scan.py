"""Stage: Model → Report. find, roles, candidates and rules in a row; the one way to look at a model."""

from __future__ import annotations

from typing import Literal

from tieaudit.audit import audit
from tieaudit.config import Settings
from tieaudit.find import Progress, find
from tieaudit.model import Model
from tieaudit.propose import listed_candidates
from tieaudit.roles import roles
from tieaudit.verdict import Report, Subject


def look(model: Model, *, progress: Progress | None = None) -> Subject:
    """What rules and schemes may look at: the model, what was found, and what each weight is for."""
    return Subject(model, find(model, progress=progress), roles(model))


def scan(
    model: Model,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    damage: Literal["", "sampled", "deep"] = "",
    device: str = "auto",
) -> Report:
    """The whole answer about one model. Cost: that of `find.find`; nothing is run and nothing is written.

    `damage`: whether lossy candidates are compared, by a sample of their weights or (`deep`) by all of them; `device`:
    where, see `placing.place_on`.
    """
    subject = look(model, progress=progress)
    candidates = listed_candidates(subject)
    if damage:  # comparing numbers needs numpy, which nothing else here does
        from tieaudit.damage import foreseen
        from tieaudit.placing import place_on

        candidates = foreseen(subject, candidates, deep=damage == "deep", place=place_on(device))
    return audit(subject, candidates, settings or Settings())
