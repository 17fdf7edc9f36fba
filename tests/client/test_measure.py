"""Measuring: exact percentiles, medians, processor time from /proc."""

import os

import pytest

from client.measure import Plan, Run, cpu_seconds, measure, percentile, summarise
from client.surroundings import describe, file_system_of


def test_percentiles_are_by_nearest_rank():
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    for values, share in (([], 0.5), ([1.0], 0.0), ([1.0], 1.1)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, share)


def test_levels_are_medians_of_runs():
    runs = [Run(n, 2.0, p, 10 * p, {"x": c}) for n, p, c in ((100, 1.0, 9.0), (400, 3.0, 1.0), (200, 2.0, 5.0))]
    level = summarise(10, runs)
    assert (level.ops_per_second, level.slowest, level.fastest) == (100.0, 50.0, 200.0)
    assert (level.p50_ms, level.p99_ms, level.cpu_us_per_operation) == (2.0, 20.0, {"x": 5.0})


def test_processor_time_comes_from_proc():
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) < before + 0.02:
        pass
    with pytest.raises(OSError, match="No such file"):
        cpu_seconds(2**30)


def test_surroundings_are_described(tmp_path):
    found = describe()
    assert found["cpus"] >= 1
    assert found["packages"]["msgpack"]
    assert file_system_of(tmp_path) != "unknown"


@pytest.mark.asyncio
async def test_a_measurement_counts_what_was_done(fleet):
    told = []
    async with fleet, fleet.client() as client:
        plan = Plan(levels=(1, 5), runs=2, seconds=0.05, warm_up_s=0.01)
        levels = await measure(client, plan, {"me": os.getpid()}, told.append)
    assert [level.concurrency for level in levels] == [1, 5]
    assert all(level.ops_per_second > 0 and 0 < level.p50_ms <= level.p99_ms for level in levels)
    assert told[-1] == "5 at a time, run 2 of 2"
