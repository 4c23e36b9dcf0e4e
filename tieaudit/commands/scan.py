"""What is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tieaudit.commands import format_option, key_option, screen
from tieaudit.console import Command, OneOf, print_result, progress, say
from tieaudit.errors import TieAuditError, UsageError, in_one_line
from tieaudit.printable import N_MOST_MESSAGE, printable

if TYPE_CHECKING:
    from tieaudit.verdict import Report

    Render = Callable[[Sequence[Report], Sequence[tuple[str, str]], dict[str, object]], str]


_EPILOG = """\b
Examples:
  tieaudit scan model.onnx
  tieaudit scan ./my-model-folder --format json
  tieaudit scan last.ckpt --key state_dict_ema
  tieaudit scan ./my-model-folder --damage
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@key_option
@click.option("--inputs", type=click.Path(path_type=Path),
              help="Of a `package.module:factory`, sample inputs as an .npz; default: generated.")  # fmt: skip
@click.option("--damage", is_flag=True,
              help="How alike the weights of candidates are that change values, from a sample; of schemes with many "
              "classes the largest ones (plan looks at all).")  # fmt: skip
@click.option("--deep", is_flag=True, help="With --damage: read all of the weights that are compared, not a sample.")
@click.option("--device", type=OneOf(["auto", "cpu", "cuda"]), default="auto", show_default=True,
              help="With --damage: where to compare them.")  # fmt: skip
@format_option(["text", "json"])
def scan(
    paths: tuple[str, ...], key: str, inputs: Path | None, damage: bool, deep: bool, device: str, format_name: str
) -> None:
    """What is there: weights, roles, ties of every origin, findings.

    PATH is a model file, a folder, or a glob; a shard or a config.json means its model.

    Exit code: 0 looked, whatever it found · 2 unreadable, nothing to look at, or a crashed rule.
    """
    from tieaudit.load import locate
    from tieaudit.scan import scan as look_at

    if not damage and (deep or device != "auto"):
        raise UsageError("expected --damage with --deep and --device: nothing else compares weights by value")
    how: Any = {"damage": "deep" if deep else "sampled" if damage else "", "device": device}
    sources, errors = locate(paths)
    reports: list[Report] = []
    for source in sources:
        try:
            with progress(source.path.name) as shown:
                reports.append(look_at(source.load(key, inputs), progress=shown, **how))
        except (TieAuditError, OSError, RecursionError, MemoryError) as error:  # also a file that went away meanwhile
            errors.append((str(source.path), str(in_one_line(error, str(source.path)))))
    for _, message in errors:
        say(f"error: {printable(message, N_MOST_MESSAGE)}")
    if reports or format_name != "text":
        print_result(_report(format_name)(reports, errors, screen()))
    if errors or not reports or any(report.crashed or report.subject.found.unreadable for report in reports):
        sys.exit(2)


def _report(name: str) -> Render:
    from tieaudit.registry import named
    from tieaudit.reports import ReportFormat

    render: Render = named("reports", ReportFormat, name, "report format").render
    return render
