"""`make soak`: a long run with one replica stopped, then its return under load, in figures.

A durable cluster of three processes of its own. Replica 2 is stopped at the beginning; while the others execute
OPERATIONS puts, memory and disk of each are sampled. Then replica 2 is started under load and must come back by a
transfer of the state; replica 1 is killed, so that every decision needs replica 2's vote; at last replica 1 is started
again. Exit 1 if any of this does not happen.

python -m client.soak --operations 200000 --keys 20000
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import click

from client.api import Client, error_of
from client.bench import initialise, stop_child
from client.cli.running import Target, example
from client.surroundings import describe
from replica.apps import kv
from replica.core.envelope import Status
from trustlog.cli.contract import CommandError, run

READY_S = 120.0
DEADLINE_S = 60.0
STATUS_S = 2.0
SAMPLE_S = 0.5
AWAY, KILLED = 2, 1
REPLICAS = 3
VALUE = bytes(range(100))
# Puts at a time while replicas return: all share this machine's processors, and who returns needs some of them.
RETURN_WORKERS = 40
AFTER_MAX = 20_000  # operations after the other replica was killed, or as many as before
MIB = 1024 * 1024


class Cluster:
    """Three replica processes, and what they cost."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        """Start one as users do."""
        home = self.directory / f"replica-{number}"
        command = [sys.executable, "-m", "replica.cli.main", "run", str(home)]
        with home.with_suffix(".log").open("ab") as log:
            self.children[number] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # noqa: S603

    def configure(self, number: int, **settings: str | int) -> None:
        """Add lines to a replica's settings, before it is started."""
        path = self.directory / f"replica-{number}" / "replica.toml"
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        path.write_text(lines + path.read_text())  # before the first table

    def end(self, number: int) -> None:
        """End one, gently."""
        stop_child(self.children.pop(number))

    def kill(self, number: int) -> None:
        """Kill one as a crash does."""
        child = self.children.pop(number)
        child.send_signal(signal.SIGKILL)
        child.wait()

    def stop(self) -> None:
        """End all that run."""
        for child in self.children.values():
            stop_child(child)

    def memory(self, number: int, field: str = "VmRSS") -> int:
        """Return the resident bytes of a replica, 0 if it does not run; "VmHWM": the most that they were."""
        child = self.children.get(number)
        if child is None or child.poll() is not None:
            return 0
        status = Path(f"/proc/{child.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))

    def disk(self, number: int) -> int:
        """Return the bytes that a replica's folder takes on the disk."""
        total = 0
        for path in (self.directory / f"replica-{number}").rglob("*"):
            try:
                total += path.stat().st_blocks * 512
            except FileNotFoundError:
                continue  # a journal that was just removed
        return total

    def installed(self, number: int) -> int:
        """Return how often a replica installed a transferred state."""
        return (self.directory / f"replica-{number}.log").read_text(errors="replace").count("state installed")


class Workers:
    """So many tasks, each of which does `_work` until they are told to end. Begun by the last line of `__init__`."""

    def __init__(self, count: int) -> None:
        self._ending = False
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(count)]

    async def _work(self, number: int) -> None:
        """Go on until `_ending`."""
        raise NotImplementedError

    async def end(self) -> None:
        """Let what is under way end; the error of a worker if one failed."""
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Load(Workers):
    """Workers that put the same keys in turn."""

    def __init__(self, client: Client, keys: int, workers: int) -> None:
        self.done = 0
        self._client, self._keys = client, keys
        self._next = 0
        self._last = time.monotonic()
        self.longest_s = 0.0  # between two answers, since it was set to 0
        super().__init__(workers)

    async def _work(self, number: int) -> None:  # noqa: ARG002 - all are alike
        while not self._ending:
            turn, self._next = self._next, self._next + 1
            result = await self._client.submit(kv.put(b"key %012d" % (turn % self._keys), VALUE))
            if result.status is not Status.OK:
                raise error_of(result)
            self.done += 1
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - self._last)
            self._last = now

    async def until(self, count: int) -> None:
        """Wait until so many operations are done; the error of a worker ends it."""
        while self.done < count:
            await self.check()

    async def check(self) -> None:
        """Let some time pass; raise what a worker failed with."""
        ended, _ = await asyncio.wait(self._tasks, timeout=0.05, return_when=asyncio.FIRST_EXCEPTION)
        for task in ended:
            task.result()


class Watch:
    """Asks every replica's status now and then; keeps the longest turns of their event loops by phase."""

    def __init__(self, client: Client) -> None:
        self.reports: dict[int, dict[str, Any]] = {}
        self.longest_ms: dict[int, float] = {}
        self._client = client
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            found = await self._client.status(deadline_s=STATUS_S)
            new = {one.number: one.report for one in found if one.reachable and one.report}
            self.reports.update(new)
            for number, report in new.items():
                turn = report["loop"]["longest_turn_ms"]
                self.longest_ms[number] = max(turn, self.longest_ms.get(number, 0.0))
            await asyncio.sleep(SAMPLE_S)

    def phase(self) -> str:
        """Return the longest turns since the last call, for people."""
        shown = ", ".join(f"replica {number} {self.longest_ms[number]:.0f} ms" for number in sorted(self.longest_ms))
        self.longest_ms.clear()
        return shown

    async def until(self, number: int, true: Callable[[dict[str, Any]], bool], what: str, load: Load | None) -> float:
        """Wait until a replica's report is as wanted; return the seconds."""
        began = time.monotonic()
        while number not in self.reports or not true(self.reports[number]):
            if time.monotonic() - began > READY_S:
                raise CommandError(f"replica {number} was not {what} within {READY_S:.0f} s", code="not-seen")
            await (load.check() if load is not None else asyncio.sleep(0.05))
        return time.monotonic() - began

    def forget(self, number: int) -> None:
        """Wait for a new report of this replica, which was started anew."""
        self.reports.pop(number, None)

    def end(self) -> None:
        """Ask no more."""
        self._task.cancel()


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example("python -m client.soak --operations 200000", "make soak OPERATIONS=1000000 KEYS=1000000"),
)
@click.option("--operations", type=click.IntRange(1000, 10**9), default=200_000, show_default=True)
@click.option("--keys", type=click.IntRange(1, 10**8), default=20_000, show_default=True, help="Distinct keys put.")
@click.option("--workers", type=click.IntRange(1, 1000), default=40, show_default=True, help="Puts at a time.")
@click.option("--retain-mib", type=click.IntRange(0, 10**6), default=16, show_default=True, help="As in replica.toml.")
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where to work.")
def cli(*, operations: int, keys: int, workers: int, retain_mib: int, parent: Path | None) -> None:
    """Run long with one replica stopped, then have it come back; print what memory and disk did meanwhile."""
    click.echo(f"{describe()}; {operations:,} puts of {len(VALUE)} bytes to {keys:,} keys, retain_mib = {retain_mib}")
    with tempfile.TemporaryDirectory(prefix="trustlog-soak-", dir=parent) as place, ExitStack() as stack:
        directory = Path(place) / "cluster"
        initialise(directory, 1, "three-phase")
        cluster = Cluster(directory)
        stack.callback(cluster.stop)
        for number in range(REPLICAS):
            cluster.configure(number, retain_mib=retain_mib)
            cluster.start(number)
        Target(directory, DEADLINE_S).run(lambda client: _soak(cluster, client, operations, keys, workers))


async def _soak(cluster: Cluster, client: Client, operations: int, keys: int, workers: int) -> None:
    await client.put("ready", "yes", deadline_s=READY_S)
    watch = Watch(client)
    await watch.until(AWAY, lambda report: report["mute"] is None and report["executed"] > 0, "ready", None)
    cluster.kill(AWAY)
    load = Load(client, keys, workers)
    try:
        await _long_run(cluster, watch, load, operations)
        await load.end()
        load = Load(client, keys, min(workers, RETURN_WORKERS))
        await _comes_back(cluster, watch, load)
        await _needs_its_vote(cluster, watch, load, min(operations, AFTER_MAX))
        await load.end()
    finally:
        watch.end()
        await load.cancel()


async def _long_run(cluster: Cluster, watch: Watch, load: Load, operations: int) -> None:
    began = time.monotonic()
    click.echo(f"replica {AWAY} stopped\n")
    click.echo("operations      s   MiB of memory: r0    r1   on disk: r0    r1    r2")
    for step in range(1, 11):
        await load.until(operations * step // 10)
        memory = [cluster.memory(number) // MIB for number in (0, KILLED)]
        disk = [cluster.disk(number) // MIB for number in range(REPLICAS)]
        took = time.monotonic() - began
        click.echo(
            f"{load.done:>10,} {took:>6.0f} {memory[0]:>19} {memory[1]:>5} {disk[0]:>13} {disk[1]:>5} {disk[2]:>5}"
        )
    click.echo(f"\nlongest turns of the event loop, milestones among them: {watch.phase()}")


async def _comes_back(cluster: Cluster, watch: Watch, load: Load) -> None:
    before, load.longest_s = load.done, 0.0
    watch.forget(AWAY)
    cluster.start(AWAY)
    took = await watch.until(AWAY, lambda _: cluster.installed(AWAY) > 0, "given the state", load)
    click.echo(f"replica {AWAY} started under load: state installed after {took:.1f} s")
    took += await watch.until(AWAY, lambda report: report["mute"] is None, "speaking", load)
    behind = watch.reports[0]["executed"] - watch.reports[AWAY]["executed"]
    click.echo(f"  speaks after {took:.1f} s, {behind} slots behind; {load.done - before:,} operations meanwhile")
    took += await watch.until(
        AWAY, lambda report: watch.reports[0]["executed"] - report["executed"] < 128, "close behind", load
    )
    click.echo(f"  less than 128 slots behind after {took:.1f} s; longest pause between answers {load.longest_s:.2f} s")
    click.echo(f"  longest turns of the event loop: {watch.phase()}")


async def _needs_its_vote(cluster: Cluster, watch: Watch, load: Load, more: int) -> None:
    before, load.longest_s = load.done, 0.0
    began = time.monotonic()
    cluster.kill(KILLED)
    await load.until(before + more)
    took = time.monotonic() - began
    click.echo(f"replica {KILLED} killed: {more:,} operations more in {took:.1f} s, which needed replica {AWAY}'s vote")
    click.echo(f"  longest pause between answers {load.longest_s:.2f} s")
    watch.forget(KILLED)
    load.longest_s = 0.0
    cluster.start(KILLED)
    took = await watch.until(
        KILLED, lambda report: report["mute"] is None and report["uptime_s"] < READY_S, "ready", load
    )
    click.echo(f"replica {KILLED} restarted with {watch.reports[0]['keys']:,} keys: ready after {took:.1f} s")
    click.echo(f"  longest pause between answers {load.longest_s:.2f} s; longest turns: {watch.phase()}")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run it and exit; when it is told to end, its replicas end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(cli, argv, prog_name="python -m client.soak")


if __name__ == "__main__":
    main()
