"""What the ways of verifying have in common: the children that run models, and levels made of what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tieaudit.change import Level
from tieaudit.end_to_end import Compared
from tieaudit.printable import counted, listed
from tieaudit.runners import Runner
from tieaudit.sandbox import ChildFailed, Sandbox

if TYPE_CHECKING:
    from tieaudit.backward import Across


def label(device: str, name: str) -> str:
    """How a device is called in a level: `CPU`, `CUDA (NVIDIA …)`."""
    return {"cpu": "CPU", "cuda": f"CUDA ({name})"}.get(device, name)


class Children:
    """One child per runner and device, started when first asked for and ended together. A context manager."""

    def __init__(self, seconds: float, memory_bytes: int | None) -> None:
        self._limits = (seconds, memory_bytes)
        self._known: dict[tuple[str, str], Sandbox] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def __call__(self, runner: Runner, device: str) -> Sandbox:
        """The child of this runner on this device."""
        key = (runner.name, device)
        if key not in self._known:
            seconds, memory_bytes = self._limits
            box = Sandbox(runner, device, seconds=seconds, memory_bytes=memory_bytes)
            self._known[key] = self._stack.enter_context(box)
        return self._known[key]

    def facts(self) -> dict[str, Any]:
        """Versions of the libraries in the children that run, and operations that ran without a deterministic form."""
        facts: dict[str, Any] = {}
        noted: set[str] = set()
        for box in self._known.values():
            if not box.alive:
                continue
            try:
                told, _ = box.ask("hello")
            except ChildFailed:
                continue
            facts.update(told["versions"])
            noted.update(told.get("not_deterministic", ()))
        return {**facts, "not_deterministic": sorted(noted)} if noted else facts


def level_of(results: Sequence[tuple[str, str, Compared]]) -> Level:
    """One level from all parts and devices: failed if one failed, held if one held."""
    for outcome in ("failed", "held", "not run"):
        chosen = [(part, label, one) for part, label, one in results if one.outcome == outcome]
        if chosen:
            break
    said = [f"{part}: {one.because}" if part else one.because for part, _, one in chosen]
    if outcome == "held":
        said += [
            f"not run on {label}{f' ({part})' if part else ''}: {one.because}"
            for part, label, one in results
            if one.outcome != "held"
        ]
    measured = [one for _, _, one in chosen if one.found is not None]
    worst = max(measured, key=lambda one: _ratio(one), default=None)
    devices = ", ".join(dict.fromkeys(label for _, label, one in chosen if one.outcome != "not run"))
    difference = worst.found.relative if worst is not None and worst.found is not None else None
    because = "; ".join(dict.fromkeys(said))
    limit = worst.limit if worst is not None else None
    if outcome == "held":
        return Level("end to end", "held", because, difference, limit, devices)
    if outcome == "failed":
        return Level("end to end", "failed", because, difference, limit, devices)
    return Level("end to end", "not run", because)


def _ratio(one: Compared) -> float:
    return one.found.relative / max(one.limit, 1e-300) if one.found is not None else 0.0


def training_level(found: Across, device: str) -> Level:
    """Training parity of two modules as a level. Not run where no gradient could be compared."""
    summed = found.summed
    if not summed:
        return Level("training", "not run", "no parameter of one is trained under a name that the other has")
    wrong = [one for one in summed if one.difference > found.limit]
    worst = max(summed, key=lambda one: one.difference)
    ties = [one for one in summed if one.n_separate > 1]
    said = f"gradients of {counted(len(summed), 'parameter')} in float64"
    if ties:
        said += f", {len(ties)} of them the sum over the slots of a tie"
    for one in [one for one in ties if len(one.reached) < 2][:2]:
        cut = tuple(name for name in one.slots if name not in (*one.reached, *one.unread))
        if not cut:
            said += f"; no operation reads {listed(one.unread)}"
            continue
        said += f"; nothing is learnt through {listed(cut)}, so that the sum of {one.name} proves nothing"
    if found.left:
        said += f"; without a partner: {listed(found.left)}"
    if wrong:
        return Level(
            "training", "failed", f"{listed(tuple(one.name for one in wrong))}: another gradient; {said}",
            worst.difference, found.limit, device,
        )  # fmt: skip
    return Level("training", "held", said, worst.difference, found.limit, device)
