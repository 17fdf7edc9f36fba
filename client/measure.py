"""Measuring a cluster from outside, in a closed or an open loop (client.workload), one or many clients at a time.

All loads take turns, round after round, so that what else the machine does hits all of them alike; a figure of a load
is the median over its runs. Processor time comes from the operating system: that of each replica, of each log's
service, and of this program, the load generator, whose share of one processor is given so that it is seen when the
generator is the limit.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from client.api import Client, error_of
from client.processes import cpu_seconds, machine_cpu_seconds
from client.workload import Content, Recording, closed_loop, open_loop
from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.core.envelope import Result, Status

LEVELS = (1, 10, 50, 200)
KEY_BYTES = 16
VALUE_BYTES = 100
KEYS = 100_000
# What all keys together may take in each replica's memory: with large values there are fewer of them.
VALUES_BYTES_MAX = 256 * 1024 * 1024
RUNS = 5
RUN_S = 3.0
WARM_UP_S = 1.0
WARM_UP_CONCURRENCY = 50
CLIENTS_MAX = 1024
# Clients that connect and open their sessions at the same time.
OPENED_AT_ONCE = 20
GENERATOR = "client"
# A generator that uses more than this of one processor is likely to be the limit: it runs on one.
GENERATOR_BUSY = 0.9
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the cluster: operations at a time (closed loop), or a rate per second (open loop)."""

    concurrency: int | None
    rate: float | None = None
    value_bytes: int = VALUE_BYTES

    def __str__(self) -> str:
        """Say it in words."""
        asked = f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:g} per second"
        return asked if self.value_bytes == VALUE_BYTES else f"{asked}, values of {self.value_bytes} bytes"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: every load at every size, `runs` times."""

    levels: tuple[int, ...] = LEVELS
    runs: int = RUNS
    seconds: float = RUN_S
    warm_up_s: float = WARM_UP_S
    rates: tuple[float, ...] = ()  # if there are any, they are used and not `levels`
    value_sizes: tuple[int, ...] = (VALUE_BYTES,)

    @property
    def loads(self) -> list[Load]:
        """Return every load."""
        if self.rates:
            return [Load(None, rate, size) for size in self.value_sizes for rate in self.rates]
        return [Load(level, None, size) for size in self.value_sizes for level in self.levels]


@dataclass(frozen=True, slots=True)
class Run:
    """One run: operations done, how long it took, latencies and CPU time used.

    cpu_us: per operation, by process. generator_cpus and others_cpus: processors kept busy by the load generator, and
    by programs that are not part of the measurement.
    """

    operations: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]
    p999_ms: float = 0.0
    max_ms: float = 0.0
    not_started: int = 0
    late_p99_ms: float = 0.0
    generator_cpus: float = 0.0
    others_cpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Level:
    """Medians over the runs of one load; `slowest` and `fastest` runs' rates show the spread."""

    concurrency: int | None
    runs: int
    ops_per_second: float
    slowest: float
    fastest: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_operation: dict[str, float]
    rate: float | None = None
    value_bytes: int = VALUE_BYTES
    mb_per_second: float = 0.0
    p999_ms: float = 0.0
    max_ms: float = 0.0
    not_started: int = 0  # open loop: operations in all runs that were due and found no room
    late_p99_ms: float = 0.0  # open loop: by how much the generator itself started later than intended
    generator_cpus: float = 0.0
    others_cpus: float = 0.0

    @property
    def generator_is_limit(self) -> bool:
        """Say whether the load generator kept its one processor so busy that it may have been the limit."""
        return self.generator_cpus > GENERATOR_BUSY

    def as_data(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "generator_is_limit": self.generator_is_limit}


class ClientSink:
    """A client as something to load."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def put(self, key: bytes, value: bytes) -> Awaitable[Result]:
        """Begin a put."""
        return self._client.submit(kv.put(key, value))

    @staticmethod
    def check(outcome: Result) -> None:
        """Raise the client's error for a result that is none."""
        if outcome.status is not Status.OK:
            raise error_of(outcome)


@asynccontextmanager
async def with_more_clients(client: Client, count: int, deadline_s: float) -> AsyncIterator[list[Client]]:
    """`client` and others up to `count`, each with a new key, connections and a session of its own."""
    async with AsyncExitStack() as stack:
        clients = [client]
        await client.put("bench", "ready", deadline_s=deadline_s)
        while len(clients) < count:
            more = range(min(OPENED_AT_ONCE, count - len(clients)))
            opened = [
                await stack.enter_async_context(Client(client.cluster, ClientKey.generate(), deadline_s=deadline_s))
                for _ in more
            ]
            await asyncio.gather(*(one.put("bench", "ready") for one in opened))
            clients += opened
        yield clients


async def measure(
    clients: Sequence[Client], plan: Plan, pids: dict[str, int], told: Callable[[str], None]
) -> list[Level]:
    """Warm up, then measure every load; `pids` names the processes whose CPU time is taken, the generator's too."""
    keys = [secrets.token_hex(KEY_BYTES // 2).encode() for _ in range(KEYS)]
    contents = {
        size: Content(keys[: max(1, min(KEYS, VALUES_BYTES_MAX // (size + 1)))], secrets.token_bytes(size))
        for size in plan.value_sizes
    }
    sinks = [ClientSink(client) for client in clients]
    runs: dict[Load, list[Run]] = {load: [] for load in plan.loads}
    told("warming up")
    warm = Load(max(WARM_UP_CONCURRENCY, len(clients)), None, min(plan.value_sizes))
    await run_load(sinks, warm, plan.warm_up_s, contents[warm.value_bytes], pids)
    for number in range(plan.runs):
        for load, done in runs.items():
            told(f"{load}, run {number + 1} of {plan.runs}")
            done.append(await run_load(sinks, load, plan.seconds, contents[load.value_bytes], pids))
    return [summarise(load, done) for load, done in runs.items()]


async def run_load(
    sinks: Sequence[ClientSink], load: Load, seconds: float, content: Content, pids: dict[str, int]
) -> Run:
    """Run one load once."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    machine = machine_cpu_seconds()
    if load.rate is not None:
        recording = await open_loop(sinks, load.rate, seconds, content)
    elif load.concurrency is not None:
        recording = await closed_loop(sinks, load.concurrency, seconds, content)
    else:
        raise ValueError("a load has a concurrency or a rate")
    used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    return run_of(recording, used, machine_cpu_seconds() - machine)


def run_of(recording: Recording, used: dict[str, float], machine: float) -> Run:
    """Return the figures of a run; `used` and `machine`: CPU seconds of each process and of all programs."""
    latencies, done = recording.latencies, max(1, recording.operations)
    late = recording.lateness
    return Run(
        operations=recording.operations,
        seconds=recording.seconds,
        p50_ms=latencies.percentile(0.5) * 1000,
        p99_ms=latencies.percentile(0.99) * 1000,
        p999_ms=latencies.percentile(0.999) * 1000,
        max_ms=latencies.maximum_s * 1000,
        not_started=recording.not_started,
        late_p99_ms=late.percentile(0.99) * 1000 if late.count else 0.0,
        cpu_us={name: cpu * 1e6 / done for name, cpu in used.items()},
        generator_cpus=used.get(GENERATOR, 0.0) / recording.seconds,
        others_cpus=max(0.0, machine - sum(used.values())) / recording.seconds,
    )


def summarise(load: Load, runs: Sequence[Run]) -> Level:
    """Return the medians of the runs of one load."""
    rates = sorted(run.operations / run.seconds for run in runs)
    rate = median(rates)
    return Level(
        concurrency=load.concurrency,
        rate=load.rate,
        value_bytes=load.value_bytes,
        runs=len(runs),
        ops_per_second=round(rate, 1),
        slowest=round(rates[0], 1),
        fastest=round(rates[-1], 1),
        mb_per_second=round(rate * load.value_bytes / MB, 3),
        p50_ms=round(median(run.p50_ms for run in runs), 3),
        p99_ms=round(median(run.p99_ms for run in runs), 3),
        p999_ms=round(median(run.p999_ms for run in runs), 3),
        max_ms=round(max(run.max_ms for run in runs), 3),
        not_started=sum(run.not_started for run in runs),
        late_p99_ms=round(median(run.late_p99_ms for run in runs), 3),
        cpu_us_per_operation={name: round(median(run.cpu_us[name] for run in runs), 1) for name in runs[0].cpu_us},
        generator_cpus=round(median(run.generator_cpus for run in runs), 3),
        others_cpus=round(median(run.others_cpus for run in runs), 3),
    )
