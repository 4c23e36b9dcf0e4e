"""Small modules, each fit for some schemes, and what every scheme saves on them in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

D, F, V = 8, 12, 20
WORDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


class Block(nn.Module):
    """A layer of one head, without a norm before it, so that every weight matters."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))
        self.norm = nn.LayerNorm(D)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.up_proj, self.down_proj = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.q_proj(x) @ self.k_proj(x).mT / D**0.5, -1)
        x = self.norm(x + self.o_proj(scores @ self.v_proj(x)))
        return x + self.down_proj(torch.relu(self.up_proj(x)))


ATTENTION, FEED, NORM = 4 * (D * D + D), 2 * D * F + F + D, 2 * D
LAYER = ATTENTION + FEED + NORM


class LM(nn.Module):
    def __init__(self, n_layers: int = 6) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block() for _ in range(n_layers))
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(words)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Side(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(words)
        for layer in self.layers:
            x = layer(x)
        return x


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Side(), Side()
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.decoder(words) + self.encoder(words))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = (nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.query(x) * self.document(x)).sum(-1)


def autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 8))


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Case:
    scheme: str
    make: Callable[[], nn.Module]
    n_saved: int
    """Parameters fewer than before, in closed form."""


def floats() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


CASES = [
    Case("albert", LM, 5 * LAYER),
    Case("albert:attention", LM, 5 * ATTENTION),
    Case("albert:ffn", LM, 5 * FEED),
    Case("albert:2", LM, 4 * LAYER),
    Case("sequence:3", LM, 3 * LAYER),
    Case("cycle:2", LM, 4 * LAYER),
    Case("cycle-rev:3", LM, 3 * LAYER),
    Case("sandwich", LM, 3 * (ATTENTION + FEED)),  # layers 1 to 4 share; each layer keeps its own norms
    Case("immediate", LM, 3 * LAYER),
    Case("middle-cycle:2", LM, 2 * LAYER),  # A BC BC D
    Case("ffn", LM, 5 * FEED),
    Case("norms", LM, 5 * NORM),
    Case("shared-qk", LM, 6 * (D * D + D)),
    Case("shared-kv", LM, 6 * (D * D + D)),
    Case("io", LM, V * D),
    Case("three-way", Translator, 2 * V * D),
    Case("encoder-decoder", Translator, V * D),
    Case("tied-transformer", Translator, 2 * (ATTENTION + FEED)),
    Case("siamese", Towers, 2 * D * F + F + D),
    Case("tied-autoencoder", autoencoder, 8 * 6 + 6 * 3),  # not the biases
]


class Predictions(nn.Module):
    """A head with two biases, as BERT's, both of which count."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.bias = nn.Linear(D, V), nn.Parameter(torch.randn(V))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x) + self.bias


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(V, D), nn.ModuleList([Block()])
        self.cls = nn.ModuleDict({"predictions": Predictions()})

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.cls["predictions"](self.layers[0](self.embed_tokens(words)))


def with_equal_tables() -> nn.Module:
    """The tie of table and head got lost: equal values, stored twice."""
    module = LM(1)
    with torch.no_grad():
        module.lm_head.weight.copy_(module.embed_tokens.weight)
    return module


def with_one_table() -> nn.Module:
    module = LM(1)
    module.lm_head.weight = module.embed_tokens.weight
    return module


MORE = [
    Case("io-bias", Masked, V),
    Case("dedup", with_equal_tables, V * D),
    Case("untie", with_one_table, -V * D),
]
"""Besides `CASES`, whose parity a test works out with merged values."""
