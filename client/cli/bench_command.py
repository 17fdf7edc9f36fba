"""`trustlog-client bench`: measures a cluster that runs already."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import click

from client.api import Client
from client.cli.bench_report import report_of, show
from client.cli.running import Target, example
from client.errors import ClientError
from client.measure import (
    CLIENTS_MAX,
    GENERATOR,
    LEVELS,
    RUN_S,
    RUNS,
    VALUE_BYTES,
    Level,
    Plan,
    measure,
    with_more_clients,
)
from client.queries import ReplicaStatus, number_in
from client.surroundings import describe
from trustlog.cli.contract import FiniteFloat, Output, output_option

Command = Callable[..., Any]
RATE_MAX = 1_000_000.0
VALUE_BYTES_MAX = 1_000_000  # with its key it fits into an operation of 1 MiB
# Opening the first of many clients may take longer than an operation.
OPENING_S = 30.0


def plan_options(command: Command) -> Command:
    """Add what both ways of measuring have in common: what is asked of the cluster, and where to draw it."""
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
            help="Closed loop: operations under way at a time; may be given several times.",
        ),
        click.option(
            "--rate",
            "rates",
            type=FiniteFloat(0, RATE_MAX, min_open=True),
            multiple=True,
            help="Open loop instead: operations that are meant to start per second, whatever became of those "
            "before; latency counts from the intended start. May be given several times.",
        ),
        click.option(
            "--value-bytes",
            "value_sizes",
            type=click.IntRange(0, VALUE_BYTES_MAX),
            multiple=True,
            default=(VALUE_BYTES,),
            show_default=True,
            help="May be given several times.",
        ),
        click.option(
            "--clients",
            type=click.IntRange(1, CLIENTS_MAX),
            default=1,
            show_default=True,
            help="Clients, each with a key and connections of its own, that share the operations.",
        ),
        click.option(
            "--plot",
            type=click.File("w", encoding="utf-8", lazy=False),
            help="Draw latency over throughput into this file, as SVG.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def plan_of(
    runs: int, seconds: float, levels: Sequence[int], rates: Sequence[float], value_sizes: Sequence[int]
) -> Plan:
    """Return the plan that the options ask for; UsageError if they contradict each other."""
    if rates and tuple(levels) != LEVELS:
        raise click.UsageError("give either --concurrency (closed loop) or --rate (open loop)")
    sizes, asked = tuple(dict.fromkeys(value_sizes)), tuple(dict.fromkeys(rates))
    return Plan(tuple(dict.fromkeys(levels)), runs, seconds, rates=asked, value_sizes=sizes)


@click.command(
    epilog=example(
        "trustlog-client -c my-cluster bench --runs 3 --seconds 2 --concurrency 200",
        "trustlog-client -c my-cluster bench --rate 1000 --rate 5000 --plot latency.svg",
        "trustlog-client -c my-cluster bench --clients 200 --concurrency 200 --value-bytes 1024",
    )
)
@plan_options
@output_option
@click.pass_obj
def bench(
    cluster: Target,
    *,
    runs: int,
    seconds: float,
    levels: Sequence[int],
    rates: Sequence[float],
    value_sizes: Sequence[int],
    clients: int,
    plot: IO[str] | None,
    output: Output,
) -> None:
    """Measure this cluster by puts of 16-byte keys, in a closed or an open loop. It writes up to 100,000 keys.

    CPU time per operation is shown for replicas on this machine, and for this program.
    """
    plan = plan_of(runs, seconds, levels, rates, value_sizes)

    async def work(client: Client) -> tuple[list[Level], list[ReplicaStatus]]:
        found = await client.status()
        return await measured(client, clients, plan, local_pids(found), cluster.deadline_s), found

    result, found = cluster.run(work)
    genesis = cluster.open().cluster.genesis
    show(output, result, report_of(found, genesis.ordering.label, clients), describe(), plot)


def local_pids(found: Sequence[ReplicaStatus]) -> dict[str, int]:
    """Return the process ids of replicas, and of their logs' services, that run on this machine.

    As far as their reports are borne out: elsewhere, a number may be some other process's here.
    """
    pids = {}
    for replica in found:
        pid = number_in(replica.report, "pid")
        if _runs_here(pid, b"replica"):
            pids[f"replica {replica.number}"] = pid
            service = _within(_within(replica.report, "log"), "service")
            if _runs_here(number_in(service, "pid"), b"trustlog.service"):
                pids[f"log {replica.number}"] = number_in(service, "pid")
    return pids


def _within(report: dict[str, Any] | None, name: str) -> dict[str, Any]:
    found = (report or {}).get(name)
    return found if isinstance(found, dict) else {}


def _runs_here(pid: int, program: bytes) -> bool:
    try:
        return pid > 0 and program in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


async def measured(client: Client, count: int, plan: Plan, pids: dict[str, int], deadline_s: float) -> list[Level]:
    """Measure with `count` clients, telling on a terminal how far it is; an operation's error is raised as itself."""
    terminal = sys.stderr.isatty()

    def told(text: str) -> None:
        if terminal:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    try:
        async with with_more_clients(client, count, max(deadline_s, OPENING_S) if count > 1 else deadline_s) as clients:
            return await measure(clients, plan, {**pids, GENERATOR: os.getpid()}, told)
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
