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
    g, h = vectors.grad.reshape(-1, 4).double(), hidden.detach().reshape(-1, 4).double()  # type: ignore[union-attr]
    p = torch.softmax(scores.detach().reshape(-1, 11), -1).double()
    assert (lookup.n_tokens, head.n_tokens) == (30, 30)
    assert lookup.row_weights is not None and head.row_weights is not None
    assert np.allclose(lookup.row_weights, np.bincount(IDS.flatten(), minlength=11) / 30)
    assert np.allclose(lookup.gradients, (g.T @ g) / 30)
    assert np.allclose(head.inputs, (h.T @ h) / 30, atol=1e-6)
    assert np.allclose(head.row_weights, (p * (1 - p)).mean(0), atol=1e-6)


def test_without_a_loss_nothing_is_differentiated() -> None:
    found = calibrate(Small(), [IDS], ["embedding.weight", "mix.weight"])
    assert found["embedding.weight"].gradients is None
    assert found["mix.weight"].inputs is not None and found["mix.weight"].inputs.shape == (4, 4)
    assert found["mix.weight"].row_weights is None


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
    with pytest.raises(UsageError, match="expected the weight of an embedding or of a linear layer"):
        calibrate(Small(), [IDS], [name])
