"""Commands: one file each, composed by `cli.py`. Here is what several of them share.

A command composes the stages and prints; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tieaudit.console import OneOf
from tieaudit.errors import UsageError

if TYPE_CHECKING:  # --help and --version answer at once: what reads models is imported by the commands that need it
    from tieaudit.calibrating import Data
    from tieaudit.change import Plan
    from tieaudit.merges import Calibrated
    from tieaudit.plan import Choices
    from tieaudit.verdict import Finding, Subject


def names_of(package: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What a shell offers for the name of a scheme, a merge policy or a rule (its code)."""

    def begun_with(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
        from tieaudit.audit import rules
        from tieaudit.merges import Merge
        from tieaudit.registry import discover
        from tieaudit.schemes import Scheme

        if package == "rules":
            known: list[str] = [*rules()]
        else:
            known = [*(discover("schemes", Scheme) if package == "schemes" else discover("merges", Merge))]
        return [name for name in known if name.upper().startswith(begun.upper())]

    return begun_with


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--scheme", "schemes", multiple=True, metavar="S", shell_complete=names_of("schemes"),
                     help="dedup (default), io, untie or declare; repeat for several, left to right."),
        click.option("--target", metavar="T", help="Be safe for ort-cpu, ort-cuda, transformers-5 or transformers-4."),
        click.option("--allow-lossy", is_flag=True, help="Tie weights that differ. Changes what the model computes."),
        click.option("--merge", metavar="M", shell_complete=names_of("merges"),
                     help="Values of a lossy tie: keep:head, mean … (see explain)."),
        click.option("--transposed-as", type=OneOf(["auto", "gemm", "gather", "fused"]), default="auto",
                     show_default=True, help="How an ONNX graph reads a tied matrix transposed."),
        click.option("--share-files/--no-share-files", default=None,
                     help="Whether ONNX files of a folder keep equal weights in one common data file: all of them, or "
                     "none. Default: those that are parts of one export."),
        click.option("--calibrate", type=click.Path(path_type=Path), metavar="DATA",
                     help="Run the model on this .npz of its inputs, or this text, to say what a lossy tie costs, and "
                     "for the policies that need it: frequency, regmean, gauss-newton, auto."),
        click.option("--tokenizer", type=click.Path(path_type=Path), metavar="DIR",
                     help="Folder of the tokenizer for a text. Default: the model's own folder."),
        click.option("--optimizer", type=OneOf(["adjust", "keep"]), default="adjust", show_default=True,
                     help="The optimizer's state in a checkpoint that is tied: as the tied model's, or as it is."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def format_option(names: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--format",
        "format_name",
        type=OneOf(names),
        default="text",
        show_default=True,
        help="How to print the result.",
    )


key_option = click.option(
    "--key", default="", metavar="K",
    help="Of a PyTorch checkpoint, what is kept under this key (dotted), or . for all of it. Default: the model's own.",
)  # fmt: skip


def choices(chosen: dict[str, Any]) -> Choices:
    from tieaudit.plan import Choices

    return Choices(
        schemes=tuple(chosen["schemes"]) or ("dedup",),
        target=chosen["target"],
        allow_lossy=chosen["allow_lossy"],
        merge=chosen["merge"],
        transposed_as=chosen["transposed_as"],
        share_files=chosen["share_files"],
        optimizer=chosen["optimizer"],
    )


def calibration(subject: Subject, chosen: dict[str, Any], device: str) -> tuple[Data | None, Calibrated | None]:
    """The data that --calibrate names and what it measured; nothing without it."""
    if chosen["calibrate"] is None:
        if chosen["tokenizer"] is not None:
            raise UsageError("expected --calibrate TEXT with --tokenizer: nothing else is made into ids")
        return None, None
    from tieaudit.calibrating import calibrate, members_of, read_data
    from tieaudit.console import spinner

    with spinner("running the model on the calibration data"):
        data = read_data(subject, chosen["calibrate"], chosen["tokenizer"], device)
        return data, calibrate(subject, data, members_of(subject, chosen["schemes"]), device)


def left(subject: Subject, plan: Plan) -> Sequence[Finding]:
    """What is wrong with a model for which a plan does nothing."""
    from tieaudit.audit import audit

    return () if plan.edits else audit(subject).findings


def screen() -> dict[str, object]:
    """What a report has to know of where it is shown."""
    import os
    import sys

    from tieaudit.config import Settings
    from tieaudit.console import on_terminal

    terminal = on_terminal(sys.stdout)
    return {
        # no-color.org: present and not empty; a dumb terminal shows escape codes as they are
        "color": terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
        "width": _width() if terminal else 100,
        "thresholds": Settings(),
    }


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns
