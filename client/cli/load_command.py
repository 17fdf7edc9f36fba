"""`trustlog-client load`: many records from a file or a pipe."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from client.api import Client
from client.cli.running import Target, as_command_error, example
from client.loader import CONCURRENCY, Loader, LoadError, Progress
from client.records import Format, RecordError, read_records
from trustlog.cli.contract import CommandError, Exit, Output, key_values, output_option

CONCURRENCY_MAX = 16384
SHOWN_EVERY_S = 0.1


@click.command(
    epilog=example(
        "trustlog-client -c my-cluster load words.tsv",
        "zcat words.jsonl.gz | trustlog-client -c my-cluster load - -o json",
    )
)
@click.argument("source", metavar="FILE|-", type=click.File("rb"))
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "tsv", "jsonl"]),
    default="auto",
    show_default=True,
    help="auto looks at the first line.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, CONCURRENCY_MAX),
    default=CONCURRENCY,
    show_default=True,
    help="Records under way at a time.",
)
@output_option
@click.pass_obj
def load(cluster: Target, *, source: BinaryIO, form: Format, concurrency: int, output: Output) -> None:
    """Put every record of a file, or of stdin: lines of KEY, tab, VALUE, or JSON lines {"key": …, "value": …}.

    A later line with the same key wins. At a line that is no record, loading stops; the lines before it are written,
    and the error says which line it is. Loading the same file again does no harm.
    """

    async def work(client: Client) -> Progress:
        with _bar(source) as advanced:
            return await Loader(client, concurrency, advanced).run(read_records(source, form))

    began = time.monotonic()
    try:
        progress = cluster.run(work)
    except LoadError as error:
        raise _stopped(error) from error
    seconds = time.monotonic() - began
    data: dict[str, object] = {
        "records": progress.records,
        "bytes": progress.bytes,
        "seconds": round(seconds, 3),
        "records_per_second": round(progress.records / seconds, 1),
    }
    output.result(data, [f"{name}={value}" for name, value in data.items()], key_values(data))


def _stopped(error: LoadError) -> CommandError:
    written = f"{error.written} records were written"
    cause = error.__cause__
    if isinstance(cause, ValueError):
        # A line that is no record names itself; one that no replica would take does not.
        text = str(cause) if isinstance(cause, RecordError) else f"line {error.line}: {cause}"
        return CommandError(
            f"{text}; {written}, all lines before it",
            "mend that line and load the file again, from there or from the beginning",
            Exit.USAGE,
            code="malformed-record",
        )
    if isinstance(cause, OSError):
        return CommandError(
            f"reading stopped before line {error.line}: {cause.strerror}; {written}",
            "load the file again; records that are there already do no harm",
            code="os-error",
        )
    known = as_command_error(cause) if isinstance(cause, Exception) else CommandError(str(error))
    return CommandError(
        f"stopped at line {error.line}: {known.message}; {written}",
        f"{known.hint}; load the file again from there, records that are there already do no harm",
        known.exit_code,
        code=known.code,
    )


@contextlib.contextmanager
def _bar(source: BinaryIO) -> Iterator[Callable[[Progress], None]]:
    """Show a bar on a terminal, by bytes read if the size is known; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    size = _size_of(source)
    columns = (
        TextColumn("loading"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("bytes, {task.fields[records]} records"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("load", total=size, records=0)
        shown = 0.0

        def advanced(progress: Progress) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= SHOWN_EVERY_S:
                shown = now
                bar.update(task, completed=progress.bytes, records=progress.records)

        yield advanced


def _size_of(source: BinaryIO) -> int | None:
    try:
        found = os.fstat(source.fileno())
    except (OSError, ValueError):
        return None
    return found.st_size or None
