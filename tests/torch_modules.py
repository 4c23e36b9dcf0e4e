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


class Words(nn.Module):
    """An embedding, a tanh and a head, tied or not, with the same values; the batch comes first."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 6)
        self.head = nn.Linear(6, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        else:
            self.head.weight = nn.Parameter(self.embed.weight.detach().clone())

    def forward(self, words: torch.Tensor) -> dict[str, Any]:
        scores = self.head(torch.tanh(self.embed(words)))
        return {"scores": scores, "best": scores.argmax(-1), "n": words.numel()}


class Steeper(Words):
    """The same outputs, and twice the gradient through the head."""

    def forward(self, words: torch.Tensor) -> dict[str, Any]:
        weight = self.head.weight + (self.head.weight - self.head.weight.detach())
        scores = nn.functional.linear(torch.tanh(self.embed(words)), weight)
        return {"scores": scores, "best": scores.argmax(-1), "n": words.numel()}


class CutOff(Words):
    """The same outputs, and no gradient through the head."""

    def forward(self, words: torch.Tensor) -> dict[str, Any]:
        scores = nn.functional.linear(torch.tanh(self.embed(words)), self.head.weight.detach())
        return {"scores": scores, "best": scores.argmax(-1), "n": words.numel()}


def words_tied() -> nn.Module:
    return Words()


def words_untied() -> nn.Module:
    return Words(tied=False)


def words_steeper() -> nn.Module:
    return Steeper()


def words_cut_off() -> nn.Module:
    return CutOff()


def words_cut_off_untied() -> nn.Module:
    return CutOff(tied=False)


def words_shifted() -> nn.Module:
    made = Words(tied=False)
    made.head.weight.data += 0.1
    return made


def words_with_inputs() -> tuple[nn.Module, Any]:
    return Words(), {"words": torch.tensor([[1, 2, 3]])}


class Unguessable(nn.Module):
    """Takes what no layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.last(batch["x"])


def unguessable() -> nn.Module:
    return Unguessable()


def unguessable_with_inputs() -> tuple[nn.Module, Any]:
    return Unguessable(), ({"x": torch.ones(2, 3)},)


def unpools() -> nn.Module:
    """An operation that PyTorch has no deterministic version of, on the CPU either."""

    class Unpools(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found, where = nn.functional.max_pool2d(self.first(x), 2, return_indices=True)
            return nn.functional.max_unpool2d(found, where, 2)

    made = Unpools()
    made.first = nn.Conv2d(1, 2, 3, padding=1)
    return made


def leaves_while_running() -> nn.Module:
    class Leaves(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            import os

            os._exit(5)

    return Leaves(2, 2)
