"""`make bench`: starts a durable cluster of its own on this machine, measures it, and takes it down again.

python -m client.bench --runs 5 --ordering two-phase -o json
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn

import click

from client.api import Client
from client.cli.bench_command import local_pids, measured, plan_of, plan_options
from client.cli.bench_report import report_of, show
from client.cli.running import Target, example
from client.measure import Level
from client.queries import ReplicaStatus
from client.surroundings import MEMORY_FILE_SYSTEMS, describe, file_system_of
from replica.cluster.clusterfile import load_any_cluster_file
from replica.cluster.pbft import PBFT
from trustlog.cli.contract import CommandError, Output, output_option, run

START_S = 30.0
STOP_S = 10.0
DEADLINE_S = 30.0
POLL_S = 0.05
LOG_SHOWN_BYTES = 2000


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "python -m client.bench --runs 5 --ordering two-phase",
        'make bench BENCH="--concurrency 200 -o json"',
        'make bench BENCH="--rate 5000 --plot latency.svg"',
    ),
)
@plan_options
@click.option(
    "--f", "faults", type=click.IntRange(1, 10), default=1, show_default=True, help="2f+1 replicas; pbft: 3f+1."
)
@click.option(
    "--ordering",
    type=click.Choice(["three-phase", "two-phase", PBFT.label]),
    default="three-phase",
    show_default=True,
    help="pbft: 3f+1 replicas without logs, in memory whatever --durability says.",
)
@click.option("--durability", type=click.Choice(["disk", "memory"]), default="disk", show_default=True)
@click.option("--log-backend", type=click.Choice(["process", "software"]), default="process", show_default=True)
@click.option(
    "--dir",
    "parent",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where to put the cluster's files, on the disk to be measured.  [default: the temporary directory]",
)
@output_option
def cli(
    *,
    runs: int,
    seconds: float,
    levels: Sequence[int],
    rates: Sequence[float],
    value_sizes: Sequence[int],
    clients: int,
    plot: IO[str] | None,
    faults: int,
    ordering: str,
    durability: str,
    log_backend: str,
    parent: Path | None,
    output: Output,
) -> None:
    """Measure a cluster of its own on this machine by puts of 16-byte keys, in a closed or an open loop."""
    plan = plan_of(runs, seconds, levels, rates, value_sizes)
    before = describe()
    with tempfile.TemporaryDirectory(prefix="trustlog-bench-", dir=parent) as place:
        directory = Path(place) / "cluster"
        initialise(directory, faults, ordering, log_backend)
        with started(directory, durability) as pids:

            async def work(client: Client) -> tuple[list[Level], list[ReplicaStatus]]:
                await client.put("ready", "yes", deadline_s=START_S)
                await all_up(client)
                here = local_pids(await client.status())
                processes = {**pids, **here}
                return await measured(client, clients, plan, processes, DEADLINE_S), await client.status()

            result, found = Target(directory, DEADLINE_S).run(work)
        file_system = file_system_of(directory)
    kept = "none" if ordering == PBFT.label else log_backend
    cluster = {**report_of(found, ordering, clients), "log_backend": kept, "file_system": file_system}
    if ordering == PBFT.label:
        click.echo("note: PBFT here keeps nothing on disk: compare it with --durability memory", err=True)
    elif file_system in MEMORY_FILE_SYSTEMS and durability == "disk":
        click.echo(f"note: the files lay in memory ({file_system}); name a disk with --dir", err=True)
    show(output, result, cluster, {**before, "load_average_after": describe()["load_average"]}, plot)


async def all_up(client: Client) -> None:
    """Wait until no replica is starting any more: f + 1 of them serve already before."""
    async with asyncio.timeout(START_S):
        while not all(replica.reachable for replica in await client.status()):  # noqa: ASYNC110 - processes set no event
            await asyncio.sleep(POLL_S)


def initialise(directory: Path, faults: int, ordering: str, log_backend: str = "process") -> None:
    """Make a cluster directory with free ports, by the command that users have."""
    command = [sys.executable, "-m", "replica.cli.main", "init", str(directory), "-o", "json"]
    command += ["--f", str(faults), "--base-port", "0", "--ordering", ordering]
    command += [] if ordering == PBFT.label else ["--log-backend", log_backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)  # noqa: S603
    if done.returncode != 0:
        raise CommandError(f"trustlog-replica init failed: {_error_in(done.stdout) or done.stderr.strip()}")


@contextlib.contextmanager
def started(directory: Path, durability: str) -> Iterator[dict[str, int]]:
    """Run the replicas as child processes; yields their process ids by name. PBFT's keep nothing on disk."""
    cluster = load_any_cluster_file(directory)
    children: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for number in range(cluster.genesis.n):
            log = stack.enter_context((directory / f"replica-{number}.log").open("w+b"))
            home = directory / f"replica-{number}"
            command = [sys.executable, "-m", "replica.cli.main", "run", str(home)]
            command += ["--durability", durability if cluster.has_logs else "memory"]
            child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # noqa: S603
            stack.callback(stop_child, child)
            children.append(child)
        try:
            yield {f"replica {number}": child.pid for number, child in enumerate(children)}
        except CommandError as error:
            raise _explained(error, children, directory) from error


def stop_child(child: "subprocess.Popen[bytes]") -> None:
    """End a replica, gently first."""
    child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _explained(error: CommandError, children: Sequence["subprocess.Popen[bytes]"], directory: Path) -> CommandError:
    """Add the last words of a replica that ended by itself."""
    for number, child in enumerate(children):
        if child.poll() is not None:
            with (directory / f"replica-{number}.log").open("rb") as log:
                words = _tail(log)
            return CommandError(
                f"replica {number} ended with code {child.returncode}: {words}", error.hint, code="replica-ended"
            )
    return error


def _tail(log: IO[bytes]) -> str:
    log.seek(0, 2)
    log.seek(max(0, log.tell() - LOG_SHOWN_BYTES))
    return log.read().decode(errors="replace").strip()


def _error_in(stdout: str) -> str:
    try:
        return str(json.loads(stdout)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the benchmark and exit."""
    run(cli, argv, prog_name="python -m client.bench")


if __name__ == "__main__":
    main()
