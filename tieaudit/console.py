"""What stands between the commands and the terminal: errors as one line, interrupts, closed and full outputs.

No command prints by itself: `print_result` is the way to stdout, and whatever a command raises ends in `Commands`.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from tieaudit.errors import TieAuditError, UsageError, in_one_line
from tieaudit.printable import N_MOST_MESSAGE, inert, printable

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it: no command's own verdict."""
TRACEBACK_VARIABLE = "TIEAUDIT_TRACEBACK"
_ARGUMENTS = "tieaudit.arguments"


class OneOf(click.Choice[str]):
    """A choice of words; of a misspelt one the nearest is named."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word, as it is spelt here; UsageError for another one."""
        if value in self.choices:
            return str(value)
        from tieaudit.registry import nearest

        option = f"{param.opts[0]}: " if param is not None else ""
        known = ", ".join(self.choices)
        raise UsageError(f"{option}expected one of {known}, found {value!r}", hint=nearest(str(value), self.choices))


class Command(click.Command):
    """A command whose help needs no reader."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _help_for_nobody(), _in_our_words(ctx):
            return super().parse_args(ctx, args)


class Commands(click.Group):
    """A group that suggests the nearest command for a misspelt one, and out of which no traceback comes."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from tieaudit.registry import choose

            choose({name: name for name in self.list_commands(ctx)}, args[0], "command")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)  # an unexpected error shall say what was being worked on
        with _help_for_nobody(), _in_our_words(ctx):
            return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Like click's, but every error of the tool is one line on stderr and its own exit code."""
        try:
            return super().main(*args, **kwargs)
        except TieAuditError as error:
            complain(error)
            sys.exit(error.exit_code)
        except BrokenPipeError:  # click's own complaint about the arguments, to a standard error that nobody reads
            _hush(sys.stderr)
            sys.exit(UsageError.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        """Like click's, but an interrupt has its usual code, and a fault of ours is one line, too."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every character of a message
                stream.reconfigure(errors="backslashreplace")
        try:
            with _ended_in_order(), _in_our_words(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted; nothing was left half done")
            sys.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, TieAuditError):
            raise
        except Exception as error:
            if TRACEBACK_VARIABLE in os.environ:
                raise
            raise in_one_line(error, shlex.join(["tieaudit", *ctx.meta.get(_ARGUMENTS, ())])) from error


@contextmanager
def _in_our_words(context: click.Context) -> Iterator[None]:
    """What click says of arguments, as all else is said: one line, and a second one with what to do."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise UsageError(_said_of(error), hint=_help_about(error, error.ctx or context)) from error


def _said_of(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption):
        return f"no option is called {error.option_name!r}"
    if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Argument):
        return f"expected {error.param.make_metavar(error.ctx)}, found nothing" if error.ctx else "expected an argument"
    if isinstance(error, click.BadParameter) and error.param is not None and error.param.opts:
        return f"{error.param.opts[0]}: {error.message}".rstrip(".")
    said = error.format_message().rstrip(".")
    return said[:1].lower() + said[1:]


def _help_about(error: click.UsageError, context: click.Context) -> str:
    """The nearest option; how a path is given that looks like one; or else what shows how the command is used."""
    if isinstance(error, click.NoSuchOption):
        if error.possibilities:
            return f"did you mean {sorted(error.possibilities)[0]}?"
        words: list[str] = context.find_root().meta.get(_ARGUMENTS, [])
        if named := [word for word in words if word.startswith("-") and os.path.lexists(word)]:
            return f"a path that begins with a dash is written ./{named[0]}"
    if isinstance(error, click.MissingParameter):
        return " ".join(context.get_usage().split()).replace("Usage:", "usage:")
    return f"`{context.command_path} --help` shows how it is used"


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """While this lasts, SIGTERM unwinds the stack like an interrupt does, so that no temporary file is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(error: TieAuditError) -> None:
    """One line on stderr, and a second one with what to do."""
    say(f"error: {printable(error.message, N_MOST_MESSAGE)}")
    if error.hint:
        say(f"  {printable(error.hint, N_MOST_MESSAGE)}")


def say(line: str) -> None:
    """One line on stderr; whether anybody reads it changes nothing about the exit code."""
    try:
        click.echo(inert(line), err=True)  # the log of a CI service has both streams
    except OSError:
        _hush(sys.stderr)


def _hush(stream: Any) -> None:
    """What is still in the buffer of a stream that cannot be written must not be tried again at the exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _help_for_nobody() -> Iterator[None]:
    """Help and version are printed by click: `--help | true` has ended well, too."""
    try:
        yield
    except BrokenPipeError:
        _hush(sys.stdout)
        raise click.exceptions.Exit(0) from None


def print_result(text: str) -> None:
    """Print a result, which ends in one line break whether its text does or not.

    A reader that has gone (`| head`) changes nothing about the exit code; a full disk does.
    """
    try:
        _print_whole(text if text.endswith("\n") else f"{text}\n")
    except OSError as error:
        _hush(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            message = f"standard output: the result cannot be printed: {error.strerror}"
            raise TieAuditError(message, hint="all else was done; what was delivered stays") from error


def _print_whole(text: str) -> None:
    """All of a text on stdout. Where nothing is buffered (PYTHONUNBUFFERED, as images for containers have it), Python
    drops in silence what the system did not take at once, on a full disk for instance."""
    raw = getattr(sys.stdout, "buffer", None)
    if not isinstance(raw, io.RawIOBase):
        click.echo(text, nl=False, color=True)
        return
    sys.stdout.flush()
    left = memoryview(text.encode(sys.stdout.encoding, sys.stdout.errors or "strict"))
    while left:
        left = left[raw.write(left) or 0 :]


def print_lines(text: str) -> None:
    """Print a result for people, in which no CI service finds a command, whatever names it shows."""
    print_result("\n".join(map(inert, text.split("\n"))))


def on_terminal(stream: Any) -> bool:
    """Whether a standard stream is a terminal; it is None where whoever started us closed it."""
    return stream is not None and bool(stream.isatty())


def not_negative(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A limit of 0 or more, or none. Every comparison with NaN is false, so a NaN would let everything pass."""
    if value is not None and not value >= 0:
        raise click.BadParameter(f"expected a number of 0 or more, found {value}")
    return value


@contextmanager
def progress(name: str) -> Iterator[Callable[[int], None] | None]:
    """A progress line for the bytes compared in full, on a terminal only."""
    if not on_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"comparing {printable(name, 40)}", total=None)
        yield lambda n_bytes: bar.advance(task, n_bytes)


@contextmanager
def counting(what: str) -> Iterator[Callable[[str, int], None]]:
    """A progress line over many models, on a terminal only: told of each that is done, and how many there are."""
    if not on_terminal(sys.stderr):
        yield lambda path, n_all: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def done(path: str, n_all: int) -> None:
            bar.update(task, advance=1, total=n_all, description=f"{what} {printable(path, 40)}")

        yield done


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """A sign of life while something is done, on a terminal only."""
    if not on_terminal(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield
