"""Exported programs under PyTorch, CPU and CUDA.

What is opened is no file but the pieces of one: the parent writes the program anew without anything that loading would
unpickle, evaluate or import (`formats/torch_export/clean.py`), and weights are read where they are.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import io
import itertools
import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tieaudit.runners import Answer, Array, Params, Runner, Verb, processor_name


@dataclass
class _Program:
    """A loaded program."""

    module: Any
    arguments: Sequence[Mapping[str, Any]]
    outputs: Sequence[str]
    dtypes: Mapping[str, str]
    written: Mapping[str, Any]
    """Buffers that a run writes, with the values they had: every run begins with those."""


class _Pieces(io.RawIOBase):
    """A file that exists only in pieces: bytes, and ranges of other files."""

    def __init__(self, pieces: Sequence[Any]) -> None:
        self._pieces = [base64.b64decode(one) if isinstance(one, str) else tuple(one) for one in pieces]
        sizes = [len(one) if isinstance(one, bytes) else one[2] for one in self._pieces]
        self._begins = [0, *itertools.accumulate(sizes)]
        self._handles: dict[str, int] = {}
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._begins[-1])[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._at < self._begins[-1]:
            index = bisect.bisect_right(self._begins, self._at) - 1
            count = min(len(view) - done, self._begins[index + 1] - self._at)
            data = self._part(self._pieces[index], self._at - self._begins[index], count)
            if not data:
                break
            view[done : done + len(data)] = data
            done += len(data)
            self._at += len(data)
        return done

    def _part(self, piece: Any, begin: int, count: int) -> bytes:
        if isinstance(piece, bytes):
            return piece[begin : begin + count]
        path, offset, _ = piece
        if path not in self._handles:
            self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._handles[path], count, offset + begin)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])
        super().close()


def _start(device: str) -> Mapping[str, Verb]:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # not the arithmetic that is being compared
    torch.backends.cudnn.allow_tf32 = False
    n_threads = torch.get_num_threads()
    programs: dict[int, _Program] = {}
    kept: dict[int, list[tuple[Any, Any]]] = {}

    def open_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        began = time.perf_counter()
        program = _load(params)
        seconds = time.perf_counter() - began
        handle = max(programs, default=0) + 1
        programs[handle] = program
        loading: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        facts = {"handle": handle, "signature": params["signature"], "loading": loading, "seconds": seconds}
        return {**facts, "n_bytes_grown": _held_bytes(program), "class": "torch.export.load"}, {}

    def run(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """`threads`: 0 for the usual number; `split`: one row of the batch at a time."""
        torch.set_num_threads(int(params.get("threads", 0)) or n_threads)
        program = programs[params["handle"]]
        if not params.get("split"):
            return {}, _run(program, arrays, device)
        n_rows = max((len(array) for array in arrays.values() if array.ndim), default=1)
        parts = [
            {n: a[index : index + 1] if a.ndim and len(a) == n_rows else a for n, a in arrays.items()}
            for index in range(n_rows)
        ]
        rows = [_run(program, part, device) for part in parts]
        names = [name for name in rows[0] if all(row[name].ndim and len(row[name]) == 1 for row in rows)]
        return {}, {name: np.concatenate([row[name] for row in rows]) for name in names}

    def time_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        program, seconds = programs[params["handle"]], []
        _run(program, arrays, device)
        for _ in range(params["n_runs"]):
            began = time.perf_counter()
            _run(program, arrays, device)
            seconds.append(time.perf_counter() - began)
        return {"seconds": statistics.median(seconds)}, {}

    def state(params: Params, arrays: Mapping[str, Array]) -> Answer:
        return _state(programs[params["handle"]]), {}

    def perturb(params: Params, arrays: Mapping[str, Array]) -> Answer:
        """Noise of four times their usual size on some `rows` (None: all) of the weight `name`, until `restore`."""
        tensor = _weights(programs[params["handle"]])[params["name"]]
        kept.setdefault(params["handle"], []).append((tensor, tensor.detach().clone()))
        rows = range(len(tensor)) if params["rows"] is None else [row for row in params["rows"] if row < len(tensor)]
        with torch.no_grad():
            torch.manual_seed(0)
            size = max(float(tensor.float().square().mean().sqrt()), 0.25)
            noise = torch.randn((len(rows), *tensor.shape[1:]), device=tensor.device) * 4 * size
            tensor[list(rows)] += noise.to(tensor.dtype)
        return {}, {}

    def restore(params: Params, arrays: Mapping[str, Array]) -> Answer:
        with torch.no_grad():
            for tensor, value in reversed(kept.pop(params["handle"], [])):
                tensor.copy_(value)
        return {}, {}

    def close(params: Params, arrays: Mapping[str, Array]) -> Answer:
        programs.pop(params["handle"], None)
        return {}, {}

    verbs: dict[str, Verb] = {"hello": _hello, "open": open_, "run": run, "time": time_, "close": close}
    return {**verbs, "state": state, "perturb": perturb, "restore": restore}


def _hello(params: Params, arrays: Mapping[str, Array]) -> Answer:
    import torch

    devices = {"cpu": processor_name()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name(0)
    return {"versions": {"torch": torch.__version__}, "devices": devices}, {}


class _Said(logging.Handler):
    """What `torch.export.load` logs before it tries the layout of older files, whose error says nothing."""

    error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.error is None and record.exc_info:
            self.error = record.exc_info[1]


def _load(params: Params) -> _Program:
    import torch

    said = _Said()
    logging.getLogger("torch.export").addHandler(said)
    try:
        with _Pieces(params["pieces"]) as file:
            program = torch.export.load(file)
    except Exception as error:
        raise said.error or error from None
    finally:
        logging.getLogger("torch.export").removeHandler(said)
    module = program.module()
    held = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}
    signature = program.graph_signature
    names = {*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()}
    written = {name: held[name].detach().clone() for name in names if name in held}
    dtypes = {port["name"]: port["dtype"] for port in params["signature"]["inputs"]}
    return _Program(module, params["arguments"], params["outputs"], dtypes, written)


def _run(program: _Program, arrays: Mapping[str, Array], device: str) -> dict[str, Array]:
    import torch

    feed = [
        _tensor(arrays[one["name"]], program.dtypes[one["name"]]).to(device) if "name" in one else one["value"]
        for one in program.arguments
    ]
    with torch.no_grad():
        held = _weights(program)
        for name, value in program.written.items():
            held[name].copy_(value)
        torch.manual_seed(0)
        results = program.module(*feed)
    found: dict[str, Array] = {}
    for name, value in zip(program.outputs, results, strict=True):
        if isinstance(value, torch.Tensor):
            found[name] = _array(value)
        elif isinstance(value, (int, float, bool)):
            found[name] = np.asarray(value)
    return found


def _tensor(array: Array, kind: str) -> Any:
    """A tensor of the type that the program declares."""
    import torch

    if array.dtype.type.__module__ == "ml_dtypes":
        width = {1: torch.uint8, 2: torch.int16}[array.dtype.itemsize]
        bits = torch.from_numpy(array.view(f"u{array.dtype.itemsize}" if width is torch.uint8 else "i2").copy())
        tensor = bits.view(getattr(torch, array.dtype.name))
    else:
        tensor = torch.from_numpy(np.array(array))
    return tensor.to(getattr(torch, kind))


def _array(value: Any) -> Array:
    import torch

    tensor = value.detach().cpu().contiguous()
    try:
        array: Array = tensor.numpy()
    except TypeError:  # a type that numpy does not have
        from tieaudit.dtypes import dtype

        bits = tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16).numpy()
        array = bits.view(dtype(str(tensor.dtype).removeprefix("torch.")).numpy())
    return array


def _weights(program: _Program) -> dict[str, Any]:
    """Parameters and buffers by every name."""
    return {
        **dict(program.module.named_buffers(remove_duplicate=False)),
        **dict(program.module.named_parameters(remove_duplicate=False)),
    }


def _held_bytes(program: _Program) -> int:
    """Bytes of all parameters and buffers in memory, each storage once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _weights(program).values()}
    return sum(storages.values())


def _state(program: _Program) -> dict[str, Any]:
    """sha256 of every parameter and buffer, and the groups of names that visit the same elements in memory."""
    import torch

    digests: dict[str, str] = {}
    places: dict[object, list[str]] = {}
    for name, tensor in _weights(program).items():
        if tensor.numel():
            axes = sorted(
                (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
            )
            places.setdefault((tensor.data_ptr(), tensor.dtype, *axes), []).append(name)
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
        digests[name] = hashlib.sha256(head + plain.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"digests": digests, "tied": [names for names in places.values() if len(names) > 1]}


RUNNER = Runner(
    name="torch_export",
    title="torch.export",
    formats=("torch_export",),
    packages=("torch",),
    extra="torch",
    start=_start,
)
