"""`trustlog-client watch`: changes as they happen."""

import sys

import click

from client.api import Client
from client.cli.running import BytesArgument, Target, example, show, text_of
from client.watch import Change, Position, WatchAhead, WatchGone, parse_position
from trustlog.cli.contract import CommandError, Exit, Output, output_option, printable


class PositionArgument(click.ParamType[Position]):
    """A slot, or a place within one, as a watch shows it."""

    name = "slot[.place]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Position:
        """Parse, or fail as a usage error."""
        try:
            return value if isinstance(value, Position) else parse_position(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(
    epilog=example(
        "trustlog-client -c my-cluster watch user/",
        "trustlog-client -c my-cluster watch user/ --after 1234 -o json",
    )
)
@click.argument("prefix", type=BytesArgument(), default=b"")
@click.option("--after", type=PositionArgument(), help="Resume after this position.  [default: from now on]")
@click.option("--count", type=click.IntRange(min=1), help="End after so many changes.")
@output_option
@click.pass_obj
def watch(cluster: Target, *, prefix: bytes, after: Position | None, count: int | None, output: Output) -> None:
    """Print what changes at keys that begin with PREFIX, in order, until Ctrl-C.

    Each change is one that f+1 replicas told alike. Its position is where --after resumes, missing and repeating
    nothing. Replicas keep changes for a bounded while; exit 1 says that those after the position are gone, or
    that there is no such position yet.

    With -o plain, each change is a line with tabs: position; put, delete, or put-large for a value that is not told;
    key; value, or its length. With -o json, a JSON document a line.
    """

    async def follow(client: Client) -> None:
        left = count
        async with client.watch(prefix, after=after) as changes:
            # Whoever starts this to see what is done next must know when that is.
            click.echo(f"watching from {changes.position} on", err=True)
            async for change in changes:
                _print(change, output)
                left = None if left is None else left - 1
                if left == 0:
                    return

    try:
        cluster.run(follow)
    except CommandError as error:
        if isinstance(error.__cause__, WatchGone):
            hint = "watch from now on, without --after, and read the keys anew: trustlog-client scan"
            raise CommandError(error.message, hint, Exit.NEGATIVE, code="gone") from error
        if isinstance(error.__cause__, WatchAhead):
            hint = "watch from now on, without --after; is the position of this cluster?"
            raise CommandError(error.message, hint, Exit.NEGATIVE, code="ahead") from error
        raise


def _print(change: Change, output: Output) -> None:
    kind = "delete" if change.deleted else "put" if change.is_whole else "put-large"
    data: dict[str, object] = {"position": str(change.position), "slot": change.slot, "change": kind}
    data.update(show("key", change.key))
    shown = ""
    if change.value is not None:
        data.update(show("value", change.value))
        shown = text_of(change.value)
    elif not change.deleted:
        data["size"] = change.size
        shown = str(change.size)
    if output.format == "json":
        output.result(data, "")
    else:
        click.echo("\t".join((str(change.position), kind, printable(text_of(change.key)), printable(shown))))
    sys.stdout.flush()
