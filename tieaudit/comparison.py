"""Stage: Subject → a table of schemes and policies: what each would save, and what it is predicted to cost.

Weights are looked at through a sample of their rows unless `deep`; nothing is written, and nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tieaudit.errors import NotFinite, RewriteRefused, UsageError
from tieaudit.formats import Format
from tieaudit.headcount import fewer_heads
from tieaudit.merge import policy_of, sites_of
from tieaudit.merges import Block, Calibrated, Merge, Sites, Statistics, expect_finite_tables
from tieaudit.pairing import N_SAMPLED, sampled_runs
from tieaudit.propose import Asked, propose
from tieaudit.registry import choose, discover
from tieaudit.saving import n_parameters_saved
from tieaudit.scaling import gain_before
from tieaudit.schemes import Scheme
from tieaudit.verdict import Candidate, Subject

RESIDUAL_RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks of the residuals that are compared, as far as they save anything."""
_ROWS_PER_DIRECTION = 8
_POLICIES = ("keep:head", "keep:first", "mean", "norm-matched", "scaled")
_LEAST_SAMPLED = 1 << 14
"""Numbers of each class of a scheme with very many of them."""
_MOST_SQUARE = 1024
"""Columns up to which a columns × columns map is fitted without being asked for: it costs their third power."""


@dataclass(frozen=True)
class Choice:
    """One scheme under one policy."""

    scheme: str
    policy: str
    """Empty for what is lossless: nothing has to be decided."""
    n_parameters_saved: int
    n_bytes_saved: int
    changed: float
    """‖change‖²/‖W‖² over all sites of the scheme: 0 is lossless, 1 as much as the weights themselves."""
    nats: float | None
    """Predicted rise of the negative log-likelihood per token; None without calibration."""
    n_classes: int
    exact: bool
    """Whether everything was read, not a sample."""
    measured: float | None = None
    """The rise of the negative log-likelihood on calibration data that nothing was fitted to, with a temporary copy."""
    refused: str = ""
    """Why it is no choice here: numbers from which nothing can be computed. Its damage is then infinite."""

    @property
    def rise(self) -> float | None:
        """In nats per token, measured or else predicted; None where neither is known."""
        return self.nats if self.measured is None else self.measured

    @property
    def damage(self) -> float:
        """By which choices are ordered: nats where they are known, else the share that changes."""
        return self.changed if self.rise is None else self.rise


def compare(subject: Subject, *, calibrated: Calibrated | None = None, deep: bool = False) -> tuple[Choice, ...]:
    """Every scheme that saves something on this model, under every policy that fits, the largest saving first.

    `calibrated`: what flows through the weights. Cost: for each scheme a sample of `pairing.N_SAMPLED` numbers of all
    weights that it would share (of many classes at least 16,384 each); with `deep` all of it, for every policy.
    """
    found: list[Choice] = []
    for scheme in discover("schemes", Scheme).values():
        for argument in scheme.worth_comparing(subject):
            candidates = propose(subject, Asked(scheme, argument))[0]
            name = f"{scheme.name}:{argument}" if argument else scheme.name
            shared = [one for one in candidates if one.action == "share"]
            found += _choices(subject, name, shared, calibrated, deep)
            found += _pooled(subject, name, [one for one in candidates if one.action == "pool"], deep)
    return tuple(sorted(found, key=lambda one: (-one.n_bytes_saved, one.damage, one.scheme, one.policy)))


def frontier(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """The choices that no other one beats in both size and damage, the smallest damage first.

    Nats and shares cannot be compared: where some choices have nats, and are not lossless, only those are looked at.
    """
    choices = tuple(one for one in choices if not one.refused)
    if any(one.rise is not None for one in choices):
        choices = tuple(one for one in choices if one.rise is not None or one.changed == 0.0)
    best: list[Choice] = []
    for one in sorted(choices, key=lambda one: (one.damage, -one.n_bytes_saved)):
        if not best or one.n_bytes_saved > best[-1].n_bytes_saved:
            best.append(one)
    return tuple(best)


def _pooled(subject: Subject, scheme: str, candidates: list[Candidate], deep: bool) -> Iterator[Choice]:
    """Fewer heads, which no merge policy decides about: each is the mean of its group."""
    n_numbers = None if deep else max(N_SAMPLED // max(len(candidates), 1), _LEAST_SAMPLED)
    found = fewer_heads(subject.model, candidates, n_numbers) if candidates else None
    if found is not None:
        saved = found.n_parameters_saved, found.n_bytes_saved
        yield Choice(scheme, "mean", *saved, found.changed, None, found.n_projections, found.exact)


def _choices(
    subject: Subject, scheme: str, candidates: list[Candidate], calibrated: Calibrated | None, deep: bool
) -> Iterator[Choice]:
    saved = sum(one.n_bytes_saved for one in candidates)
    if saved <= 0:
        return
    lossy = [one for one in candidates if not one.lossless]
    if not lossy:
        yield Choice(scheme, "", n_parameters_saved(subject.model, candidates), saved, 0.0, None, len(candidates), True)
        return
    n_numbers = None if deep else max(N_SAMPLED // len(lossy), _LEAST_SAMPLED)
    seen = [(one, found) for one in lossy if (found := _sites(subject, one, calibrated, n_numbers)) is not None]
    if len(seen) < len(lossy):
        return  # codes, or types that cannot be merged: plan says why, by name
    try:
        for _, sites in seen:
            expect_finite_tables(sites, "")
    except NotFinite as error:
        yield _refused(scheme, "every policy", candidates, error)
        return
    fitted = [name for name in discover("merges", Merge) if calibrated is not None and _fitted(name)]
    n_rows = min(sites.n_rows for _, sites in seen)
    # a sample of as many rows as the residual has directions would be restored completely, which tells nothing
    dials = [f"low-rank:{rank}" for rank in RESIDUAL_RANKS if n_rows >= _ROWS_PER_DIRECTION * rank]
    narrow = max(sites.n_columns for _, sites in seen) <= _MOST_SQUARE
    for policy in (*_POLICIES, *(("linear",) if narrow or deep else ()), *fitted, *dials):
        choice = _choice(subject, scheme, policy, candidates, seen)
        if choice is not None and choice.n_bytes_saved > 0:
            yield choice


def _choice(
    subject: Subject, scheme: str, policy: str, candidates: list[Candidate], seen: list[tuple[Candidate, Sites]]
) -> Choice | None:
    chosen, argument = policy_of(policy)
    changed = size = nats = 0.0
    known, n_added, n_bytes_added, exact = True, 0, 0, True
    for candidate, sites in seen:
        weight = subject.model.by_id[candidate.members[0].id]
        try:
            merged = chosen.merge(sites, argument)
        except NotFinite as error:
            return _refused(scheme, policy, candidates, error)
        except (RewriteRefused, UsageError):
            return None
        energies = [_energy(sites, index) for index in range(len(sites.ids))]
        changed += sum(share * one for share, one in zip(sites.relative_change(merged), energies, strict=True))
        size += sum(energies)
        cost = sites.predicted_nats(merged)
        known, nats = known and cost is not None, nats + (cost or 0.0)
        corrected = [
            replace(one, n_rows=weight.n_elements // max(sites.n_columns, 1)).n_parameters
            for at, one in merged.corrections.items()
            if not (one.kind == "scale" and _is_free(subject, sites.ids[at], sites.n_columns))
        ]
        costs = sum(corrected) * weight.n_bytes // max(weight.n_elements, 1)
        if corrected and (costs >= candidate.n_bytes_saved or len(weight.shape) != 2):
            return None  # it would cost what it saves; and a bias needs no adapter
        n_added, n_bytes_added = n_added + sum(corrected), n_bytes_added + costs
        exact = exact and sites.n_rows * sites.n_columns == weight.n_elements
    return Choice(
        scheme=scheme,
        policy=policy,
        n_parameters_saved=n_parameters_saved(subject.model, candidates) - n_added,
        n_bytes_saved=sum(one.n_bytes_saved for one in candidates) - n_bytes_added,
        changed=changed / size if size else 0.0,
        nats=nats if known else None,
        n_classes=len(candidates),
        exact=exact,
    )


def _is_free(subject: Subject, head: str, n_columns: int) -> bool:
    """Whether the norm before a head takes a scale of its columns."""
    format_ = choose(discover("formats", Format), subject.model.format, "format")
    return not isinstance(gain_before(format_, subject.model, head, n_columns), str)


def _refused(scheme: str, policy: str, candidates: list[Candidate], error: NotFinite) -> Choice:
    saved = sum(one.n_bytes_saved for one in candidates)
    return Choice(scheme, policy, 0, saved, math.inf, None, len(candidates), False, refused=error.message)


def _fitted(name: str) -> bool:
    return bool(discover("merges", Merge)[name].needs)


def _energy(sites: Sites, index: int) -> float:
    return sum(float(np.square(sites.tables[index].rows(*at)).sum()) for at in sites.blocks())


@dataclass(frozen=True)
class _Sample:
    """Some rows of a table, held in memory, as a table of its own."""

    values: Block
    rows_per_block: int = 1 << 30

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def n_rows(self) -> int:
        return len(self.values)

    @property
    def n_columns(self) -> int:
        return int(self.values.shape[1])

    def rows(self, begin: int, end: int) -> Block:
        """Rows of the sample."""
        return self.values[begin:end]


def _sites(
    subject: Subject, candidate: Candidate, calibrated: Calibrated | None, n_numbers: int | None
) -> Sites | None:
    """The members of a class, calibrated; a sample of `n_numbers` of all members together, or all rows.

    None for what is no floating-point tensor.
    """
    kinds = {id: role.kind for id, role in subject.roles.items()}
    try:
        whole = sites_of([(subject.model.by_id[member.id], member) for member in candidate.members], kinds, calibrated)
    except RewriteRefused:
        return None
    n = None if n_numbers is None else n_numbers // len(whole.ids)
    runs = None if n is None else sampled_runs(whole.n_rows, whole.n_columns, n)
    if runs is None:
        return whole
    picked = np.concatenate([np.arange(begin, end) for begin, end in runs])
    tables = tuple(_Sample(np.concatenate([table.rows(*run) for run in runs])) for table in whole.tables)
    fitted, held = (
        tuple(_of_rows(one, picked, whole.n_rows) for one in each) for each in (whole.statistics, whole.held_out)
    )
    return replace(whole, tables=tables, statistics=fitted, held_out=held)


def _of_rows(statistics: Statistics | None, picked: Block, n_rows: int) -> Statistics | None:
    """Weights of the rows that were picked, made up for those that were not."""
    if statistics is None or statistics.row_weights is None:
        return statistics
    return replace(statistics, row_weights=statistics.row_weights[picked] * (n_rows / len(picked)))
