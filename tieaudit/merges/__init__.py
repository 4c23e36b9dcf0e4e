"""Merge policies: which common value unequal weights get, and what corrects it at each site. One file each.

A policy sees the tables of one class in a common layout, [rows, columns], and says how to compute any rows of the
common value; the engine reads, rounds once to the stored type and writes, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tieaudit.errors import NotFinite
from tieaudit.printable import listed
from tieaudit.summing import Sums

Block = NDArray[np.float64]
Rows = Callable[[int, int], Block]
"""(begin, end) → these rows in float64. A dataclass or a `partial`, never a closure: the proof runs in another
process."""


NO_CALIBRATION = "give --calibrate DATA.npz or a text; keep:head, mean and low-rank:R need none"
"""What to do without statistics."""
KEEP_ONE = "keep:ID computes nothing, and keeps those of one of them"
"""What to do with numbers that nothing can be computed from."""


class Table(Protocol):
    """One member of a class in the common layout."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def n_columns(self) -> int: ...
    @property
    def rows_per_block(self) -> int: ...
    def rows(self, begin: int, end: int) -> Block: ...


@dataclass(frozen=True)
class Statistics:
    """What calibration measured at one site, as averages over tokens; of gradients, over what is predicted."""

    n_tokens: int
    row_weights: Block | None = None
    """[rows] How much a row matters: token frequencies p of an embedding, E[g²] of the loss's gradient at what a
    product gives; of a head E[p(1 − p)] of its probabilities, which is the expectation of that, by the square of the
    scale between product and scores."""
    inputs: Block | None = None
    """[columns, columns] E[x xᵀ] of what the table's rows are multiplied with (a head's hidden states)."""
    gradients: Block | None = None
    """[columns, columns] E[g gᵀ] of the loss at what a lookup gives."""
    turned: bool = False
    """The rows meant here are the columns of the weight as it is stored: a matrix kept as [inputs, outputs]."""

    @classmethod
    def of(cls, sums: Sums, *, turned: bool = False) -> Statistics:
        """Averages of what was added up."""
        n = max(sums.n_tokens, 1)
        n_targets = sums.n_targets or n
        of_weights = n if sums.inputs is None else n_targets  # how often an id is looked up, or Σ g²
        by = ((sums.row_weights, of_weights), (sums.inputs, n), (sums.gradients, n_targets))
        weights, inputs, gradients = (None if one is None else one / count for one, count in by)
        return cls(sums.n_tokens, weights, inputs, gradients, turned)

    @property
    def curvature(self) -> Block | None:
        """How much a change of a row matters, by direction: that of the loss for a lookup, of its inputs for a
        product."""
        return self.gradients if self.inputs is None else self.inputs


@dataclass(frozen=True)
class Calibrated:
    """What calibration measured at the weights of one model, by id."""

    fitted: Mapping[str, Statistics]
    """Policies are fitted to it."""
    held_out: Mapping[str, Statistics] = field(default_factory=dict)
    """From other tokens; empty where there are too few."""
    notes: tuple[str, ...] = ()
    """What was not calibrated, and why."""


@dataclass(frozen=True)
class Sites:
    """The class that gets one value."""

    ids: tuple[str, ...]
    tables: tuple[Table, ...]
    kinds: tuple[str, ...]
    """Role kind of each."""
    statistics: tuple[Statistics | None, ...]
    """What calibration measured at each; policies are fitted to it."""
    held_out: tuple[Statistics | None, ...] = ()
    """The same from other tokens, by which what was fitted is judged; empty: by those it was fitted to."""
    turned: bool = False
    """Rows and columns are swapped against the layout of the first member, so that columns are inputs."""

    @property
    def n_rows(self) -> int:
        return self.tables[0].n_rows

    @property
    def n_columns(self) -> int:
        return self.tables[0].n_columns

    def index_of(self, kind: str) -> int | None:
        """The first member with this role; None if there is none."""
        return self.kinds.index(kind) if kind in self.kinds else None

    def blocks(self) -> list[tuple[int, int]]:
        """(begin, end) of blocks that together are all rows."""
        step = self.tables[0].rows_per_block
        return [(begin, min(begin + step, self.n_rows)) for begin in range(0, self.n_rows, step)]

    def predicted_nats(self, merged: Merged) -> float | None:
        """Predicted rise of the negative log-likelihood, in nats per token; None where a site was not calibrated.

        Gauss–Newton, to second order: ½ Σ_v p_v δᵀSδ at a lookup, ½ Σ_v q_v δᵀCδ at a head or another product, δ the
        change of row v. For products q = E[g²] takes the gradients at a result as independent of its inputs, and of
        each other (Martens & Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature,
        ICML, with a diagonal second factor). Above 0.1 nats it only ranks policies. Cost: reads every table once.
        """
        total = 0.0
        for index, statistics in enumerate(self.held_out or self.statistics):
            if merged.keeps == index and index not in merged.corrections:
                continue
            curvature = None if statistics is None else statistics.curvature
            if statistics is None or curvature is None or statistics.row_weights is None:
                return None
            for begin, end in self.blocks():
                delta = merged.seen_by(index)(begin, end) - self.tables[index].rows(begin, end)
                weights = statistics.row_weights[begin:end]
                total += 0.5 * float(np.sum(weights * np.sum((delta @ curvature) * delta, axis=1)))
        return total

    def weighted_errors(self, merged: Merged) -> tuple[float | None, ...]:
        """Share of the energy of what each site gives that changes, on calibration tokens; None where not calibrated.

        E‖Δx‖²/E‖Wx‖² = tr(ΔCΔᵀ)/tr(WCWᵀ) for a product, Σ p_v‖δ_v‖²/Σ p_v‖w_v‖² for a lookup. Cost: reads every table.
        """
        return tuple(self._weighted_error(merged, at, one) for at, one in enumerate(self.held_out or self.statistics))

    def _weighted_error(self, merged: Merged, index: int, statistics: Statistics | None) -> float | None:
        if statistics is None or (statistics.inputs is None and statistics.row_weights is None):
            return None
        changed = size = 0.0
        for begin, end in self.blocks():
            rows = self.tables[index].rows(begin, end)
            for_each = [merged.seen_by(index)(begin, end) - rows, rows]
            if statistics.inputs is not None:
                sums = [float(np.sum((one @ statistics.inputs) * one)) for one in for_each]
            else:
                assert statistics.row_weights is not None
                weights = statistics.row_weights[begin:end, None]
                sums = [float(np.sum(weights * np.square(one))) for one in for_each]
            changed, size = changed + sums[0], size + sums[1]
        return changed / size if size > 0.0 else 0.0

    def relative_change(self, merged: Merged) -> tuple[float, ...]:
        """‖change‖² / ‖W‖² at each site: how much of what it held is gone. Needs no data; 1.0 is all of it."""
        found = []
        for index, table in enumerate(self.tables):
            changed = size = 0.0
            for begin, end in self.blocks():
                rows = table.rows(begin, end)
                changed += float(np.square(merged.seen_by(index)(begin, end) - rows).sum())
                size += float(np.square(rows).sum())
            found.append(changed / size if size > 0.0 else 0.0)
        return tuple(found)


def expect_finite_tables(sites: Sites, policy: str, rows: tuple[int, int] | None = None) -> None:
    """NotFinite, naming the member and the place of a number that is none. `rows`: (begin, end), else all.

    Cost: reads these rows of every table.
    """
    asked = f"--merge {policy}: " if policy else ""
    for begin, end in [rows] if rows is not None else sites.blocks():
        for id, table in zip(sites.ids, sites.tables, strict=True):
            wrong = np.argwhere(~np.isfinite(table.rows(begin, end)))
            if len(wrong):
                at = [begin + int(wrong[0][0]), int(wrong[0][1])][: len(table.shape)]
                raise NotFinite(
                    f"{asked}{listed((id,))}: expected finite numbers, found inf or NaN at {at}, which would spread "
                    f"into the common value of {listed(sites.ids)}; {KEEP_ONE}"
                )


def finite(sites: Sites, policy: str, *found: Block) -> None:
    """NotFinite where sums over the tables, or over what flowed through them, are not all finite."""
    if all(np.isfinite(one).all() for one in found):
        return
    expect_finite_tables(sites, policy)
    raise NotFinite(
        f"--merge {policy}: {listed(sites.ids)}: expected finite sums over the tables and the calibration data, found "
        f"inf or NaN; {KEEP_ONE}"
    )


@dataclass(frozen=True)
class Correction:
    """What one site applies to the common value C before it uses it."""

    kind: Literal["scale", "linear", "low-rank"]
    """C·diag(right), C·right, or C + left·right."""
    right: Block
    """[columns], [columns, columns] or [rank, columns]."""
    left: Rows | None = None
    """Rows of [rows, rank]."""
    n_rows: int = 0

    @property
    def n_parameters(self) -> int:
        """What it costs; a scale costs nothing where it can be folded into the norm before it."""
        return self.right.size + (self.n_rows * self.right.shape[0] if self.left is not None else 0)

    def apply(self, common: Block, begin: int, end: int) -> Block:
        """What the site sees of rows begin … end."""
        if self.kind == "scale":
            return common * self.right
        if self.kind == "linear":
            return common @ self.right
        assert self.left is not None
        return common + self.left(begin, end) @ self.right


@dataclass(frozen=True)
class Merged:
    """The common value, and what each site corrects."""

    rows: Rows
    keeps: int | None = None
    """The member whose bytes survive exactly, so that nothing has to be computed."""
    corrections: Mapping[int, Correction] = field(default_factory=dict)
    """Member → what it applies to the common value."""
    because: str = ""
    """What was decided and why, where the policy decided something."""

    def seen_by(self, member: int) -> Rows:
        """The rows as one site sees them, corrected."""
        correction = self.corrections.get(member)
        return self.rows if correction is None else _Corrected(self.rows, correction)

    @property
    def n_parameters_added(self) -> int:
        return sum(one.n_parameters for one in self.corrections.values())


@dataclass(frozen=True)
class _Corrected:
    common: Rows
    correction: Correction

    def __call__(self, begin: int, end: int) -> Block:
        return self.correction.apply(self.common(begin, end), begin, end)


@dataclass(frozen=True)
class Merge:
    """A policy."""

    name: str
    summary: str
    source: str
    merge: Callable[[Sites, str], Merged]
    """(sites, argument) → the common value. RewriteRefused if these sites cannot be merged so, UsageError for an
    argument that is none. The argument is what stands behind the colon in `low-rank:32`, empty if nothing does."""
    argument: str = ""
    """What stands behind the colon, for people; empty for a policy that takes nothing."""
    check: Callable[[str, Collection[str]], object] | None = None
    """(argument, ids of the model): raises UsageError for an argument that is none, whether or not anything is merged;
    None where every argument is one."""
    needs: tuple[Literal["row_weights", "inputs", "gradients"], ...] = ()
    """Statistics without which it refuses."""
    corrects: bool = False
    """Whether some sites get a correction, which only who asks for it wants: `auto` does not work it out."""
    page: str = ""
    """More for `tieaudit explain NAME`."""
