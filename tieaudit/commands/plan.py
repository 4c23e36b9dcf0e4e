"""What could be done."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tieaudit.commands import calibration, choices, format_option, key_option, left, plan_options
from tieaudit.console import Command, OneOf, print_result
from tieaudit.errors import MissingPackage, UsageError

if TYPE_CHECKING:
    from tieaudit.calibrating import Data
    from tieaudit.change import Plan
    from tieaudit.comparison import Choice
    from tieaudit.merges import Calibrated
    from tieaudit.verdict import Subject

_WITHOUT_GRADIENTS = ("onnx", "torch_export")
_EPILOG = """\b
Examples:
  tieaudit plan model.onnx
  tieaudit plan ./my-model-folder --scheme io --allow-lossy --merge keep:head
  tieaudit plan model.onnx --frontier --plot frontier.svg
  tieaudit plan ./my-model-folder --calibrate text.txt --frontier
  tieaudit plan model.onnx --scheme io --allow-lossy --merge auto --calibrate ids.npz
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path")
@plan_options
@click.option(
    "--frontier", is_flag=True, help="Of all schemes and policies, only what nothing beats in size and damage."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw size against damage into a .png or .svg that must not exist (needs matplotlib).")  # fmt: skip
@click.option("--deep", is_flag=True, help="Read all of the weights that are compared, not a sample.")
@click.option("--device", type=OneOf(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where to compare weights, and to run the model on calibration data.")  # fmt: skip
@key_option
@format_option(["text", "json"])
def plan(
    path: str,
    frontier: bool,
    plot: Path | None,
    deep: bool,
    device: str,
    key: str,
    format_name: str,
    **chosen: Any,
) -> None:
    """What could be done and what it would save; writes nothing.

    Without --scheme: what can be shared without loss, and a table of all schemes and merge policies with what each
    saves and how much of the weights it would change. With --calibrate, in nats per token where the loss can be
    predicted.

    Exit code: 0 printed · 2 everything was refused.
    """
    from tieaudit import outcome
    from tieaudit.load import load_one
    from tieaudit.placing import place_on
    from tieaudit.plan import plan as make_plan
    from tieaudit.scan import look

    if chosen["schemes"] and (frontier or plot is not None):
        raise UsageError("expected --frontier and --plot without --scheme: they compare all schemes")
    _check(plot)
    subject = look(load_one(path, together=bool(chosen["share_files"]), key=key))
    data, calibrated = calibration(subject, chosen, device)
    made = make_plan(subject, choices(chosen), calibrated=calibrated, place=place_on(device))
    if data is not None and made.edits and any(one.nats is None for one in made.predictions):
        from tieaudit.trial import tried

        made = tried(subject.model, made, data, device)
    table: tuple[Choice, ...] = ()
    if not chosen["schemes"]:
        from tieaudit.comparison import compare
        from tieaudit.comparison import frontier as best

        every = compare(subject, calibrated=calibrated, deep=deep)
        if data is not None and calibrated is not None and subject.model.format in _WITHOUT_GRADIENTS:
            every, made = _with_losses(subject, every, made, data, calibrated, device)
        table = (*best(every), *(one for one in every if one.refused)) if frontier else every
        if plot is not None:
            from tieaudit.drawing import draw

            draw(every, best(every), plot)
    print_result(outcome.planned(subject.model, made, format_name, left=left(subject, made), choices=table))
    if made.refusals and not made.edits:
        sys.exit(2)


def _with_losses(
    subject: Subject, every: tuple[Choice, ...], made: Plan, data: Data, calibrated: Calibrated, device: str
) -> tuple[tuple[Choice, ...], Plan]:
    """The choices with their measured losses, and the plan with a note on those that have none."""
    from tieaudit.console import spinner
    from tieaudit.trial import compared

    with spinner("measuring the loss of each choice"):
        every, because = compared(subject, every, calibrated, data, device)
    return every, replace(made, notes=(*made.notes, because)) if because else made


def _check(plot: Path | None) -> None:
    """Before anything is read: whether a picture can be drawn there."""
    import importlib.util
    import os

    if plot is None:
        return
    if plot.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {plot}: expected a name that ends in .png or .svg")
    if os.path.lexists(plot):
        raise UsageError(f"--plot {plot}: exists already; nothing is ever overwritten")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", "plot", "drawing the frontier")
