"""What plan, apply and verify print: one screen of text, or JSON under a versioned schema name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tieaudit import __version__
from tieaudit.change import Edit, Equalise, Plan, Pool, Prediction, Proof, Respell, SetConfig, Share, Unshare
from tieaudit.difference import OUTCOMES, Difference, shown
from tieaudit.equality import can_declare
from tieaudit.evidence import loss_line, proof_lines
from tieaudit.model import Member, Model
from tieaudit.plain import plain
from tieaudit.printable import columns, counted, listed, printable, size
from tieaudit.verdict import Finding
from tieaudit.view import AS_STORED

if TYPE_CHECKING:  # printing a plan needs nothing that runs models
    from tieaudit.apply import Applied
    from tieaudit.comparison import Choice
    from tieaudit.survival.ties import Survival

N_MOST_LINES = 12
N_MOST_LEFT = 3
N_MOST_SITES = 4
N_MOST_CHOICES = 24


def planned(
    model: Model,
    plan: Plan,
    format_name: str,
    *,
    left: Sequence[Finding] = (),
    asked_to_write: bool = False,
    choices: Sequence[Choice] = (),
) -> str:
    """A plan: what would be done, what is refused and why, and how to do it.

    `left`: findings of the model where there is nothing to do, so that this is never read as *nothing is wrong*.
    `choices`: other schemes and policies, as a table below it.
    """
    if format_name == "json":
        return _json("plan", plan=plan, choices=list(choices))
    lines = [f"{printable(model.path)}  {model.format}", *_plan_lines(model, plan)]
    if not plan.edits and not plan.refusals and plan.into is None:
        lines.append(f"nothing to do for {', '.join(plan.schemes)}")
        lines += [f"but {finding.severity} {finding.code} {finding.name} stays: {printable(finding.message, 300)}"
                  for finding in left[:N_MOST_LEFT]]  # fmt: skip
    elif (plan.edits or plan.into is not None) and not asked_to_write:
        lines.append(f"{'do' if model.format == 'torch_module' else 'write'} it with: {_apply_command(model, plan)}")
    elif asked_to_write:
        lines.append("nothing was written")
    return "\n".join([*lines, *(_table(choices) if choices else ())])


def _table(choices: Sequence[Choice]) -> list[str]:
    """Schemes and policies beside each other, and below them what was left out and why."""
    refused = [one for one in choices if one.refused]
    choices = [one for one in choices if not one.refused]
    sampled = "" if all(one.exact for one in choices) else "; from a sample of the weights"
    nats = " or the predicted rise of the loss" if any(one.rise is not None for one in choices) else ""
    if any(one.measured is not None for one in choices):
        nats += " (measured: that of a temporary copy, on calibration data)"
    rows = [("scheme", "policy", "parameters", "bytes", "damage")]
    for one in choices[:N_MOST_CHOICES]:
        damage = f"{one.rise:.3g} nats a token" if one.rise is not None else f"{one.changed:.1%} changed"
        damage += ", measured" if one.measured is not None else ""
        rows.append(
            (
                one.scheme,
                one.policy or "lossless",
                f"{-one.n_parameters_saved:+,}",
                size(one.n_bytes_saved),
                damage if one.policy else "none",
            )
        )
    more = len(choices) - N_MOST_CHOICES
    return [
        "",
        f"what could be shared, and the share of these weights' energy that would change{nats}{sampled}:",
        *(f"  {line}" for line in columns(rows, "<<>>>")),
        *(f"  left out: {printable(one.scheme)}, {one.policy}: {printable(one.refused, 300)}" for one in refused[:4]),
        *([f"  … and {len(refused) - 4:,} more left out"] if len(refused) > 4 else []),
        *([f"  … and {more:,} more (--format json lists all, --frontier what nothing beats)"] if more > 0 else []),
        "  (tieaudit explain NAME says what each does; --allow-lossy --scheme S --merge POLICY does it knowingly)",
    ]


def applied(model: Model, done: Applied, format_name: str) -> str:
    """A delivery: what was done, how it was proved, where it lies."""
    plan, proof = done.plan, done.proof
    output, receipt = str(done.delivered.path), str(done.delivered.receipt)
    if format_name == "json":
        return _json("apply", plan=plan, proof=proof, output=output, receipt=receipt)
    lines = [
        f"{printable(model.path)}  {model.format}",
        *_plan_lines(model, plan),
        *proof_lines(proof, _packs(model, plan)),
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
    return "\n".join([*lines, *proof_lines(proof), verdict])


def differing(one: Model, other: Model, found: Difference, format_name: str) -> str:
    """Ties lost and gained between two models."""
    if format_name == "json":
        counts = {name.replace(" ", "_"): len(found.of(name)) for name in OUTCOMES}
        return _json("diff", before=one.path, after=other.path, told=found.told, counts=counts,
                     n_bytes_read=found.n_bytes_read)  # fmt: skip
    return shown(found, format_name, formats=(one.format, other.format))


def survived(name: str, found: Survival, format_name: str) -> str:
    """Which operations break the ties of a live module."""
    if format_name == "json":
        return _json("survival", model=name, **{field: getattr(found, field) for field in ("ties", "rows")})
    return "\n".join(printable(line, None) for line in [name, *str(found).splitlines()])


def checked(receipt: Path, problems: Sequence[str], format_name: str) -> str:
    """What no longer agrees with a receipt."""
    if format_name == "json":
        return _json("receipt-check", receipt=str(receipt), problems=problems)
    lines = [printable(problem, None) for problem in problems]
    return "\n".join(lines) or "input and output are exactly what the receipt says"


def undone(receipt: Path, removed: Sequence[Path], format_name: str) -> str:
    """A delivery that was taken back."""
    if format_name == "json":
        return _json("undo", receipt=str(receipt), removed=[str(file) for file in removed])
    files = counted(len(removed), "file")
    return f"undone: {files} and the receipt removed; the input was checked and is unchanged"


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
    lines += _predicted(plan.predictions)
    if plan.loss is not None:
        lines += ["measured on calibration data, with a temporary copy:", loss_line(plain(plan.loss))]
    return lines


def _predicted(found: Sequence[Prediction]) -> list[str]:
    """What calibration says that lossy ties cost, class by class."""
    if not found:
        return []
    measured = [one for one in found if any(error is not None for error in one.errors)]
    lines = _cut([f"  {_prediction(one)}" for one in measured])
    if n_left := len(found) - len(measured):
        lines.append(f"  {counted(n_left, 'class', 'classes')} of weights not calibrated: no products, or not reached")
    if not measured:
        return ["predicted:", *lines]
    known = [one.nats for one in found if one.nats is not None]
    total = f"; {sum(known):+.3g} nats a token in all" if len(known) == len(found) > 1 else ""
    tokens = counted(max(one.n_tokens for one in found), "token")
    return [f"predicted from {tokens}, the share of what each site gives that changes{total}:", *lines]


def _prediction(one: Prediction) -> str:
    shares = ", ".join(
        f"{printable(id)} {'not calibrated' if error is None else f'{error:.2%}'}"
        for id, error in zip(one.ids[:N_MOST_SITES], one.errors, strict=False)
    )
    more = f", and {len(one.ids) - N_MOST_SITES} more" if len(one.ids) > N_MOST_SITES else ""
    return f"{shares}{more}; loss {'not predicted' if one.nats is None else f'{one.nats:+.3g} nats a token'}"


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
            if not rest:
                return _fold_line(edit)
            if can_declare(model) and values is None:  # which name survives is the class's business, not the list's
                names = listed(tuple(_seen(member) for member in members))
                return f"share    {names}: stored once{_shape(model, kept.id)}"
            value = "one merged tensor" if values is not None else printable(kept.id)
            said = "; ".join(f"{printable(id)} corrected ({one.kind})" for id, one in adjustments.items())
            line = f"share    {value} ← {listed(tuple(_seen(member) for member in rest))}{_shape(model, kept.id)}"
            return f"{line}; {said}" if said else line
        case Equalise(members=(_,)):
            return _fold_line(edit)
        case Equalise(members=members, values=values):
            value = "one merged value" if values is not None else f"the value of {printable(members[0].id)}"
            return f"equal    {value} → {listed(tuple(_seen(member) for member in members))}: each stored"
        case Unshare(source=source, name=name):
            return f"unshare  {printable(name)} gets its own copy of {printable(source)}{_shape(model, source)}"
        case Pool(weights=weights, n_heads=n_heads, n_groups=n_groups):
            return f"pool     {listed(tuple(one.id for one in weights))}: {n_heads} heads become {n_groups}"
        case Respell(weight=weight, because=because):
            return f"respell  {printable(weight)}{_shape(model, weight)}: {printable(because)}"
        case SetConfig(file=file, key=key, value=value):
            return f"set      {printable(file)}: {printable('.'.join(key))} = {json.dumps(value)}"


def _fold_line(edit: Share | Equalise) -> str:
    return f"fold     {printable(edit.members[0].id)} {printable(edit.because)}"


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
    if plan.optimizer != "adjust":
        words += ["--optimizer", plan.optimizer]
    if plan.transposed_as != "auto":
        words += ["--transposed-as", plan.transposed_as]
    policies = {one.policy for one in plan.predictions}  # without its data a fitted policy would be refused
    if plan.merge is not None or len(policies) == 1:
        words += ["--merge", plan.merge or next(iter(policies))]
    words += ["--calibrate", "DATA"] if policies else []
    return f"{printable(' '.join(shlex.quote(word) for word in words), None)} --to OUT"
