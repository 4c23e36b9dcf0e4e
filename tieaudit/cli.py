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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tieaudit")
def main() -> None:
    """Tell the truth about weight tying.

    \b
    scan says which weights of a model are tied, which claim to be, and which once were.
    apply writes the repaired model, verify proves that nothing else changed.
    lock keeps what is tied in a file, diff tells which ties two models do not share.

    Reads ONNX files, safetensors files, PyTorch checkpoints, exported programs (.pt2), live modules
    (package.module:factory) and Hugging Face folders. Nothing is ever written in place.
    """


for _command in (scan, check, plan, apply, verify, diff, lock, explain):
    main.add_command(_command)
