"""The rewrite, proved and delivered."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tieaudit.commands import calibration, choices, format_option, key_option, left, plan_options
from tieaudit.console import Command, OneOf, not_negative, print_result, spinner
from tieaudit.errors import UsageError

if TYPE_CHECKING:
    from tieaudit.change import Kind


_EPILOG = """\b
Examples:
  tieaudit apply model.onnx --scheme dedup --to model-tied.onnx
  tieaudit apply ./my-model-folder --scheme dedup --to ./my-model-tied
  tieaudit apply ./my-model-folder --scheme io --allow-lossy --merge gauss-newton --calibrate text.txt --to ./tied
  tieaudit apply model.pt --to model.safetensors
  tieaudit apply ./folder-with-pytorch_model.bin --container safetensors --to ./folder-with-safetensors
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path", required=False)
@plan_options
@click.option(
    "--to",
    "destination",
    type=click.Path(path_type=Path),
    help="Where to write; must not exist. Without it, print the plan.",
)
@click.option("--container", "kind", type=OneOf(["safetensors", "torch"]),
              help="Write the weights as safetensors or as PyTorch does (in a folder: pytorch_model.bin), ties kept. "
              "Without --scheme nothing else is done. Default: what the name of --to says.")  # fmt: skip
@click.option("--require", type=OneOf(["structural", "regional", "end-to-end"]),
              help="Least level of proof for delivery. Default: regional; structural for bare tensors.")  # fmt: skip
@click.option("--device", type=OneOf(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where to run the proof, and the model on calibration data.")  # fmt: skip
@click.option("--inputs", type=click.Path(path_type=Path),
              help="Inputs for the proof, an .npz; default: generated from the signature.")  # fmt: skip
@click.option(
    "--max-drift", type=float, callback=not_negative, help="Largest output difference that a lossy plan may cause."
)
@click.option("--strict", is_flag=True, help="If any part of the plan is refused, deliver nothing.")
@click.option(
    "--undo", type=click.Path(path_type=Path), metavar="RECEIPT", help="Take a delivery back, given its receipt."
)
@key_option
@format_option(["text", "json"])
def apply(
    path: str | None,
    destination: Path | None,
    kind: Kind | None,
    require: str | None,
    device: str,
    inputs: Path | None,
    max_drift: float | None,
    strict: bool,
    undo: Path | None,
    key: str,
    format_name: str,
    **chosen: Any,
) -> None:
    """Plan, write, read back, prove, deliver, with a receipt. The input is only read.

    With --calibrate the loss on the half of the data to which nothing was fitted is measured before and after.

    Where --to or --container names another container than PATH's, the model is converted and keeps its ties.

    Exit code: 0 delivered, or nothing to do · 1 a proof failed, nothing delivered · 2 refused, or a proof could
    not run, nothing delivered.
    """
    if undo is not None:
        from tieaudit.deliver import undo as take_back
        from tieaudit.outcome import undone

        print_result(undone(undo, take_back(undo), format_name))
        return
    if path is None:
        raise UsageError("expected a PATH, or --undo RECEIPT")
    from tieaudit import outcome
    from tieaudit.apply import check_kind
    from tieaudit.convert import container_for, convert
    from tieaudit.load import load_one
    from tieaudit.plan import plan as make_plan
    from tieaudit.rewrite import stamps
    from tieaudit.scan import look

    model = load_one(path, together=bool(chosen["share_files"]), key=key)
    seen = stamps(model)
    subject = look(model)
    into = container_for(model, destination, kind)
    data, calibrated = calibration(subject, chosen, device)
    if into is not None:
        made = convert(subject, into, choices(chosen) if chosen["schemes"] else None, calibrated)
    else:
        if destination is not None:  # also where there is nothing to do: a conversion that is not made would seem done
            check_kind(Path(model.path), destination)
        made = make_plan(subject, choices(chosen), calibrated=calibrated)
    refused = bool(made.refusals) and (strict or not made.edits)
    if destination is None or refused or not made.edits and into is None:
        wrong, asked = left(subject, made), destination is not None
        print_result(outcome.planned(model, made, format_name, left=wrong, asked_to_write=asked))
        sys.exit(2 if refused else 0)
    from tieaudit.apply import apply as carry_out
    from tieaudit.inputs import read_inputs

    given = read_inputs(inputs) if inputs is not None else None
    with spinner("writing and proving"):
        done = carry_out(
            model,
            made,
            destination,
            require=require.replace("-", " ") if require else None,
            device=device,
            inputs=given,
            max_drift=max_drift,
            seen=seen,
            data=data,
        )
    print_result(outcome.applied(model, done, format_name))
