"""What plan, apply and verify print: one screen of text, or JSON under a versioned schema name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tieaudit import __version__
from tieaudit.change import Edit, Level, Plan, Pool, Proof, Respell, SetConfig, Share, Unshare
from tieaudit.equality import can_declare
from tieaudit.model import Member, Model
from tieaudit.plain import plain
from tieaudit.printable import counted, listed, printable, size
from tieaudit.verdict import Finding
from tieaudit.view import AS_STORED

if TYPE_CHECKING:  # printing a plan needs nothing that runs models
    from tieaudit.apply import Applied

N_MOST_LINES = 12
N_MOST_LEFT = 3
NOT_TRIED = "(one of many: not tried)"
"""How `controls.py` marks uses beyond the number that it perturbs."""
_MARKS = {"held": "held", "failed": "FAILED", "not run": "not run"}


def planned(
    model: Model,
    plan: Plan,
    format_name: str,
    *,
    left: Sequence[Finding] = (),
    asked_to_write: bool = False,
) -> str:
    """A plan: what would be done, what is refused and why, and how to do it.

    `left`: findings of the model where there is nothing to do, so that this is never read as *nothing is wrong*.
    """
    if format_name == "json":
        return _json("plan", plan=plan)
    lines = [f"{printable(model.path)}  {model.format}", *_plan_lines(model, plan)]
    if not plan.edits and not plan.refusals and plan.into is None:
        lines.append(f"nothing to do for {', '.join(plan.schemes)}")
        lines += [f"but {finding.severity} {finding.code} {finding.name} stays: {printable(finding.message, 300)}"
                  for finding in left[:N_MOST_LEFT]]  # fmt: skip
    elif (plan.edits or plan.into is not None) and not asked_to_write:
        lines.append(f"{'do' if model.format == 'torch_module' else 'write'} it with: {_apply_command(model, plan)}")
    elif asked_to_write:
        lines.append("nothing was written")
    return "\n".join(lines)


def applied(model: Model, done: Applied, format_name: str) -> str:
    """A delivery: what was done, how it was proved, where it lies."""
    plan, proof = done.plan, done.proof
    output, receipt = str(done.delivered.path), str(done.delivered.receipt)
    if format_name == "json":
        return _json("apply", plan=plan, proof=proof, output=output, receipt=receipt)
    lines = [
        f"{printable(model.path)}  {model.format}",
        *_plan_lines(model, plan),
        *_proof_lines(proof, _packs(model, plan)),
    ]
    lines += [f"delivered {printable(output)}", f"receipt   {printable(receipt)}"]
    return "\n".join(lines)


def compared(one: Model, other: Model, proof: Proof, format_name: str) -> str:
    """A verification of two models."""
    if format_name == "json":
        return _json("verify", before=one.path, after=other.path, proof=proof)
    lines = [f"before  {printable(one.path)}  {one.format}", f"after   {printable(other.path)}  {other.format}"]
    ran = any(level.outcome != "not run" for level in proof.levels)
    verdict = "differs" if proof.failed else "equal within the noise floor" if ran else "could not run"
    if proof.drift is not None and not proof.failed and ran:
        verdict = f"drift {proof.drift:.3g}, within the limit"
    return "\n".join([*lines, *_proof_lines(proof), verdict])


def _json(command: str, **content: object) -> str:
    head = {"schema": f"tieaudit/{command}/1", "tool": {"name": "tieaudit", "version": __version__}}
    return json.dumps({**head, **{name: plain(value) for name, value in content.items()}}, indent=1)


def _plan_lines(model: Model, plan: Plan) -> list[str]:
    described = [_edit_line(model, edit) for edit in plan.edits]
    lines = [f"plan ({', '.join(plan.schemes)}; safe for {plan.target}): {_saving(plan)}"]
    lines += _cut([f"  {line}" for line in described])
    if plan.refusals:
        lines.append(f"refused: {len(plan.refusals)}")
        lines += _cut([_refusal_line(refusal.scheme, refusal.ids, refusal.because) for refusal in plan.refusals])
    lines += [f"note: {printable(note, 400)}" for note in plan.notes]
    return lines


def _saving(plan: Plan) -> str:
    edits = counted(len(plan.edits), "edit")
    if not plan.edits and plan.into is None:
        return edits
    kept = "no value changes" if plan.lossless else "values change"
    if plan.into is not None and not plan.n_bytes_saved:
        return f"{edits}; {kept}"
    if plan.n_bytes_saved < 0:
        return f"{edits}, adds {size(-plan.n_bytes_saved)}; {kept}"
    return f"{edits}, saves {size(plan.n_bytes_saved)} of the file; {kept}"


def _refusal_line(scheme: str, ids: tuple[str, ...], because: str) -> str:
    return f"  {scheme}: {listed(ids)}: {printable(because, 600)}" if ids else f"  {scheme}: {printable(because, 600)}"


def _edit_line(model: Model, edit: Edit) -> str:
    match edit:
        case Share(members=members, values=values, adjustments=adjustments):
            kept, rest = members[0], members[1:]
            if can_declare(model) and values is None:  # which name survives is the class's business, not the list's
                names = listed(tuple(_seen(member) for member in members))
                return f"share    {names}: stored once{_shape(model, kept.id)}"
            value = "one merged tensor" if values is not None else printable(kept.id)
            said = "; ".join(f"{printable(id)} corrected ({one.kind})" for id, one in adjustments.items())
            line = f"share    {value} ← {listed(tuple(_seen(member) for member in rest))}{_shape(model, kept.id)}"
            return f"{line}; {said}" if said else line
        case Unshare(source=source, name=name):
            return f"unshare  {printable(name)} gets its own copy of {printable(source)}{_shape(model, source)}"
        case Pool(weights=weights, n_heads=n_heads, n_groups=n_groups):
            return f"pool     {listed(tuple(one.id for one in weights))}: {n_heads} heads become {n_groups}"
        case Respell(weight=weight, because=because):
            return f"respell  {printable(weight)}{_shape(model, weight)}: {printable(because)}"
        case SetConfig(file=file, key=key, value=value):
            return f"set      {printable(file)}: {printable('.'.join(key))} = {json.dumps(value)}"


def _packs(model: Model, plan: Plan) -> bool:
    """Whether ONNX Runtime may hold a matrix twice that this plan makes one."""
    return model.format == "onnx" and any(isinstance(edit, Share) for edit in plan.edits)


def _seen(member: Member) -> str:
    return member.id if member.view == AS_STORED else f"{member.id} ({member.view})"


def _shape(model: Model, id: str) -> str:
    weight = model.by_id.get(id)
    return f"  {weight.dtype}{list(weight.shape)}" if weight is not None else ""


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= N_MOST_LINES:
        return lines
    return [*lines[:N_MOST_LINES], f"  … and {len(lines) - N_MOST_LINES} more (--format json lists all)"]


def _proof_lines(proof: Proof, packs: bool = False) -> list[str]:
    lines = ["proof:", *(f"  {_level_line(level)}" for level in proof.levels)]
    if proof.drift is not None:
        lines.append(f"  drift against the original: {proof.drift:.3g} of the outputs' own size at most")
    untried = [use for use in proof.not_exercised if use.endswith(NOT_TRIED)]
    silent = tuple(use for use in proof.not_exercised if not use.endswith(NOT_TRIED))
    if silent:
        lines.append(f"  not exercised, never moved the outputs: {listed(silent)}")
    if untried:
        lines.append(f"  not exercised, one of many that were not tried: {counted(len(untried), 'use')}")
    return lines + _fact_lines(proof.facts, packs)


_PAIRED = {
    "n_bytes_stored": "stored",
    "n_bytes_optimised": "as the runtime optimises it",
    "n_bytes_resident": "resident while it runs",
    "seconds_per_run": "time per run",
}
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


def _fact_lines(facts: Mapping[str, object], packs: bool) -> list[str]:
    """What both cost, before → after; facts of single parts and longer ones are left to JSON.

    `packs`: a runtime that may hold a shared matrix twice ran it.
    """
    lines = []
    for name, label in _PAIRED.items():
        before, after = facts.get(f"{name}_before"), facts.get(f"{name}_after")
        if isinstance(before, (int, float)) and isinstance(after, (int, float)):
            lines.append(f"  {label}: {_amount(name, before)} → {_amount(name, after)}")
            if name == "n_bytes_resident" and packs and after > MUCH_MORE * before:
                lines += PREPACKED
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
    ran = [f"{name} {facts[name]}" for name in ("onnxruntime", "torch", "transformers") if name in facts]
    return [*lines, *([f"  with {', '.join(ran)}"] if ran else [])]


def _amount(name: str, value: float) -> str:
    return f"{value * 1000:.3g} ms" if name.startswith("seconds") else size(int(value))


def _level_line(level: Level) -> str:
    measured = ""
    if level.max_difference is not None and level.limit is not None:
        measured = f" (largest difference {level.max_difference:.3g}, limit {level.limit:.3g})"
    where = f" on {level.device}" if level.device else ""
    return f"{level.name:<11} {_MARKS[level.outcome]}{where}{measured}: {printable(level.because, 400)}"


def _apply_command(model: Model, plan: Plan) -> str:
    if model.format == "torch_module":  # no file to write: it is changed where it lives
        names = ", ".join(repr(name) for name in plan.schemes)
        return f"tieaudit.tie(module, scheme=({names},)) in Python"
    schemes = plan.schemes[:-1] if plan.into is not None else plan.schemes  # the last one is the conversion itself
    words = ["tieaudit", "apply", model.path, *(word for name in schemes for word in ("--scheme", name))]
    if plan.into is not None:
        words += ["--container", plan.into.form]
    if not plan.lossless:
        words.append("--allow-lossy")
    if plan.share_files is not None:
        words.append("--share-files" if plan.share_files else "--no-share-files")
    return f"{printable(' '.join(shlex.quote(word) for word in words), None)} --to OUT"
