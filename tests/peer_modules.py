"""What the tests of peers' cases about modules and checkpoints share: small modules, and what is found in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tieaudit
from tieaudit.model import Model
from tieaudit.verdict import Report


def of(**parts: Any) -> nn.Module:
    """A module of these submodules, parameters and buffers, under these names, in this order."""
    made = nn.Module()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
            made.register_buffer(name, part)
        else:
            setattr(made, name, part)
    return made


def linears(n: int, size: int = 8) -> nn.Module:
    """linear1 … linear<n>, nothing shared."""
    return of(**{f"linear{index}": nn.Linear(size, size) for index in range(1, n + 1)})


def tied(kept: nn.Module, other: nn.Module, name: str = "weight") -> nn.Module:
    """The other module, with this tensor of the first."""
    setattr(other, name, getattr(kept, name))
    return other


class LM(nn.Module):
    """Lookup, a hidden layer, and a head without bias that is the table."""

    def __init__(self, n_words: int = 40, size: int = 16, *, tied: bool = True, hidden: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(n_words, size)
        self.mid = nn.Linear(size, size) if hidden else nn.Identity()
        self.head = nn.Linear(size, n_words, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mid(self.emb(words))))


IDS = torch.tensor([[1, 2, 3], [4, 5, 39]])


def report(source: nn.Module | Path, inputs: Any = None) -> Report:
    found = tieaudit.scan(source, inputs=inputs) if inputs is not None else tieaudit.scan(source)
    assert found.crashed == ()
    assert found.subject.found.unreadable == {}
    return found


def groups(source: nn.Module | Path, origin: str = "aliased") -> list[tuple[str, ...]]:
    """Names of one tensor, in the order of the model; a tie of one name by its uses is left out."""
    ties = report(source).subject.found.ties
    return [tie.ids for tie in ties if tie.origin == origin and len(tie.ids) > 1]


def views(source: nn.Module | Path, origin: str = "aliased") -> list[list[tuple[str, str]]]:
    """As `groups`, with how every name sees the first one."""
    ties = report(source).subject.found.ties
    return [[(m.id, str(m.view)) for m in tie.members] for tie in ties if tie.origin == origin and len(tie.ids) > 1]


def slices(source: nn.Module | Path) -> list[tuple[str, ...]]:
    """Names that share some bytes but not all, the whole first."""
    return [overlap.ids for overlap in report(source).subject.found.overlaps]


def codes(source: nn.Module | Path) -> list[str]:
    return sorted({finding.code for finding in report(source).findings})


def saved(path: Path, tensors: Mapping[str, Any] | nn.Module) -> Path:
    """A checkpoint as PyTorch writes it."""
    torch.save(tensors.state_dict() if isinstance(tensors, nn.Module) else dict(tensors), path)
    return path


def stored_bytes(model: Model, name: str) -> bytes:
    storage = model.by_id[name].storage
    assert storage is not None
    return storage.read_ranges([(0, storage.n_bytes)])[0]


def values(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.detach().contiguous().numpy().tobytes()
    return data


def outcomes(module: nn.Module, *operations: str, inputs: Any = None) -> list[str]:
    """What becomes of the ties of a module under everyday operations."""
    return [row.outcome for row in tieaudit.survival(module, inputs=inputs, only=operations).rows]
