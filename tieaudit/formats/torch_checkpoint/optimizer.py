"""What a plan means for the optimizer states in the same file: adjusted, kept, and whether they fit, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tieaudit.change import Edit
from tieaudit.formats.torch_checkpoint.adjustment import Adjustment, Decision
from tieaudit.formats.torch_checkpoint.write import decisions
from tieaudit.model import Model

_ESTIMATE = (
    "of (g₁+g₂)² no file holds the average of 2·g₁·g₂. The sum is right for gradients that do not correlate; a tied "
    "model has at most twice that, so that the next step is at most √2 times too long, or less (a step too short)"
)


def notes(model: Model, edits: Sequence[Edit], adjust: bool = True) -> tuple[str, ...]:
    """What becomes of every optimizer state beside a model whose ties change. Cost: a run over the pickle, once."""
    found = decisions(model, edits, adjust)
    return tuple(said for one in found.values() for decision in one for said in _said(decision, model, edits))


def _said(decision: Decision, model: Model, edits: Sequence[Edit]) -> Iterator[str]:
    name = f"the optimizer state {decision.where!r}" if decision.where else "the optimizer state"
    if isinstance(decision, Adjustment):
        yield from _adjusted(name, decision)
    elif not decision.because:
        n_after = decision.n_after
        yield f"{name} has one entry for each of the {n_after} parameters that the result has: it is kept and fits"
    else:
        unfit = ", and does not fit the result" if decision.how else ""
        yield f"{name} is kept as it is{unfit}: {decision.because}"
        if decision.how:
            yield decision.how


def _adjusted(name: str, made: Adjustment) -> Iterator[str]:
    """What was summed, what that is worth, and what it assumes."""
    pairs = "; ".join(" and ".join(map(str, (join.kept, *(other for other, _ in join.others)))) for join in made.joins)
    yield (
        f"{name} is adjusted to the {made.n_after} parameters that the result has: of its {made.n_before} entries "
        f"{pairs} become one, in the place of the first, and later ones are renumbered"
    )
    linear = sorted({moment for join in made.joins for moment in join.sums.linear})
    squared = sorted({moment for join in made.joins for moment in join.sums.squared})
    if linear:
        turned = ", transposed where the tie is" if any(one for join in made.joins for _, one in join.others) else ""
        yield (
            f"{', '.join(linear)} of the tied parameter is the sum of both{turned}: exactly what a tied model has if "
            "the weights were equal all along, as gradients add and the average is linear"
        )
    if squared:
        yield f"{', '.join(squared)} of the tied parameter is the sum of both, which is an estimate: {_ESTIMATE}"
    if linear and any(join.sums.decayed for join in made.joins):
        yield (
            "its groups have weight decay: where the optimizer adds that to the gradient (SGD, Adam; not AdamW), the "
            "sums hold it twice"
        )
    if linear or squared:
        yield "--optimizer keep leaves the state as it is"
