"""What is concluded about a model: measured classes, candidates, findings, totals, and what could not be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tieaudit.model import Member, Model, Role, Tie
from tieaudit.sealed import Locked
from tieaudit.storage import no_values
from tieaudit.view import View

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Apart:
    """A table and a matrix of its shape, one or both stored as codes: how far apart their numbers are."""

    table: str
    matrix: str
    view: View
    """Through which the table has the matrix's layout."""
    equal: bool
    """Every number is the same once it is computed from its code; everything was read."""
    n_steps: float
    """The median distance in quantisation steps (the mean of both steps), of the numbers that were looked at."""
    n_most_steps: float
    n_looked_at: int


@dataclass(frozen=True)
class Overlap:
    """Names that share some of their stored bytes, but not all: slices of one tensor, which is no equality."""

    ids: tuple[str, ...]
    """The one that spans most first."""
    because: str


@dataclass(frozen=True)
class Found:
    """What `find` established by reading bytes and regions; judgement comes later."""

    ties: tuple[Tie, ...]
    """Every tie, of every origin."""
    constants: frozenset[str] = frozenset()
    """Ids of tensors filled with one value; equal constants are in `constant_classes`, never in `ties`."""
    constant_classes: tuple[tuple[str, ...], ...] = ()
    """Ids of equal constants stored separately."""
    apart: tuple[Apart, ...] = ()
    """Tables read by ids against matrices of their shape, where codes stand between the bytes and the numbers."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Id → why its bytes could not be read."""
    n_bytes_read: int = 0
    """Bytes of tensors read from files to find all that."""
    overlaps: tuple[Overlap, ...] = ()
    """Slices: names that share some of their bytes."""

    def unseen(self, model: Model, ids: Iterable[str]) -> dict[str, str]:
        """Those of `ids` whose values nobody here has seen, and why: the one question about bytes that are not known.

        A read failed; a weight is stored and has no values here (a pointer, the meta device); or files with weights
        are elsewhere, and one of them may hold what is not stored in those that are here.
        """
        elsewhere = "" if model.weights_here else model.metadata["weights"]
        found: dict[str, str] = {}
        for id in ids:
            weight = model.by_id.get(id)
            if weight is None or weight.storage is None:
                why = elsewhere
            else:
                why = self.unreadable.get(id) or no_values(weight.storage)
            if why:
                found[id] = why
        return found


@dataclass(frozen=True)
class Likeness:
    """How alike two weights are that a scheme would make one."""

    verdict: str
    """equal, close, related, related by a linear map, unrelated, or cannot tell."""
    because: str
    """One sentence, with the numbers that decided."""
    diagnostics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Diagnostic → (value, what unrelated tables have)."""
    exact: bool = False
    """Everything was read; otherwise a sample of rows, or a sketch of the columns."""
    ids: tuple[str, ...] = ()
    """The two that were compared."""


@dataclass(frozen=True)
class Candidate:
    """A scheme's proposal for one class of weights."""

    scheme: str
    members: tuple[Member, ...]
    n_bytes_saved: int
    lossless: bool
    because: str
    action: Literal["share", "unshare", "declare", "respell", "pool", "fit"] = "share"
    """`fit`: the roles are those of a tie, the shapes are not: shown, never written."""
    damage: str = ""
    """For a lossy proposal: the measured difference in one sentence, where it was measured."""
    likeness: Likeness | None = None
    """For a lossy proposal: its two members that are least alike, where they were compared."""
    n_groups: int = 0
    """For heads that are to be pooled: how many are to be left."""


@dataclass(frozen=True)
class Refusal:
    """A part of the proposal that will not be done, and why, in one sentence."""

    scheme: str
    ids: tuple[str, ...]
    because: str


@dataclass(frozen=True)
class Fix:
    """What would mend a finding."""

    safety: Literal["safe", "unsafe", "manual"]
    command: str
    """Copy-and-paste command, or a sentence for a manual fix."""
    scheme: str = ""
    """The scheme that the command applies, for who applies it without a shell; empty for a manual fix."""


@dataclass(frozen=True)
class Finding:
    """One judgement of one rule. The engine stamps code, name and severity."""

    ids: tuple[str, ...]
    message: str
    fix: Fix | None = None
    evidence: Mapping[str, object] = field(default_factory=dict)
    n_bytes: int = 0
    """Bytes at stake, compared with the rule's threshold by the engine."""
    code: str = ""
    name: str = ""
    severity: Severity = "warning"


@dataclass(frozen=True)
class CannotTell:
    """A rule's third answer: it does not know, and why. Never shown as clean."""

    because: str
    ids: tuple[str, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class Crashed:
    """A rule that raised: the tool's fault, shown and counted, exit code 2."""

    code: str
    because: str
    traceback: str


@dataclass(frozen=True)
class Summary:
    """Totals of one model."""

    n_weights: int
    """Names, absent ones not counted."""
    n_parameters: int | None
    """`sum(p.numel() for p in model.parameters())` of the live model; None with a reason where it cannot be told."""
    n_parameters_named: int | None
    """The same, but every name counted, absent ones included."""
    n_bytes: int
    """Bytes stored, each region once."""
    n_bytes_duplicate: int
    """Of those, bytes that are further copies of non-constant tensors."""
    n_parameters_because: str = ""


@dataclass(frozen=True)
class Demands:
    """What the owner of a model asks of it beyond being true to itself: nothing, unless a policy says so."""

    expect: tuple[str, ...] = ()
    """Schemes whose ties must be there, `io` or `cycle:3`."""
    max_duplicate_bytes: int | None = None
    max_parameters: int | None = None
    stale: tuple[str, ...] = ()
    """Of the policy's own file: a sentence for each suppression that hid nothing."""


NO_DEMANDS = Demands()


@dataclass(frozen=True)
class Subject:
    """Everything a rule or a scheme may look at: immutable, the same for all."""

    model: Model
    found: Found
    roles: Mapping[str, Role]
    demands: Demands = NO_DEMANDS
    locked: Locked | None = None
    """What the lock file says of this model; None: nothing was locked, or nobody looked."""
    worked_out: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What several schemes need and the first of them worked out, by its name: the stacks of layers."""

    def unseen(self, ids: Iterable[str]) -> dict[str, str]:
        """Those of `ids` whose values nobody here has seen, and why; see `Found.unseen`."""
        return self.found.unseen(self.model, ids)

    @property
    def seen_whole(self) -> bool:
        """Whether the values of every stored weight were there to be read; else what is not found may still be."""
        return self.model.weights_here and not self.unseen(one.id for one in self.model.weights if not one.absent)


@dataclass(frozen=True)
class Report:
    """The whole answer about one model."""

    subject: Subject
    summary: Summary
    candidates: tuple[Candidate, ...]
    findings: tuple[Finding, ...]
    cannot_tell: tuple[CannotTell, ...]
    crashed: tuple[Crashed, ...]
    n_rules: int
    n_silenced: int = 0
    """Findings under their rule's threshold: not listed, still in ties and totals."""

    @property
    def n_by_role(self) -> dict[str, int]:
        """Kind of role → how many stored names have it, the most frequent first; *other* is last."""
        names = [weight.id for weight in self.subject.model.weights if not weight.absent]
        counts = Counter(self.subject.roles[id].kind for id in names if id in self.subject.roles)
        return dict(sorted(counts.items(), key=lambda one: (one[0] == "other", -one[1], one[0])))
