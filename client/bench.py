"""`make bench`: starts a durable cluster of its own on this machine, measures it, and takes it down again.

python -m client.bench --runs 5 --ordering two-phase -o json
"""

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
from client.cli.bench_command import measured, plan_options, report_of, show
from client.cli.running import Target, example
from client.measure import Level, Plan
from client.queries import ReplicaStatus
from client.surroundings import MEMORY_FILE_SYSTEMS, describe, file_system_of
from trustlog.cli.contract import CommandError, Output, output_option, run

START_S = 30.0
STOP_S = 10.0
DEADLINE_S = 30.0
LOG_SHOWN_BYTES = 2000


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "python -m client.bench --runs 5 --ordering two-phase", 'make bench BENCH="--concurrency 200 -o json"'
    ),
)
@plan_options
@click.option("--f", "faults", type=click.IntRange(1, 10), default=1, show_default=True, help="2f+1 replicas.")
@click.option("--ordering", type=click.Choice(["three-phase", "two-phase"]), default="three-phase", show_default=True)
@click.option("--durability", type=click.Choice(["disk", "memory"]), default="disk", show_default=True)
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
    faults: int,
    ordering: str,
    durability: str,
    parent: Path | None,
    output: Output,
) -> None:
    """Measure a cluster of its own on this machine: puts of 16-byte keys and 100-byte values, closed loop."""
    plan = Plan(tuple(levels), runs, seconds)
    before = describe()
    with tempfile.TemporaryDirectory(prefix="trustlog-bench-", dir=parent) as place:
        directory = Path(place) / "cluster"
        initialise(directory, faults, ordering)
        with started(directory, faults, durability) as pids:

            async def work(client: Client) -> tuple[list[Level], list[ReplicaStatus]]:
                await client.put("ready", "yes", deadline_s=START_S)
                return await measured(client, plan, pids), await client.status()

            result, found = Target(directory, DEADLINE_S).run(work)
        file_system = file_system_of(directory)
    cluster = {**report_of(found, ordering), "file_system": file_system}
    if file_system in MEMORY_FILE_SYSTEMS and durability == "disk":
        click.echo(f"note: the files lay in memory ({file_system}); name a disk with --dir", err=True)
    show(output, result, cluster, {**before, "load_average_after": describe()["load_average"]})


def initialise(directory: Path, faults: int, ordering: str) -> None:
    """Make a cluster directory with free ports, by the command that users have."""
    command = [sys.executable, "-m", "replica.cli.main", "init", str(directory), "-o", "json"]
    command += ["--f", str(faults), "--base-port", "0", "--ordering", ordering]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)  # noqa: S603
    if done.returncode != 0:
        raise CommandError(f"trustlog-replica init failed: {_error_in(done.stdout) or done.stderr.strip()}")


@contextlib.contextmanager
def started(directory: Path, faults: int, durability: str) -> Iterator[dict[str, int]]:
    """Run the replicas as child processes; yields their process ids by name."""
    children: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for number in range(2 * faults + 1):
            log = stack.enter_context((directory / f"replica-{number}.log").open("w+b"))
            home = directory / f"replica-{number}"
            command = [sys.executable, "-m", "replica.cli.main", "run", str(home)]
            command += ["--durability", durability]
            child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # noqa: S603
            stack.callback(_stop, child)
            children.append(child)
        try:
            yield {f"replica {number}": child.pid for number, child in enumerate(children)}
        except CommandError as error:
            raise _explained(error, children, directory) from error


def _stop(child: "subprocess.Popen[bytes]") -> None:
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
