"""A module as bytes that another process, or another copy of it, can be made of, shared memory included.

PyTorch refuses to pickle a parametrized module, because its class is made while the program runs; here it travels as
its own class and its attributes, and is parametrized again where it arrives. What is read here was written here.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        import torch
        from torch.nn.utils import parametrize

        if isinstance(value, torch.nn.Module) and parametrize.is_parametrized(value):
            kind = parametrize.type_before_parametrizations(value)
            return _blank, (kind,), dict(value.__dict__), None, None, _restored
        return NotImplemented


def _blank(kind: type[torch.nn.Module]) -> torch.nn.Module:
    made: torch.nn.Module = object.__new__(kind)
    return made


def _restored(module: torch.nn.Module, state: dict[str, Any]) -> None:
    from torch.nn.utils import parametrize

    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)


def pack(value: Any, to: Path | IO[bytes]) -> None:
    """Write a module, or something that holds one. Raises whatever its classes raise when they are pickled."""
    import torch

    torch.save(value, to, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__="pickle"))


def unpack(source: Path | IO[bytes]) -> Any:
    """What `pack` wrote: never a file of anybody else, for it names the user's own classes."""
    import torch

    return torch.load(source, weights_only=False)
