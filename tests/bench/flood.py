"""`make bench-flood`: what one client's flood does to another's latency, on a real cluster of processes.

python -m tests.bench.flood --rounds 3 --seconds 8 --dir /some/disk

One client puts, a few times a second. Meanwhile a program of its own floods the cluster: with one key and as much under
way as a replica takes from one client, or with many keys. The loads take turns, round after round, in one cluster.
"""

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import click

from client.api import Client
from client.bench import all_up, initialise, started
from client.errors import ClientError
from client.events import Settings
from client.queries import number_in
from client.surroundings import file_system_of
from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.core.rooms import REQUESTS_PER_CLIENT_MAX
from tests.bench.programs import Program, module
from tests.bench.report import RESULTS, surroundings, table, write_into

ROUNDS = 3
SECONDS = 8.0
# Puts of the quiet client per second.
RATE = 20.0
DEADLINE_S = 60.0
VALUE = bytes(100)
NONE = "none"
# Name -> keys, operations under way with each.
FLOODS = {NONE: (0, 0), "one key": (1, 20_000), "64 keys": (64, 250)}
# A client that means harm keeps as many envelopes under way as a replica holds for it.
GREEDY = Settings(
    envelopes_in_flight_max=REQUESTS_PER_CLIENT_MAX, bytes_in_flight_max=1 << 30, patience_learned_ms_max=8000
)


@dataclass
class Figures:
    """What one load came to: the quiet client's latencies, in seconds, and the flood's operations per second."""

    latencies: list[float] = field(default_factory=list)
    flood_rates: list[float] = field(default_factory=list)
    views: int = 0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share of `values` does not exceed."""
    return sorted(values)[max(0, -(-len(values) * round(share * 1000) // 1000) - 1)]


async def flood(directory: Path, keys: int, at_once: int) -> None:
    """Open all clients and wait for a line on standard input, then put until the next one.

    Each line is answered by one: {} when the flood begins, and what it came to.
    """
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        sys.stdin.readline()
        loop.call_soon_threadsafe(asked_to_end.set)

    done = 0

    async def one(client: Client, number: int) -> None:
        nonlocal done
        operation = kv.put(b"flood-%d" % (number % 1000), VALUE)
        while not asked_to_end.is_set():
            try:
                await client.submit(operation, deadline_s=DEADLINE_S)
            except ClientError:
                continue
            done += 1

    async with AsyncExitStack() as stack:
        cluster = Client.from_dir(directory).cluster
        clients = []
        for _ in range(keys):
            client = Client(cluster, ClientKey.generate(), deadline_s=DEADLINE_S, settings=GREEDY)
            clients.append(await stack.enter_async_context(client))
            await client.put("flood", "ready")
        await asyncio.to_thread(sys.stdin.readline)
        threading.Thread(target=listen, daemon=True).start()
        began = time.monotonic()
        tasks = [asyncio.create_task(one(client, i)) for client in clients for i in range(at_once)]
        print("{}", flush=True)
        await asked_to_end.wait()
        print(json.dumps({"operations": done, "seconds": time.monotonic() - began}), flush=True)
        for task in tasks:
            task.cancel()


async def timed_puts(client: Client, seconds: float) -> list[float]:
    """Put at a fixed rate for so long, whatever became of those before; return how long each took, in seconds.

    From the intended start: else a client that waits would ask less just while it has to wait.
    """
    latencies = []

    async def put(intended: float) -> None:
        await client.put(f"quiet-{len(tasks)}", VALUE)
        latencies.append(time.monotonic() - intended)

    began = time.monotonic()
    tasks: list[asyncio.Task[None]] = []
    while (intended := began + len(tasks) / RATE) < began + seconds:
        await asyncio.sleep(intended - time.monotonic())
        tasks.append(asyncio.create_task(put(intended)))
    await asyncio.gather(*tasks)
    return latencies


async def measure(directory: Path, rounds: int, seconds: float) -> dict[str, Figures]:
    """Let the loads take turns."""
    found = {name: Figures() for name in FLOODS}
    async with Client.from_dir(directory, deadline_s=DEADLINE_S) as client:
        await client.put("quiet", VALUE)
        await all_up(client)
        await timed_puts(client, 1.0)
        for number in range(rounds):
            for name, (keys, at_once) in FLOODS.items():
                click.echo(f"flood: {name}, round {number + 1} of {rounds}", err=True)
                with ExitStack() as stack:
                    if keys:
                        options = ("--flooder", str(directory), "--keys", str(keys), "--at-once", str(at_once))
                        program = Program("flooder", module("tests.bench.flood", *options), directory, talks=True)
                        stack.callback(program.stop)
                        await asyncio.to_thread(program.ask, {})
                        await timed_puts(client, 1.0)
                    found[name].latencies += await timed_puts(client, seconds)
                    if keys:
                        said = await asyncio.to_thread(program.ask, {})
                        found[name].flood_rates.append(said["operations"] / said["seconds"])
                found[name].views = max(number_in(replica.report, "view") for replica in await client.status())
                await timed_puts(client, 1.0)
    return found


def page_of(found: dict[str, Figures], rounds: int, seconds: float, where: str) -> str:
    """Return the table, and how it was measured."""
    rows = []
    for name, figures in found.items():
        flooded = sum(figures.flood_rates) / len(figures.flood_rates) if figures.flood_rates else 0
        ms = [f"{1000 * percentile(figures.latencies, share):.1f}" for share in (0.5, 0.99, 1)]
        rows.append([name, f"{len(figures.latencies):,}", *ms, f"{flooded:,.0f}", str(figures.views)])
    headings = ["flood", "puts of the quiet client", "p50 ms", "p99 ms", "worst ms", "flood's puts per second", "view"]
    lines = [
        (
            f"One client's puts of {len(VALUE)}-byte values, {RATE:g} per second in an open loop, beside another program's flood of such puts; n = 3, "
            "three-phase, the log in a process of its own, on disk. One key: "
            f"{FLOODS['one key'][1]:,} operations under way, in up to {REQUESTS_PER_CLIENT_MAX} envelopes; 64 keys: "
            f"{FLOODS['64 keys'][1]} with each. All of {rounds} rounds of {seconds:g} s, in turns; replicas, logs, the "
            "quiet client and the flooder share the machine, so part of what the quiet client loses is processor time. "
            "The view is the highest at the end: whether a primary was left."
        ),
        "",
        table(headings, rows),
        "",
        where,
    ]
    return "\n".join(lines)


@click.command()
@click.option("--rounds", type=click.IntRange(1, 100), default=ROUNDS, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 600), default=SECONDS, show_default=True, help="Length of a run.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
@click.option("--flooder", type=click.Path(path_type=Path), hidden=True)
@click.option("--keys", type=int, default=1, hidden=True)
@click.option("--at-once", type=int, default=1, hidden=True)
def main(*, rounds, seconds, parent, write, flooder, keys, at_once) -> None:
    """Measure one client's latency without and with another's flood."""
    if flooder is not None:
        asyncio.run(flood(flooder, keys, at_once))
        return
    with tempfile.TemporaryDirectory(prefix="trustlog-flood-", dir=parent) as place:
        directory = Path(place) / "cluster"
        initialise(directory, 1, "three-phase")
        with started(directory, "disk"):
            found = asyncio.run(measure(directory, rounds, seconds))
        kind = file_system_of(directory)
    text = page_of(found, rounds, seconds, surroundings({"files on": kind}))
    click.echo(text)
    if write:
        write_into(RESULTS, "flood", text)


if __name__ == "__main__":
    sys.exit(main())
