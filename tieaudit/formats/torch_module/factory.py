"""`package.module:factory` on the command line: the user's own code builds the module in a child process.

Naming the factory is asking for its code to be run; it runs apart, so that what it prints, leaks or breaks is its own
affair, and under a limit of time. The child keeps the module and reads its tensors block by block when asked: nothing
is copied whole. Protocol: one JSON line a question; one JSON line and `n_bytes` raw bytes an answer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieaudit.errors import MissingPackage, UnreadableModel
from tieaudit.model import Declaration, Model, Part, Use, Weight
from tieaudit.storage import Region
from tieaudit.view import AS_STORED, Transpose, View

LIMIT_SECONDS = 600.0
"""For one answer; building the module and tracing it is the first one."""
# -P: the folder we stand in comes first only after torch and tieaudit are imported
COMMAND = (sys.executable, "-P", "-c", "from tieaudit.formats.torch_module.answer import main; main()")


class _Ended(UnreadableModel):
    """The child ended instead of answering."""


class Builder:
    """A child process that has built one module and answers questions about it."""

    def __init__(self, name: str, *, seconds: float = LIMIT_SECONDS) -> None:
        self.name = name
        self.seconds = seconds
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        home = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
        self._child = subprocess.Popen(
            (*COMMAND, name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The answer and its bytes. UnreadableModel with the factory's own error, or with how the process ended."""
        assert self._child.stdin is not None and self._child.stdout is not None  # both are pipes
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._child.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended early: what it left behind says why
                self._child.stdin.write(json.dumps(question).encode() + b"\n")
                self._child.stdin.flush()
            line = self._child.stdout.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
            data = self._child.stdout.read(int(answer.get("n_bytes", 0))) if answer else b""
        finally:
            timer.cancel()
        if answer is None or len(data) != int(answer.get("n_bytes", 0)):
            raise _Ended(f"{self.name}: {self._how_it_ended(late.is_set())}")
        if "error" in answer:
            raise UnreadableModel(f"{self.name}: {answer['error']}", hint=answer.get("hint", ""))
        return answer, data

    def close(self) -> None:
        """End the child. Safe to call twice."""
        self._child.kill()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            with contextlib.suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()
        self._child.wait()

    def _how_it_ended(self, late: bool) -> str:
        if late:
            return f"the factory took more than {self.seconds:g} s"
        code = self._child.wait()
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip().splitlines()
        last = f": {said[-1][:300]}" if said else ""
        return f"the process that ran the factory ended with exit code {code}{last}"


@dataclass(frozen=True)
class DistantStorage:
    """A tensor in the child that built the module."""

    name: str
    """The factory, which names the child."""
    index: int
    region: Region
    n_bytes: int
    strides: tuple[int, ...] | None = None
    no_values: str = ""

    def read_ranges(self, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
        """UnreadableModel where there are no values, or no such child any more."""
        wanted = [list(one) for one in ranges]
        builder = _builders.get(self.name)
        if builder is None:
            raise UnreadableModel(f"{self.name}: the process that holds this module has ended")
        _, data = builder.ask({"read": self.index, "ranges": wanted})
        found, begin = [], 0
        for _, length in wanted:
            found.append(data[begin : begin + length])
            begin += length
        return found


_builders: dict[str, Builder] = {}


def _close_all() -> None:
    while _builders:
        _builders.popitem()[1].close()


def load(name: str, inputs: Path | None = None) -> Model:
    """The module that `package.module:factory` makes. UnreadableModel in one line if it makes none.

    The attribute is a module, or a callable without arguments that returns a module or a pair of a module and sample
    inputs (a tuple, or a dict of keyword arguments), from which the uses then come. `inputs`: an .npz that takes their
    place, with an array for each argument by its name, or in order where numpy named them itself (`arr_0` …).
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingPackage("torch", "torch", f"{name}: building a PyTorch module")
    if not _builders:
        atexit.register(_close_all)
    if name in _builders:
        _builders.pop(name).close()
    question = {"describe": name, "inputs": str(inputs.absolute()) if inputs is not None else ""}
    notes: tuple[str, ...] = ()
    try:
        answer = _asked(name, question)
    except _Ended as ended:  # its forward may have done that, which nobody asked for
        try:
            answer = _asked(name, {**question, "untraced": True})
        except _Ended:
            raise ended from None
        notes = (f"its forward was tried to see who uses what: {ended.message}; nothing was traced then",)
    return Model(
        path=name,
        format="torch_module",
        parts=(Part("", ()),),
        weights=tuple(_weight(name, index, row) for index, row in enumerate(answer["weights"])),
        uses=tuple(_use(row) for row in answer["uses"]),
        declarations=tuple(_declaration(row) for row in answer["declarations"]),
        hints=answer["hints"],
        metadata=answer["metadata"],
        notes=(*notes, *answer["notes"]),
    )


def _asked(name: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """What a new child says of the module; the child is kept, for its tensors. UnreadableModel."""
    builder = Builder(name)
    try:
        answer, _ = builder.ask(question)
    except BaseException:
        builder.close()
        raise
    _builders[name] = builder
    return answer


def _weight(name: str, index: int, row: Mapping[str, Any]) -> Weight:
    where, begin, end = row["region"]
    strides = tuple(row["strides"]) if row["strides"] is not None else None
    storage = DistantStorage(name, index, (where, begin, end), row["n_bytes"], strides, row["no_values"])
    return Weight(
        row["id"], row["name"], tuple(row["shape"]), row["dtype"], storage, parameter=row["parameter"],
        because=row["because"],
    )  # fmt: skip


def _declaration(row: Mapping[str, Any]) -> Declaration:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Declaration(**fields)


def _use(row: Mapping[str, Any]) -> Use:
    view = View(tuple(Transpose(tuple(perm)) for perm in row["perms"])) if row["perms"] else AS_STORED
    return Use(
        row["weight"], row["op"], row["node"], row["slot"], view, chain=tuple(row["chain"]),
        transposes=bool(row["perms"]), call=tuple(row["call"]),
    )  # fmt: skip
