"""Calibration sums what flows through a site; checked against sums over all tokens at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tieaudit.calibration import calibrate
from tieaudit.errors import UsageError


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 4)
        self.mix = torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.drop(torch.tanh(self.mix(self.embedding(ids)))))
        return found


def loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


IDS = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(1))


def test_sums_over_batches_are_those_of_all_tokens() -> None:
    module = Small()
    module.train()
    found = calibrate(module, IDS.split(2), ["embedding.weight", "head.weight"], loss=loss, heads=["head.weight"])
    assert module.training and all(one.grad is None for one in module.parameters())
    lookup, head = found["embedding.weight"], found["head.weight"]

    module.eval()  # without dropout, as the model is used
    vectors = module.embedding(IDS)
    vectors.retain_grad()
    hidden = torch.tanh(module.mix(vectors))
    scores = module.head(hidden)
    loss(scores, IDS).backward()  # type: ignore[no-untyped-call]
    g, h = (one[:, :-1].detach().reshape(-1, 4).double() for one in (vectors.grad, hidden))  # type: ignore[index]
    p = torch.softmax(scores[:, :-1].detach().reshape(-1, 11), -1).double()
    assert (lookup.n_tokens, head.n_tokens) == (24, 24)  # nothing is predicted from the last of five ids
    assert lookup.row_weights is not None and head.row_weights is not None
    assert np.allclose(lookup.row_weights, np.bincount(IDS[:, :-1].flatten(), minlength=11) / 24)
    assert np.allclose(lookup.gradients, (g.T @ g) / 24)
    assert np.allclose(head.inputs, (h.T @ h) / 24, atol=1e-6)
    assert np.allclose(head.row_weights, (p * (1 - p)).mean(0), atol=1e-6)


def test_without_a_loss_nothing_is_differentiated() -> None:
    found = calibrate(Small(), [IDS], ["embedding.weight", "mix.weight"])
    assert found["embedding.weight"].gradients is None
    assert found["mix.weight"].inputs is not None and found["mix.weight"].inputs.shape == (4, 4)
    assert found["mix.weight"].row_weights is None


class Scaled(torch.nn.Module):
    """Embedding, a norm of three spellings one after the other, a biased layer, a head."""

    class Gemma(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.5, -0.2, 0.1, 0.7]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)

    class Odd(torch.nn.Module):
        """A bias that is not simply added."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 1.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x + self.bias)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.layer = torch.nn.Embedding(11, 4), torch.nn.LayerNorm(4)
        torch.nn.init.uniform_(self.layer.weight, 0.5, 1.5)
        torch.nn.init.normal_(self.layer.bias)
        self.rms, self.gemma, self.odd = torch.nn.RMSNorm(4), Scaled.Gemma(), Scaled.Odd()
        self.mix, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.rms(self.layer(self.embedding(ids)))
        found: torch.Tensor = self.head(self.odd(self.mix(self.gemma(self.rms(x)))))  # the RMS norm runs twice
        return found


def test_vectors_are_weighed_by_their_squared_gradients_token_by_token() -> None:
    module, names = Scaled(), ["layer.weight", "layer.bias", "gemma.weight", "mix.bias", "head.bias"]
    found = calibrate(module, IDS.split(3), names, loss=loss)

    by_hand = {name: torch.zeros_like(module.get_parameter(name)).double() for name in names}
    for row in IDS:  # autograd's own gradient of one token's vector: that of a copy which this token alone uses
        expanded = {name: module.get_parameter(name).detach().expand(5, -1).clone().requires_grad_() for name in names}
        kept = dict(module.named_parameters())
        x = torch.nn.functional.layer_norm(kept["embedding.weight"][row], (4,))
        x = x * expanded["layer.weight"] + expanded["layer.bias"]
        x = module.rms(module.rms(x))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + expanded["gemma.weight"])
        x = module.odd(x @ module.mix.weight.T + expanded["mix.bias"])
        scores = x @ module.head.weight.T + expanded["head.bias"]
        torch.nn.functional.cross_entropy(scores[:-1], row[1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
        for name, one in expanded.items():
            assert one.grad is not None
            by_hand[name] += one.grad.double().square().sum(0)
    for name in names:
        weights = found[name].row_weights
        assert weights is not None and found[name].n_tokens == 24  # of 6 rows; the last place predicts nothing
        assert np.allclose(weights, by_hand[name].numpy() / 24, rtol=1e-4), name
        assert found[name].inputs is not None and found[name].inputs.tolist() == [[1.0]]


def test_a_scale_that_is_used_twice_is_summed_over_both_and_a_bias_inside_is_none() -> None:
    found = calibrate(Scaled(), [IDS], ["rms.weight"], loss=loss)
    assert found["rms.weight"].n_tokens == 48 and found["rms.weight"].row_weights is not None
    with pytest.raises(UsageError, match=r"odd.bias: .*: Odd neither adds its bias"):
        calibrate(Scaled(), [IDS], ["odd.bias"], loss=loss)


def test_a_layer_that_is_called_twice_is_summed_over_both_calls() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.fc(self.fc(x))
            return found

    assert calibrate(Twice(), [torch.ones(3, 4)], ["fc.weight"])["fc.weight"].n_tokens == 6


@pytest.mark.parametrize("name", ["nothing.weight", "drop.weight", "mix.bias.weight"])
def test_a_name_that_is_no_site_is_one_clear_line(name: str) -> None:
    with pytest.raises(UsageError, match="expected the weight of an embedding, of a linear layer or of a norm"):
        calibrate(Small(), [IDS], [name])


class Between(Small):
    """What stands between head and softmax in Cohere and Granite (a scale), Gemma (a cap) and BERT (a bias)."""

    def __init__(self, scale: float = 1.0, cap: float = 0.0, bias: float = 0.0) -> None:
        super().__init__()
        self.scale, self.cap, self.bias = scale, cap, bias * torch.arange(11.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = 6.0 * super().forward(ids) * self.scale
        return (self.cap * torch.tanh(scores / self.cap) if self.cap else scores) + self.bias


BETWEEN = {"a small scale": Between(scale=1 / 16), "a large one": Between(scale=8.0), "a bias": Between(bias=3.0),
           "a cap": Between(cap=3.0), "all": Between(scale=0.5, cap=4.0, bias=1.0)}  # fmt: skip


@pytest.mark.parametrize("name", ["a small scale", "a large one", "a bias"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_head_has_the_probabilities_of_the_model_by_the_scale_before_them(name: str, backward: bool) -> None:
    module = BETWEEN[name].eval()
    with torch.no_grad():
        p = torch.softmax(module(IDS).double(), -1)
    p = (p[:, :-1] if backward else p).reshape(-1, 11)  # with a loss, nothing is predicted from the last places
    given = {"loss": loss} if backward else {}
    found = calibrate(module, [IDS], ["head.weight"], heads=["head.weight"], **given)["head.weight"].row_weights
    # of scores s = c·(Wx) + b the loss has the second derivative c²·(diag p − ppᵀ) by Wx; without c², or with the p of
    # Wx itself, it is off by a factor of 36/256, 2304, or by where the bias puts all the mass
    assert np.allclose(found, (p * (1 - p)).mean(0) * (6.0 * module.scale) ** 2, rtol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
def test_a_cap_counts_with_its_mean_slope(backward: bool) -> None:
    module = BETWEEN["a cap"].eval()
    given = {"loss": loss} if backward else {}
    found = calibrate(module, [IDS], ["head.weight"], heads=["head.weight"], **given)["head.weight"].row_weights
    with torch.no_grad():
        scores = module(IDS)[:, : -1 if backward else None].double()
    p = torch.softmax(scores, -1)
    exact = p * (1 - p) * (6.0 * (1.0 - (scores / module.cap) ** 2)) ** 2  # d(c·tanh(6z/c))/dz = 6·(1 − tanh²)
    ratio = found.sum() / exact.reshape(-1, 11).mean(0).sum()
    assert 0.5 < ratio < 2.0


def test_padding_changes_nothing_where_the_loss_does_not_move_with_it() -> None:
    module = Small().eval()
    padded = torch.cat([IDS, torch.zeros(6, 20, dtype=torch.long)], 1)

    def hidden(output: Any, ids: torch.Tensor) -> torch.Tensor:
        return loss(output[:, :5], ids[:, :5])

    names = ["embedding.weight", "mix.weight", "head.weight"]
    plain = calibrate(module, [IDS], names, loss=loss, heads=names[2:])
    found = calibrate(module, [padded], names, loss=hidden, heads=names[2:])
    for name in names:
        assert found[name].n_tokens == plain[name].n_tokens == 24
        for field in ("row_weights", "inputs", "gradients"):
            one, other = getattr(found[name], field), getattr(plain[name], field)
            assert (one is None) == (other is None) and (one is None or np.allclose(one, other, atol=1e-7))
