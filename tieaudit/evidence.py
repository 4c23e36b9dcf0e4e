"""A proof as lines of text: which levels held, what moved, what it cost in time and memory."""

from __future__ import annotations

from collections.abc import Mapping

from tieaudit.change import Level, Proof
from tieaudit.printable import counted, listed, printable, size

_MARKS = {"held": "held", "failed": "FAILED", "not run": "not run"}
NOT_TRIED = "(one of many: not tried)"
"""How `controls.py` marks uses beyond the number that it perturbs."""


def _moved(moved: object) -> list[str]:
    """What a drift means for predictions, where an output scores a vocabulary."""
    if not isinstance(moved, Mapping) or not moved["n_tokens"]:
        return []
    said = (
        f"KL {moved['kl_mean']:.3g} nats a token on average, 99.9 % below {moved['kl_999']:.3g}; the same most likely "
        f"token for {moved['top1']:.1%} of {counted(moved['n_tokens'], 'token')}"
    )
    yardstick = f" ({moved['yardstick']})" if moved["yardstick"] else ""
    return [f"    {said}{yardstick}", "    made-up inputs say little about this: give real ones with --inputs"]


def _loss_lines(facts: Mapping[str, object]) -> list[str]:
    """ΔNLL on the user's data, with its paired standard error."""
    if (reason := facts.get("loss_not_measured")) is not None:
        return [f"  loss on the calibration data: not measured: {printable(str(reason), 300)}"]
    loss = facts.get("loss")
    if not isinstance(loss, Mapping):
        return []
    return [loss_line(loss)]


def loss_line(loss: object) -> str:
    """ΔNLL on tokens, from a `LossChange` as plain values."""
    assert isinstance(loss, Mapping)
    which = "held out of the fit" if loss["held_out"] else "to which the policy was fitted"
    numbers = {name: float(loss[name]) for name in ("before", "after", "rise", "standard_error")}  # NaN is a text
    return (
        f"  loss on {counted(loss['n_tokens'], 'token')} {which}: {numbers['before']:.4g} → {numbers['after']:.4g} "
        f"nats a token, ΔNLL {numbers['rise']:+.3g} ± {numbers['standard_error']:.2g} (paired standard error)"
    )


def proof_lines(proof: Proof, packs: bool = False) -> list[str]:
    lines = ["proof:", *(f"  {_level_line(level)}" for level in proof.levels)]
    if proof.drift is not None:
        lines.append(f"  drift against the original: {proof.drift:.3g} of the outputs' own size at most")
        lines += _moved(proof.facts.get("moved"))
    lines += _loss_lines(proof.facts)
    untried = [use for use in proof.not_exercised if use.endswith(NOT_TRIED)]
    silent = tuple(use for use in proof.not_exercised if not use.endswith(NOT_TRIED))
    if silent:
        lines.append(f"  not exercised, never moved the outputs: {listed(silent)}")
    if untried:
        lines.append(f"  not exercised, one of many that were not tried: {counted(len(untried), 'use')}")
    return lines + fact_lines(proof.facts, packs)


_PAIRED = {
    "n_bytes_stored": "stored",
    "n_bytes_optimised": "as the runtime optimises it",
    "n_bytes_resident": "resident while it runs",
    "n_bytes_process_peak": "memory of the process at most, over what it was before",
    "n_bytes_device_peak": "device memory at most",
}
_LEAST_PEAK_BYTES = 1 << 24
"""Below it the growth of a process says more about its libraries than about the model."""
_PEAKS = {
    "n_bytes_peak_writing": "writing",
    "n_bytes_peak_verifying": "verifying",
    "n_bytes_peak_running": "running the models",
}
"""Processes of their own, each with its own peak."""
MUCH_MORE = 1.2
"""Growth of resident memory from which the reader is told why."""

PREPACKED = (
    "    more than before: ONNX Runtime packs the shared matrix for the product, and keeps it as it is for the lookup;",
    "    the session option session.disable_prepacking=1 holds one copy, at the price of speed",
)


def fact_lines(facts: Mapping[str, object], packs: bool) -> list[str]:
    """What both cost, before → after; facts of single parts and longer ones are left to JSON.

    `packs`: a runtime that may hold a shared matrix twice ran it.
    """
    lines = _paired_lines(facts, packs)
    on_gpu = facts.get("on_cuda")
    if isinstance(on_gpu, Mapping):
        lines += _paired_lines(on_gpu, False)
    if (apart := facts.get("folded_apart_by_the_runtime")) is not None:
        lines.append(f"  folded apart by the runtime: {printable(str(apart))}")
    if (wider := facts.get("held_in_a_wider_type_by_the_runtime")) is not None:
        lines.append(
            f"  held by the runtime in a wider type as well, so that memory gains nothing: {printable(str(wider))}"
        )
    spread = facts.get("spread_of_the_original")
    if isinstance(spread, float):
        lines.append(f"  the original differs from itself by {spread:.3g} under settings that may not matter")
    peaks = [f"{label} {size(n)}" for name, label in _PEAKS.items() if isinstance(n := facts.get(name), int)]
    if peaks:
        lines.append(f"  memory at most: {', '.join(peaks)}")
    loose = facts.get("not_deterministic")
    if isinstance(loose, (list, tuple)) and loose:
        names = listed(tuple(str(name) for name in loose))
        lines.append(f"  no deterministic algorithm in PyTorch for {names}: runs may differ in their rounding")
    ran = [f"{name} {facts[name]}" for name in ("onnxruntime", "torch", "transformers", "cuda") if name in facts]
    return [*lines, *([f"  with {', '.join(ran)}"] if ran else [])]


def _paired_lines(facts: Mapping[str, object], packs: bool) -> list[str]:
    """Memory and time of both on one device."""
    lines = []
    for name, label in _PAIRED.items():
        before, after = facts.get(f"{name}_before"), facts.get(f"{name}_after")
        if not isinstance(before, int) or not isinstance(after, int):
            continue
        if name == "n_bytes_process_peak" and max(before, after) < _LEAST_PEAK_BYTES:
            continue
        where = f" ({printable(str(facts.get('runs_on', '')))})" if name == "n_bytes_device_peak" else ""
        lines.append(f"  {label}{where}: {size(before)} → {size(after)}")
        if name == "n_bytes_resident" and packs and after > MUCH_MORE * before:
            lines += PREPACKED
    return lines + _time_lines(facts)


def _time_lines(facts: Mapping[str, object]) -> list[str]:
    """Medians, the middle half of the runs, and no arrow where the difference lies within the spread."""
    before, after = _times(facts, "before"), _times(facts, "after")
    if not before or not after:
        return []
    where = f"time per run on {printable(str(facts.get('runs_on', 'the CPU')))}"
    if facts.get("time_differs"):
        return [f"  {where}: {before} → {after}"]
    return [f"  {where}: no measurable difference: {before} before, {after} after"]


def _times(facts: Mapping[str, object], side: str) -> str:
    middle, spread = facts.get(f"seconds_per_run_{side}"), facts.get(f"seconds_per_run_quartiles_{side}")
    if not isinstance(middle, (int, float)) or not isinstance(spread, (list, tuple)):
        return ""
    low, high = (f"{float(one) * 1000:.3g}" for one in spread)
    return f"{middle * 1000:.3g} ms (middle half of {facts.get(f'n_runs_{side}')} runs {low} … {high})"


def _level_line(level: Level) -> str:
    measured = ""
    if level.max_difference is not None and level.limit is not None:
        measured = f" (largest difference {level.max_difference:.3g}, limit {level.limit:.3g})"
    where = f" on {level.device}" if level.device else ""
    return f"{level.name:<11} {_MARKS[level.outcome]}{where}{measured}: {printable(level.because, 400)}"
