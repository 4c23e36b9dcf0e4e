"""What flows through the sites of a live PyTorch module, added up by hooks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tieaudit.errors import UsageError
from tieaudit.summing import N_SLOPE_ROWS, Sums, places, slope

if TYPE_CHECKING:
    import torch

_CHECKED_ROWS = 8
_ROOM = 0.02
"""Of the largest number: as far as rounding to 8 bits may lead two ways of computing the same apart."""


class Watch:
    """Hooks at the modules that own some parameters: tables, matrices, and vectors that are a bias or a norm's scale.

    A context manager.

    `backward`: gradients are wanted, so that `differentiate` must follow every forward pass. Then a place counts if the
    loss moves with it, which padding and what nothing is predicted from do not. Else `scored` must follow, and the
    places count that `shown` says. `heads`: of these names the scores of a softmax are made, for E[p(1 − p)].
    UsageError for a name that no embedding, linear layer or norm owns.
    """

    def __init__(
        self, module: torch.nn.Module, names: Sequence[str], *, backward: bool, heads: Sequence[str] = ()
    ) -> None:
        self.sums = {name: Sums() for name in names}
        self.unfit: dict[str, str] = {}
        """Name → why what its module computes is no product with it."""
        self.turned: set[str] = set()
        """Names of those whose layer multiplies by the weight as it is stored, and not by its transpose."""
        self.shown: Any = None
        """[rows, length] Which places of the next forward pass are no padding; None: all."""
        self._backward = backward
        self._pending: list[tuple[Sums, Callable[[Any], None], Any]] = []
        """Outputs of this forward pass whose gradients are still to come, and who takes them."""
        self._products: list[tuple[Sums, Any]] = []
        """What heads gave in this forward pass, whose scores are still to come."""
        self._result: Mapping[str, Any] = {}
        """What the model gave in this forward pass."""
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

    def differentiate(
        self, loss: torch.Tensor, n_targets: int = 0, result: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Gradients of a loss, the sum of `n_targets`, at the outputs that were seen; parameters get none.

        `result`: what the model gave, among it the scores that were made of what its heads gave.
        """
        import torch

        waiting, self._pending = self._pending, []
        self._products.clear()
        self._result = result or {}
        if waiting:
            found = torch.autograd.grad(loss, [output for _, _, output in waiting], allow_unused=True)
            for (_, take, _), gradient in zip(waiting, found, strict=True):
                take(gradient)
        for sums in {id(one): one for one, _, _ in waiting}.values():
            sums.n_targets += n_targets

    def scored(self, result: Mapping[str, torch.Tensor], shown: Any = None) -> None:
        """What the model gave, in a forward pass that is not differentiated: the scores made of what its heads gave.

        `shown`: [rows, length] the places whose scores count; None: as `self.shown` says.
        """
        waiting, self._products = self._products, []
        self._pending.clear()
        self._result = result
        for sums, product in waiting:
            kept = places((product.numel() // product.shape[-1],), self.shown if shown is None else shown)
            sums.n_targets += self._add_scores(sums, product, kept)

    def _add_scores(self, sums: Sums, product: torch.Tensor, kept: Any) -> int:
        """Σ p(1 − p) over the places that count, by the square of how scores move with the product. How many count.

        The curvature of the loss, whatever is predicted: what the observed words say of it, Σ g², is a sample of that,
        in which a rare word hardly occurs.
        """
        import torch

        like = [one for one in self._result.values()
                if one.is_floating_point() and one.ndim and one.shape[-1] == product.shape[-1]
                and one.numel() == product.numel()]  # fmt: skip
        raw, rows = _rows(product), _rows(like[0] if like else product)
        if kept is not None:
            picked = torch.from_numpy(kept).to(raw.device)
            raw, rows = raw[picked], rows[picked]
        if len(rows):
            p = torch.softmax(rows.float(), dim=-1)
            few = [one[:N_SLOPE_ROWS].double().cpu().numpy() for one in (raw, rows)]
            sums.add("row_weights", (p * (1.0 - p)).double().sum(dim=0).cpu().numpy() * slope(few[0], few[1]) ** 2)
        return len(rows)

    def _hook(self, name: str, owner: torch.nn.Module, head: bool) -> Any:
        import torch

        sums, met, last = self.sums[name], set[str](), name.rpartition(".")[2]
        if getattr(owner, last).ndim == 1:
            return owner.register_forward_hook(partial(self._vector, name, last))
        if isinstance(owner, torch.nn.Embedding):

            def looked_up(one: Any, args: Any, output: Any) -> None:
                if not args:
                    return
                ids = args[0].detach().cpu().numpy()

                def take(g: Any) -> None:
                    kept = places(ids.shape, self.shown) if g is None else _moved(g)
                    sums.add_ids(ids, owner.num_embeddings, kept)
                    if g is not None:
                        sums.add("gradients", _moment(g))

                self._await(sums, output, take)

            return owner.register_forward_hook(looked_up)

        def multiplied(one: Any, args: Any, output: Any) -> None:
            if not args or name in self.unfit:
                return
            x = args[0].detach()
            if name not in met:
                met.add(name)
                found = _product(owner, x, output)
                if isinstance(found, str):
                    self.unfit[name] = found
                    return
                self.turned |= {name} if found else set()
            if head and not self._waits(output):
                self._products.append((sums, output.detach()))

            def take(g: Any) -> None:
                kept = places(tuple(x.shape[:-1]), self.shown) if g is None else _moved(g)
                rows = _rows(x) if kept is None else _rows(x)[torch.from_numpy(kept).to(x.device)]
                sums.add("inputs", _moment(rows))
                sums.n_tokens += len(rows)
                if g is not None and head:
                    self._add_scores(sums, output.detach(), _moved(g))
                elif g is not None:
                    sums.add("row_weights", _squares(g))

            self._await(sums, output, take)

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
        waits, sums = self._waits(output), self.sums[name]
        if waits and name not in self._factors:  # a second call may see what the first one gave
            found = _factor(owner, last, output)
            if isinstance(found, str):
                self.unfit[name] = found
                return
            self._factors[name] = found
        times = _derivatives(owner, last, output)[self._factors[name]] if waits else None
        places_of_output = tuple(output.shape[:-1])

        def take(g: Any) -> None:
            kept = places(places_of_output, self.shown) if g is None else _moved(g)
            n_tokens = int(np.prod(places_of_output, dtype=np.int64)) if kept is None else int(kept.sum())
            sums.add("inputs", np.full((1, 1), float(n_tokens)))
            sums.n_tokens += n_tokens
            if g is not None:
                sums.add("row_weights", _squares(g * times))

        self._await(sums, output, take)

    def _waits(self, output: Any) -> bool:
        return self._backward and bool(output.requires_grad)

    def _await(self, sums: Sums, output: Any, take: Callable[[Any], None]) -> None:
        if self._waits(output):
            self._pending.append((sums, take, output))
        else:
            take(None)


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


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _moved(gradient: torch.Tensor) -> Any:
    """Places with which the loss moves."""
    return (_rows(gradient) != 0).any(dim=1).cpu().numpy()


def _moment(tensor: torch.Tensor) -> Any:
    wide = _rows(tensor).double()
    return (wide.T @ wide).cpu().numpy()


def _squares(tensor: torch.Tensor) -> Any:
    return _rows(tensor).double().square().sum(dim=0).cpu().numpy()
