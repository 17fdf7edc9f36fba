"""`trustlog-replica application`: which version of the application is in force, and putting the next one in force."""

import asyncio
from pathlib import Path
from typing import Any

import click
from rich.console import Group as Lines

from replica.application import VERSION_MAX
from replica.cli.operating import CLUSTER, Operator, cluster_file, deadline_option, operated, refreshed
from replica.cluster.clusterfile import ClusterFile
from replica.operations.asking import ask_all
from replica.operations.versions import activate, in_force, not_ready_for, standings
from trustlog.cli.contract import CommandError, Exit, Output, example, grid, key_values, output_option

DEADLINE_S = 30.0

OPERATED = operated(DEADLINE_S, "f + 1 replicas must have answered alike")


@click.group(
    "application",
    short_help="Show the application's version in force, and put the next one in force.",
    epilog=example("trustlog-replica application show my-cluster"),
)
def application_commands() -> None:
    """Change what the application of a running cluster does: at one slot, for all replicas.

    CLUSTER is cluster.toml or its directory. First every replica gets the new code, one after the other; it goes on
    doing what the version in force does. Then the new version is put in force, and there is no way back.
    """


@application_commands.command(
    "show",
    short_help="Say which version is in force, and which ones the replicas know.",
    epilog=example("trustlog-replica application show my-cluster"),
)
@CLUSTER
@deadline_option(DEADLINE_S, "the replicas must have answered")
@output_option
def show_command(*, cluster: Path, deadline_s: float, output: Output) -> None:
    """Say which version of the application is in force, and which is the newest that each replica's code knows.

    In force is what f + 1 replicas say alike; what its code knows is each one's own word.
    """
    present = refreshed(cluster_file(cluster), deadline_s)
    _show(output, present)


@application_commands.command(
    "activate",
    short_help="Put a version in force.",
    epilog=example("trustlog-replica application activate my-cluster --version 1"),
)
@OPERATED
@click.option(
    "--version", type=click.IntRange(1, VERSION_MAX), required=True, help="Greater than the one that is in force."
)
@click.option("--force", is_flag=True, help="Do it although some replicas do not know it: those stop.")
@output_option
def activate_command(*, operator: Operator, version: int, force: bool, output: Output) -> None:
    """Have a version put in force: ordered like any operation, and in force from the next slot on.

    Refused unless all replicas answer and say that their code knows it: one that does not stops before that slot, and
    goes on when it has the code. With --force f + 1 that know it are enough, as when a machine is lost; fewer could not
    go on, so that is refused always. No version before comes back.
    """
    present = operator.present
    against, enough = not_ready_for(version, asyncio.run(ask_all(present)), present.genesis)
    if against and not (force and enough):
        text = f"version {version} was not put in force: {'; '.join(against)}"
        hint = (
            "install the new code there and start it; if that machine is lost: --force"
            if enough
            else f"install the new code: {present.genesis.quorum} replicas must know a version, or none could go on"
        )
        raise CommandError(text, hint, Exit.NEGATIVE, code="version-not-known")
    after = asyncio.run(activate(present, operator.key, version, deadline_s=operator.deadline_s))
    data: dict[str, Any] = {"version": version, "after": after}
    plain = [f"{name}={value}" for name, value in data.items()]
    output.result(data, plain, key_values({"version": version, "in force after slot": after}))


def _show(output: Output, present: ClusterFile) -> None:
    found = standings(asyncio.run(ask_all(present)))
    agreed = in_force(found, present.genesis)
    name = present.genesis.application
    rows = [
        {"number": one.number, "knows": one.known, "in_force": one.in_force, "problem": one.problem} for one in found
    ]
    data = {"application": name, "in_force": agreed, "replicas": rows}
    plain = [f"application={name} in_force={_word(agreed)}"]
    plain += [f"{one.number} {_word(one.known)} {_word(one.in_force)} {one.problem or '-'}" for one in found]
    table = grid(
        ["replica", "knows", "in force there", "problem"],
        [[one.number, _word(one.known), _word(one.in_force), one.problem or "-"] for one in found],
    )
    summary = {"application": name, "version in force": agreed if agreed is not None else "not known now"}
    output.result(data, plain, Lines(key_values(summary), table))


def _word(value: int | None) -> str:
    return "-" if value is None else str(value)
