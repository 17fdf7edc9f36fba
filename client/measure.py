"""Measuring a cluster from outside, closed loop: every worker has one operation under way and starts the next at once.

Figures of a level are medians over its runs. Percentiles are exact, by the nearest rank: the smallest of the measured
latencies that at least the given share of them does not exceed.
"""

import asyncio
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter as now  # a loop may count in whole milliseconds
from typing import Any

from client.api import Client, error_of
from replica.apps import kv
from replica.core.envelope import Status

LEVELS = (1, 10, 50, 200)
KEY_BYTES = 16
VALUE_BYTES = 100
KEYS = 100_000
RUNS = 5
RUN_S = 3.0
WARM_UP_S = 1.0
WARM_UP_CONCURRENCY = 50
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    levels: tuple[int, ...] = LEVELS
    runs: int = RUNS
    seconds: float = RUN_S
    warm_up_s: float = WARM_UP_S


@dataclass(frozen=True, slots=True)
class Run:
    """One run: operations done, how long it took, latencies and CPU time used."""

    operations: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]


@dataclass(frozen=True, slots=True)
class Level:
    """Medians over the runs at one concurrency; `slowest` and `fastest` runs' rates show the spread."""

    concurrency: int
    runs: int
    ops_per_second: float
    slowest: float
    fastest: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_operation: dict[str, float]

    def as_data(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the exact percentile of sorted values by the nearest rank."""
    if not values or not 0 < share <= 1:
        raise ValueError("a percentile needs values, and a share above 0 and at most 1")
    return values[math.ceil(share * len(values)) - 1]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, from /proc; OSError if it is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The program's name stands in brackets and may hold anything; the fields are counted from behind it.
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def measure(client: Client, plan: Plan, pids: dict[str, int], told: Callable[[str], None]) -> list[Level]:
    """Warm up, then measure every level; `pids` names the processes whose CPU time is taken."""
    keys = [secrets.token_hex(KEY_BYTES // 2).encode() for _ in range(KEYS)]
    told("warming up")
    await _run(client, WARM_UP_CONCURRENCY, plan.warm_up_s, keys, pids)
    levels = []
    for concurrency in plan.levels:
        runs = []
        for number in range(plan.runs):
            told(f"{concurrency} at a time, run {number + 1} of {plan.runs}")
            runs.append(await _run(client, concurrency, plan.seconds, keys, pids))
        levels.append(summarise(concurrency, runs))
    return levels


def summarise(concurrency: int, runs: Sequence[Run]) -> Level:
    """Return the medians of the runs at one concurrency."""
    rates = sorted(run.operations / run.seconds for run in runs)
    names = runs[0].cpu_us
    return Level(
        concurrency=concurrency,
        runs=len(runs),
        ops_per_second=round(median(rates), 1),
        slowest=round(rates[0], 1),
        fastest=round(rates[-1], 1),
        p50_ms=round(median(run.p50_ms for run in runs), 3),
        p99_ms=round(median(run.p99_ms for run in runs), 3),
        cpu_us_per_operation={name: round(median(run.cpu_us[name] for run in runs), 1) for name in names},
    )


async def _run(client: Client, concurrency: int, seconds: float, keys: Sequence[bytes], pids: dict[str, int]) -> Run:
    value = secrets.token_bytes(VALUE_BYTES)
    latencies: list[float] = []
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    began = now()
    ends = began + seconds

    async def worker(number: int) -> None:
        # Each worker walks through all keys from its own place, so that levels write to the same keys.
        position = number * (len(keys) // concurrency)
        while (started := now()) < ends:
            result = await client.submit(kv.put(keys[position % len(keys)], value))
            if result.status is not Status.OK:
                raise error_of(result)
            latencies.append(now() - started)
            position += 1

    async with asyncio.TaskGroup() as group:
        for number in range(concurrency):
            group.create_task(worker(number))
    took = now() - began
    used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    latencies.sort()
    return Run(
        operations=len(latencies),
        seconds=took,
        p50_ms=percentile(latencies, 0.5) * 1000,
        p99_ms=percentile(latencies, 0.99) * 1000,
        cpu_us={name: cpu * 1e6 / len(latencies) for name, cpu in used.items()},
    )
