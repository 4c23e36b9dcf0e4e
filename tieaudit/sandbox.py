"""A child process that runs models for us, with limits. A runtime that crashes there is a result, not our crash.

Parent and child speak in JSON lines over the child's standard streams; arrays travel as .npz files in a temporary
folder (never pickled). One child serves many requests, so that a slow import is paid once.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

from tieaudit.dtypes import dtype
from tieaudit.errors import TieAuditError
from tieaudit.registry import choose, discover
from tieaudit.runners import Array, Runner

Failure = Literal["crashed", "timed out", "out of memory", "error"]
LIMIT_SECONDS = 300.0
"""Default time for one request."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_TAIL_BYTES = 4000


class ChildFailed(TieAuditError):
    """A request to a child process has no answer; `kind` says what happened to it."""

    def __init__(self, message: str, kind: Failure, log: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.log = log
        """The end of what the child printed."""


class Sandbox:
    """One child process for one runner and one device; started by the first request, restarted after a crash.

    Use it as a context manager. `memory_bytes` limits the child's private memory: by default to what the machine has
    free when the child starts, so that it fails before the system does; 0 is no limit. Ignored for CUDA, whose driver
    reserves address space far beyond it.
    """

    def __init__(
        self, runner: Runner, device: str = "cpu", *, seconds: float = LIMIT_SECONDS, memory_bytes: int | None = None
    ) -> None:
        self.runner = runner
        self.device = device
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self.generation = 0
        """Counts the children started: handles of an earlier generation are gone."""
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether a child is running, so that what it opened is still there."""
        return self._child is not None and self._child.poll() is None

    def close(self) -> None:
        """End the child and remove the temporary folder. Safe to call twice."""
        self._stop()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def ask(
        self,
        verb: str,
        params: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Array] | None = None,
        *,
        seconds: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The child's answer. ChildFailed if it crashed, took too long, ran out of memory or raised."""
        child = self._running()
        folder = self._place()
        request: dict[str, Any] = {"verb": verb, "params": dict(params or {}), "reply": str(folder / "reply.npz")}
        if arrays:
            request["arrays"] = pack(arrays, folder / "request.npz")
            request["file"] = str(folder / "request.npz")
        limit = self.seconds if seconds is None else seconds
        try:
            _pipe(child.stdin).write(json.dumps(request) + "\n")
            _pipe(child.stdin).flush()
            line = self._lines.get(timeout=limit)
        except BrokenPipeError:
            line = None
        except queue.Empty:
            log = self._stop()
            raise ChildFailed(f"{self.runner.title} did not finish within {limit:g} s", "timed out", log) from None
        if line is None:
            raise self._crash(child)
        return self._answer(json.loads(line), folder)

    def _answer(self, reply: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
        if not reply["ok"]:
            kind: Failure = "out of memory" if reply["memory"] else "error"
            raise ChildFailed(f"{self.runner.title}: {reply['error']}", kind)
        arrays = unpack(folder / "reply.npz", reply["arrays"]) if reply["arrays"] else {}
        return reply["value"], arrays

    def _running(self) -> subprocess.Popen[str]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._stop()
        arguments = [
            self.runner.name,
            self.device,
            str(_free_bytes() if self.memory_bytes is None else self.memory_bytes),
        ]
        with (self._place() / "log").open("wb") as log:
            # -P: a file called torch.py in the user's folder must not be imported
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", "from tieaudit.sandbox import serve; serve()", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**child_environment(), **_OFFLINE},
                text=True,
                encoding="utf-8",
            )
        self._lines = queue.Queue()
        threading.Thread(target=_listen, args=(_pipe(self._child.stdout), self._lines), daemon=True).start()
        self.generation += 1
        return self._child

    def _place(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tieaudit-run-")
        return Path(self._folder.name)

    def _stop(self) -> str:
        """End the child if there is one; the end of its log."""
        child, self._child = self._child, None
        if child is None:
            return ""
        child.kill()  # it holds nothing that would want an orderly end
        child.wait()
        with contextlib.suppress(OSError):
            _pipe(child.stdin).close()
        return self._log()

    def _log(self) -> str:
        with contextlib.suppress(OSError), (self._place() / "log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace").strip()
        return ""

    def _crash(self, child: subprocess.Popen[str]) -> ChildFailed:
        code = child.wait()
        log = self._stop()
        title = self.runner.title
        if code < 0:
            return ChildFailed(f"{title} {how_it_ended(code)}", "crashed", log)
        last = log.splitlines()[-1] if log else "it printed nothing"
        return ChildFailed(f"{title} ended with exit code {code}: {last}", "crashed", log)


def child_environment() -> dict[str, str]:
    """The variables of a process that is to import this very package."""
    home = str(Path(__file__).resolve().parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def how_it_ended(code: int) -> str:
    """What an exit code of a child says, as the end of a sentence."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    hint = ": the system may have run out of memory" if name == "SIGKILL" else ""
    return f"crashed with signal {name}{hint}"


def _free_bytes() -> int:
    """Memory that the system could still give, 0 if it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return 0


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise BrokenPipeError("the child has no such stream")
    return stream


def _listen(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
    stream.close()


def pack(arrays: Mapping[str, Array], path: Path) -> list[list[str]]:
    """Write arrays as .npz under numbers; the (name, element type) of each number. No objects: strings as unicode."""
    plain: dict[str, Array] = {}
    names: list[list[str]] = []
    for index, (name, array) in enumerate(arrays.items()):
        kind = array.dtype.name
        if array.dtype.kind == "O":
            array, kind = np.array(array, dtype=str), "string"
        elif array.dtype.kind == "U":
            kind = "string"
        elif array.dtype.type.__module__ == "ml_dtypes":
            array = np.ascontiguousarray(array).view(f"uint{array.dtype.itemsize * 8}")
        plain[str(index)] = array
        names.append([name, kind])
    np.savez(path, **plain)  # type: ignore[arg-type]
    return names


def unpack(path: Path, names: list[list[str]]) -> dict[str, Array]:
    """What `pack` wrote."""
    found: dict[str, Array] = {}
    with np.load(path, allow_pickle=False) as file:
        for index, (name, kind) in enumerate(names):
            array = file[str(index)]
            if kind != "string" and array.dtype.name != kind:
                array = array.view(dtype(kind).numpy())
            found[name] = array
    return found


def serve() -> None:
    """The child: answer requests until standard input ends. Called by the parent's command line only."""
    name, device, memory_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # what the runtime prints to standard output must not end up between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    die_with_parent()
    if memory_bytes and device == "cpu":
        _limit_memory(memory_bytes)
    verbs = choose(discover("runners", Runner), name, "runner").start(device)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_handle(verbs, request)) + "\n")
        answers.flush()


def _handle(verbs: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arrays = unpack(Path(request["file"]), request["arrays"]) if "arrays" in request else {}
        value, results = verbs[request["verb"]](request["params"], arrays)
        names = pack(results, Path(request["reply"])) if results else []
        return {"ok": True, "value": value, "arrays": names}
    except Exception as error:  # whatever a runtime raises is the answer
        text = " ".join(str(error).split()) or type(error).__name__
        memory = isinstance(error, MemoryError) or any(
            sign in text.lower()
            for sign in ("bad allocation", "bad_alloc", "failed to allocate memory", "out of memory")
        )
        return {"ok": False, "error": text[:1500], "memory": memory}


def die_with_parent(*, in_order: bool = False) -> None:
    """Linux: a parent that is killed takes this process with it, even in the middle of a run.

    `in_order`: by SIGTERM, which unwinds the stack where it is handled.
    """
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, int(signal.SIGTERM if in_order else signal.SIGKILL))  # PR_SET_PDEATHSIG


def _limit_memory(n_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system
        return
    # RLIMIT_DATA and not RLIMIT_AS: address space that is only reserved (arenas, mapped weight files) costs nothing
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
