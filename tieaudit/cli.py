"""The command line. It composes the stages and prints; it decides nothing.

Results go to stdout, progress and errors to stderr. Exit codes: see each command's help.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tieaudit import __version__
from tieaudit.console import Commands, not_negative, on_terminal, print_result, say
from tieaudit.console import progress as _progress
from tieaudit.console import spinner as _spinner
from tieaudit.errors import TieAuditError, UsageError, in_one_line
from tieaudit.printable import N_MOST_MESSAGE, printable

if TYPE_CHECKING:  # --help and --version answer at once: what reads models is imported by the commands that need it
    from tieaudit.change import Kind, Plan
    from tieaudit.plan import Choices
    from tieaudit.verdict import Finding, Report, Subject

    Render = Callable[[Sequence[Report], Sequence[tuple[str, str]], dict[str, object]], str]

_EPILOG_SCAN = """\b
Examples:
  tieaudit scan model.onnx
  tieaudit scan ./my-model-folder --format json
  tieaudit scan last.ckpt --key state_dict_ema
"""
_EPILOG_PLAN = """\b
Examples:
  tieaudit plan model.onnx
  tieaudit plan ./my-model-folder --scheme io --allow-lossy --merge keep:head
"""
_EPILOG_APPLY = """\b
Examples:
  tieaudit apply model.onnx --scheme dedup --to model-tied.onnx
  tieaudit apply ./my-model-folder --scheme dedup --to ./my-model-tied
  tieaudit apply model.pt --to model.safetensors
  tieaudit apply ./folder-with-pytorch_model.bin --container safetensors --to ./folder-with-safetensors
"""
_EPILOG_VERIFY = """\b
Examples:
  tieaudit verify model.onnx model-tied.onnx
  tieaudit verify my_package.models:make_untied my_package.models:make_tied
  tieaudit verify --receipt model-tied.onnx.receipt.json
  tieaudit verify my_package.models:make_model --survival
"""
_EPILOG_EXPLAIN = """\b
Examples:
  tieaudit explain TIE202
  tieaudit explain dedup
"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tieaudit")
def main() -> None:
    """Tell the truth about weight tying.

    \b
    scan says which weights of a model are tied, which claim to be, and which once were.
    apply writes the repaired model, verify proves that nothing else changed.

    Reads ONNX files, safetensors files, PyTorch checkpoints and Hugging Face folders. Nothing is ever written in place.
    """


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--scheme", "schemes", multiple=True, metavar="S",
                     help="dedup (default), io, untie or declare; repeat for several, left to right."),
        click.option("--target", metavar="T", help="Be safe for ort-cpu, ort-cuda, transformers-5 or transformers-4."),
        click.option("--allow-lossy", is_flag=True, help="Tie weights that differ. Changes what the model computes."),
        click.option("--merge", metavar="M", help="Values of a lossy tie: keep:head (default), keep:embedding, mean."),
        click.option("--transposed-as", type=click.Choice(["auto", "gemm", "gather", "fused"]), default="auto",
                     show_default=True, help="How an ONNX graph reads a tied matrix transposed."),
        click.option("--share-files/--no-share-files", default=None,
                     help="Whether ONNX files of a folder keep equal weights in one common data file: all of them, or "
                     "none. Default: those that are parts of one export."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _format_option(names: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--format",
        "format_name",
        type=click.Choice(names),
        default="text",
        show_default=True,
        help="How to print the result.",
    )


_key_option = click.option(
    "--key", default="", metavar="K",
    help="Of a PyTorch checkpoint, what is kept under this key (dotted), or . for all of it. Default: the model's own.",
)  # fmt: skip


@main.command(epilog=_EPILOG_SCAN)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_key_option
@click.option("--inputs", type=click.Path(path_type=Path),
              help="Of a `package.module:factory`, sample inputs as an .npz; default: generated.")  # fmt: skip
@_format_option(["text", "json"])
def scan(paths: tuple[str, ...], key: str, inputs: Path | None, format_name: str) -> None:
    """What is there: weights, roles, ties of every origin, candidates, findings.

    PATH is a model file, a folder, or a glob; a shard or a config.json means its model.

    Exit code: 0 looked, whatever it found · 2 unreadable, nothing to look at, or a crashed rule.
    """
    from tieaudit.load import locate
    from tieaudit.scan import scan as look_at

    sources, errors = locate(paths)
    reports: list[Report] = []
    for source in sources:
        try:
            with _progress(source.path.name) as progress:
                reports.append(look_at(source.load(key, inputs), progress=progress))
        except (TieAuditError, OSError, RecursionError, MemoryError) as error:  # also a file that went away meanwhile
            errors.append((str(source.path), str(in_one_line(error, str(source.path)))))
    if reports or format_name != "text":
        print_result(_report(format_name)(reports, errors, _settings()))
    for _, message in errors:
        say(f"error: {printable(message, N_MOST_MESSAGE)}")
    if errors or not reports or any(report.crashed or report.subject.found.unreadable for report in reports):
        sys.exit(2)


@main.command(epilog=_EPILOG_PLAN)
@click.argument("path")
@_plan_options
@_key_option
@_format_option(["text", "json"])
def plan(path: str, key: str, format_name: str, **chosen: Any) -> None:
    """What could be done and what it would save; writes nothing.

    Exit code: 0 printed · 2 everything was refused.
    """
    from tieaudit import outcome
    from tieaudit.load import load_one
    from tieaudit.plan import plan as make_plan
    from tieaudit.scan import look

    subject = look(load_one(path, together=bool(chosen["share_files"]), key=key))
    made = make_plan(subject, _choices(chosen))
    print_result(outcome.planned(subject.model, made, format_name, left=_left(subject, made)))
    if made.refusals and not made.edits:
        sys.exit(2)


@main.command(epilog=_EPILOG_APPLY)
@click.argument("path", required=False)
@_plan_options
@click.option(
    "--to",
    "destination",
    type=click.Path(path_type=Path),
    help="Where to write; must not exist. Without it, print the plan.",
)
@click.option("--container", "kind", type=click.Choice(["safetensors", "torch"]),
              help="Write the weights as safetensors or as PyTorch does (in a folder: pytorch_model.bin), ties kept. "
              "Without --scheme nothing else is done. Default: what the name of --to says.")  # fmt: skip
@click.option("--require", type=click.Choice(["structural", "regional", "end-to-end"]),
              help="Least level of proof for delivery. Default: regional; structural for bare tensors.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="Where to run the proof.")  # fmt: skip
@click.option("--inputs", type=click.Path(path_type=Path),
              help="Inputs for the proof, an .npz; default: generated from the signature.")  # fmt: skip
@click.option(
    "--max-drift", type=float, callback=not_negative, help="Largest output difference that a lossy plan may cause."
)
@click.option("--strict", is_flag=True, help="If any part of the plan is refused, deliver nothing.")
@click.option(
    "--undo", type=click.Path(path_type=Path), metavar="RECEIPT", help="Take a delivery back, given its receipt."
)
@_key_option
@_format_option(["text", "json"])
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
    if into is not None:
        made = convert(subject, into, _choices(chosen) if chosen["schemes"] else None)
    else:
        if destination is not None:  # also where there is nothing to do: a conversion that is not made would seem done
            check_kind(Path(model.path), destination)
        made = make_plan(subject, _choices(chosen))
    refused = bool(made.refusals) and (strict or not made.edits)
    if destination is None or refused or not made.edits and into is None:
        left, asked = _left(subject, made), destination is not None
        print_result(outcome.planned(model, made, format_name, left=left, asked_to_write=asked))
        sys.exit(2 if refused else 0)
    from tieaudit.apply import apply as carry_out
    from tieaudit.inputs import read_inputs

    given = read_inputs(inputs) if inputs is not None else None
    with _spinner("writing and proving"):
        done = carry_out(
            model,
            made,
            destination,
            require=require.replace("-", " ") if require else None,
            device=device,
            inputs=given,
            max_drift=max_drift,
            seen=seen,
        )
    print_result(outcome.applied(model, done, format_name))


@main.command(epilog=_EPILOG_VERIFY)
@click.argument("before", required=False)
@click.argument("after", required=False)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
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
@_key_option
@_format_option(["text", "json"])
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

    Exit code: 0 equal, or drift within the limit · 1 differs · 2 could not run. With --survival: 0 tried · 2 could not
    run.
    """
    if survival:
        from tieaudit.outcome import survived
        from tieaudit.survival.apart import survival_of

        with _spinner("trying everyday operations"):
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
    with _spinner("running both models"):
        proof = with_peaks(compare(one, other, **how))
    if given is not None and (reason := unused(proof)) is not None:
        raise UsageError(f"{inputs}: the given inputs could not be used: {reason}")
    print_result(outcome.compared(one, other, proof, format_name))
    ran = [level for level in proof.levels if level.outcome != "not run"]
    sys.exit(1 if proof.failed else 0 if ran else 2)


@main.command(epilog=_EPILOG_EXPLAIN)
@click.argument("name", required=False)
def explain(name: str | None) -> None:
    """The page of a rule, a scheme, a merge policy or a relation; without a name, what there is.

    Exit code: 0 printed · 2 no such name.
    """
    from tieaudit.explain import explain as page
    from tieaudit.explain import index

    print_result(index() if name is None else page(name))


def _left(subject: Subject, plan: Plan) -> Sequence[Finding]:
    """What is wrong with a model for which a plan does nothing."""
    from tieaudit.audit import audit

    return () if plan.edits else audit(subject).findings


def _choices(chosen: dict[str, Any]) -> Choices:
    from tieaudit.plan import Choices

    return Choices(
        schemes=tuple(chosen["schemes"]) or ("dedup",),
        target=chosen["target"],
        allow_lossy=chosen["allow_lossy"],
        merge=chosen["merge"],
        transposed_as=chosen["transposed_as"],
        share_files=chosen["share_files"],
    )


def _report(name: str) -> Render:
    from tieaudit.registry import choose, discover
    from tieaudit.reports import ReportFormat

    render: Render = choose(discover("reports", ReportFormat), name, "report format").render
    return render


def _settings() -> dict[str, object]:
    import os

    from tieaudit.config import Settings

    terminal = on_terminal(sys.stdout)
    return {
        "color": terminal and "NO_COLOR" not in os.environ,
        "width": _width() if terminal else 100,
        "thresholds": Settings(),
    }


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns
