"""What both models cost beside each other: bytes stored, as the runtime optimises them, resident, and time per run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tieaudit.inputs import Feed
from tieaudit.model import Model, Weight
from tieaudit.running import opened, path_of
from tieaudit.sandbox import ChildFailed, Sandbox
from tieaudit.storage import FileStorage

_N_RUNS = 7
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
        facts.update({f"{key}_{side}": value for key, value in _measured(model, part, feed, sandbox).items()})
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


def _measured(model: Model, part: str, feed: Feed, sandbox: Sandbox) -> dict[str, Any]:
    """Bytes in memory once loaded, and median seconds per run."""
    try:
        if model.format != "onnx":  # the runner counts its tensors exactly, and another child costs seconds
            return _timed(model, part, feed, sandbox)
        memory, seconds = sandbox.memory_bytes, sandbox.seconds
        # a child of its own, so that nothing of the other model is counted
        with Sandbox(sandbox.runner, sandbox.device, seconds=seconds, memory_bytes=memory) as fresh:
            fresh.ask("hello")
            return _timed(model, part, feed, fresh)
    except ChildFailed:
        return {}


def _timed(model: Model, part: str, feed: Feed, sandbox: Sandbox) -> dict[str, Any]:
    with opened(sandbox, path_of(model, part)) as one:
        timed, _ = sandbox.ask("time", {"handle": one.handle, "n_runs": _N_RUNS}, feed.arrays)
    facts: dict[str, Any] = {"seconds_per_run": round(float(timed["seconds"]), 6)}
    if one.facts["n_bytes_grown"] is not None:
        facts["n_bytes_resident"] = one.facts["n_bytes_grown"]
    return facts
