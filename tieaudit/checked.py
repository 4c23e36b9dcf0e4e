"""What the gate says: one model judged under a policy, and a whole run over many models.

Slim on purpose: no weights, no storages. Thousands of these are held at once, kept in a cache and handed between
processes; whoever wants the whole truth about one model asks `scan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tieaudit.verdict import CannotTell, Crashed, Finding, Severity, Summary

RANK: Mapping[Severity, int] = {"error": 0, "warning": 1, "info": 2}
"""Severities, the worst first."""

STALE = "TIE901"
"""The rule about suppressions that hide nothing."""
OF_THE_POLICY = frozenset({STALE})
"""Codes of the rules about the policy itself: they run once, on its file, and not on every model."""


@dataclass(frozen=True)
class Place:
    """Where an engineer has to look."""

    path: str
    """File, POSIX, relative to the root of the run where it lies below it."""
    line: int = 0
    """Counted from 1, in a text file that holds the cause (config.json, tieaudit.toml); 0 where there is none."""


@dataclass(frozen=True)
class Judged:
    """A finding that the policy lets through, with its place and a name that stays the same from run to run."""

    finding: Finding
    place: Place
    fingerprint: str
    """sha256, in hexadecimal, of the code and of id, element type and shape of each weight: neither the order of
    findings nor a retrained value changes it."""


@dataclass(frozen=True)
class Checked:
    """The gate's answer about one model."""

    path: str
    """POSIX, relative to the root of the run where it lies below it."""
    format: str
    findings: tuple[Judged, ...] = ()
    """What counts: selected, above its threshold, neither suppressed nor in the baseline; the worst first."""
    cannot_tell: tuple[CannotTell, ...] = ()
    crashed: tuple[Crashed, ...] = ()
    summary: Summary | None = None
    """None for what is no model: the policy's own file."""
    n_rules: int = 0
    """Rules that ran."""
    n_silenced: int = 0
    """Findings under their rule's threshold of bytes."""
    used: tuple[str, ...] = ()
    """Keys of the suppressions that speak of a finding here."""
    n_suppressed: int = 0
    known: tuple[Judged, ...] = ()
    """Findings that the baseline holds."""
    unreadable: bool = False
    """Whether bytes of a weight could not be read."""
    n_bytes_read: int = 0
    """Bytes of tensors read to find that out, by the run that did."""
    weights_here: bool = True
    """False where only names or pointers to the weights are there (git-LFS, DVC): rules about bytes could not judge."""
    files: tuple[str, ...] = ()
    """Files on which the answer rests, as they were opened."""
    cached: bool = False
    """Whether all of this comes from an earlier run over the same bytes."""
    ran: tuple[str, ...] = ()
    """Codes of the rules that ran to their end, and of those about the policy that are selected for this model."""


@dataclass(frozen=True)
class Run:
    """All of one `tieaudit check`."""

    models: tuple[Checked, ...]
    """In the order of their paths; what is said of the policy itself comes last."""
    errors: tuple[tuple[str, str], ...] = ()
    """(path, message) of what could not be read."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(path, reason) of what was named and is no model: exit code 0."""
    root: str = "."
    """What paths are relative to: the folder of the policy, or the working directory."""
    top: str = ""
    """The work tree of git that holds the root, absolute; empty where there is none."""
    policy: str = ""
    """The file that the policy comes from, as shown; empty where there is none."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """Settings of this run that a reader may want: fail-on, since, baseline."""

    @property
    def findings(self) -> Iterator[tuple[Checked, Judged]]:
        """Every finding with its model."""
        return ((model, judged) for model in self.models for judged in model.findings)
