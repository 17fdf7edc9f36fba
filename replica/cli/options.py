"""What several commands of `trustlog-replica` take: types of parameters, and options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource

from replica.application import ApplicationLoadError, load_application
from replica.cluster.clusterfile import ORDERINGS, parse_address
from replica.cluster.pbft import PBFT
from replica.cluster.provision import DEFAULT_APPLICATION
from replica.core.genesis import Ordering
from replica.core.quorum import FAULTS_MAX
from trustlog.cli.contract import CommandError, Exit

PROGRAM = "trustlog-replica"

Command = TypeVar("Command", bound=Callable[..., Any])


class Hosts(click.ParamType[tuple[str, ...]]):
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


class Address(click.ParamType[tuple[str, int]]):
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


NEW_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
FAULTS = click.option(
    "--f",
    "f",
    type=click.IntRange(1, FAULTS_MAX),
    default=1,
    show_default=True,
    help="Faulty replicas to survive; there are 2f + 1 replicas (3f + 1 with pbft).",
)


LOG_BACKEND = click.option(
    "--log-backend",
    type=click.Choice(["process", "software"]),
    default="process",
    show_default=True,
    help="What keeps a replica's log: a program of its own, or the replica itself.",
)


ENCRYPT_STORE = click.option(
    "--encrypt-store",
    is_flag=True,
    help="Seal payloads at rest with a key that the log's program, or its TPM, keeps; it cannot be changed later.",
)


def agreed_options(command: Command) -> Command:
    """Add what all replicas of a new cluster agree on; it cannot be changed later."""
    options = (
        click.option(
            "--ordering",
            type=click.Choice(list(ORDERINGS)),
            default=Ordering.THREE_PHASE.label,
            show_default=True,
            help="two-phase saves one message delay (MinBFT); pbft: a baseline without trusted logs, in memory.",
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


FOLDER = click.argument("folder", metavar="DIR/replica-N", type=click.Path(path_type=Path))


def check_application(name: str) -> None:
    """Find a mistake in --app now, not when the first replica starts."""
    try:
        load_application(name)
    except ApplicationLoadError as error:
        raise CommandError(f"--app: {error}", exit_code=Exit.USAGE, code="application") from error


def refuse_log_options(ordering: str) -> None:
    """Refuse options of a trusted log for a cluster that has none, instead of passing them over."""
    context = click.get_current_context()
    for name, option in (("log_backend", "--log-backend"), ("encrypt_store", "--encrypt-store")):
        given = context.get_parameter_source(name) not in {None, ParameterSource.DEFAULT}
        if ordering == PBFT.label and given:
            raise click.UsageError(f"{option} belongs to trusted logs, and with --ordering pbft there are none")
