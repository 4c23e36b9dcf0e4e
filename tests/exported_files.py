"""Small exported programs, made by torch.export itself, and changed copies of their archives."""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH = 50, 8


class LanguageModel(nn.Module):
    """Embedding, positions, one layer that is called three times, norm, soft-capped head. `names` may be anything."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.pos = nn.Parameter(torch.randn(16, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("mask", torch.rand(WIDTH), persistent=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.emb(input_ids) + self.pos[: input_ids.shape[1]]
        with torch.no_grad():
            angles = self.pos[: input_ids.shape[1]].cos()
        for _ in range(3):
            x = torch.relu(self.layer(x) + angles)
        x = self.norm(x) * self.mask
        return {"logits": torch.tanh(self.head(x) / 30) * 30 * self.scale}


class TransposedHead(nn.Module):
    """A head that multiplies by a matrix of its own, the transpose of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.out = nn.Parameter(self.emb.weight.detach().t().contiguous())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.emb(input_ids) @ self.out


def ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def quietly(action: Callable[[], Any]) -> Any:
    """What torch's exporter and loader log and warn of is not what is tested."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    finally:
        logging.disable(logging.NOTSET)


def program(module: nn.Module, *args: Any, dynamic: bool = True, **kwargs: Any) -> Any:
    free = {"input_ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=4, max=16)}}
    shapes = free if dynamic else None
    return quietly(lambda: torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes, strict=False))


def saved(path: Path, exported: Any) -> Path:
    quietly(lambda: torch.export.save(exported, path))
    return path


def language_model(path: Path, tied: bool, *, equal: bool = False) -> Path:
    torch.manual_seed(0)
    module = LanguageModel(tied)
    if equal:
        module.head.weight.data.copy_(module.emb.weight.data)
    return saved(path, program(module, ids()))


def reloaded(path: Path) -> Any:
    return quietly(lambda: torch.export.load(path))


def changed(source: Path, target: Path, edit: Mapping[str, Any]) -> Path:
    """A copy of an archive with members replaced: by bytes, or by what a function makes of their JSON; None drops."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content: Any = old.read(name)
            inner = name.removeprefix(f"{top}/")
            if inner in edit:
                content = edit[inner]
                if callable(content):
                    value = json.loads(old.read(name))
                    content = json.dumps(content(value) or value).encode()
            if content is not None:
                new.writestr(name, content)
        for inner, content in edit.items():
            if f"{top}/{inner}" not in old.namelist() and isinstance(content, bytes):
                new.writestr(f"{top}/{inner}", content)
    return target
