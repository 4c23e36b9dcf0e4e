"""Nested values of PyTorch → tensors by where they are, and tensors ↔ arrays. One code for every way to run a module.

Names: `logits`, `hidden_states[0]`, `[1].x`, `['odd key']`; a single tensor is `output`. Whatever torch.utils._pytree
knows is taken apart, and besides it dataclasses, named tuples, nested tensors and objects that hold tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tieaudit.errors import UsageError

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
_PLAIN = (bool, int, float, complex, str, np.generic, np.ndarray)
N_MOST_DEEP = 32
"""Levels of nesting that are looked at; what lies deeper is left out."""


def tensors_of(value: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a nested output, by where it is. Caches for a next call are no outputs."""
    import torch

    return {name: leaf for name, leaf in leaves(value) if isinstance(leaf, torch.Tensor)}


def arrays_of(value: Any) -> dict[str, Array]:
    """Tensors, numbers and texts of a nested output as arrays. UsageError for a tensor without values.

    Of an object that is no container only the tensors count: what else it remembers is its own affair.
    """
    return {name: array_of(leaf, name) for name, leaf in leaves(value)}


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of every tensor, number and text inside."""
    for name, leaf in _walk(value, "", 0, frozenset()):
        yield name.removeprefix(".") or "output", leaf


def _walk(value: Any, name: str, depth: int, above: frozenset[int]) -> Iterator[tuple[str, Any]]:
    import torch

    if value is None or depth > N_MOST_DEEP or id(value) in above:
        return
    if isinstance(value, _PLAIN) or isinstance(value, torch.Tensor) and not value.is_nested:
        yield name, value
    elif not _is_cache(value) and not isinstance(value, torch.nn.Module):
        parts = _parts(value)
        only_tensors = parts is None
        for key, part in _attributes(value) if parts is None else parts:
            for inner, leaf in _walk(part, name + key, depth + 1, above | {id(value)}):
                if isinstance(leaf, torch.Tensor) or not only_tensors:
                    yield inner, leaf


def _parts(value: Any) -> Iterator[tuple[str, Any]] | None:
    """The children of a container with their part of the name; None for what is no container."""
    import torch
    from torch.utils import _pytree

    if isinstance(value, torch.Tensor):  # a nested one
        return ((f"[{index}]", part) for index, part in enumerate(value.unbind()))
    if isinstance(value, Mapping):
        return ((_key(key), part) for key, part in value.items())
    if isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
        return ((f".{field}", getattr(value, field)) for field in fields)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, range)):
        return ((f"[{index}]", part) for index, part in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value))
    node = _pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return None
    children, _ = node.flatten_fn(value)
    return ((f"[{index}]", part) for index, part in enumerate(children))


def _key(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _is_cache(value: Any) -> bool:
    return hasattr(value, "to_legacy_cache") or type(value).__name__.endswith("Cache")


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Public attributes of an object: outputs of a class that is neither container nor dataclass."""
    if not isinstance(value, type) and hasattr(value, "__dict__") and not callable(value):
        yield from ((f".{key}", part) for key, part in vars(value).items() if not key.startswith("_"))


def array_of(leaf: Any, name: str = "output") -> Array:
    """A tensor, number or text as an array of its own element type. UsageError for a tensor without values."""
    import torch

    if not isinstance(leaf, torch.Tensor):
        array = np.asarray(leaf)
        return array.astype(str) if array.dtype.kind == "O" else array
    tensor = leaf.detach()
    if tensor.device.type == "meta" or type(tensor).__name__ in ("FakeTensor", "FunctionalTensor"):
        raise UsageError(f"{name}: expected an output with values, found a tensor on the meta device or a fake one")
    if hasattr(tensor, "full_tensor"):  # a DTensor
        tensor = tensor.full_tensor()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    if tensor.dtype == torch.complex32:
        tensor = tensor.to(torch.complex64)
    try:
        plain: Array = tensor.numpy()
    except TypeError:
        return _exotic(tensor)
    return plain


def _exotic(tensor: torch.Tensor) -> Array:
    """Element types that numpy does not have: by ml_dtypes where it knows them, else their bytes."""
    import ml_dtypes
    import torch

    kind = getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch."), None)
    flat: Array = tensor.reshape(-1).view(torch.uint8).numpy()
    if kind is None or np.dtype(kind).itemsize != tensor.element_size():
        return flat
    shaped: Array = flat.view(kind).reshape(tuple(tensor.shape))
    return shaped


def tensor_of(array: Array) -> torch.Tensor:
    """The tensor of an array, copied; element types of ml_dtypes keep their bits."""
    import torch

    if array.dtype.type.__module__ == "ml_dtypes":
        kind = getattr(torch, array.dtype.name, None)
        if kind is None:
            raise UsageError(f"expected an element type that torch has, found {array.dtype.name}")
        raw = np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}").copy()
        signed = torch.from_numpy(raw.view(f"int{8 * array.dtype.itemsize}"))
        return signed.view(kind)
    return torch.from_numpy(np.array(array))
