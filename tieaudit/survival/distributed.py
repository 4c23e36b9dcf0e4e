"""Wrapping for training on several processes: two of them on this machine's CPU, joined by gloo.

The module travels to them as a pickle that we write and that only they read; a class that cannot be imported there
(one of a notebook) cannot travel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.sandbox import child_environment, die_with_parent, how_it_ended
from tieaudit.survival.ties import NotRun, Operation, Outcome, Trial, judged, judged_module, tied_names

if TYPE_CHECKING:
    import torch

N_PROCESSES = 2
LIMIT_SECONDS = 180.0


def _on_processes(kind: str) -> Callable[[Trial], tuple[Outcome, str]]:
    def run(trial: Trial) -> tuple[Outcome, str]:
        import torch
        from torch import distributed

        if not distributed.is_available() or not distributed.is_gloo_available():
            raise NotRun("this build of torch has no gloo")
        if type(trial.module).__module__ == "__main__":
            raise NotRun("the class is defined in __main__, where no other process finds it")
        torch.save({"module": trial.twin(), "inputs": trial.inputs}, trial.folder / "module.pt")
        (trial.folder / "path.json").write_text(json.dumps(sys.path))
        children = [_started(kind, trial.folder, rank) for rank in range(N_PROCESSES)]
        try:
            answers = [_answer(child) for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        worst = next((one for one in answers if one[0] != "kept"), answers[0])
        return worst

    return run


def _started(kind: str, folder: Path, rank: int) -> subprocess.Popen[str]:
    code = "from tieaudit.survival.distributed import worker; worker()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, kind, str(folder), str(rank)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment(),
    )  # fmt: skip


def _answer(child: subprocess.Popen[str]) -> tuple[Outcome, str]:
    try:
        said, log = child.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return "error", f"it did not finish within {LIMIT_SECONDS:g} s"
    try:
        outcome, because = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        last = log.strip().splitlines()[-1][:200] if log.strip() else ""
        return "error", f"the process {how_it_ended(child.returncode)}: {last}"
    return outcome, because


def worker() -> None:
    """One of the processes. Started by this module's own command line only."""
    kind, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    die_with_parent()
    sys.path[:] = json.loads((folder / "path.json").read_text())
    import torch
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_PROCESSES)
    try:
        # written by the process that started this one; its pickle names the user's own class
        given = torch.load(folder / "module.pt", weights_only=False)
        answer = {"ddp": _ddp, "fsdp2": _fsdp2}[kind](given["module"], given["inputs"])
    except Exception as error:  # the library's answer
        answer = ("error", f"{type(error).__name__}: {' '.join(str(error).split())[:240]}")
    print(json.dumps(answer), flush=True)
    distributed.destroy_process_group()


def _ddp(module: torch.nn.Module, inputs: Any) -> tuple[Outcome, str]:
    from torch.nn.parallel import DistributedDataParallel

    trial = Trial(module, inputs, tied_names(module), Path())
    wrapped = DistributedDataParallel(module)
    said = _trained(wrapped, inputs)
    outcome, because = judged_module(trial, wrapped.module)
    return outcome, f"{because}; {said}"


def _fsdp2(module: torch.nn.Module, inputs: Any) -> tuple[Outcome, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ties = tied_names(module)
    fully_shard(module, mesh=init_device_mesh("cpu", (N_PROCESSES,)))
    said = _trained(module, inputs)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = tuple(tie for tie in ties if set(tie.names) <= set(parameters))
    outcome, because = judged(known, parameters, objects=True)
    return outcome, f"{because}; {said}"


def _trained(module: torch.nn.Module, inputs: Any) -> str:
    """One step of training, where there are inputs for it."""
    if inputs is None:
        return "wrapped only: without sample inputs no step was made"
    import torch

    from tieaudit.calling import call, tensors_of

    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    results = [one for one in tensors_of(call(module, inputs)).values() if one.requires_grad]
    torch.stack([one.float().square().mean() for one in results]).sum().backward()
    optimizer.step()
    return "after one step"


OPERATIONS = (
    Operation(
        "DistributedDataParallel (gloo, 2 processes)",
        _on_processes("ddp"),
        "tie before wrapping; never set a parameter of the module after it is wrapped",
    ),
    Operation(
        "fully_shard, FSDP2 (gloo, 2 processes)",
        _on_processes("fsdp2"),
        "shard the tied modules in one group (the root), and tie before sharding",
    ),
)
