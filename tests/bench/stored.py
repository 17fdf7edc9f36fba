"""A cluster of three that stores so many keys: it is filled, put to and looked at, and its replicas end and return.

`make bench-keys` (tests.bench.keys) measures with it. Replicas are looked at over HTTP, each at a door of its own: a client
would wait longer and longer between two attempts to connect to one that is not there yet.
"""

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median

from client.api import Client
from client.bench import initialise
from client.cli.bench_command import local_pids
from client.loader import Loader
from client.measure import GENERATOR, KEY_BYTES, ClientSink, Load, Run, run_load
from client.records import Record
from client.soak import MIB, REPLICAS, Cluster
from client.workload import Content, OpenLoop, Recording
from tests.bench.gap import until_level
from tests.bench.members import BACKUP, by_role
from tests.bench.programs import HOST, ProgramError, fetched
from tests.support.ports import free_ports

VALUE_BYTES = 100
WRITTEN_AT_ONCE = 1000
# Slots pass most quickly while each holds little.
FEW_AT_ONCE = 4
SOME_S = 0.2
# How often puts at a rate start: as many as are due by then, so that they share envelopes as those of a closed loop do.
# One by one each would be an envelope of its own, and half the rate keeps the machine as busy as all of it does.
BURST_S = 0.02
WARM_UP_S = 1.0
DEADLINE_S = 60.0
# Whoever is not there after so long does not come any more.
PATIENCE_S = 600.0
POLL_S = 0.05


@dataclass
class Loaded:
    """What rounds of the same puts came to. written: bytes per put that a backup wrote to the disk; turns_ms: longest."""

    runs: list[Run] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    turns_ms: list[float] = field(default_factory=list)
    views: int = 0


@dataclass(frozen=True)
class Size:
    """Bytes of a replica in memory and on the disk: the median replica's."""

    memory: float
    disk: float


@dataclass
class Return:
    """How a replica came back that had missed so much. Seconds since its start; transfers: as its log tells of them."""

    changed: int
    behind: int = 0  # slots
    loads: dict[str, Recording] = field(default_factory=dict)
    installed_s: float | None = None
    level_s: float = 0.0
    transfers: list[dict] = field(default_factory=list)
    memory: int = 0
    memory_most: int = 0


def key_of(number: int) -> bytes:
    """Return a key."""
    return b"%0*d" % (KEY_BYTES, number)


def written_by(pid: int) -> int:
    """Return the bytes that a process caused to be written to a disk (proc(5), io)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))


def leader_of(reports: dict[int, dict]) -> int:
    """Return the primary of the highest view that a replica is in."""
    return max(reports.values(), key=lambda report: report["view"])["primary"]


def backups_of(reports: dict[int, dict]) -> list[int]:
    """Return who is not the primary of the highest view, in ascending order."""
    return [number for number in sorted(reports) if number != leader_of(reports)]


def is_level(own: dict | None, others_before: Iterable[dict]) -> bool:
    """Say whether a replica is ready and has executed what the others had when they were asked before."""
    executed = [report["executed"] for report in others_before]
    if own is None or own["not_ready"] is not None or not executed:
        return False
    return own["executed"] >= max(executed)


class Stored:
    """The cluster. retain_mib: how much of the logs each replica keeps beyond need."""

    client: Client

    def __init__(self, keys: int, directory: Path, ordering: str, retain_mib: int) -> None:
        self.keys, self.retain_mib = keys, retain_mib
        initialise(directory, 1, ordering)
        self.cluster = Cluster(directory)
        self._doors = free_ports(REPLICAS)
        for number, port in enumerate(self._doors):
            self.cluster.configure(number, retain_mib=retain_mib, http=f"{HOST}:{port}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Stored"]:
        """Start all replicas, and end them afterwards."""
        try:
            for number in range(REPLICAS):
                self.cluster.start(number)
            async with Client.from_dir(self.cluster.directory, deadline_s=DEADLINE_S) as self.client:
                await self.client.put("ready", "yes", deadline_s=PATIENCE_S)
                await self.settled()
                yield self
        finally:
            self.cluster.stop()

    async def settled(self) -> int:
        """Wait until nothing tells the replicas apart; nothing may be under way. Return their view."""
        return await until_level(self.client)

    # What is put

    def chosen(self, number: int) -> list[bytes]:
        """Return so many keys, or all there are, evenly from among them."""
        number = min(number, self.keys)
        return [key_of(place * self.keys // number) for place in range(number)]

    async def fill(self, puts: int) -> None:
        """Put all keys in turn until so many puts are done."""
        await self.overwrite(key_of(number % self.keys) for number in range(puts))

    async def overwrite(self, keys: Iterable[bytes]) -> None:
        """Put a new value to these."""
        value = secrets.token_bytes(VALUE_BYTES)
        records = (Record(line, key, value) for line, key in enumerate(keys, 1))
        await Loader(self.client, WRITTEN_AT_ONCE, lambda _: None).run(records)

    async def durable(self) -> None:
        """Put until the state with all that was put before is on every replica's disk; till then only the logs are."""
        sinks, content = [ClientSink(self.client)], Content([key_of(0)], secrets.token_bytes(VALUE_BYTES))
        slot = max(report["executed"] for report in (await self.reports()).values())
        while min(report["persisted"] for report in (await self.reports()).values()) < slot:
            await run_load(sinks, Load(FEW_AT_ONCE), SOME_S, content, {})

    async def round(self, keys: Sequence[bytes], at_once: int, seconds: float, loaded: Loaded) -> None:
        """Keep so many puts under way; note what that came to."""
        found = await self.client.status()
        pids = by_role(local_pids(found), leader_of({one.number: one.report for one in found if one.report}))
        backups = [pid for role, pid in pids.items() if role.startswith(BACKUP)]
        sinks, content = [ClientSink(self.client)], Content(keys, secrets.token_bytes(VALUE_BYTES))
        pids[GENERATOR] = os.getpid()
        await run_load(sinks, Load(at_once), min(WARM_UP_S, seconds), content, pids)
        before = [written_by(pid) for pid in backups]
        run = await run_load(sinks, Load(at_once), seconds, content, pids)
        written = [written_by(pid) - was for pid, was in zip(backups, before, strict=True)]
        loaded.runs.append(run)
        loaded.written.append(median(written) / max(1, run.operations))
        reports = await self.reports()
        loaded.turns_ms.append(max(report["loop"]["longest_turn_ms"] for report in reports.values()))

    @asynccontextmanager
    async def paced(self, keys: Sequence[bytes], rate: float) -> AsyncIterator[Recording]:
        """Put at this rate, whatever became of the puts before, while the body runs; after it the recording is whole."""
        content = Content(keys, secrets.token_bytes(VALUE_BYTES))
        burst = max(1, round(rate * BURST_S))
        loop = OpenLoop([ClientSink(self.client)], rate, PATIENCE_S, content, time.perf_counter, burst)
        task = asyncio.create_task(loop.run())
        try:
            yield loop.recording
        finally:
            loop.end()
            await task

    # What the replicas are

    async def reports(self) -> dict[int, dict]:
        """Return what each replica says of itself, of those that answer."""
        pages = [asyncio.to_thread(fetched, f"http://{HOST}:{port}/status") for port in self._doors]
        return {number: json.loads(page) for number, page in enumerate(await asyncio.gather(*pages)) if page}

    def size(self) -> Size:
        """Return what a replica takes."""
        everybody = range(REPLICAS)
        memory = median(self.cluster.memory(number) for number in everybody)
        return Size(memory, median(self.cluster.disk(number) for number in everybody))

    async def sizes(self, puts: int, steps: int) -> list[Size]:
        """Put to all keys in turn; return the sizes before, and after each step."""
        found = [self.size()]
        for _ in range(steps):
            await self.fill(puts // steps)
            found.append(self.size())
        return found

    # Replicas that end and return

    async def restart(self, number: int) -> float:
        """End a replica and start it again; return the seconds from its start until it is ready."""
        await asyncio.to_thread(self.cluster.end, number)
        began = time.perf_counter()
        self.cluster.start(number)
        page = f"http://{HOST}:{self._doors[number]}/readyz"
        await self._until(number, lambda: asyncio.to_thread(fetched, page))
        return time.perf_counter() - began

    async def restarts(self, times: int, load: tuple[Sequence[bytes], float] | None = None) -> list[float]:
        """Restart backups in turn, each time until all are level again; beside a load of these keys and rate, if any."""
        took = []
        for turn in range(times):
            number = backups_of(await self.reports())[turn % (REPLICAS - 1)]
            if load is None:
                took.append(await self.restart(number))
            else:
                async with self.paced(*load):
                    took.append(await self.restart(number))
            await self.settled()
        return took

    async def outrun(self, away: int, slot: int, keys: Sequence[bytes]) -> None:
        """Overwrite these keys, in passes, until the others do not keep the logs after this slot any more.

        That is so when they have made the state durable twice after it, and more was put since than they retain.
        """
        durable: set[int] = set()
        for passes in count(1):
            await self.overwrite(keys)
            reports = await self.reports()
            persisted = min(report["persisted"] for number, report in reports.items() if number != away)
            if persisted > slot:
                durable.add(persisted)
            if len(durable) > 1 and passes * len(keys) * VALUE_BYTES > 2 * self.retain_mib * MIB:
                return

    async def come_back(self, changed: int, rate: float, seconds: float, told: Callable[[str], None]) -> Return:
        """End a replica, change so many keys, and let it come back beside a load; then prove that its vote counts."""
        keys = self.chosen(changed)
        found = Return(len(keys))

        async def load(name: str) -> None:
            told(f"puts at {rate:,.0f} per second: {name}")
            async with self.paced(keys, rate) as found.loads[name]:
                await asyncio.sleep(seconds)

        await load("all three replicas serve")
        reports = await self.reports()
        away, other = backups_of(reports)
        slot = reports[away]["executed"]
        await asyncio.to_thread(self.cluster.end, away)
        told(f"replica {away} stopped; {len(keys):,} keys are changed, until it needs the state")
        await self.outrun(away, slot, keys)
        await load("one of them is stopped")
        found.behind = max(report["executed"] for report in (await self.reports()).values()) - slot
        told(f"replica {away} returns")
        async with self.paced(keys, rate) as found.loads["it returns"]:
            await self._return(away, found)
        await load("all three serve again")
        other = next(number for number in backups_of(await self.reports()) if number != away)
        await asyncio.to_thread(self.cluster.end, other)
        await load("another one is stopped: its vote is needed")
        return found

    async def _return(self, away: int, found: Return) -> None:
        installed = self.cluster.installed(away)
        began = time.perf_counter()
        self.cluster.start(away)
        before: dict[int, dict] = {}

        async def level() -> bool:
            nonlocal before
            reports = await self.reports()
            if found.installed_s is None and self.cluster.installed(away) > installed:
                found.installed_s = time.perf_counter() - began
            others = [report for number, report in before.items() if number != away]
            before = reports
            return is_level(reports.get(away), others)

        await self._until(away, level)
        found.level_s = time.perf_counter() - began
        found.transfers = self._transfers(away)
        found.memory, found.memory_most = (self.cluster.memory(away, field) for field in ("VmRSS", "VmHWM"))

    def _transfers(self, number: int) -> list[dict]:
        """Return what a replica's log says of transfers."""
        lines = (self.cluster.directory / f"replica-{number}.log").read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if '"state transferred"' in line]

    async def _until(self, number: int, is_so: Callable[[], Awaitable[object]]) -> None:
        """Wait until something is so of a replica that runs; what is asked may be answered late."""
        ends = time.monotonic() + PATIENCE_S
        while not await is_so():
            code = self.cluster.children[number].poll()
            if code is not None:
                raise ProgramError(f"replica {number} ended with code {code}")
            if time.monotonic() > ends:
                raise ProgramError(f"replica {number} was not ready within {PATIENCE_S:g} s")
            await asyncio.sleep(POLL_S)
