"""Calibration: what flows through each site of a live module on sample text, as the averages that merge policies need.

Only sums are kept, [rows] and [columns, columns] per site: memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tieaudit.calling import call, comparable
from tieaudit.errors import UsageError
from tieaudit.merges import Block, Statistics

if TYPE_CHECKING:
    import torch

Loss = Callable[[Any, Any], "torch.Tensor"]
"""(output, inputs) → the sum over tokens of the negative log-likelihood, in nats."""


@dataclass
class _Sums:
    """What one site adds up."""

    n_tokens: int = 0
    row_weights: Block | None = None
    inputs: Block | None = None
    gradients: Block | None = None
    pending: list[Any] = field(default_factory=list)
    """Outputs of lookups of this batch, whose gradients are still to come."""

    def statistics(self) -> Statistics:
        n = max(self.n_tokens, 1)
        scaled = [None if one is None else one / n for one in (self.row_weights, self.inputs, self.gradients)]
        return Statistics(self.n_tokens, *scaled)


def calibrate(
    module: torch.nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    *,
    loss: Loss | None = None,
    heads: Sequence[str] = (),
) -> dict[str, Statistics]:
    """Statistics of the sites that own these parameters, by name. The module is run in eval mode and not changed.

    `loss`: with it a backward pass gives the gradients at lookups. `heads`: of these names, the outputs are taken as
    scores of a softmax, for E[p(1 − p)]. UsageError for a name that no embedding or linear layer owns. Cost: one
    forward (and backward) pass per batch, and columns² numbers per site.
    """
    import torch

    sums = {name: _Sums() for name in names}
    hooks = [hook for name in names for hook in _watch(module, name, sums[name], loss is not None, name in heads)]
    try:
        with comparable(module), torch.set_grad_enabled(loss is not None):
            for batch in batches:
                output = call(module, batch)
                if loss is not None:
                    _backward(loss(output, batch), sums.values())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: one.statistics() for name, one in sums.items()}


def _watch(module: torch.nn.Module, name: str, sums: _Sums, backward: bool, head: bool) -> list[Any]:
    import torch

    path = name.rpartition(".")[0]
    owner = dict(module.named_modules(remove_duplicate=False)).get(path)
    if isinstance(owner, torch.nn.Embedding):
        rows = owner.num_embeddings

        def looked_up(one: Any, args: Any, output: Any) -> None:
            ids = args[0].reshape(-1)
            counts = torch.bincount(ids, minlength=rows).double().cpu().numpy()
            sums.row_weights = counts if sums.row_weights is None else sums.row_weights + counts
            sums.n_tokens += ids.numel()
            if backward and output.requires_grad:
                sums.pending.append(output)

        return [owner.register_forward_hook(looked_up)]
    weight = getattr(owner, "weight", None)
    if owner is None or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise UsageError(f"{name}: expected the weight of an embedding or of a linear layer, found none of this name")

    def multiplied(one: Any, args: Any, output: Any) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        sums.inputs = _add(sums.inputs, x)
        sums.n_tokens += len(x)
        if head:
            p = torch.softmax(output.detach().reshape(-1, output.shape[-1]).float(), dim=-1)
            spread = (p * (1.0 - p)).double().sum(dim=0).cpu().numpy()
            sums.row_weights = spread if sums.row_weights is None else sums.row_weights + spread

    assert owner is not None
    return [owner.register_forward_hook(multiplied)]


def _backward(value: torch.Tensor, sums: Iterable[_Sums]) -> None:
    """Gradients at the lookups alone: parameters get none."""
    import torch

    waiting = [(one, output) for one in sums for output in one.pending]
    if waiting:
        found = torch.autograd.grad(value, [output for _, output in waiting], allow_unused=True)
        for (one, _), gradient in zip(waiting, found, strict=True):
            if gradient is not None:
                one.gradients = _add(one.gradients, gradient.reshape(-1, gradient.shape[-1]))
    for one, _ in waiting:
        one.pending.clear()


def _add(total: Block | None, rows: torch.Tensor) -> Block:
    wide = rows.detach().double()
    moment: Block = (wide.T @ wide).cpu().numpy()
    return moment if total is None else np.add(total, moment)
