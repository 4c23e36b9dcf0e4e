"""Ties lost and gained between two models."""

from __future__ import annotations

import sys

import click

from tieaudit.commands import format_option
from tieaudit.console import Command, print_lines, print_result, progress

_EPILOG = """\b
Examples:
  tieaudit diff ./my-model-folder model.onnx
  tieaudit diff before.safetensors after.safetensors --format markdown
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("before")
@click.argument("after")
@click.option("--strict", is_flag=True, help="Exit 2 where a tie cannot be followed.")
@format_option(["text", "json", "markdown"])
def diff(before: str, after: str, strict: bool, format_name: str) -> None:
    """Ties lost and gained between two models, also of two formats.

    BEFORE and AFTER are each one model: a file, a folder or `package.module:factory`. Weights are matched by name, by
    value (transposed or in a narrower float type, too), by the end of their names, then by role, layer and shape.

    A tie is lost if its members are one value before, and after are stored more often or differ.

    Exit code: 0 no tie lost · 1 ties lost · 2 unreadable; with --strict, also a tie that cannot be followed.
    """
    from tieaudit.difference import difference
    from tieaudit.load import load_one
    from tieaudit.outcome import differing
    from tieaudit.scan import look

    subjects = []
    for path in (before, after):
        model = load_one(path)
        with progress(path) as shown:
            subjects.append(look(model, progress=shown))
    found = difference(*subjects)
    (print_result if format_name == "json" else print_lines)(
        differing(subjects[0].model, subjects[1].model, found, format_name)
    )
    doubt = strict and found.of("cannot tell")
    sys.exit(2 if doubt else 1 if found.of("lost") else 0)
