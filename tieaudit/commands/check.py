"""The gate for CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tieaudit.commands import names_of
from tieaudit.console import Command, OneOf, counting, print_lines, print_result, say
from tieaudit.errors import UsageError
from tieaudit.printable import N_MOST_MESSAGE, printable

if TYPE_CHECKING:
    from tieaudit.checked import Run
    from tieaudit.overhaul import Fixing
    from tieaudit.policy import Section
    from tieaudit.reports import ReportFormat

FORMATS = ("text", "github", "gitlab", "sarif", "junit", "json", "markdown")
"""Report formats of ours that show a run; a test compares them with the registry, which --help must not import."""


class _Formats(click.Choice[str]):
    """Our formats in the help, and besides them any that another package brings along."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if value in FORMATS else _format(str(value)).name


_EPILOG = """\b
Examples:
  tieaudit check
  tieaudit check models/ --format github --report sarif=tieaudit.sarif --report markdown=summary.md
  tieaudit check --fix --in-place
"""


@click.command(cls=Command, epilog=_EPILOG)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The policy, for all models. Default: the nearest tieaudit.toml or pyproject.toml upwards from each.",
)
@click.option(
    "--select",
    multiple=True,
    metavar="CODES",
    shell_complete=names_of("rules"),
    help="Rules to run instead of the policy's: TIE101,TIE2 …",
)
@click.option(
    "--extend-select", multiple=True, metavar="CODES", shell_complete=names_of("rules"), help="Rules to run besides."
)
@click.option("--ignore", multiple=True, metavar="CODES", shell_complete=names_of("rules"), help="Rules not to run.")
@click.option(
    "--expect",
    multiple=True,
    metavar="SCHEME",
    shell_complete=names_of("schemes"),
    help="Ties that must be there: io, three-way …",
)
@click.option("--since", metavar="REV", help="Only models of which git says that a file changed since REV.")
@click.option(
    "--format",
    "format_name",
    type=_Formats(FORMATS),
    default="text",
    show_default=True,
    help="How to print the result.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="FORMAT=FILE",
    help="Write the result to FILE as well, in this format; repeat for several.",
)
@click.option("--statistics", is_flag=True, help="With the text: how many findings each rule has.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Known findings, which do not count. Default: the policy's.",
)
@click.option("--write-baseline", is_flag=True, help="Make the findings of this run the known ones.")
@click.option("--fix", is_flag=True, help="Make the safe fixes, into --to DIR or --in-place. Exit code: what remains.")
@click.option(
    "--unsafe-fixes",
    is_flag=True,
    help="Also fixes that are right only if what a finding says is what was meant. None changes a value.",
)
@click.option("--diff", is_flag=True, help="Print what --fix would do, and write nothing.")
@click.option(
    "--to",
    "destination",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --fix: write mended models there, beside nothing else; the tree below PATH is repeated, of several "
    "below the folder that holds them all.",
)
@click.option("--in-place", is_flag=True, help="With --fix: replace the models' own files, proved first, all or none.")
@click.option("--require", type=OneOf(["structural", "regional", "end-to-end"]),
              help="With --fix: least level of proof. Default: regional; structural for bare tensors.")  # fmt: skip
@click.option(
    "--exit-zero",
    is_flag=True,
    help="Findings are exit code 0. What could not be checked is still 2, a fix that failed 1.",
)
@click.option("--strict", is_flag=True, help="What a rule cannot tell is exit code 2.")
@click.option(
    "--jobs", type=click.IntRange(1, 256), metavar="N", help="Processes at once. Default: one per core, 8 at most."
)
@click.option("--no-cache", is_flag=True, help="Read every model, and keep no answer.")
@click.option("--cache-dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Where answers are kept. Default: .tieaudit_cache beside the policy.")  # fmt: skip
def check(paths: tuple[str, ...], **chosen: Any) -> None:
    """The gate for CI: rules and policy over all models; exit code.

    PATH is a model file, a folder or a glob; a shard or a config.json means its model; a file that belongs to no model
    is passed over. Default: everything below the working directory that git does not ignore.

    Exit code: 0 clean · 1 findings · 2 could not do the whole job: unreadable, a crashed rule, nothing to check;
    with --strict also what cannot be told. 2 beats 1.
    """
    from tieaudit.patrol import Wanted, patrol

    files = [_report_file(text) for text in chosen["reports"]]
    fixing = _fixing(chosen)
    wanted = Wanted(
        paths=paths,
        config=chosen["config"],
        asked=_asked(chosen),
        since=chosen["since"],
        baseline=chosen["baseline"],
        write_baseline=chosen["write_baseline"],
        n_jobs=chosen["jobs"],
        cache_dir=chosen["cache_dir"],
        no_cache=chosen["no_cache"],
        strict=chosen["strict"],
        outputs=tuple(str(file) for _, file in files),
        fixing=fixing,
    )
    with counting("checking") as shown:
        found = patrol(wanted, shown)
    unwritten = [error for name, file in files if (error := _write(found.run, name, file)) is not None]
    if fixing is not None and fixing.only_show:
        _complain_of(found.run)
        print_lines("\n\n".join(found.notes) or "nothing to fix")
    else:
        for note in found.notes:  # before the result: the verdict is the last line on the screen
            say(printable(note, N_MOST_MESSAGE))
        if chosen["format_name"] != "text":  # which says the same to the same reader
            _complain_of(found.run)
        print_result(_text(found.run, chosen["format_name"], chosen["statistics"]))
    for error in unwritten:  # a full disk costs the report, not the result
        say(f"error: {printable(error.message, N_MOST_MESSAGE)}")
    code = max(found.exit_code, UsageError.exit_code if unwritten else 0)
    sys.exit(0 if code == 1 and chosen["exit_zero"] and not found.failed else code)


def _complain_of(run: Run) -> None:
    """What could not be read, on standard error: for a person who reads the log of a job that prints for a machine."""
    for path, message in run.errors:
        place = "" if path in message else f"{path}: "
        say(f"error: {printable(place + message, N_MOST_MESSAGE)}")


def _fixing(chosen: Mapping[str, Any]) -> Fixing | None:
    """What the options say about fixes; UsageError for what does not go together."""
    places = [name for name, given in (("--to", chosen["destination"]), ("--in-place", chosen["in_place"])) if given]
    if chosen["diff"] and places:
        raise UsageError(f"expected --diff without {places[0]}: it writes nothing")
    if chosen["fix"] and len(places) != 1 and not chosen["diff"]:
        raise UsageError("expected --to DIR or --in-place with --fix, one of them", hint="--diff shows the plan")
    if not chosen["fix"] and not chosen["diff"]:
        alone = [f"--{name.replace('_', '-')}" for name in ("unsafe_fixes", "require") if chosen[name]]
        if places or alone:
            raise UsageError(f"expected --fix with {(*places, *alone)[0]}")
        return None
    from tieaudit.overhaul import Fixing

    require = chosen["require"].replace("-", " ") if chosen["require"] else None
    return Fixing(chosen["in_place"], chosen["destination"], chosen["unsafe_fixes"], chosen["diff"], require)


def _asked(chosen: Mapping[str, Any]) -> Section | None:
    """What the command line says of rules, checked as a policy is."""
    from tieaudit.govern import spoken

    given = {name: _words(chosen[name]) for name in ("select", "extend_select", "ignore", "expect") if chosen[name]}
    return spoken(given) if given else None


def _words(texts: Sequence[str]) -> list[str]:
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def _report_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not file:
        raise UsageError(f"--report {text}: expected FORMAT=FILE with one of {', '.join(FORMATS)}")
    if not os.path.isdir(os.path.dirname(file) or "."):  # said now, not after the run
        raise UsageError(f"--report {text}: expected a folder that is there, found no {os.path.dirname(file)}")
    return name if name in FORMATS else _format(name).name, Path(file)


def _text(run: Run, name: str, statistics: bool) -> str:
    from tieaudit.commands import screen

    text: str = _format(name).of_run(run, {**screen(), "statistics": statistics})
    return text


def _write(run: Run, name: str, file: Path) -> UsageError | None:
    """Write a report; the error if that cannot be done."""
    from tieaudit.replacing import flows, replace_text, write_on

    text = _format(name).of_run(run, {"color": False, "width": 100, "statistics": True})
    try:
        (write_on if flows(file) else replace_text)(file, text)
    except UsageError as error:
        return error
    return None


def _format(name: str) -> ReportFormat:
    from tieaudit.registry import named
    from tieaudit.reports import ReportFormat

    found: ReportFormat = named("reports", ReportFormat, name, "report format")
    return found
