"""What PyTorch itself says about a checkpoint: the truth that the reader without PyTorch is held against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def named(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of nested containers by its dotted name."""
    if isinstance(value, torch.Tensor):
        yield prefix or "tensor", value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from named(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from named(inner, f"{prefix}.{index}" if prefix else str(index))


def loaded(path: Path) -> dict[str, torch.Tensor]:
    return dict(named(torch.load(path, weights_only=True, map_location="cpu")))


def row_major_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def cells(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The storage and the elements of it that a tensor visits, in its own order: brute force over every index."""
    index = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return tensor.untyped_storage().data_ptr(), index.as_strided(
        tensor.size(), tensor.stride(), tensor.storage_offset()
    )


def one_value(found: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Classes of names that visit exactly the same elements of one storage, in whatever order, as one type."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, tensor in found.items():
        if tensor.numel():
            where, visited = cells(tensor)
            groups[where, tensor.dtype, tuple(sorted(visited.reshape(-1).tolist()))].append(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def sharing(found: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Pairs of names that share some elements of one storage, but not all."""
    visited = {
        name: (cells(one)[0], set(cells(one)[1].reshape(-1).tolist())) for name, one in found.items() if one.numel()
    }
    return {
        frozenset((a, b))
        for a, (where, some) in visited.items()
        for b, (other, more) in visited.items()
        if a < b and where == other and some & more and some != more
    }
