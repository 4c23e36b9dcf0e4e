"""What could be done."""

from __future__ import annotations

import sys
from typing import Any

import click

from tieaudit.commands import choices, format_option, key_option, left, plan_options
from tieaudit.console import Command, print_result

_EPILOG = """\b
Examples:
  tieaudit plan model.onnx
  tieaudit plan ./my-model-folder --scheme io --allow-lossy --merge keep:head
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("path")
@plan_options
@key_option
@format_option(["text", "json"])
def plan(path: str, key: str, format_name: str, **chosen: Any) -> None:
    """What could be done and what it would save; writes nothing.

    Exit code: 0 printed · 2 everything was refused.
    """
    from tieaudit import outcome
    from tieaudit.load import load_one
    from tieaudit.plan import plan as make_plan
    from tieaudit.scan import look

    subject = look(load_one(path, together=bool(chosen["share_files"]), key=key))
    made = make_plan(subject, choices(chosen))
    print_result(outcome.planned(subject.model, made, format_name, left=left(subject, made)))
    if made.refusals and not made.edits:
        sys.exit(2)
