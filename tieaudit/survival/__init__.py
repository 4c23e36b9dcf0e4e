"""Stage: a live module → which everyday operations break its ties. The module itself is never changed.

Every operation works on a copy of its own with the very same ties; what comes out is asked which names are one tensor.
A tie of one `Parameter` object is *kept* only as one object: names of one memory in separate objects are moved once
for each of them by an optimizer, which is another model.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tieaudit.errors import UsageError
from tieaudit.survival.ties import NotRun, Operation, Outcome, Survival, Survived, TiedNames, Trial, said, tied_names

if TYPE_CHECKING:
    import torch

__all__ = ["Survival", "Survived", "operations", "survival"]
LIMIT_SECONDS = 300.0
"""For one operation."""


def operations() -> tuple[Operation, ...]:
    """All operations, in the order of the table."""
    from tieaudit.survival import distributed, exports, files, memory

    return (*memory.OPERATIONS, *files.OPERATIONS, *exports.OPERATIONS, *distributed.OPERATIONS)


def survival(
    module: torch.nn.Module, inputs: Any = None, *, only: Sequence[str] | None = None, seconds: float = LIMIT_SECONDS
) -> Survival:
    """Try every operation, or those named in `only`, on copies of the module.

    `inputs`: sample inputs, which exports need, and without which distributed wrapping runs no step. UsageError for a
    module without ties, or for an unknown name. `seconds`: the most that one operation may take, where the system can
    interrupt this thread. Cost: one copy of the module at a time; files go to a temporary folder; distributed wrapping
    starts two processes.
    """
    ties = ties_of(module)
    rows = tuple(tried(one, module, inputs, ties, seconds) for one in chosen(only))
    return Survival(tuple(one.names for one in ties), rows)


def chosen(only: Sequence[str] | None) -> list[Operation]:
    """The operations of these names, or all that this machine can try. UsageError for an unknown name."""
    known = {one.name: one for one in operations()}
    if only is None:
        return [one for one in known.values() if one.here()]
    if wrong := [name for name in only if name not in known]:
        raise UsageError(f"no operation is called {wrong[0]!r}", hint=f"one of: {', '.join(known)}")
    return [known[name] for name in only]


def ties_of(module: torch.nn.Module) -> tuple[TiedNames, ...]:
    """The ties that operations could break. UsageError if there are none."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"expected an nn.Module, found a {type(module).__name__}")
    ties = tied_names(module)
    if not ties:
        raise UsageError(
            f"{type(module).__name__}: no tensor of this module has several names, so no tie can break",
            hint="a module that is called several times shares its weights without names: nothing parts them",
        )
    return ties


def tried(
    operation: Operation, module: torch.nn.Module, inputs: Any, ties: tuple[TiedNames, ...], seconds: float
) -> Survived:
    """One row of the table, whatever the operation raises."""
    outcome: Outcome
    with tempfile.TemporaryDirectory(prefix="tieaudit-survival-") as folder, _quiet():
        try:
            with _limited(seconds):
                outcome, because = operation.run(Trial(module, inputs, ties, Path(folder)))
        except NotRun as reason:
            outcome, because = "not run", reason.message
        except (Exception, SystemExit, _TookTooLong) as error:  # what a library or a module raises is the answer
            outcome, because = "error", said(error)
    return row(operation, outcome, because)


def row(operation: Operation, outcome: Outcome, because: str) -> Survived:
    """A row with its remedy."""
    remedy = {"lost": operation.remedy, "error": operation.on_error}.get(outcome, "")
    return Survived(operation.name, outcome, because, remedy)


class _TookTooLong(BaseException):
    """Not an Exception, so that no library takes it for a fault of its own and goes on."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer. Only the main thread of a Unix process can be, and nobody else's timer is taken."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TookTooLong(late(seconds))

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def late(seconds: float) -> str:
    """What is said of an operation that took too long."""
    return f"it did not finish within {seconds:g} s"


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn and log about what they lack; what matters of it is in the row."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
