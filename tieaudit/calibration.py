"""Calibration: what flows through each site of a live module on sample text, as the averages that merge policies need.

Only sums are kept, [rows] and [columns, columns] per site: memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tieaudit.calling import call, comparable
from tieaudit.errors import UsageError
from tieaudit.merges import Statistics
from tieaudit.nested import tensors_of
from tieaudit.watching import Watch

if TYPE_CHECKING:
    import torch

Loss = Callable[[Any, Any], "torch.Tensor"]
"""(output, inputs) → the sum over tokens of the negative log-likelihood, in nats."""


def calibrate(
    module: torch.nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    *,
    loss: Loss | None = None,
    heads: Sequence[str] = (),
) -> dict[str, Statistics]:
    """Statistics of the sites that own these parameters, by name. The module is run in eval mode and not changed.

    `loss`: with it a backward pass gives the gradients at lookups, and E[g²] at the results of products and at vectors;
    places with which the loss does not move, such as padding, do not count; without it all places do. `heads`: scores
    of a softmax are made of what these give, so that E[p(1 − p)] is known. UsageError for a name that no embedding,
    linear layer or norm owns. Cost: one forward (and backward) pass per batch, and columns² numbers per site.
    """
    import torch

    with (
        Watch(module, names, backward=loss is not None, heads=heads) as watch,
        comparable(module),
        torch.set_grad_enabled(loss is not None),
    ):
        for batch in batches:
            output = call(module, batch)
            if loss is not None:
                watch.differentiate(loss(output, batch), result=tensors_of(output))
            else:
                watch.scored(tensors_of(output))
    for name, reason in watch.unfit.items():
        raise UsageError(
            f"{name}: expected the weight of an embedding, of a linear layer or a norm, or a bias: {reason}"
        )
    return {name: Statistics.of(one, turned=name in watch.turned) for name, one in watch.sums.items()}
