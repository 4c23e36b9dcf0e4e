"""The page of anything that has a name."""

from __future__ import annotations

import click

from tieaudit.console import Command, print_result

_EPILOG = """\b
Examples:
  tieaudit explain TIE202
  tieaudit explain dedup
"""


def _names(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from tieaudit.explain import pages

    return [name for name in pages() if name.upper().startswith(begun.upper())]


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("name", required=False, shell_complete=_names)
def explain(name: str | None) -> None:
    """The page of a rule, a scheme, a merge policy or a relation.

    Without NAME: what there is, a line each. A family (TIE1) is listed likewise.

    Exit code: 0 printed · 2 no such name.
    """
    from tieaudit.explain import explain as page
    from tieaudit.explain import index

    print_result(index() if name is None else page(name))
