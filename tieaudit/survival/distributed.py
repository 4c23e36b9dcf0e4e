"""Wrapping for training on several processes: two of them on this machine's CPU, joined by gloo.

The module travels to them as a pickle that we write and that only they read; a class that cannot be imported there
(one of a notebook) cannot travel.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.sandbox import child_environment, die_with_parent, how_it_ended
from tieaudit.survival.ties import NotRun, Operation, Outcome, Trial, judged, judged_module, said, tied_names
from tieaudit.survival.travelling import pack, unpack

if TYPE_CHECKING:
    import torch

N_PROCESSES = 2
LIMIT_SECONDS = 180.0
GRACE_SECONDS = 5.0
"""For the others once one process has failed."""


def _on_processes(kind: str) -> Callable[[Trial], tuple[Outcome, str]]:
    def run(trial: Trial) -> tuple[Outcome, str]:
        from torch import distributed

        if not distributed.is_available() or not distributed.is_gloo_available():
            raise NotRun("this build of torch has no gloo")
        if type(trial.module).__module__ == "__main__":
            raise NotRun("the class is defined in __main__, where no other process finds it")
        inputs = None
        with suppress(NotRun):  # then it is wrapped only
            inputs = trial.sample()
        try:
            pack({"module": trial.module, "inputs": inputs}, trial.folder / "module.pt")
        except Exception as error:  # whatever a class raises that cannot be pickled
            raise NotRun(f"this module cannot travel to other processes: {said(error)}") from error
        (trial.folder / "path.json").write_text(json.dumps(sys.path))
        children = [_started(kind, trial.folder, rank) for rank in range(N_PROCESSES)]
        try:
            _wait(children)
        finally:
            for child in children:
                child.kill()
        answers = [_answer(child, trial.folder / f"log{rank}") for rank, child in enumerate(children)]
        return next((one for one in answers if one[0] != "kept"), answers[0])

    return run


def _started(kind: str, folder: Path, rank: int) -> subprocess.Popen[str]:
    code = "from tieaudit.survival.distributed import worker; worker()"
    with (folder / f"log{rank}").open("wb") as log:  # a pipe that nobody reads in time would hold the process up
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, kind, str(folder), str(rank)],
            stdout=subprocess.PIPE, stderr=log, text=True, env=child_environment(),
        )  # fmt: skip


def _wait(children: Sequence[subprocess.Popen[str]]) -> None:
    """Until all have ended, or one has failed and the others, who wait for it, had time to notice."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end and any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            end = min(end, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)


def _answer(child: subprocess.Popen[str], log: Path) -> tuple[Outcome, str]:
    printed, _ = child.communicate()
    try:
        outcome, because = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        if child.returncode == -signal.SIGKILL:  # by us, unless the system had no memory left
            return "error", f"it did not finish within {LIMIT_SECONDS:g} s, or waited for a process that had failed"
        lines = log.read_text(errors="replace").strip().splitlines()
        return "error", f"the process {how_it_ended(child.returncode)}" + (f": {lines[-1][:200]}" if lines else "")
    return outcome, because


def worker() -> None:
    """One of the processes. Started by this module's own command line only."""
    kind, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the module prints
    die_with_parent()
    sys.path[:] = json.loads((folder / "path.json").read_text())
    from torch import distributed

    answer: tuple[Outcome, str]
    try:
        module, inputs = _arrived(folder / "module.pt")
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=N_PROCESSES)
        answer = {"ddp": _ddp, "fsdp2": _fsdp2}[kind](module, inputs)
    except NotRun as reason:
        answer = ("not run", reason.message)
    except (Exception, SystemExit) as error:  # the library's answer, or the module's
        answer = ("error", said(error))
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    if answer[0] == "kept" and distributed.is_initialized():
        distributed.destroy_process_group()
    os._exit(0 if answer[0] == "kept" else 1)  # the others need not wait, and nothing is left to be tidied up


def _arrived(file: Path) -> tuple[Any, Any]:
    """What the process that started this one wrote."""
    try:
        given = unpack(file)
    except Exception as error:  # a class that can only be found there
        raise NotRun(f"this module cannot travel to other processes: {said(error)}") from error
    return given["module"], given["inputs"]


def _ddp(module: torch.nn.Module, inputs: Any) -> tuple[Outcome, str]:
    from torch.nn.parallel import DistributedDataParallel

    trial = Trial(module, inputs, tied_names(module), Path())
    wrapped = DistributedDataParallel(module)
    step = _trained(wrapped, inputs)
    outcome, because = judged_module(trial, wrapped.module)
    return outcome, f"{because}; {step}"


def _fsdp2(module: torch.nn.Module, inputs: Any) -> tuple[Outcome, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ties = tied_names(module)
    fully_shard(module, mesh=init_device_mesh("cpu", (N_PROCESSES,)))
    step = _trained(module, inputs)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = tuple(tie for tie in ties if set(tie.names) <= set(parameters))
    if not known:
        raise NotRun("no tie of parameters: buffers are not sharded")
    outcome, because = judged(known, parameters, objects=True)
    return outcome, f"{because}; {step}"


def _trained(module: torch.nn.Module, inputs: Any) -> str:
    """One step of training, where there are inputs for it and something that learns."""
    if inputs is None:
        return "wrapped only: without sample inputs no step was made"
    import torch

    from tieaudit.calling import call, tensors_of

    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    results = [one for one in tensors_of(call(module, inputs)).values() if one.requires_grad]
    if not results:
        return "no step was made: no output depends on a parameter that learns"
    torch.stack([one.abs().float().square().mean() for one in results]).sum().backward()
    optimizer.step()
    return "after one step"


OPERATIONS = (
    Operation(
        "DistributedDataParallel (gloo, 2 processes)",
        _on_processes("ddp"),
        "tie before wrapping; never set a parameter of the module after it is wrapped",
        "wrap a module of plain dense tensors of which at least one learns, and whose every parameter a step uses",
    ),
    Operation(
        "fully_shard, FSDP2 (gloo, 2 processes)",
        _on_processes("fsdp2"),
        "shard the tied modules in one group (the root), and tie before sharding",
        "shard a module of plain dense tensors, and shard tied modules in one group (the root)",
    ),
)
