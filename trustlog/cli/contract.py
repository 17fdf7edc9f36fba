"""What every program of this project promises to scripts and to people.

Output: ``-o/--output table|json|plain`` after the command's name; table on a terminal, plain otherwise.
With ``json``, stdout holds JSON documents and nothing else, errors included: each has ``"schema_version":
1``, an error is ``{"schema_version": 1, "error": {"code", "message", "hint", "exit"}}``. Otherwise errors
go to stderr as ``error: what happened`` and ``hint: what to do next``. Control characters in data never
reach a terminal.

Exit codes: 0 done; 1 a negative answer, a failed verification, damage or a failing disk; 2 used wrongly
(arguments, files that are missing or not accessible) or our output cannot be written; 3 nobody reachable, or
undecided within the deadline; 130 interrupted; 141 the reader of our output went away.

Output that cannot be written (a full disk, a closed stdout) is no answer, so never 1: exit 2, code
``output-failed``, always as text on stderr. What the command was to do may be done.

A command returns nothing, or an ``Exit`` to end with after it has printed its result; it raises
``CommandError`` (or click's errors, TrustLogError, OSError), and ``run`` turns those into the above.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar, cast

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from trustlog.errors import MisuseError, SealedStateError, TrustLogError, VerificationError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEMA_VERSION = 1
FORMATS = ("table", "json", "plain")

_EXIT_INTERRUPTED = 130
_EXIT_PIPE_CLOSED = 141
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

Command = TypeVar("Command", bound=Callable[..., Any])


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    NEGATIVE = 1
    USAGE = 2
    UNREACHABLE = 3


class CommandError(Exception):
    """A failure, with what its reader needs: what happened, what to do, a code for programs, an exit code."""

    def __init__(self, message: str, hint: str = "", exit_code: int = Exit.NEGATIVE, *, code: str = "failed") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.code = code


class OutputError(OSError):
    """Our own output cannot be written."""


class FiniteFloat(click.FloatRange):
    """A number within bounds. "nan" is a number to Python, and within all bounds."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse, or fail as a usage error."""
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number to count with", param, ctx)
        return number


def printable(text: str) -> str:
    """Return ``text`` with control, format and unassigned characters (newlines too) as visible escapes."""
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _UNPRINTABLE else char
        for char in text
    )


def key_values(pairs: Mapping[str, object]) -> Table:
    """Build a two-column table of names and values; values are made printable, and never taken as markup."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(Text(name), Text(printable(str(value))))
    return table


def grid(headings: Sequence[str], rows: Iterable[Sequence[object]], whole: Collection[str] = ()) -> Table:
    """Build a table with headings; cells are made printable and are never taken as markup.

    whole: the headings of columns whose cells are not broken, however narrow the terminal is.
    """
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(Text(heading), overflow="fold", no_wrap=heading in whole)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    return table


def example(*lines: str) -> str:
    """Build the ``epilog`` of a command: its example, kept line by line. Every command has one."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


class _Console(Console):
    """A console that leaves it to ``run`` what a reader that went away means; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Output:
    """Prints a command's results in the format its user chose."""

    def __init__(self, output_format: str | None = None) -> None:
        """Take one of FORMATS; None means table on a terminal, plain otherwise."""
        self.format = output_format or ("table" if sys.stdout.isatty() else "plain")

    def result(
        self, data: Mapping[str, object], plain: str | Sequence[str], table: RenderableType | None = None
    ) -> None:
        """Print one result: ``data`` as JSON, ``plain`` (one line per string) or ``table``, as chosen.

        ``data`` needs no schema version. A table's cells must be printable: use ``key_values`` or ``grid``.
        """
        if self.format == "json":
            _write(json.dumps({"schema_version": SCHEMA_VERSION, **data}))
        elif self.format == "table" and table is not None:
            _Console(file=sys.stdout, highlight=False).print(table)
        else:
            for line in [plain] if isinstance(plain, str) else plain:
                _write(printable(line))


def output_option(command: Command) -> Command:
    """Add ``-o/--output`` to a command, which then takes a parameter ``output: Output``."""
    option = click.option(
        "-o",
        "--output",
        type=click.Choice(FORMATS),
        callback=lambda _context, _parameter, value: Output(value),
        help="table (default on a terminal), plain (default otherwise) or json.",
    )
    return option(command)


def run(group: click.Group, argv: Sequence[str] | None = None, prog_name: str = "trustlog") -> NoReturn:
    """Run a program under the contract above and exit. ``argv`` is without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        code = _run(group, arguments, prog_name)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        code = _EXIT_PIPE_CLOSED
    except OutputError as error:
        _discard_output()
        failure = as_command_error(error, prog_name)
        _report(failure, as_json=False)
        code = failure.exit_code
    sys.exit(code)


class _OutputFile(io.FileIO):
    """Standard output, whose failures can be told from those of every other file."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


def _prepare_streams() -> None:
    """Make the standard streams usable whatever our caller did to them, and stdout's failures recognisable."""
    if sys.stdin is None:
        _occupy(0, os.O_RDONLY)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        _occupy(1, os.O_RDONLY)  # reading only: what is written to a closed stdout fails
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_OutputFile(1, "w", closefd=False)), encoding="utf-8")
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        old = sys.stdout
        raw = _OutputFile(old.fileno(), "w", closefd=False)
        buffered = isinstance(old.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw) if buffered else cast("io.BufferedWriter", raw),
            encoding=old.encoding,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
    if sys.stderr is None:
        _occupy(2, os.O_WRONLY)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _occupy(number: int, flags: int) -> None:
    """Give a closed standard stream's number to /dev/null, so that no file or socket gets it."""
    null = os.open(os.devnull, flags)
    if null != number:
        os.dup2(null, number)
        os.close(null)


def _discard_output() -> None:
    """Let stdout lead nowhere: at exit the interpreter flushes it once more, and must not fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _run(group: click.Group, arguments: list[str], prog_name: str) -> int:
    try:
        with group.make_context(prog_name, arguments.copy()) as context:
            result = group.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        failure = CommandError("interrupted", "", _EXIT_INTERRUPTED, code="interrupted")
    except (BrokenPipeError, OutputError):
        raise
    except click.exceptions.NoArgsIsHelpError as error:
        _write(error.format_message(), sys.stderr)
        return Exit.USAGE
    except (click.ClickException, CommandError, TrustLogError, OSError) as error:
        failure = as_command_error(error, _command_path(group, arguments, prog_name))
    else:
        return result if isinstance(result, Exit) else Exit.OK
    _report(failure, as_json=_wants_json(arguments))
    return failure.exit_code


def _command_path(group: click.Group, arguments: Sequence[str], prog_name: str) -> str:
    """Return which command was typed, for an error of click's that does not know it."""
    path, command = prog_name, cast("click.Command", group)
    for word in arguments:
        if isinstance(command, click.Group) and word in command.commands:
            path, command = f"{path} {word}", command.commands[word]
    return path


def as_command_error(error: Exception, prog_name: str = "trustlog") -> CommandError:
    """Give an expected failure its code, hint and exit code."""
    if isinstance(error, CommandError):
        return error
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else prog_name
        # Where click lists choices, it breaks lines.
        text = " ".join(error.format_message().split())
        return CommandError(text, f"see: {path} --help", Exit.USAGE, code="usage")
    if isinstance(error, VerificationError):
        return CommandError(str(error), "do not rely on this; ask for it again", code=error.reason)
    if isinstance(error, SealedStateError):
        return CommandError(str(error), "keep the files for inspection", code="damaged")
    if isinstance(error, MisuseError):
        return CommandError(str(error), f"see: {prog_name} --help", Exit.USAGE, code="misuse")
    if isinstance(error, OutputError):
        hint = "give the output room; what the command was to do may be done already"
        return CommandError(f"our output cannot be written: {error.strerror}", hint, Exit.USAGE, code="output-failed")
    if isinstance(error, (ConnectionError, TimeoutError)):
        hint = "check address and network, and try again"
        return CommandError(f"not reachable: {error}", hint, Exit.UNREACHABLE, code="unreachable")
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename is not None else ""
        if isinstance(error, PermissionError):
            where += f" (as user {os.geteuid()})"
        local = isinstance(
            error,
            (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
        )
        hint = "check the path and its permissions" if local else "check the disk"
        exit_code = Exit.USAGE if local else Exit.NEGATIVE
        return CommandError(f"{error.strerror or error}{where}", hint, exit_code, code="os-error")
    return CommandError(str(error))


def _wants_json(arguments: Sequence[str]) -> bool:
    """Read the output format where parsing has failed, perhaps before it came to the option."""
    wanted = False
    for position, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument in {"-o", "--output"}:
            wanted = arguments[position + 1 : position + 2] == ["json"]
        elif argument.startswith(("-o", "--output=")):
            wanted = argument in {"-ojson", "--output=json"}
    return wanted


def _report(failure: CommandError, *, as_json: bool) -> None:
    if as_json:
        error = {
            "code": failure.code,
            "message": failure.message,
            "hint": failure.hint,
            "exit": int(failure.exit_code),
        }
        _write(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}))
        return
    _write(f"error: {printable(failure.message)}", sys.stderr)
    if failure.hint:
        _write(f"hint: {printable(failure.hint)}", sys.stderr)


def _write(line: str, stream: TextIO | None = None) -> None:
    print(line, file=stream or sys.stdout)
