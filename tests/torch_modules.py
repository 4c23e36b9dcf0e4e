"""Small PyTorch modules with ties of every kind, for several test files. Also named on command lines by tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TiedLM(nn.Module):
    """An embedding, an LSTM, and a head that is the embedding: the model of Press & Wolf in small."""

    def __init__(self, n_words: int = 50, size: int = 8, *, tied: bool = True, n_layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_words, size)
        self.rnn = nn.LSTM(size, size, n_layers)
        self.head = nn.Linear(size, n_words)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(words))[0])


class Universal(nn.Module):
    """One layer, called three times: no parameter shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.relu(self.layer(x))
        return self.last(x)


class Twice(nn.Module):
    """One module at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Autoencoder(nn.Module):
    """A decoder that is the encoder's transposed copy, bit for bit: what a tied autoencoder became in a file."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 3, dtype=dtype)
        self.decode = nn.Linear(3, 6, dtype=dtype)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().T.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def tied_lm() -> nn.Module:
    torch.manual_seed(0)
    print("the factory prints to standard output")
    return TiedLM()


def tied_lm_with_inputs() -> tuple[nn.Module, Any]:
    return TiedLM(), (torch.tensor([[1, 2, 3], [4, 5, 6]]),)


def universal_with_inputs() -> tuple[nn.Module, Any]:
    return Universal(), (torch.zeros(2, 6),)


def autoencoder() -> nn.Module:
    return Autoencoder()


def raises() -> None:
    raise ValueError("no weights\nto be had")


def exits() -> None:
    raise SystemExit(0)


def dies() -> None:
    import os

    os._exit(3)


def makes_text() -> str:
    return "a"
