"""Stage: a live module → which everyday operations break its ties. The module itself is never changed.

Every operation works on a copy of its own with the very same ties; what comes out is asked which names are one tensor.
A tie of one `Parameter` object is *kept* only as one object: names of one memory in separate objects are moved once
for each of them by an optimizer, which is another model.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.errors import UsageError
from tieaudit.survival.ties import NotRun, Operation, Outcome, Survival, Survived, Trial, tied_names

if TYPE_CHECKING:
    import torch

__all__ = ["Survival", "Survived", "operations", "survival"]


def operations() -> tuple[Operation, ...]:
    """All operations, in the order of the table."""
    from tieaudit.survival import distributed, exports, files, memory

    return (*memory.OPERATIONS, *files.OPERATIONS, *exports.OPERATIONS, *distributed.OPERATIONS)


def survival(module: torch.nn.Module, inputs: Any = None, *, only: Sequence[str] | None = None) -> Survival:
    """Try every operation, or those named in `only`, on copies of the module.

    `inputs`: sample inputs, which exports need, and without which distributed wrapping runs no step. UsageError for a
    module without ties, or for an unknown name. Cost: one copy of the module at a time; files go to a temporary folder;
    distributed wrapping starts two processes.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"expected an nn.Module, found a {type(module).__name__}")
    known = {one.name: one for one in operations()}
    if only is not None and (wrong := [name for name in only if name not in known]):
        raise UsageError(f"no operation is called {wrong[0]!r}", hint=f"one of: {', '.join(known)}")
    ties = tied_names(module)
    if not ties:
        raise UsageError(f"{type(module).__name__}: no tensor of this module has several names, so no tie can break")
    rows = [_tried(known[name], module, inputs, ties) for name in (known if only is None else only)]
    return Survival(tuple(one.names for one in ties), tuple(rows))


def _tried(operation: Operation, module: torch.nn.Module, inputs: Any, ties: Any) -> Survived:
    with tempfile.TemporaryDirectory(prefix="tieaudit-survival-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome: Outcome
        try:
            outcome, because = operation.run(Trial(module, inputs, ties, Path(folder)))
        except NotRun as reason:
            outcome, because = "not run", reason.message
        except Exception as error:  # what a library raises is the answer
            said = " ".join(str(error).split())[:240]
            outcome, because = "error", f"{type(error).__name__}: {said}"
    remedy = operation.remedy if outcome in ("lost", "error") else ""
    return Survived(operation.name, outcome, because, remedy)
