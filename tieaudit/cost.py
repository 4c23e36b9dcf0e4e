"""What both models cost beside each other: bytes stored, as the runtime optimises them, resident, and time per run."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tieaudit.inputs import Feed
from tieaudit.model import Model, Weight
from tieaudit.running import Paths, opened, path_of
from tieaudit.sandbox import ChildFailed, Sandbox
from tieaudit.storage import FileStorage

N_RUNS = 3
SECONDS_OF_RUNS = 0.1
"""Of one round: at least so many runs, and at least so long."""
N_ROUNDS = 3
LEAST_DIFFERENCE = 0.1
"""Part of the time by which two must differ to be called different: on a machine that does other things as well, runs
of the very same model may differ by some percent."""
N_MOST_BYTES_AT_ONCE = 1 << 30
_N_MOST_WATCHED = 8


def stored_bytes(model: Model) -> int:
    """Bytes of all weights, each region once."""
    return sum({w.storage.region: w.n_bytes for w in model.weights if w.storage is not None}.values())


def of_part(
    before: Model, after: Model, part: str, served: Sequence[str], feed: Feed, sandbox: Sandbox
) -> dict[str, Any]:
    """Facts of one part on one device, for the report; what could not be measured is missing.

    `served` are ids of tied weights in `after`: the runtime's own optimised model is searched for second copies.
    """
    facts: dict[str, Any] = {}
    for side, model in (("before", before), ("after", after)):
        watch = _watched(model, served) if side == "after" else {}
        if model.format == "onnx":
            facts.update({f"{key}_{side}": value for key, value in _optimised(model, part, watch, sandbox).items()})
    runs = [measuring(path_of(model, part), feed, sandbox) for model in (before, after)]
    facts.update(alternated(runs[0], runs[1], stored_bytes(before) + stored_bytes(after)))
    copies = facts.pop("copies_after", {})
    facts.pop("copies_before", None)
    if copies:
        apart = sorted(id for id, (same, _) in copies.items() if same > 1)
        wider = sorted(id for id, (_, wide) in copies.items() if wide)
        facts["folded_apart_by_the_runtime"] = ", ".join(apart) if apart else "no"
        if wider:
            facts["held_in_a_wider_type_by_the_runtime"] = ", ".join(wider)
    return facts


def _watched(model: Model, served: Sequence[str]) -> dict[str, list[Any]]:
    weights = [model.by_id[id] for id in served if id in model.by_id]
    weights.sort(key=lambda weight: -weight.n_bytes)
    return {weight.id: _place(weight, weight.storage) for weight in weights[:_N_MOST_WATCHED] if _is_matrix(weight)}


def _is_matrix(weight: Weight) -> bool:
    return (
        weight.is_float and len(weight.shape) == 2 and min(weight.shape) > 1 and isinstance(weight.storage, FileStorage)
    )


def _place(weight: Weight, storage: object) -> list[Any]:
    if not isinstance(storage, FileStorage):
        raise TypeError(f"{weight.id}: expected bytes in a file")
    return [storage.path, storage.offset, storage.n_bytes, weight.dtype, list(weight.shape)]


def _optimised(model: Model, part: str, watch: Mapping[str, Any], sandbox: Sandbox) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tieaudit-optimised-") as folder:
        params = {"path": path_of(model, part), "to": folder, "watch": dict(watch)}
        try:
            found, _ = sandbox.ask("optimise", params)
        except ChildFailed:  # some providers cannot write their optimised model; then there is nothing to report
            return {}
    return {"n_bytes_optimised": found["n_bytes"], "operations": found["operations"], "copies": found["copies"]}


@dataclass(frozen=True)
class Cost:
    """What running one model costs, on one device."""

    seconds: tuple[float, ...]
    """Of every run after the first."""
    on: str
    """The hardware."""
    n_bytes_resident: int | None
    """Once loaded: a module's tensors, each memory once; else the growth of the process."""
    n_bytes_peak: int | None
    """At most while it ran, resident ones included: of the device's memory on a GPU, else of the process."""
    on_gpu: bool = False


def costs(before: Cost | None, after: Cost | None) -> dict[str, Any]:
    """Both as facts for the report: medians, the middle half of the runs, and whether they differ beyond it."""
    facts: dict[str, Any] = {}
    for side, one in (("before", before), ("after", after)):
        if one is None:
            continue
        low, middle, high = _quartiles(one.seconds)
        facts[f"seconds_per_run_{side}"] = middle
        facts[f"seconds_per_run_quartiles_{side}"] = [low, high]
        facts[f"n_runs_{side}"] = len(one.seconds)
        facts["runs_on"] = one.on
        if one.n_bytes_resident is not None:
            facts[f"n_bytes_resident_{side}"] = one.n_bytes_resident
        if one.n_bytes_peak is not None:
            facts[f"n_bytes_{'device' if one.on_gpu else 'process'}_peak_{side}"] = one.n_bytes_peak
    if before is not None and after is not None:
        facts["time_differs"] = differs(before.seconds, after.seconds)
    return facts


def differs(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists of times differ beyond their spread and by a tenth: in the middle, and at their fastest.

    The fastest run is the one that the rest of the machine disturbed least.
    """
    (low, middle, high), (other_low, other_middle, other_high) = _quartiles(one), _quartiles(other)
    if high >= other_low and other_high >= low:
        return False
    fast, slow = (one, other) if middle < other_middle else (other, one)
    return min(fast) * (1 + LEAST_DIFFERENCE) < min(slow) and abs(middle - other_middle) > LEAST_DIFFERENCE * min(
        middle, other_middle
    )


def _quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return round(low, 9), round(middle, 9), round(high, 9)


Measure = Callable[[], Cost]


def alternated(before: AbstractContextManager[Measure], after: AbstractContextManager[Measure], n_bytes: int) -> Any:
    """Facts of both, measured in turns, so that a machine that slows down slows both; {} where one does not run.

    `n_bytes`: what both hold. Models that are large are not held at once, and measured one after the other.
    """
    try:
        if n_bytes > N_MOST_BYTES_AT_ONCE:
            found = []
            for one in (before, after):
                with one as measure:
                    found.append(merged([measure() for _ in range(N_ROUNDS)]))
            return costs(*found)
        with before as first, after as second:
            rounds = [(first(), second()) for _ in range(N_ROUNDS)]
        return costs(merged([one for one, _ in rounds]), merged([one for _, one in rounds]))
    except ChildFailed:
        return {}


def merged(rounds: Sequence[Cost]) -> Cost:
    """All runs together; the peak of the first round, which met nothing that was ready."""
    return replace(rounds[0], seconds=tuple(s for one in rounds for s in one.seconds))


@contextmanager
def measuring(path: Paths, feed: Feed, sandbox: Sandbox) -> Iterator[Measure]:
    """A function that measures one round of one model. ChildFailed; also for parts that are run as one."""
    if not isinstance(path, str):
        raise ChildFailed("parts that are run as one are not measured", "error")
    with ExitStack() as stack:
        if sandbox.runner.name == "onnxruntime":
            # a child of its own, so that nothing of the other model is counted; PyTorch's counts its tensors exactly,
            # and another child costs seconds
            memory, limit = sandbox.memory_bytes, sandbox.seconds
            sandbox = stack.enter_context(Sandbox(sandbox.runner, sandbox.device, seconds=limit, memory_bytes=memory))
            sandbox.ask("hello")
        one = stack.enter_context(opened(sandbox, path))

        def measure() -> Cost:
            params = {"handle": one.handle, "n_runs": N_RUNS, "seconds": SECONDS_OF_RUNS}
            timed, _ = sandbox.ask("time", params, feed.arrays)
            return Cost(
                tuple(timed["each"]), timed["on"], one.facts["n_bytes_grown"], timed["n_bytes_peak"],
                sandbox.device == "cuda",
            )  # fmt: skip

        yield measure
