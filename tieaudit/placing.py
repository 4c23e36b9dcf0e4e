"""Where sums over weights are formed: numpy, or PyTorch on a GPU where there is one. Float64 in both."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tieaudit.errors import MissingPackage, UsageError

Place = Callable[[NDArray[np.float64]], Any]


def place_on(device: str) -> Place:
    """What puts an array where `device` says: `cpu` is numpy, `cuda` PyTorch on the GPU, `auto` either.

    MissingPackage or UsageError for `cuda` where that cannot be. `auto` imports PyTorch only where the system shows a
    GPU, because the import takes seconds.
    """
    if device == "cpu" or (device == "auto" and not (_has_gpu() and find_spec("torch") is not None)):
        return np.asarray
    if find_spec("torch") is None:
        raise MissingPackage("torch", "torch", "comparing weights on a GPU")
    import torch

    if torch.cuda.is_available():
        return tensors_on("cuda")
    if device == "cuda":
        raise UsageError("--device cuda: expected a GPU that PyTorch can use, found none", hint="--device cpu")
    return np.asarray


def tensors_on(device: str) -> Place:
    """Float64 tensors of PyTorch on a device; `cpu` is for tests of the very path that a GPU takes."""
    import torch

    def place(array: NDArray[np.float64]) -> Any:
        plain = np.ascontiguousarray(array)
        return torch.from_numpy(plain if plain.flags.writeable else plain.copy()).to(device)

    return place


def fetched(value: Any) -> NDArray[np.float64]:
    """What was placed, as a numpy array."""
    found: NDArray[np.float64] = value if isinstance(value, np.ndarray) else value.cpu().numpy()
    return found


def _has_gpu() -> bool:
    """Whether the system shows an NVIDIA device: Linux's own, or that of the Windows subsystem."""
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))
