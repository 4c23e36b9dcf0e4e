"""The command line: the group of all commands. Results go to stdout, progress and errors to stderr.

Exit codes: see each command's help.
"""

from __future__ import annotations

import click

from tieaudit import __version__
from tieaudit.commands.apply import apply
from tieaudit.commands.check import check
from tieaudit.commands.diff import diff
from tieaudit.commands.explain import explain
from tieaudit.commands.lock import lock
from tieaudit.commands.plan import plan
from tieaudit.commands.scan import scan
from tieaudit.commands.verify import verify
from tieaudit.console import Commands

_EPILOG = """\b
Examples:
  tieaudit scan model.onnx
  tieaudit check models/ --diff
"""


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tieaudit")
def main() -> None:
    """Tell the truth about weight tying.

    \b
    scan says which weights of a model are tied, which claim to be, and which once were.
    check is the gate for CI: rules and a policy over all models of a repository.
    plan says what could be done, apply writes the repaired model, verify compares two models.
    lock keeps what is tied in a file, diff tells which ties two models do not share.
    explain prints the page of a rule, a scheme or a merge policy.

    Reads ONNX files, safetensors files, PyTorch checkpoints, exported programs (.pt2), live modules
    (package.module:factory) and Hugging Face folders. A model is only read: what is written goes beside it, under a
    new name. The one exception has to be asked for: check --fix --in-place.
    """


for _command in (scan, check, plan, apply, verify, diff, lock, explain):
    main.add_command(_command)
