"""`make bench-gap`: how long nothing is answered when the primary is killed at full load.

python -m tests.bench.gap --kills 10 --ordering three-phase

Three durable replicas, one client that keeps so many operations under way. Each time the present primary is killed, the
pause is taken, the load ends, and the replica is started again; when all are level the next one begins.

The gap is counted from when the oldest operation under way at the kill was begun, to the answer that ended the longest pause.
What is not executed after the kill was under way then or begun later, so no backup can have known of it before: the gap
is never shorter than the time from when a backup first knew of an unexecuted request. Most often backups learn of one
later, when the client's connection to the primary breaks and it asks everybody.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import click
import uvloop

from client.api import Client
from client.bench import initialise
from client.errors import ClientError
from client.queries import ReplicaStatus, number_in
from client.soak import REPLICAS, Cluster, Workers
from replica.apps import kv
from replica.core.envelope import Status
from replica.core.patience import PATIENCE_FIRST_MS
from tests.bench.programs import POLL_S, ProgramError
from tests.bench.report import RESULTS, files_on, surroundings, table, write_into

KILLS = 10
AT_ONCE = 200
ORDERINGS = ("two-phase", "three-phase")
# How many times the patience the median gap may be.
WANTED = 1.5
VALUE = bytes(100)
KEYS = 10_000
# An operation that is not answered within this has failed.
DEADLINE_S = 60.0
READY_S = 120.0
LOADED_S = 2.0
AFTER_FAILURE_S = 0.05
# Answers that are waited for after a kill, in multiples of what is under way: that much at most was ordered before.
ROUNDS_AFTER = 10


@dataclass(frozen=True)
class Kill:
    """What one kill came to. patience_ms: the longest of a backup's, at the kill."""

    gap_s: float
    patience_ms: int


@dataclass
class Figures:
    """What all kills of one cluster came to. views: how many were left, from the first kill to the last return."""

    kills: list[Kill] = field(default_factory=list)
    operations: int = 0
    failed: int = 0
    views: int = 0


class Load(Workers):
    """So many operations under way. answered: when each was, in seconds; failed: how many were not, or were refused."""

    def __init__(self, client: Client, at_once: int) -> None:
        self.answered: list[float] = []
        self.failed = 0
        self._client = client
        self._next = 0
        self._begun: dict[int, float] = {}  # by worker
        super().__init__(at_once)

    @property
    def oldest(self) -> float:
        """When the oldest operation under way was begun."""
        return min(self._begun.values())

    async def _work(self, number: int) -> None:
        while not self._ending:
            self._next += 1
            self._begun[number] = time.perf_counter()
            try:
                result = await self._client.submit(kv.put(b"key %012d" % (self._next % KEYS), VALUE))
            except ClientError:
                result = None
            if result is not None and result.status is Status.OK:
                self.answered.append(time.perf_counter())
            else:
                self.failed += 1
                await asyncio.sleep(AFTER_FAILURE_S)

    async def until(self, count: int) -> None:
        """Wait until so many operations were answered since the beginning."""
        ends = time.monotonic() + READY_S
        while len(self.answered) < count:
            if time.monotonic() > ends:
                raise ProgramError(f"{len(self.answered)} operations were answered in {READY_S:g} s, not {count}")
            await asyncio.sleep(POLL_S)


def gap_of(answered: Sequence[float], killed: float, oldest: float) -> float:
    """Return how long it took from `oldest`, when what was under way was begun, to the end of the longest pause.

    A pause lies between two answers, one after the other; those that ended before the kill are not looked at.
    """
    before = sum(at <= killed for at in answered)
    if not before or before == len(answered):
        raise ProgramError("a gap lies between two answers: there was none before the kill, or none after it")
    since = answered[before - 1 :]
    _, end = max(pairwise(since), key=lambda pause: pause[1] - pause[0])
    return end - min(oldest, since[0])


def reports_of(found: Sequence[ReplicaStatus]) -> dict[int, dict]:
    """Return the reports of those who gave one."""
    return {one.number: one.report for one in found if one.reachable and one.report}


def are_level(reports: dict[int, dict]) -> bool:
    """Say whether all replicas are ready, in one open view, and have executed the same."""
    alike = {(report["view"], report["executed"]) for report in reports.values()}
    ready = all(
        report["not_ready"] is None and report["mute"] is None and report["view_open"] for report in reports.values()
    )
    return len(reports) == REPLICAS and ready and len(alike) == 1


async def until_level(client: Client) -> int:
    """Wait until nothing tells the replicas apart; return their view. Nothing may be under way."""
    ends = time.monotonic() + READY_S
    while not are_level(reports := reports_of(await client.status())):
        if time.monotonic() > ends:
            shown = {number: (one["view"], one["executed"], one["not_ready"]) for number, one in reports.items()}
            raise ProgramError(f"the replicas were not level within {READY_S:g} s: view, slot, trouble: {shown}")
        await asyncio.sleep(POLL_S)
    return number_in(reports[0], "view")


async def kill_once(cluster: Cluster, client: Client, at_once: int, figures: Figures) -> None:
    """Load the cluster, kill its primary, take the gap, and let the replica return."""
    load = Load(client, at_once)
    try:
        await asyncio.sleep(LOADED_S)
        await load.until(at_once)
        reports = reports_of(await client.status())
        leader = max(reports.values(), key=lambda report: report["view"])["primary"]
        killed, before, oldest = time.perf_counter(), len(load.answered), load.oldest
        cluster.kill(leader)
        await load.until(before + ROUNDS_AFTER * at_once)
        await load.end()
    finally:
        await load.cancel()
        figures.operations += len(load.answered)
        figures.failed += load.failed
    patience = max(report["patience_ms"] for number, report in reports.items() if number != leader)
    figures.kills.append(Kill(gap_of(load.answered, killed, oldest), patience))
    cluster.start(leader)


async def measure(cluster: Cluster, kills: int, at_once: int, told: str) -> Figures:
    """Kill the primary of a running cluster so many times."""
    figures = Figures()
    async with Client.from_dir(cluster.directory, deadline_s=DEADLINE_S) as client:
        await client.put("ready", "yes", deadline_s=READY_S)
        first = await until_level(client)
        for number in range(kills):
            await kill_once(cluster, client, at_once, figures)
            click.echo(f"{told}: kill {number + 1} of {kills}: {1000 * figures.kills[-1].gap_s:.0f} ms", err=True)
            figures.views = await until_level(client) - first
    return figures


def measured(ordering: str, parent: Path | None, kills: int, at_once: int) -> Figures:
    """Start a cluster, measure it, and take it down."""
    with tempfile.TemporaryDirectory(prefix="trustlog-gap-", dir=parent) as place, ExitStack() as stack:
        directory = Path(place) / "cluster"
        initialise(directory, 1, ordering)
        cluster = Cluster(directory)
        stack.callback(cluster.stop)
        for number in range(REPLICAS):
            cluster.start(number)
        return uvloop.run(measure(cluster, kills, at_once, ordering))


def row_of(ordering: str, figures: Figures) -> list[str]:
    """Return one line of the table."""
    gaps = [1000 * kill.gap_s for kill in figures.kills]
    patience = sorted({kill.patience_ms for kill in figures.kills})
    return [
        ordering,
        str(len(gaps)),
        f"{median(gaps):,.0f}",
        f"{max(gaps):,.0f}",
        f"{PATIENCE_FIRST_MS:,}",
        f"{patience[0]:,}" if len(patience) == 1 else f"{patience[0]:,} to {patience[-1]:,}",
        f"{median(gaps) / PATIENCE_FIRST_MS:.2f}",
        str(figures.views),
        f"{figures.failed} of {figures.operations + figures.failed:,}",
    ]


def verdict(ordering: str, figures: Figures) -> str:
    """Say whether it is as good as it is meant to be."""
    gaps = [1000 * kill.gap_s for kill in figures.kills]
    times = median(gaps) / PATIENCE_FIRST_MS
    kept = "kept" if times <= WANTED else "missed"
    failed = "no operation failed" if not figures.failed else f"{figures.failed} operations failed, none may"
    each = ", ".join(f"{gap:.0f}" for gap in gaps)
    return f"{ordering}: p50 at most {WANTED:g} times the patience: {kept} ({times:.2f}); {failed}. Each gap, in ms: {each}."


def page_of(found: dict[str, Figures], at_once: int, where: str) -> str:
    """Return the table, what it says, and how it was measured."""
    headings = ["ordering", "kills", "gap p50 ms", "worst ms", "first patience ms", "patience at the kills ms"]
    headings += ["p50 / first patience", "views left", "operations failed"]
    lines = [
        (
            f"The primary of three durable replicas is killed (kill -9) while one client keeps {at_once} puts of "
            f"{len(VALUE)}-byte values under way; the log in a process of its own, TLS. Gap: from when the oldest operation "
            "under way at the kill was begun, to the answer that ended the longest pause. No backup can have known of a "
            "request that was not executed before, so from when they knew it is no longer than that. The replica is "
            "started again without load; the next kill waits until all are level. Patience is what a backup has with "
            "the oldest request before it suspects the primary; at the kills: the longest of a backup's, which doubles "
            "after views in which it ended. At least one view is left per kill."
        ),
        "",
        table(headings, [row_of(ordering, figures) for ordering, figures in found.items()]),
        "",
        *(f"- {verdict(ordering, figures)}" for ordering, figures in found.items()),
        "",
        where,
    ]
    return "\n".join(lines)


@click.command()
@click.option("--kills", type=click.IntRange(1, 1000), default=KILLS, show_default=True, help="Of each ordering.")
@click.option("--at-once", type=click.IntRange(1, 16384), default=AT_ONCE, show_default=True, help="Operations.")
@click.option(
    "--ordering", "orderings", type=click.Choice(ORDERINGS), multiple=True, default=ORDERINGS, show_default=True
)
@click.option("--dir", "parent", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A real disk.")
@click.option("--write", is_flag=True, help=f"Put the table into {RESULTS.name}.")
def main(*, kills, at_once, orderings, parent, write) -> None:
    """Measure how long nothing is answered when the primary is killed."""
    kind = files_on(parent)
    try:
        found = {ordering: measured(ordering, parent, kills, at_once) for ordering in dict.fromkeys(orderings)}
    except (ProgramError, ClientError) as error:
        raise click.ClickException(str(error)) from error
    text = page_of(found, at_once, surroundings({"files on": kind}))
    click.echo(text)
    if write:
        write_into(RESULTS, "gap", text)


if __name__ == "__main__":
    sys.exit(main())
