"""The proof of a rewrite in a process of its own: what it needs is not the writer's, and its end is a result.

The request travels pickled over a pipe that nobody else can write to (locators of bytes, never tensors); the answers
are JSON lines, one per finished level. Whatever kills that process, what it had proved until then counts, and the rest
is *not run*.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from tieaudit import errors
from tieaudit.change import Level, Plan, Proof, Written
from tieaudit.errors import TieAuditError, in_one_line
from tieaudit.model import Model
from tieaudit.runners import Array
from tieaudit.sandbox import child_environment, die_with_parent, how_it_ended
from tieaudit.verify import LEVELS, prove

# -P: a file called numpy.py in the user's folder must not be imported
COMMAND = (sys.executable, "-P", "-c", "from tieaudit.proving import serve; serve()")
TRACEBACK_VARIABLE = "TIEAUDIT_TRACEBACK"
_SECONDS_TO_END = 5.0
"""How long an interrupted proof may tidy up before it is killed."""


@dataclass(frozen=True)
class Request:
    """What is to be proved."""

    before: Model
    after: Model
    plan: Plan
    written: Written
    device: str = "auto"
    inputs: Mapping[str, Array] | None = None
    max_drift: float | None = None


def prove_apart(request: Request) -> Proof:
    """`verify.prove` in another process. Raises what that raises.

    Where the process is killed or runs out of memory, the levels that it had not finished are *not run*, with the
    reason. Facts: `n_bytes_peak_verifying` of that process, `n_bytes_peak_running` of the largest one that ran models.
    """
    levels: list[Level] = []
    with tempfile.TemporaryDirectory(prefix="tieaudit-verify-") as place, _child(Path(place)) as child:
        with suppress(BrokenPipeError):  # it ended early: its exit code says why
            pickle.dump(request, _pipe(child.stdin))
            _pipe(child.stdin).close()
        for line in _pipe(child.stdout):
            if not line.endswith(b"\n"):  # it was killed while it wrote
                continue
            answer = json.loads(line)
            if "proof" in answer:
                return _proof(answer["proof"])
            if "error" in answer:
                if answer["error"]["kind"] == "MemoryError":
                    break
                raise _error(**answer["error"])
            levels.append(Level(**answer["level"]))
        else:
            return _cut_short(levels, f"the process that verifies {how_it_ended(child.wait())}")
    return _cut_short(levels, "the process that verifies ran out of memory")


@contextmanager
def _child(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, ended when the block is left; all its temporary files lie in `place`."""
    environment = {**child_environment(), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(place))}
    log = None if TRACEBACK_VARIABLE in os.environ else subprocess.DEVNULL
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment)
    try:
        yield child
    finally:
        with suppress(OSError):
            _pipe(child.stdin).close()
        if child.poll() is None:
            child.terminate()  # in order: not every system ends the processes that it started with it
            try:
                child.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        _pipe(child.stdout).close()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise BrokenPipeError("the process has no such stream")
    return stream


def _cut_short(levels: list[Level], because: str) -> Proof:
    """What was proved before the process ended."""
    known = {level.name for level in levels}
    return Proof((*levels, *(Level(name, "not run", because) for name in LEVELS if name not in known)))


def _proof(answer: Mapping[str, Any]) -> Proof:
    levels = tuple(Level(**level) for level in answer["levels"])
    return Proof(levels, tuple(answer["not_exercised"]), answer["drift"], answer["facts"])


def _error(kind: str, message: str, hint: str) -> TieAuditError:
    made = getattr(errors, kind, TieAuditError)
    if not issubclass(made, TieAuditError) or made.__init__ is not TieAuditError.__init__:
        made = TieAuditError
    found: TieAuditError = made(message, hint=hint)
    return found


def serve() -> None:
    """The process that verifies: one request from standard input, answers to standard output."""
    # what a library prints must not end up between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells us too, but the writer decides
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    die_with_parent(in_order=True)

    def answer(**content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    request: Request = pickle.load(sys.stdin.buffer)
    try:
        proof = prove(
            request.before,
            request.after,
            request.plan,
            request.written,
            device=request.device,
            inputs=request.inputs,
            max_drift=request.max_drift,
            reached=lambda level: answer(level=asdict(level)),
        )
    except MemoryError:
        answer(error={"kind": "MemoryError", "message": "", "hint": ""})
    except Exception as error:
        if TRACEBACK_VARIABLE in os.environ:
            raise
        said = in_one_line(error, request.before.path)
        answer(error={"kind": type(said).__name__, "message": said.message, "hint": said.hint})
    else:
        answer(proof=asdict(with_peaks(proof)))


def with_peaks(proof: Proof) -> Proof:
    """The proof with the peak memory of this process and of the largest of its children that have ended."""
    peaks = {"n_bytes_peak_verifying": peak_bytes(), "n_bytes_peak_running": _peak_bytes_of_children()}
    return replace(proof, facts={**proof.facts, **{name: value for name, value in peaks.items() if value}})


def peak_bytes() -> int | None:
    """The most physical memory that this process has had, mapped files included; None where the system does not say.

    Linux: VmHWM and not ru_maxrss, which is inherited from whoever started the process.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        return _usage(children=False)


def _peak_bytes_of_children() -> int | None:
    return _usage(children=True)


def _usage(*, children: bool) -> int | None:
    try:
        import resource
    except ImportError:  # not on this system
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
