"""What flows through the sites of a live PyTorch module, added up by hooks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tieaudit.errors import UsageError
from tieaudit.summing import Sums

if TYPE_CHECKING:
    import torch

_CHECKED_ROWS = 8
_ROOM = 0.02
"""Of the largest number: as far as rounding to 8 bits may lead two ways of computing the same apart."""


class Watch:
    """Hooks at the modules that own some parameters: tables, matrices, and vectors that are a bias or a norm's scale.

    A context manager.

    `backward`: gradients are wanted, so that `differentiate` must follow every forward pass. `heads`: of these names
    the outputs are taken as scores of a softmax. UsageError for a name that no embedding, linear layer or norm owns.
    """

    def __init__(
        self, module: torch.nn.Module, names: Sequence[str], *, backward: bool, heads: Sequence[str] = ()
    ) -> None:
        self.sums = {name: Sums() for name in names}
        self.unfit: dict[str, str] = {}
        """Name → why what its module computes is no product with it."""
        self.turned: set[str] = set()
        """Names of those whose layer multiplies by the weight as it is stored, and not by its transpose."""
        self._backward = backward
        self._pending: list[tuple[Callable[[Any], None], Any]] = []
        """Outputs of this forward pass whose gradients are still to come, and who takes them."""
        self._factors: dict[str, int] = {}
        """Name of a vector → which of `_derivatives` is its."""
        owners = dict(module.named_modules(remove_duplicate=False))
        found = [(name, _owner(owners, name)) for name in names]
        self._hooks = [self._hook(name, owner, name in heads) for name, owner in found]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def differentiate(self, loss: torch.Tensor) -> None:
        """Gradients of a loss at the outputs that were seen; parameters get none."""
        import torch

        waiting, self._pending = self._pending, []
        if waiting:
            found = torch.autograd.grad(loss, [output for _, output in waiting], allow_unused=True)
            for (take, _), gradient in zip(waiting, found, strict=True):
                if gradient is not None:
                    take(gradient)

    def forget(self) -> None:
        """Of a forward pass that is not differentiated."""
        self._pending.clear()

    def _hook(self, name: str, owner: torch.nn.Module, head: bool) -> Any:
        import torch

        sums, last = self.sums[name], name.rpartition(".")[2]
        if getattr(owner, last).ndim == 1:
            return owner.register_forward_hook(partial(self._vector, name, last))
        if isinstance(owner, torch.nn.Embedding):

            def looked_up(one: Any, args: Any, output: Any) -> None:
                if args:
                    sums.add_ids(args[0].cpu().numpy(), owner.num_embeddings)
                    self._await(output, lambda g: sums.add("gradients", _moment(g)))

            return owner.register_forward_hook(looked_up)

        def multiplied(one: Any, args: Any, output: Any) -> None:
            if not args or name in self.unfit:
                return
            x = args[0].detach()
            if sums.inputs is None:
                found = _product(owner, x, output)
                if isinstance(found, str):
                    self.unfit[name] = found
                    return
                self.turned |= {name} if found else set()
            sums.add("inputs", _moment(x))
            sums.n_tokens += x.numel() // max(x.shape[-1], 1)
            if head:
                p = torch.softmax(output.detach().reshape(-1, output.shape[-1]).float(), dim=-1)
                sums.add("row_weights", (p * (1.0 - p)).double().sum(dim=0).cpu().numpy())
            else:
                self._await(output, lambda g: sums.add("row_weights", _squares(g)))

        return owner.register_forward_hook(multiplied)

    def _vector(self, name: str, last: str, owner: Any, args: Any, output: Any) -> None:
        """Σ of the squared gradients of each number of a bias or of a scale, token by token."""
        import torch

        if name in self.unfit:
            return
        n = getattr(owner, last).numel()
        if not isinstance(output, torch.Tensor) or output.shape[-1:] != (n,):
            self.unfit[name] = f"{type(owner).__name__} gives no tensor with {n:,} numbers in a row"
            return
        differentiated = self._backward and output.requires_grad
        if differentiated and name not in self._factors:  # a second call may see what the first one gave
            found = _factor(owner, last, output)
            if isinstance(found, str):
                self.unfit[name] = found
                return
            self._factors[name] = found
        sums, n_tokens = self.sums[name], output.numel() // n
        sums.add("inputs", np.full((1, 1), float(n_tokens)))
        sums.n_tokens += n_tokens
        if differentiated:
            times = _derivatives(owner, last, output)[self._factors[name]]
            self._await(output, lambda g: sums.add("row_weights", _squares(g * times)))

    def _await(self, output: Any, take: Callable[[Any], None]) -> None:
        if self._backward and output.requires_grad:
            self._pending.append((take, output))


def no_site(module: torch.nn.Module, name: str) -> str:
    """Why a parameter cannot be watched; empty if it can, as far as that can be told before it runs."""
    try:
        _owner(dict(module.named_modules(remove_duplicate=False)), name)
    except UsageError as error:
        return error.message
    return ""


def _owner(owners: Mapping[str, torch.nn.Module], name: str) -> torch.nn.Module:
    import torch

    path, _, last = name.rpartition(".")
    owner = owners.get(path)
    held = getattr(owner, last, None)
    n_axes = {"weight": (1, 2), "bias": (1,)}.get(last, ())
    if owner is None or not isinstance(held, torch.Tensor) or held.ndim not in n_axes:
        raise UsageError(
            f"{name}: expected the weight of an embedding, of a linear layer or of a norm, or a bias, found none of "
            "this name"
        )
    return owner


def _derivatives(owner: Any, last: str, output: torch.Tensor) -> list[torch.Tensor]:
    """What ∂output/∂vector may be, number by number: 1 for a bias; for a scale γ of something n, where the output is
    γ·n + bias, or (1 + γ)·n + bias, that is n."""
    import torch

    y, bias = output.detach().float(), getattr(owner, "bias", None)
    if last == "bias":
        return [torch.ones_like(y)]
    centred, scale = y if bias is None else y - bias.detach().float(), getattr(owner, last).detach().float()
    return [torch.nan_to_num(centred / by, 0.0, 0.0, 0.0) for by in (scale, 1.0 + scale)]


def _factor(owner: Any, last: str, output: torch.Tensor) -> int | str:
    """Which of `_derivatives` it is, or why it is none: autograd gives for the vector the sum of it over tokens."""
    import torch

    vector, kind = getattr(owner, last), type(owner).__name__
    if not vector.requires_grad:
        return f"{kind}.{last} takes no gradient"
    probe = torch.arange(output.numel(), device=output.device).mul(0.37).cos().reshape(output.shape)
    (found,) = torch.autograd.grad(output, vector, probe.to(output.dtype), retain_graph=True, allow_unused=True)
    for index, times in enumerate(_derivatives(owner, last, output)) if found is not None else ():
        each = (probe * times).reshape(-1, vector.numel())
        if float((each.sum(dim=0) - found.float()).abs().max()) <= _ROOM * float(each.abs().sum(dim=0).max()) + 1e-6:
            return index
    return f"{kind} neither adds its {last} to what it gives nor multiplies by it"


def _product(owner: Any, x: torch.Tensor, output: Any) -> bool | str:
    """Whether the output is x·W + bias (and not x·Wᵀ + bias), measured on a few rows; or why it is neither.

    Conv1D of GPT-2 is the layer that keeps its weight as [inputs, outputs].
    """
    import torch

    if not isinstance(output, torch.Tensor):
        return f"{type(owner).__name__} gives no tensor"
    rows, given = (one.detach().reshape(-1, one.shape[-1])[:_CHECKED_ROWS].float() for one in (x, output))
    bias = getattr(owner, "bias", None)
    added = 0.0 if bias is None else bias.detach().float()
    room = _ROOM * float(given.abs().max()) + 1e-6
    weight = owner.weight.detach().float()
    for turned, matrix in ((False, weight.T), (True, weight)):
        if (rows.shape[-1], given.shape[-1]) == tuple(matrix.shape):
            if float((rows @ matrix + added - given).abs().max()) <= room:
                return turned
    return f"{type(owner).__name__} gives something else than its inputs times its weight"


def _moment(rows: torch.Tensor) -> Any:
    wide = rows.detach().reshape(-1, rows.shape[-1]).double()
    return (wide.T @ wide).cpu().numpy()


def _squares(rows: torch.Tensor) -> Any:
    return rows.detach().reshape(-1, rows.shape[-1]).double().square().sum(dim=0).cpu().numpy()
