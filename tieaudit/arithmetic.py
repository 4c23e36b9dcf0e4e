"""PyTorch arithmetic that can be compared, and what a run costs: TF32 off, deterministic algorithms, medians, peaks."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tieaudit.machine import Timing, processor_name, repeated

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""cuBLAS is deterministic only with a fixed workspace, which it reads when CUDA starts. Source: cuBLAS documentation,
"Results reproducibility", and torch.use_deterministic_algorithms."""
_NO_SUCH = re.compile(r"(\S+) does not have a deterministic implementation|not deterministic because it uses (CuBLAS)")


def settle_workspace() -> None:
    """Set cuBLAS's workspace, unless the user did. To be called before CUDA starts; later it has no effect."""
    os.environ.setdefault(*WORKSPACE)


@contextmanager
def exact() -> Iterator[None]:
    """TF32 off, cuDNN's benchmarking off, deterministic algorithms on; all of it is put back.

    TF32 rounds factors to 10 bits: not the arithmetic that is being compared. Where the process has started CUDA with
    no workspace set for cuBLAS, `attempt` finds out and says so.
    """
    import torch

    if not torch.cuda.is_initialized():
        settle_workspace()
    put_back = _without_tf32()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fill = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # a cost, and no part of what is compared
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill
        put_back()


def _without_tf32() -> Callable[[], None]:
    """How to put it back. The older switches raise once somebody has used the newer ones (torch 2.9), so then those."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = [place for place in (matmul, *(getattr(cudnn, name, None) for name in ("conv", "rnn")))
             if hasattr(place, "fp32_precision")]  # fmt: skip
    kept = [(place, place.fp32_precision) for place in newer]

    def put_back_newer() -> None:
        for place, value in kept:
            if place.fp32_precision != value:
                place.fp32_precision = value

    try:
        convolutions, precision = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        for place in newer:
            place.fp32_precision = "ieee"
        return put_back_newer
    matmul.allow_tf32 = cudnn.allow_tf32 = False

    def put_back() -> None:
        torch.set_float32_matmul_precision(precision)  # which is matmul.allow_tf32, and more exact
        cudnn.allow_tf32 = convolutions
        put_back_newer()

    return put_back


def attempt(run: Callable[[], T], noted: set[str]) -> T:
    """What `run` gives under deterministic algorithms; where an operation has none, once more without, and noted.

    To be called inside `exact`. Adds to `noted` the operations that ran without a deterministic version.
    """
    import torch

    try:
        return run()
    except RuntimeError as error:
        if not (found := _operation(str(error))):
            raise
        noted.add(found)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = run()
    finally:
        torch.use_deterministic_algorithms(True)
    noted.update(filter(None, (_operation(str(one.message)) for one in said)))
    return result


def _operation(message: str) -> str:
    found = _NO_SUCH.search(message)
    return (found[1] or found[2]) if found else ""


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the module's first tensor is; the CPU for a module without any."""
    import torch

    tensors = (*module.parameters(), *module.buffers())
    return next((one.device for one in tensors), torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """The hardware behind a device, for the report."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return processor_name() if device.type == "cpu" else str(device)


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers in memory, each storage once."""
    storages = {}
    for tensor in (*module.parameters(), *module.buffers()):
        with suppress(RuntimeError, NotImplementedError):  # a wrapper around other tensors
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def timed(run: Callable[[], Any], device: torch.device, n_runs: int, seconds: float) -> Timing:
    """`machine.repeated` on a device: every run until the device has finished, the peak of its allocated memory.

    Measured with the algorithms that the library chooses, deterministic or not.
    """
    import torch

    def whole() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        if device.type != "cuda":
            return repeated(whole, n_runs, seconds)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        found = repeated(whole, n_runs, seconds)
        return replace(found, n_bytes_peak=max(0, torch.cuda.max_memory_allocated(device) - before))
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
