"""`trustlog-replica`: makes clusters and runs replicas, under the contract of `trustlog.cli.contract`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import click
from click.core import ParameterSource
from rich.console import Group as Lines
from rich.text import Text

from replica.application import ApplicationLoadError, load_application
from replica.cli.dev import run_development_cluster
from replica.cli.inspect import inspect_command
from replica.cluster.clusterfile import ClusterFile, parse_address
from replica.cluster.home import Durability, LogFormat, LogLevel, load_home
from replica.cluster.provision import (
    CLIENT_NAME,
    DEFAULT_APPLICATION,
    DEFAULT_BASE_PORT,
    DEFAULT_HOST,
    assemble,
    init_cluster,
    keygen,
    load_public_part,
    make_client,
    replica_folder_name,
)
from replica.cluster.strict_toml import ConfigError
from replica.core.genesis import Ordering
from replica.core.quorum import FAULTS_MAX
from replica.sim.command import sim_command
from trustlog import TrustLogError, log_id
from trustlog.cli.contract import CommandError, Exit, Output, grid, key_values, output_option, run

PROGRAM = "trustlog-replica"
_ORDERINGS = {ordering.label: ordering for ordering in Ordering}

Command = TypeVar("Command", bound=Callable[..., Any])


def _example(*lines: str) -> str:
    # The first character tells click to leave the lines as they are.
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


class _Commands(click.Group):
    """Turns configuration errors into the contract's: their texts already say what to do."""

    def invoke(self, ctx: click.Context) -> object:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise CommandError(str(error), exit_code=Exit.USAGE, code="configuration") from error


class _Hosts(click.ParamType[tuple[str, ...]]):
    """Host names or addresses with commas between them."""

    name = "host,host,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split, or fail as a usage error. What makes a host valid is checked where the cluster is made."""
        if isinstance(value, tuple):
            return value
        hosts = tuple(host.strip() for host in str(value).split(","))
        if not all(hosts):
            self.fail("an empty host between two commas", param, ctx)
        return hosts


class _Address(click.ParamType[tuple[str, int]]):
    """host:port, an IPv6 address in brackets."""

    name = "host:port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Split, or fail as a usage error."""
        if isinstance(value, tuple):
            return cast("tuple[str, int]", value)
        try:
            return parse_address(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_NEW_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
_FAULTS = click.option(
    "--f",
    "f",
    type=click.IntRange(1, FAULTS_MAX),
    default=1,
    show_default=True,
    help="Faulty replicas to survive; there are 2f + 1 replicas.",
)


def _agreed_options(command: Command) -> Command:
    """Add what all replicas of a new cluster agree on; it cannot be changed later."""
    options = (
        click.option(
            "--ordering",
            type=click.Choice(list(_ORDERINGS)),
            default=Ordering.THREE_PHASE.label,
            show_default=True,
            help="two-phase saves one message delay (MinBFT).",
        ),
        click.option(
            "--app",
            "application",
            metavar="MODULE:CLASS",
            default=DEFAULT_APPLICATION,
            show_default=True,
            help="The application; it must be importable on every replica.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(
    cls=_Commands,
    epilog=_example("trustlog-replica dev"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="trustlog", message="%(prog)s %(version)s")
def cli() -> None:
    """Make clusters of 2f + 1 replicas, and run them."""


@cli.command(
    "init",
    short_help="Make a whole cluster in a new directory.",
    epilog=_example("trustlog-replica init my-cluster --f 1", "trustlog-replica run my-cluster/replica-0"),
)
@_NEW_DIRECTORY
@_FAULTS
@click.option("--hosts", type=_Hosts(), default=DEFAULT_HOST, show_default=True, help="One for all, or one each.")
@click.option(
    "--base-port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_BASE_PORT,
    show_default=True,
    help="Port of the first replica on a host, the next one has the next; 0: free ones of this machine.",
)
@click.option("--name", help="A name for people to know the cluster by.  [default: DIR's]")
@_agreed_options
@output_option
def init_command(
    *,
    directory: Path,
    f: int,
    hosts: tuple[str, ...],
    base_port: int,
    name: str | None,
    ordering: str,
    application: str,
    output: Output,
) -> None:
    """Make a whole cluster in the new directory DIR: cluster.toml, a folder per replica, a client's key.

    All private keys are made here. Where each machine should make its own, use keygen and assemble.
    """
    _check_application(application)
    cluster = init_cluster(
        directory,
        f=f,
        hosts=hosts,
        base_port=base_port,
        name=name,
        ordering=_ORDERINGS[ordering],
        application=application,
    )
    _show_cluster(output, cluster, directory / "cluster.toml", directory)


@cli.command(
    "keygen",
    short_help="Make one replica's private folder.",
    epilog=_example("trustlog-replica keygen my-cluster/replica-0 --number 0 --address 192.0.2.10:7100"),
)
@_NEW_DIRECTORY
@click.option("--number", type=click.IntRange(0, 2 * FAULTS_MAX), required=True, help="From 0 to 2f.")
@click.option("--address", type=_Address(), required=True, help="Where the others will reach this replica.")
@output_option
def keygen_command(*, directory: Path, number: int, address: tuple[str, int], output: Output) -> None:
    """Make one replica's private folder DIR on this machine, and the public file to send to the assembler."""
    public_file = keygen(directory, number, *address)
    part = load_public_part(public_file)
    data = {
        "number": number,
        "address": part.place.address,
        "folder": str(directory),
        "public_file": str(public_file),
        "certificate_sha256": part.place.fingerprint.hex(),
        "log_id": log_id(part.member.log_public_key).hex(),
    }
    next_step = f"next: send {public_file} to whoever runs {PROGRAM} assemble"
    output.result(data, [str(public_file)], Lines(key_values(data), Text(next_step)))


@cli.command(
    "client-key",
    short_help="Make a client's private folder.",
    epilog=_example("trustlog-replica client-key my-cluster/client"),
)
@_NEW_DIRECTORY
@output_option
def client_key_command(*, directory: Path, output: Output) -> None:
    """Make a client's private folder DIR with a new key, for a machine where `init` was not run."""
    public_key = make_client(directory).public_key.hex()
    data = {"folder": str(directory), "public_key": public_key}
    output.result(data, public_key, key_values(data))


@cli.command(
    "assemble",
    short_help="Write the cluster file from public files.",
    epilog=_example("trustlog-replica assemble replica-*.public.toml --out cluster.toml"),
)
@click.argument("public_files", metavar="PUBLIC.toml…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="cluster.toml", show_default=True)
@click.option("--name", default="trustlog", show_default=True, help="A name for people.")
@_agreed_options
@output_option
def assemble_command(
    *,
    public_files: tuple[Path, ...],
    out: Path,
    name: str,
    ordering: str,
    application: str,
    output: Output,
) -> None:
    """Write the cluster file from the public files of replicas 0 to 2f.

    Copy it, unchanged, to every replica and every client.
    """
    cluster = assemble(public_files, out, name=name, ordering=_ORDERINGS[ordering], application=application)
    _show_cluster(output, cluster, out, None)


@cli.command("run", short_help="Run one replica.", epilog=_example("trustlog-replica run my-cluster/replica-0"))
@click.argument("folder", metavar="DIR/replica-N", type=click.Path(path_type=Path))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Over replica.toml.")
@click.option("--log-format", type=click.Choice(["auto", "console", "json"]), help="Over replica.toml.")
@click.option("--durability", type=click.Choice(["disk", "memory"]), help="Over replica.toml.")
@output_option
def run_command(
    *,
    folder: Path,
    log_level: LogLevel | None,
    log_format: LogFormat | None,
    durability: Durability | None,
    output: Output,
) -> None:
    """Run one replica until SIGTERM or Ctrl-C."""
    # Imported here: the other commands need no daemon, and answer sooner without it.
    from replica.shell import daemon  # noqa: PLC0415

    home = load_home(folder)
    if output.format == "json":
        log_format = log_format or "json"
    settings = dataclasses.replace(
        home.settings,
        log_level=log_level or home.settings.log_level,
        log_format=log_format or home.settings.log_format,
        durability=durability or home.settings.durability,
    )
    try:
        status = daemon.run(dataclasses.replace(home, settings=settings))
    except daemon.StartError as error:
        if isinstance(error.__cause__, TrustLogError):
            # The log's own texts name its directory already.
            raise daemon.StartError(str(error.__cause__)) from error
        raise
    raise click.exceptions.Exit(status)


@cli.command(
    "dev",
    short_help="Run a whole cluster in this terminal.",
    epilog=_example("trustlog-replica dev my-cluster"),
)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@_FAULTS
@click.option(
    "--base-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the first replica of a new cluster.  [default: free ones]",
)
@_agreed_options
@output_option
@click.pass_context
def dev_command(
    ctx: click.Context,
    *,
    directory: Path | None,
    f: int,
    base_port: int,
    ordering: str,
    application: str,
    output: Output,
) -> Exit:
    """Run a whole cluster in this terminal, until Ctrl-C; it is made first if DIR does not exist.

    Without DIR, the cluster is made in a temporary directory. A replica that ends is not started again. The options
    say how a new cluster is made; given for one that exists, they must be what it was made with.
    """
    names = {"f": "--f", "base_port": "--base-port", "ordering": "--ordering", "application": "--app"}
    given = {option for name, option in names.items() if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    _check_application(application)
    return run_development_cluster(
        directory,
        f=f,
        base_port=base_port,
        ordering=_ORDERINGS[ordering],
        application=application,
        as_json=output.format == "json",
        given=given,
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    run(cli, argv, PROGRAM)


def _check_application(name: str) -> None:
    """Find a mistake in --app now, not when the first replica starts."""
    try:
        load_application(name)
    except ApplicationLoadError as error:
        raise CommandError(f"--app: {error}", exit_code=Exit.USAGE, code="application") from error


def _show_cluster(output: Output, cluster: ClusterFile, file: Path, directory: Path | None) -> None:
    genesis = cluster.genesis
    replicas = [
        {
            "number": place.number,
            "address": place.address,
            "certificate_sha256": place.fingerprint.hex(),
            "log_id": log_id(member.log_public_key).hex(),
        }
        for place, member in zip(cluster.replicas, genesis.members, strict=True)
    ]
    summary: dict[str, object] = {
        "cluster_file": str(file),
        "cluster_id": cluster.cluster_id.hex(),
        "file_sha256": cluster.digest.hex(),
        "name": genesis.name,
        "f": genesis.f,
        "ordering": genesis.ordering.label,
        "application": genesis.application,
    }
    next_step = f"next: copy {file} to every replica and client, each beside its folder"
    if directory is not None:
        for replica in replicas:
            replica["folder"] = str(directory / replica_folder_name(cast("int", replica["number"])))
        summary["client"] = str(directory / CLIENT_NAME)
        next_step = f"next: {PROGRAM} run {replicas[0]['folder']}, and so on; or: {PROGRAM} dev {directory}"
    plain = [f"{key}={value}" for key, value in summary.items()]
    plain += [f"replica-{replica['number']}={replica['address']}" for replica in replicas]
    table = grid(
        ["replica", "address", "log id"],
        [[r["number"], r["address"], f"{str(r['log_id'])[:16]}…"] for r in replicas],
    )
    output.result({**summary, "replicas": replicas}, plain, Lines(key_values(summary), "", table, "", Text(next_step)))


cli.add_command(inspect_command)
cli.add_command(sim_command)


if __name__ == "__main__":
    main()
