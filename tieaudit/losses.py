"""Stage: two models and data → how much the loss changed, token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tieaudit.calibrating import Data, batches, runner_of, sandbox_on
from tieaudit.change import LossChange
from tieaudit.end_to_end import with_limits
from tieaudit.errors import TieAuditError
from tieaudit.model import Model
from tieaudit.running import opened, path_of
from tieaudit.sandbox import Sandbox


def paired(before: NDArray[np.float64], after: NDArray[np.float64], *, held_out: bool) -> LossChange:
    """The mean change of the loss, with its paired standard error.

    With dₜ = NLL_after(t) − NLL_before(t) over n tokens: ΔNLL = d̄ = Σ dₜ / n and
    SE = √(Σ (dₜ − d̄)² / (n − 1)) / √n. Pairing takes away what makes tokens hard for both models: the standard errors
    of the two means apart are often ten times as large. Tokens of one text are not independent, so that the true
    uncertainty is somewhat larger. ValueError for no tokens, or two different numbers of them.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"expected as many losses, found {len(before)} and {len(after)}")
    d = after - before
    n = len(d)
    error = float(d.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return LossChange(float(before.mean()), float(after.mean()), float(d.mean()), error, n, held_out)


def change_of_loss(before: Model, after: Model, data: Data, device: str = "auto") -> LossChange | str:
    """The loss of both on the half of the data that nothing was fitted to, or why it could not be measured.

    Cost: one forward pass of each over that half, one after the other, in child processes.
    """
    fitted, other = data.tokens.halves()
    tokens = other or fitted
    if tokens.targets is None:
        return "the data says not what is to be predicted"
    try:
        found = [_losses(model, replace(data, tokens=tokens), device) for model in (before, after)]
    except TieAuditError as error:
        return error.message
    if not len(found[0]):
        return "no token is to be predicted"
    return paired(found[0], found[1], held_out=other is not None)


def _losses(model: Model, data: Data, device: str) -> NDArray[np.float64]:
    with sandbox_on(runner_of(model), device) as box:
        return losses(model, data, box)


def losses(model: Model, data: Data, box: Sandbox) -> NDArray[np.float64]:
    """−log p of every target, in order, by a child that is there already. TieAuditError if it does not run."""
    with opened(box, path_of(model, "")) as one:
        signature = with_limits(one.signature, path_of(model, ""))
        params = {"handle": one.handle}
        feeds = batches(data.tokens, signature, data.n_vocabulary)
        found = [box.ask("losses", params, batch)[1]["losses"] for batch in feeds]
    return np.concatenate(found) if found else np.zeros(0)
