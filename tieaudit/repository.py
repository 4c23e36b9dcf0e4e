"""Stage: paths → the models that a run of the gate is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tieaudit.load import Source, locate


@dataclass(frozen=True)
class Gathered:
    sources: tuple[Source, ...]
    errors: tuple[tuple[str, str], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    complete: bool = True


def gather(
    paths: Sequence[str],
    *,
    root: Path,
    exclude: Sequence[str] = (),
    respect_gitignore: bool = True,
    since: str | None = None,
) -> Gathered:
    sources, errors = locate(paths or [str(root)])
    return Gathered(tuple(sources), tuple(errors), (), not paths)
