"""Modules whose ties are of every shape, and modules that resist being tried. Also named on command lines by tests."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from torch import nn

import tieaudit

WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Pair(nn.Module):
    """An embedding and a head that is the embedding."""

    def __init__(self, n_words: int = 60, size: int = 30) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_words, size)
        self.head = nn.Linear(size, n_words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(words))


class Decoder(nn.Module):
    """A decoder that sees the encoder's matrix transposed, through a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(60, 30)
        self.decode = nn.Linear(30, 60)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().T.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class Buffers(nn.Module):
    """One table of numbers, registered by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Module(), nn.Module(), nn.Linear(40, 4)
        table = torch.randn(40, 40)
        self.a.register_buffer("table", table)
        self.b.register_buffer("table", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x @ self.a.table + x @ self.b.table)


class ThreeWay(nn.Module):
    """T5 in small: one table that is a module at two paths, and a Parameter at two more."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(60, 30)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.embed = self.shared
        self.decoder.embed = nn.Embedding(60, 30)
        self.decoder.embed.weight = self.shared.weight
        self.head = nn.Linear(30, 60, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, words: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder.embed(words).mean(1, keepdim=True) + self.decoder.embed(said))


class Cells(nn.Module):
    """Two LSTM layers with one recurrent matrix; ONNX orders their gates anew, so that no value stays in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LSTM(30, 30), nn.LSTM(30, 30)
        self.b.weight_hh_l0 = self.a.weight_hh_l0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)[0])[0]


class Slices(nn.Module):
    """A matrix, its transpose, and its first rows, in one memory."""

    def __init__(self) -> None:
        super().__init__()
        value = torch.randn(60, 30)
        self.full, self.turned, self.part = nn.Parameter(value), nn.Parameter(value.T), nn.Parameter(value[:20])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x @ self.part.T, x @ self.full.T, x @ self.turned


class Columns(nn.Module):
    """The halves of a split matrix: they lie between each other and share nothing."""

    def __init__(self) -> None:
        super().__init__()
        value = torch.randn(8, 8)
        self.left, self.right = nn.Parameter(value[:, :4]), nn.Parameter(value[:, 4:])


class Complex(nn.Module):
    """One complex matrix under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(40, 40, dtype=torch.complex64))
        self.q = self.p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.p @ self.q


class Custom(Pair):
    """Inputs of its own kind, all of them required."""

    def forward(self, batch: Any, *, scale: Any) -> torch.Tensor:
        return super().forward(batch["ids"]) * scale["by"]


class NoCopy(Pair):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> NoCopy:
        raise RuntimeError("no copies\nof me")


class NoCopyAtAll(NoCopy):
    """Nor pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickles")


class Dies(Pair):
    """Ends its process when it is called."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        os._exit(7)


class Exits(Pair):
    """Asks for the end of the program when it is called."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        sys.exit(7)


class Sleeps(Pair):
    """Takes long to be called."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        time.sleep(60)
        return super().forward(words)


class Babbles(Pair):
    """Prints more than a pipe holds."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        print("x" * 200_000)
        return super().forward(words)


def transposed() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = Decoder()
    tieaudit.tie(module)
    return module, (torch.randn(2, 60),)


def dies() -> tuple[nn.Module, Any]:
    return Dies(), (WORDS,)


def sleeps() -> tuple[nn.Module, Any]:
    return Sleeps(), (WORDS,)


def untied() -> nn.Module:
    return nn.Linear(2, 2)
