"""Two models on the same inputs; survival of ties; receipts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tieaudit.commands import format_option, key_option
from tieaudit.console import Command, OneOf, not_negative, print_result, spinner
from tieaudit.errors import UsageError

_EPILOG = """\b
Examples:
  tieaudit verify model.onnx model-tied.onnx
  tieaudit verify my_package.models:make_untied my_package.models:make_tied
  tieaudit verify --receipt model-tied.onnx.receipt.json
  tieaudit verify my_package.models:make_model --survival
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("before", required=False)
@click.argument("after", required=False)
@click.option("--device", type=OneOf(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where to run.")  # fmt: skip
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Inputs as an .npz; default: generated from the signature."
)
@click.option("--max-drift", type=float, callback=not_negative,
              help="Largest output difference to accept; default: the noise floor.")  # fmt: skip
@click.option("--gradients/--no-gradients", default=None,
              help="Training parity, too. Default: of two live modules of at most 1 GiB in float64.")  # fmt: skip
@click.option(
    "--receipt", type=click.Path(path_type=Path), help="Check that input and output are what this receipt says."
)
@click.option(
    "--survival", is_flag=True, help="Which everyday operations break the ties of BEFORE, a `package.module:factory`."
)
@key_option
@format_option(["text", "json"])
def verify(
    before: str | None,
    after: str | None,
    device: str,
    inputs: Path | None,
    max_drift: float | None,
    gradients: bool | None,
    receipt: Path | None,
    survival: bool,
    key: str,
    format_name: str,
) -> None:
    """Run both models on the same inputs and compare.

    BEFORE and AFTER are two models of one signature: ONNX, Hugging Face folders, live modules
    (`package.module:factory`, whose code is run), or one of each. With --survival, the ties of one live module through
    copies, files, exports and distributed wrapping: kept, lost or error, and remedies.

    Checkpoints and safetensors files, which nothing runs, are compared by their values.

    Exit code: 0 equal, or drift within the limit · 1 differs · 2 could not run. With --survival: 0 tried · 2 could not
    run.
    """
    if survival:
        from tieaudit.outcome import survived
        from tieaudit.survival.apart import survival_of

        with spinner("trying everyday operations"):
            found = survival_of(before, after)
        print_result(survived(str(before), found, format_name))
        return
    if receipt is not None:
        from tieaudit.deliver import check_receipt
        from tieaudit.outcome import checked

        problems = check_receipt(receipt)
        print_result(checked(receipt, problems, format_name))
        sys.exit(1 if problems else 0)
    if before is None or after is None:
        raise UsageError("expected two models, BEFORE and AFTER, or --receipt RECEIPT")
    from tieaudit import outcome
    from tieaudit.apply import unused
    from tieaudit.inputs import read_inputs
    from tieaudit.load import load_one
    from tieaudit.proving import with_peaks
    from tieaudit.verify import compare

    given = read_inputs(inputs) if inputs is not None else None
    one, other = load_one(before, key=key), load_one(after, key=key)
    how: Any = {"device": device, "inputs": given, "max_drift": max_drift, "gradients": gradients}
    with spinner("running both models"):
        proof = with_peaks(compare(one, other, **how))
    if given is not None and (reason := unused(proof)) is not None:
        raise UsageError(f"{inputs}: the given inputs could not be used: {reason}")
    print_result(outcome.compared(one, other, proof, format_name))
    ran = [level for level in proof.levels if level.outcome != "not run"]
    sys.exit(1 if proof.failed else 0 if ran else 2)
