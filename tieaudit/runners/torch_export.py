"""Exported programs under PyTorch, CPU and CUDA.

What is opened is no file but the pieces of one: the parent writes the program anew without anything that loading would
unpickle, evaluate or import (`formats/torch_export/clean.py`), and weights are read where they are.
"""

from __future__ import annotations

import base64
import bisect
import io
import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tieaudit.runners import Answer, Array, Params, Runner, Verb


@dataclass
class _Program:
    """A loaded program."""

    module: Any
    arguments: Sequence[Mapping[str, Any]]
    outputs: Sequence[str]
    dtypes: Mapping[str, str]
    written: Mapping[str, Any]
    """Buffers that a run writes, with the values they had: every run begins with those."""

    def given(self, arrays: Mapping[str, Array]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one run."""
        feed = [
            _tensor(arrays[one["name"]], self.dtypes[one["name"]]) if "name" in one else one["value"]
            for one in self.arguments
        ]
        return tuple(feed), {}

    def begin_again(self) -> None:
        """Give the buffers that a run writes their first values."""
        import torch

        held = dict(self.module.named_buffers(remove_duplicate=False))
        held.update(self.module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self.written.items():
                held[name].copy_(value)

    def named(self, results: Sequence[Any]) -> dict[str, Any]:
        """The outputs by the names that the signature has for them."""
        return dict(zip(self.outputs, results, strict=True))


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
    from tieaudit.torch_session import Session

    session = Session(device)

    def open_(params: Params, arrays: Mapping[str, Array]) -> Answer:
        began = time.perf_counter()
        program = _load(params)
        seconds = time.perf_counter() - began
        handle, facts = session.hold(
            program.module, program.given, before_each=program.begin_again, named=program.named
        )
        loading: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        facts = {**facts, "handle": handle, "signature": params["signature"], "loading": loading}
        return {**facts, "seconds": seconds, "class": "torch.export.load"}, {}

    return session.verbs(open_)


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


RUNNER = Runner(
    name="torch_export",
    title="torch.export",
    formats=("torch_export",),
    packages=("torch",),
    extra="torch",
    start=_start,
)
