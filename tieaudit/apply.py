"""Stage: Plan → a delivered model. Write, read back, prove, deliver; any failure leaves no output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tieaudit.calibrating import Data
from tieaudit.change import Plan, Proof
from tieaudit.deliver import Delivered, deliver
from tieaudit.errors import ParityFailed, RewriteRefused
from tieaudit.formats import Format
from tieaudit.losses import change_of_loss
from tieaudit.model import Model
from tieaudit.proving import Request, peak_bytes, prove_apart
from tieaudit.registry import choose, discover
from tieaudit.rewrite import Stamps, left_behind, rewrite, stamps, workspace
from tieaudit.verify import LEVELS, prove

_OF_FILES = frozenset({".onnx", ".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".gguf", ".h5", ".npz"})
_LIVE = "torch_module"


@dataclass(frozen=True)
class Applied:
    """What came of a plan."""

    plan: Plan
    proof: Proof
    delivered: Delivered


def apply(
    model: Model,
    plan: Plan,
    destination: Path,
    *,
    require: str | None = None,
    device: str = "auto",
    inputs: Mapping[str, Any] | None = None,
    max_drift: float | None = None,
    seen: Stamps | None = None,
    data: Data | None = None,
) -> Applied:
    """Write `plan` to `destination`, which must not exist.

    `require`: the least level of proof; None for regional, or structural where a model of its format cannot be run.

    `data`: calibration data, on whose held-out half the loss is measured before and after (the fact `loss`).

    ParityFailed if any level of proof fails, RewriteRefused if the required level could not run, nothing can be
    written, or a file of the model changed since `seen` (by default: since now); in all these cases nothing is left
    behind and the input was only read. The proof runs in a process of its own.
    """
    source = Path(model.path)
    if source.is_dir() and destination.resolve().is_relative_to(source.resolve()):
        raise RewriteRefused(
            f"{destination}: is inside the model's own folder, which is only read", hint="give another --to"
        )
    if plan.into is None:
        check_kind(source, destination)
    if plan.into is None and source.is_file() and destination.suffix == source.suffix:
        plan = replace(plan, data_names=_data_names(model, destination))
    seen = stamps(model) if seen is None else seen
    plan = replace(plan, notes=(*plan.notes, *left_behind(destination)))
    with workspace(destination) as folder:
        written, after = rewrite(model, plan, folder)
        seen.check()
        if model.format == _LIVE:  # its tensors belong to this process
            proof = prove(model, after, plan, written)
        else:
            proof = prove_apart(Request(model, after, plan, written, device, inputs, max_drift))
        seen.check()
        proof = replace(proof, facts={**proof.facts, "n_bytes_peak_writing": peak_bytes()})
        _accept(model, proof, require or least_level(model))
        if data is not None:
            proof = replace(proof, facts={**proof.facts, **_loss(model, after, data, device)})
        if inputs is not None and (reason := unused(proof)) is not None:
            raise RewriteRefused(f"the given inputs could not be used, nothing was delivered: {reason}")
        return Applied(plan, proof, deliver(model, plan, written, proof, folder, destination))


def _loss(before: Model, after: Model, data: Data, device: str) -> dict[str, object]:
    found = change_of_loss(before, after, data, device)
    return {"loss_not_measured": found} if isinstance(found, str) else {"loss": asdict(found)}


def least_level(model: Model) -> str:
    """The level of proof that is asked for where the user does not say."""
    return "regional" if choose(discover("formats", Format), model.format, "format").has_program else "structural"


def check_kind(source: Path, destination: Path) -> None:
    """The result is of the source's kind: a folder that is called like a file of another one would mislead.

    RewriteRefused if the name of the destination says another.
    """
    found, expected = destination.suffix.lower(), source.suffix if source.is_file() else ""
    if found in _OF_FILES and destination.suffix != expected:
        what = f"a name that ends in {expected}, or that of a folder" if expected else "the name of a folder"
        raise RewriteRefused(
            f"{destination}: expected {what}, as the input is, found one that ends in {found}", hint="give another --to"
        )


def _data_names(model: Model, destination: Path) -> dict[str, str]:
    """New names for the data files whose own ones are taken where the result will lie: in the source's folder, say.

    RewriteRefused if those are taken, too.
    """
    home, names = Path(model.path).absolute().parent, dict[str, str]()
    known = [Path(path).absolute() for part in model.parts for path in part.paths[1:]]
    old = [(data.relative_to(home) if data.is_relative_to(home) else Path(data.name)).as_posix() for data in known]
    for name in dict.fromkeys((*old, f"{Path(model.path).name}.data")):  # the last one: where large tensors move out
        if not os.path.lexists(destination.parent / name):
            continue
        new = f"{destination.name}.data" if len(old) < 2 else f"{destination.stem}.{Path(name).name}"
        if os.path.lexists(destination.parent / new):
            raise RewriteRefused(
                f"{destination.parent / new}: exists already, and the result needs a data file of this name; "
                "nothing is ever overwritten",
                hint=f"give a --to in a folder of its own: {destination.parent / destination.stem / destination.name}",
            )
        names[name] = new
    return names


def unused(proof: Proof) -> str | None:
    """Why the end-to-end level, for which alone inputs are given, did not run; None if it ran."""
    return next((one.because for one in proof.levels if one.name == LEVELS[-1] and one.outcome == "not run"), None)


def _accept(model: Model, proof: Proof, require: str) -> None:
    if proof.failed:
        level = proof.failed[0]
        raise ParityFailed(f"{model.path}: the {level.name} proof failed, nothing was delivered: {level.because}")
    needed = LEVELS[: LEVELS.index(require) + 1]
    outcomes = {level.name: level for level in proof.levels}
    reached = [name for name in LEVELS if name in outcomes and outcomes[name].outcome == "held"]
    if any(name in reached for name in LEVELS[LEVELS.index(require) :]):
        return  # a higher level that ran stands for the lower ones
    missing = next((outcomes[name] for name in needed if name in outcomes and name not in reached), None)
    because = missing.because if missing is not None else "it was not attempted"
    raise RewriteRefused(
        f"{model.path}: expected the {require} proof, which could not run: {because}; nothing was delivered",
        hint="--require structural delivers on the structural proof alone",
    )
