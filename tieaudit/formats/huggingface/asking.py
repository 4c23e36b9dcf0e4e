"""The parent's side of `ask.py`: one long-lived child process, limited in time and memory, restarted when it fails."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60.0
"""For one question, the import of transformers included."""
MEMORY_BYTES = 24 * 2**30
"""Address space of the child; torch alone maps some 5 GB of it."""
COMMAND = (sys.executable, "-P", "-m", "tieaudit.formats.huggingface.ask")
"""-P: a model folder that somebody stands in may hold a transformers.py of its own."""


def installed() -> bool:
    """Whether transformers and torch are there to be asked; imports neither."""
    return all(importlib.util.find_spec(package) is not None for package in ("transformers", "torch"))


class Asker:
    """A child process that answers questions about model classes, one at a time."""

    def __init__(self, command: tuple[str, ...] = COMMAND, timeout: float = TIMEOUT_SECONDS):
        self.command = command
        self.timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, or {"error": why there is none}. Never raises for what the child does."""
        try:
            child = self._running()
            line = self._exchange(child, json.dumps(question).encode() + b"\n")
            answer = json.loads(line)
            if not isinstance(answer, dict):
                raise ValueError("the answer is not an object")
        except (OSError, ValueError, TimeoutError, EOFError) as error:
            self.close()
            return {"error": str(error) or type(error).__name__}
        return answer

    def close(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes of a question that nobody will read
                    stream.close()
        child.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                bufsize=0,
                preexec_fn=_limit_memory,
            )
        return self._child

    def _exchange(self, child: subprocess.Popen[bytes], question: bytes) -> bytes:
        """Send one line and read one, both within the time limit: a child that reads nothing must not block us."""
        assert child.stdin is not None and child.stdout is not None  # both are pipes
        deadline = time.monotonic() + self.timeout
        received, rest = bytearray(), memoryview(question)
        os.set_blocking(child.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            selector.register(child.stdin, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TimeoutError(f"no answer about the model class within {self.timeout:.0f} s")
                for key, _ in events:
                    if key.fileobj is child.stdin:
                        rest = rest[os.write(child.stdin.fileno(), rest[:65536]) :]
                        if not rest:
                            selector.unregister(child.stdin)
                    elif block := os.read(child.stdout.fileno(), 1 << 20):
                        received += block
                    else:
                        raise EOFError("the process that was asked about the model class ended without an answer")
        return bytes(received)


def _environment() -> dict[str, str]:
    """No network, no GPU, and the same tieaudit as ours."""
    package_root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH", ""))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


_shared: list[Asker] = []


def ask_class(
    config: Mapping[str, Any], architecture: str, shapes: Mapping[str, tuple[int, ...]], about: str = "ties"
) -> dict[str, Any]:
    """Ask the installed class through the one child of this process. {"error": …} where there is no answer.

    `about`: its ties, names and parameters, or the settings that count key and value `heads`.
    """
    if not installed():
        return {"error": "transformers is not installed"}
    if not _shared:
        _shared.append(Asker())
        atexit.register(_shared[0].close)
    question = {"config": config, "architecture": architecture, "shapes": {k: list(v) for k, v in shapes.items()}}
    return _shared[0].ask({**question, "about": about})
