"""`trustlog-client`: the key-value store, raw operations, bulk loading, status and measuring, from a shell."""

import sys
from pathlib import Path
from typing import BinaryIO, NoReturn

import click

from client.api import DEADLINE_S, DEADLINE_S_MAX, Client
from client.cli.receipt_command import receipt_option, run_one
from client.cli.running import BytesArgument, Target, example, show, text_of, write_raw
from client.store import KeyValueCalls, check_stale
from replica.apps import kv
from trustlog.cli.build import version_option
from trustlog.cli.completion import answer_shell, completion_command
from trustlog.cli.contract import Exit, FiniteFloat, Output, grid, output_option, printable, run
from trustlog.cli.lazy import LazyCommands
from trustlog.cli.passphrases import passphrase_option

SCAN_KEYS_MAX = 100_000
VALUE_BYTES_READ = 8 * 1024 * 1024
KEY = click.argument("key", type=BytesArgument())
target = click.pass_obj


_COMMANDS = LazyCommands(
    {
        "load": "client.cli.load_command:load",
        "status": "client.cli.status_command:status",
        "bench": "client.cli.bench_command:bench",
        "gateway": "client.cli.gateway_command:gateway",
        "watch": "client.cli.watch_command:watch",
        "receipt": "client.cli.receipt_command:receipt_commands",
        "keys": "client.cli.keys_command:keys_commands",
    }
)


@click.group(
    commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(
        "export TRUSTLOG_CLUSTER=my-cluster",
        "trustlog-client put greeting hello",
        "trustlog-client get greeting",
        "trustlog-client status",
    ),
)
@click.option(
    "-c",
    "--cluster",
    "directory",
    metavar="DIR",
    envvar="TRUSTLOG_CLUSTER",
    type=click.Path(path_type=Path),
    help="Directory with cluster.toml and the folder client.  [env: TRUSTLOG_CLUSTER]",
)
@click.option(
    "--deadline",
    metavar="SECONDS",
    type=FiniteFloat(0, DEADLINE_S_MAX, min_open=True),
    default=DEADLINE_S,
    show_default=True,
    help="How long an operation may take.",
)
@passphrase_option
@version_option
@click.pass_context
def cli(ctx: click.Context, directory: Path | None, deadline: float, passphrase_file: Path | None) -> None:
    """Talk to a cluster of replicas. Every answer is what f+1 of them agree on.

    Exit codes: 0 done, 1 a negative answer (no such key, not swapped, refused), 2 used wrongly or the output
    cannot be written, 3 not reachable or undecided within the deadline.
    """
    ctx.obj = Target(directory, deadline, passphrase_file)


@cli.command(
    epilog=example(
        "trustlog-client -c my-cluster put greeting hello",
        "trustlog-client -c my-cluster put picture --file picture.png",
    )
)
@KEY
@click.argument("value", type=BytesArgument(), required=False)
@click.option("--file", "source", type=click.File("rb"), help="Take the value from a file, - for stdin.")
@receipt_option
@output_option
@target
def put(
    cluster: Target,
    *,
    key: bytes,
    value: bytes | None,
    source: BinaryIO | None,
    receipt: Path | None,
    output: Output,
) -> None:
    """Set KEY to VALUE.

    A key has 1 to 4096 bytes; key and value together have at most 1 MiB, unless cluster.toml says otherwise.
    """
    if source is not None and value is None:
        # One byte more than any cluster takes, so that a huge file is refused and not read.
        value = source.read(VALUE_BYTES_READ + 1)
    elif source is not None or value is None:
        raise click.UsageError("give either VALUE or --file")
    content = value
    replaced, more = run_one(cluster, lambda calls: calls.put(key, content), receipt)
    data: dict[str, object] = {**show("key", key), "replaced": replaced, **more}
    output.result(data, "replaced" if replaced else "created")


@cli.command(
    epilog=example(
        "trustlog-client -c my-cluster get greeting", "trustlog-client -c my-cluster get picture -o plain > picture.png"
    )
)
@KEY
@click.option("--stale", is_flag=True, help="Ask f+1 replicas without ordering: sooner, perhaps not the latest.")
@output_option
@target
def get(cluster: Target, *, key: bytes, stale: bool, output: Output) -> Exit:
    """Print the value of KEY; exit 1 if it has none. With -o plain: its bytes and nothing else.

    A key has 1 to 4096 bytes.
    """
    value = cluster.run(lambda client: client.stale_get(key) if stale else client.get(key))
    data: dict[str, object] = {**show("key", key), "found": value is not None, "stale": stale}
    if value is None:
        if output.format == "json":
            output.result(data, "")
        else:
            click.echo(f"no such key: {printable(text_of(key))}", err=True)
        return Exit.NEGATIVE
    if output.format == "json":
        output.result({**data, **show("value", value)}, "")
    elif sys.stdout.isatty():
        click.echo(printable(text_of(value)))
    else:
        write_raw(value)
    return Exit.OK


@cli.command("del", epilog=example("trustlog-client -c my-cluster del greeting"))
@KEY
@receipt_option
@output_option
@target
def delete(cluster: Target, *, key: bytes, receipt: Path | None, output: Output) -> Exit:
    """Remove KEY; exit 1 if it has no value.

    A key has 1 to 4096 bytes.
    """
    deleted, more = run_one(cluster, lambda calls: calls.delete(key), receipt)
    output.result({**show("key", key), "deleted": deleted, **more}, "deleted" if deleted else "absent")
    return Exit.OK if deleted else Exit.NEGATIVE


@cli.command(
    epilog=example(
        "trustlog-client -c my-cluster cas greeting hello goodbye",
        "trustlog-client -c my-cluster cas lock mine --absent",
    )
)
@KEY
@click.argument("values", metavar="[EXPECTED] NEW", type=BytesArgument(), nargs=-1)
@click.option("--absent", is_flag=True, help="Expect that KEY has no value; then give NEW only.")
@receipt_option
@output_option
@target
def cas(
    cluster: Target, *, key: bytes, values: tuple[bytes, ...], absent: bool, receipt: Path | None, output: Output
) -> Exit:
    """Set KEY to NEW if its value is EXPECTED; exit 1, and show its value, if not.

    A key has 1 to 4096 bytes; key and values together have at most 1 MiB, unless cluster.toml says otherwise.
    """
    if len(values) != (1 if absent else 2):
        raise click.UsageError("give KEY EXPECTED NEW, or KEY NEW --absent")
    expected = None if absent else values[0]
    result, more = run_one(cluster, lambda calls: calls.cas(key, expected, values[-1]), receipt)
    data: dict[str, object] = {**show("key", key), "swapped": result.swapped, **more}
    plain = "swapped"
    if not result.swapped:
        data["found"] = result.present is not None
        plain = "not swapped: the key has no value"
        if result.present is not None:
            data.update(show("value", result.present))
            plain = f"not swapped: the value is {text_of(result.present)}"
    output.result(data, plain)
    return Exit.OK if result.swapped else Exit.NEGATIVE


# A negative amount looks like an option.
@cli.command(
    context_settings={"ignore_unknown_options": True},
    epilog=example("trustlog-client -c my-cluster incr visitors", "trustlog-client -c my-cluster incr balance -25"),
)
@KEY
@click.argument("amount", type=int, default=1)
@receipt_option
@output_option
@target
def incr(cluster: Target, *, key: bytes, amount: int, receipt: Path | None, output: Output) -> None:
    """Add AMOUNT (default 1) to the whole number at KEY and print the sum.

    A key has 1 to 4096 bytes; the sum must fit 64 bits.
    """
    number, more = run_one(cluster, lambda calls: calls.incr(key, amount), receipt)
    output.result({**show("key", key), "number": number, **more}, str(number))


@cli.command(
    epilog=example(
        "trustlog-client -c my-cluster scan user/ --limit 20",
        "trustlog-client -c my-cluster scan -o json | jq -r .items[].key",
    )
)
@click.argument("prefix", type=BytesArgument(), default=b"")
@click.option("--limit", type=click.IntRange(1, SCAN_KEYS_MAX), default=100, show_default=True)
@click.option("--after", type=BytesArgument(), default=b"", help="Begin above this key.")
@output_option
@target
def scan(cluster: Target, *, prefix: bytes, limit: int, after: bytes, output: Output) -> None:
    """Print the keys that begin with PREFIX and their values, in byte order.

    With -o plain, key and value are separated by a tab and control characters in them are escaped; JSON is exact.
    """

    async def pages(client: Client) -> tuple[list[tuple[bytes, bytes]], bool]:
        items: list[tuple[bytes, bytes]] = []
        position, more = after, True
        while more and len(items) < limit:
            page = await client.scan_page(prefix, limit=min(limit - len(items), kv.SCAN_LIMIT_MAX), after=position)
            items += page.items
            more = page.more and bool(page.items)
            position = items[-1][0] if items else position
        return items, more

    items, more = cluster.run(pages)
    if output.format == "plain":
        for key, value in items:
            click.echo(f"{printable(text_of(key))}\t{printable(text_of(value))}")
    else:
        listed = [{**show("key", key), **show("value", value)} for key, value in items]
        rows = [(text_of(key), text_of(value)) for key, value in items]
        output.result({"items": listed, "more": more}, "", grid(("key", "value"), rows))
    if more and output.format != "json":
        click.echo(f"more keys follow; go on with --after '{printable(text_of(items[-1][0]))}'", err=True)


@cli.command(
    "exec",
    epilog=example("trustlog-client -c my-cluster exec increment", "trustlog-client -c my-cluster exec --hex 0200016b"),
)
@click.argument("operation", type=BytesArgument())
@click.option("--hex", "as_hex", is_flag=True, help="OPERATION is in hexadecimal digits.")
@click.option("--stale", is_flag=True, help="Ask f+1 replicas without ordering; only for operations that read.")
@receipt_option
@output_option
@target
def execute(
    cluster: Target, *, operation: bytes, as_hex: bool, stale: bool, receipt: Path | None, output: Output
) -> None:
    """Run an OPERATION of whatever application the cluster has, as its bytes, and print the result's bytes."""
    if as_hex:
        try:
            operation = bytes.fromhex(operation.decode())
        except ValueError:
            raise click.UsageError("--hex wants an even number of hexadecimal digits") from None

    if stale and receipt is not None:
        raise click.UsageError("there is no receipt of what is not ordered: leave --stale or --receipt out")

    async def ask(calls: KeyValueCalls) -> bytes:
        if not stale:
            return await calls.execute(operation)
        answer = await calls.stale(operation)
        check_stale(answer)
        return answer.value

    result, more = run_one(cluster, ask, receipt)
    if output.format == "json":
        output.result({**show("result", result), "stale": stale, **more}, "")
    elif sys.stdout.isatty():
        click.echo(printable(text_of(result)))
    else:
        write_raw(result)


cli.add_command(completion_command(cli, "trustlog-client"))


def main(argv: list[str] | None = None) -> NoReturn:
    """Run `trustlog-client` and exit."""
    answer_shell(cli, "trustlog-client")
    run(cli, argv, prog_name="trustlog-client")


if __name__ == "__main__":
    main()
