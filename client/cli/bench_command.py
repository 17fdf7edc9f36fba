"""`trustlog-client bench`: measures a cluster that runs already."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from client.api import Client
from client.cli.running import Target, example
from client.errors import ClientError
from client.measure import KEY_BYTES, LEVELS, RUN_S, RUNS, VALUE_BYTES, Level, Plan, measure
from client.queries import ReplicaStatus, number_in
from client.surroundings import describe
from trustlog.cli.contract import FiniteFloat, Output, grid, output_option

Command = Callable[..., Any]
GENERATOR = "client"


def plan_options(command: Command) -> Command:
    """Add what both ways of measuring have in common: --runs, --seconds, --concurrency."""
    options = (
        click.option("--runs", type=click.IntRange(1, 1000), default=RUNS, show_default=True),
        click.option(
            "--seconds",
            type=FiniteFloat(0.1, 3600),
            default=RUN_S,
            show_default=True,
            help="Length of a run.",
        ),
        click.option(
            "--concurrency",
            "levels",
            type=click.IntRange(1, 16384),
            multiple=True,
            default=LEVELS,
            show_default=True,
            help="Operations under way at a time; may be given several times.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog=example("trustlog-client -c my-cluster bench --runs 3 --seconds 2 --concurrency 200"))
@plan_options
@output_option
@click.pass_obj
def bench(cluster: Target, *, runs: int, seconds: float, levels: Sequence[int], output: Output) -> None:
    """Measure this cluster: puts of 16-byte keys and 100-byte values, closed loop. It writes up to 100,000 keys.

    CPU time per operation is shown for replicas on this machine.
    """
    plan = Plan(tuple(levels), runs, seconds)

    async def work(client: Client) -> tuple[list[Level], list[ReplicaStatus]]:
        found = await client.status()
        return await measured(client, plan, local_pids(found)), found

    result, found = cluster.run(work)
    genesis = cluster.open().cluster.genesis
    show(output, result, report_of(found, genesis.ordering.label), describe())


def local_pids(found: Sequence[ReplicaStatus]) -> dict[str, int]:
    """Return the process ids of replicas that run on this machine, as far as their reports are borne out."""
    pids = {}
    for replica in found:
        pid = number_in(replica.report, "pid")
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        # A replica elsewhere may have a number that some other process has here.
        if pid and b"replica" in command:
            pids[f"replica {replica.number}"] = pid
    return pids


async def measured(client: Client, plan: Plan, pids: dict[str, int]) -> list[Level]:
    """Measure, telling on a terminal how far it is; a worker's error is raised as itself."""
    terminal = sys.stderr.isatty()

    def told(text: str) -> None:
        if terminal:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    try:
        return await measure(client, plan, {**pids, GENERATOR: os.getpid()}, told)
    except* ClientError as group:
        raise _first(group) from group
    finally:
        if terminal:
            click.echo("\r\x1b[K", nl=False, err=True)
        await asyncio.sleep(0)


def _first(group: BaseExceptionGroup[ClientError]) -> ClientError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, ClientError):
        raise TypeError("a group of client errors holds something else")
    return error


def report_of(found: Sequence[ReplicaStatus], ordering: str) -> dict[str, Any]:
    """Return what is measured, as the replicas report it."""
    durabilities = {str(replica.report.get("durability", "unknown")) for replica in found if replica.report}
    return {
        "replicas": len(found),
        "reachable": sum(1 for replica in found if replica.reachable),
        "ordering": ordering,
        "durability": ", ".join(sorted(durabilities)) or "unknown",
        "key_bytes": KEY_BYTES,
        "value_bytes": VALUE_BYTES,
        "operation": "put",
    }


def show(output: Output, levels: Sequence[Level], measured_cluster: dict[str, Any], machine: dict[str, Any]) -> None:
    """Print a measurement."""
    processes = list(levels[0].cpu_us_per_operation) if levels else []
    headings = ["at once", "ops/s", "min", "max", "p50 ms", "p99 ms"]
    headings += [f"{name.replace('replica ', 'r').replace(GENERATOR, 'cl')} µs" for name in processes]
    rows = [
        (
            level.concurrency,
            f"{level.ops_per_second:,.0f}",
            f"{level.slowest:,.0f}",
            f"{level.fastest:,.0f}",
            f"{level.p50_ms:.2f}",
            f"{level.p99_ms:.2f}",
            *(f"{level.cpu_us_per_operation[name]:.1f}" for name in processes),
        )
        for level in levels
    ]
    data = {
        "cluster": measured_cluster,
        "machine": machine,
        "levels": [level.as_data() for level in levels],
    }
    about = [f"{name}={value}" for name, value in {**measured_cluster, **machine}.items()]
    table = grid(headings, rows)
    if output.format == "plain":
        lines = ["\t".join(headings), *("\t".join(str(cell) for cell in row) for row in rows)]
        for line in [*about, *lines]:
            click.echo(line)
        return
    output.result(data, "", table)
    if output.format == "table":
        click.echo(
            "\nmedians over the runs, and the least and greatest rate; µs: CPU time per operation, cl is the client"
        )
        for line in about:
            click.echo(line)
