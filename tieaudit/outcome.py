"""What plan, apply and verify print: one screen of text, or JSON under a versioned schema name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from tieaudit import __version__
from tieaudit.change import Edit, Level, Plan, Proof, Respell, SetConfig, Share, Unshare
from tieaudit.model import Member, Model
from tieaudit.plain import plain
from tieaudit.printable import counted, listed, printable, size
from tieaudit.view import AS_STORED

N_MOST_LINES = 12
NOT_TRIED = "(one of many: not tried)"
"""How `controls.py` marks uses beyond the number that it perturbs."""
_MARKS = {"held": "held", "failed": "FAILED", "not run": "not run"}


def planned(
    model: Model, plan: Plan, format_name: str, settings: Mapping[str, object], *, asked_to_write: bool = False
) -> str:
    """A plan: what would be done, what is refused and why, and how to do it."""
    if format_name == "json":
        return _json("plan", plan=plan)
    lines = [f"{printable(model.path)}  {model.format}", *_plan_lines(model, plan)]
    if not plan.edits and not plan.refusals:
        lines.append("nothing to do: every lossless tie is already one stored tensor")
    elif plan.edits and not asked_to_write:
        lines.append(f"write it with: {_apply_command(model, plan)}")
    elif asked_to_write:
        lines.append("nothing was written")
    return "\n".join(lines)


def applied(
    model: Model, plan: Plan, proof: Proof, output: str, receipt: str, format_name: str, settings: Mapping[str, object]
) -> str:
    """A delivery: what was done, how it was proved, where it lies."""
    if format_name == "json":
        return _json("apply", plan=plan, proof=proof, output=output, receipt=receipt)
    lines = [f"{printable(model.path)}  {model.format}", *_plan_lines(model, plan), *_proof_lines(proof)]
    lines += [f"delivered {printable(output)}", f"receipt   {printable(receipt)}"]
    return "\n".join(lines)


def compared(one: Model, other: Model, proof: Proof, format_name: str, settings: Mapping[str, object]) -> str:
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
    lines = [
        f"plan ({', '.join(plan.schemes)}; safe for {plan.target}): {counted(len(plan.edits), 'edit')}, {_saving(plan)}"
    ]
    lines += _cut([f"  {line}" for line in described])
    if plan.refusals:
        lines.append(f"refused: {len(plan.refusals)}")
        lines += _cut([_refusal_line(refusal.scheme, refusal.ids, refusal.because) for refusal in plan.refusals])
    lines += [f"note: {printable(note, 400)}" for note in plan.notes]
    return lines


def _saving(plan: Plan) -> str:
    kept = "no value changes" if plan.lossless else "values change"
    if plan.n_bytes_saved < 0:
        return f"adds {size(-plan.n_bytes_saved)}; {kept}"
    return f"saves {size(plan.n_bytes_saved)}; {kept}"


def _refusal_line(scheme: str, ids: tuple[str, ...], because: str) -> str:
    return f"  {scheme}: {listed(ids)}: {printable(because, 600)}" if ids else f"  {scheme}: {printable(because, 600)}"


def _edit_line(model: Model, edit: Edit) -> str:
    match edit:
        case Share(members=members, values=values):
            kept, rest = members[0], members[1:]
            value = "one merged tensor" if values is not None else printable(kept.id)
            return f"share    {value} ← {listed(tuple(_seen(member) for member in rest))}{_shape(model, kept.id)}"
        case Unshare(source=source, name=name):
            return f"unshare  {printable(name)} gets its own copy of {printable(source)}{_shape(model, source)}"
        case Respell(weight=weight, because=because):
            return f"respell  {printable(weight)}{_shape(model, weight)}: {printable(because)}"
        case SetConfig(file=file, key=key, value=value):
            return f"set      {printable(file)}: {printable('.'.join(key))} = {json.dumps(value)}"


def _seen(member: Member) -> str:
    return member.id if member.view == AS_STORED else f"{member.id} ({member.view})"


def _shape(model: Model, id: str) -> str:
    weight = model.by_id.get(id)
    return f"  {weight.dtype}{list(weight.shape)}" if weight is not None else ""


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= N_MOST_LINES:
        return lines
    return [*lines[:N_MOST_LINES], f"  … and {len(lines) - N_MOST_LINES} more (--format json lists all)"]


def _proof_lines(proof: Proof) -> list[str]:
    lines = ["proof:", *(f"  {_level_line(level)}" for level in proof.levels)]
    if proof.drift is not None:
        lines.append(f"  drift against the original: {proof.drift:.3g}")
    untried = [use for use in proof.not_exercised if use.endswith(NOT_TRIED)]
    silent = tuple(use for use in proof.not_exercised if not use.endswith(NOT_TRIED))
    if silent:
        lines.append(f"  not exercised, never moved the outputs: {listed(silent)}")
    if untried:
        lines.append(f"  not exercised, one of many that were not tried: {counted(len(untried), 'use')}")
    return lines + _fact_lines(proof.facts)


def _fact_lines(facts: Mapping[str, object]) -> list[str]:
    """Facts before → after, one line each; those of single parts and longer ones are left to JSON."""
    lines, single = [], []
    for name, value in facts.items():
        if not isinstance(value, (str, int, float)) or name.endswith("_after") or "(" in name:
            continue
        label = name.removesuffix("_before").removeprefix("n_bytes_").replace("_", " ")
        after = facts.get(f"{name.removesuffix('_before')}_after")
        if name.endswith("_before") and after is not None:
            lines.append(f"  {label}: {_fact(name, value)} → {_fact(name, after)}")
        elif not name.endswith("_before"):
            single.append(f"{label} {_fact(name, value)}")
    return [*lines, *([f"  {'; '.join(single)}"] if single else [])]


def _fact(name: str, value: object) -> str:
    if name.startswith("n_bytes") and isinstance(value, int):
        return size(value)
    return printable(f"{value:.3g}" if isinstance(value, float) else str(value))


def _level_line(level: Level) -> str:
    measured = ""
    if level.max_difference is not None and level.limit is not None:
        measured = f" (largest difference {level.max_difference:.3g}, limit {level.limit:.3g})"
    where = f" on {level.device}" if level.device else ""
    return f"{level.name:<11} {_MARKS[level.outcome]}{where}{measured}: {printable(level.because, 400)}"


def _apply_command(model: Model, plan: Plan) -> str:
    words = ["tieaudit", "apply", model.path, *(word for name in plan.schemes for word in ("--scheme", name))]
    if not plan.lossless:
        words.append("--allow-lossy")
    return f"{printable(' '.join(shlex.quote(word) for word in words), None)} --to OUT"
