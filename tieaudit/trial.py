"""Stage: Plans and data → how much each changes the loss, measured with temporary copies that are thrown away.

What no derivative tells is tried out: ONNX Runtime computes no gradients, and second order ends where damage is large.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tieaudit.calibrating import Data, runner_of, sandbox_on
from tieaudit.change import LossChange, Plan
from tieaudit.comparison import Choice
from tieaudit.cost import stored_bytes
from tieaudit.errors import TieAuditError
from tieaudit.losses import losses, paired
from tieaudit.merges import Calibrated
from tieaudit.model import Model
from tieaudit.plan import Choices, plan
from tieaudit.rewrite import rewrite
from tieaudit.tokens import Tokens
from tieaudit.verdict import Subject

FORMATS = ("huggingface", "onnx", "torch_export")
"""What is written into a folder and run from there; a live module would be changed itself."""
N_MOST_BYTES = 4 << 30
"""Of a copy: a larger one is written by `apply` alone, which measures the loss as well."""
N_MOST_STEPS = 1 << 39
"""Parameters times tokens of all copies of a comparison: about a minute on two cores."""
N_LEAST_TOKENS = 256
"""Fewer say little about a table of choices."""


def tried(model: Model, made: Plan, data: Data, device: str = "auto") -> Plan:
    """The plan with the measured change of the loss, or with a note that says why it was not measured.

    On the half of the data that nothing was fitted to. Cost: a copy of the model on disk, and a forward pass of both
    over that half, in a child process.
    """
    fitted, held = data.tokens.halves()
    (found,) = _measured(model, [made], data, held or fitted, device, held_out=held is not None)
    if isinstance(found, str):
        return replace(made, notes=(*made.notes, f"loss not measured: {found}"))
    return replace(made, loss=found)


def compared(
    subject: Subject, choices: tuple[Choice, ...], calibrated: Calibrated, data: Data, device: str = "auto"
) -> tuple[tuple[Choice, ...], str]:
    """The choices, ordered as before, with the loss measured where it is not predicted; and why, where it is not.

    Cost: for each such choice a copy on disk and a forward pass, over so many tokens that all of it stays within
    `N_MOST_STEPS`.
    """
    model = subject.model
    wanted = [one for one in choices if one.nats is None and one.policy]
    fitted, held = data.tokens.halves()
    tokens = held or fitted
    if not wanted:
        return choices, ""
    n_parameters = sum(one.n_elements for one in model.weights if one.is_float)
    n_rows = N_MOST_STEPS // (max(n_parameters, 1) * (len(wanted) + 1) * max(tokens.length, 1))
    if n_rows * tokens.length < min(N_LEAST_TOKENS, tokens.n_rows * tokens.length):
        because = (
            f"the loss of {len(wanted)} choices is not measured: the model is large; --scheme measures one of them"
        )
        return choices, because
    plans = [
        plan(subject, Choices((one.scheme,), allow_lossy=True, merge=one.policy), calibrated=calibrated)
        for one in wanted
    ]
    found = _measured(model, plans, data, tokens.rows(0, n_rows), device, held_out=held is not None)
    risen = {one: got.rise for one, got in zip(wanted, found, strict=True) if isinstance(got, LossChange)}
    because = next((f"loss not measured: {one}" for one in found if isinstance(one, str)), "")
    measured = [replace(one, measured=risen[one]) if one in risen else one for one in choices]
    measured.sort(key=lambda one: (-one.n_bytes_saved, one.damage, one.scheme, one.policy))
    return tuple(measured), because


def _measured(
    model: Model, plans: Sequence[Plan], data: Data, tokens: Tokens, device: str, *, held_out: bool
) -> list[LossChange | str]:
    """For each plan what it costs on these tokens, or why that is not known; one child runs all of them."""
    if model.format not in FORMATS:
        return [f"a model of format {model.format} would be changed itself"] * len(plans)
    if tokens.targets is None:
        return ["the data says not what is to be predicted"] * len(plans)
    if stored_bytes(model) > N_MOST_BYTES:
        return [f"a copy would take more than {N_MOST_BYTES >> 30} GiB; apply measures it"] * len(plans)
    data, found = replace(data, tokens=tokens), list[LossChange | str]()
    try:
        with sandbox_on(runner_of(model), device) as box:
            before = losses(model, data, box)
            if not len(before):
                return ["no token is to be predicted"] * len(plans)
            for one in plans:
                if not one.edits:
                    found.append("; ".join(refusal.because for refusal in one.refusals[:1]) or "nothing is to be done")
                    continue
                with tempfile.TemporaryDirectory(prefix="tieaudit-trial-") as folder:
                    copy = rewrite(model, one, Path(folder))[1]
                    found.append(paired(before, losses(copy, data, box), held_out=held_out))
    except TieAuditError as error:
        found += [error.message] * (len(plans) - len(found))
    return found
