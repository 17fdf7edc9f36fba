"""The client against real replicas in processes of their own."""

import asyncio
import json
import os
import signal

import pytest

from client import Client
from client.bench import initialise, main, started

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(tmp_path):
    directory = tmp_path / "a cluster"
    initialise(directory, 1, "three-phase")
    with started(directory, "memory") as pids:
        yield directory, pids


@pytest.mark.asyncio
async def test_concurrent_clients_lose_and_repeat_nothing(cluster):
    directory, _ = cluster
    async with Client.from_dir(directory, deadline_s=30) as one, Client.from_dir(directory, deadline_s=30) as two:
        sums = await asyncio.gather(*(client.incr("n") for client in (one, two) for _ in range(300)))
        assert sorted(sums) == list(range(1, 601))
        assert await one.stale_get("n") == await two.get("n") == b"600"
        # The third may still be starting: two are enough to serve.
        reports = [replica.report for replica in await one.status() if replica.reachable]
        assert len(reports) >= 2
        assert sum(report["executed"] > 0 for report in reports) >= 2


@pytest.mark.asyncio
async def test_large_values_read_at_once_do_not_crowd_each_other_out(cluster):
    """Twelve values of 900 kB do not fit one reply: what finds no room is asked for again, not failed."""
    directory, _ = cluster
    async with Client.from_dir(directory, deadline_s=60) as client:
        values = [bytes([i]) * 900_000 for i in range(12)]
        for i, value in enumerate(values):
            await client.put(f"large{i}", value)
        assert await asyncio.gather(*(client.get(f"large{i}") for i in range(12))) == values


@pytest.mark.asyncio
async def test_it_serves_with_a_backup_killed(cluster):
    directory, pids = cluster
    async with Client.from_dir(directory, deadline_s=30) as client:
        await client.put("a", "b")
        os.kill(pids["replica 2"], signal.SIGKILL)
        for i in range(50):
            await client.put(f"k{i}", "v")
        assert len([key async for key, _ in client.scan("k")]) == 50
    found = await _reachable(directory)
    assert found == [True, True, False]


def test_make_bench_runs_its_own_cluster_and_leaves_nothing_behind(tmp_path, capfd):
    options = ["--runs", "1", "--seconds", "0.2", "--concurrency", "5", "--dir", str(tmp_path), "-o", "json"]
    with pytest.raises(SystemExit) as ended:
        main([*options, "--durability", "memory", "--ordering", "two-phase"])
    found = json.loads(capfd.readouterr().out)
    assert ended.value.code == 0
    assert found["cluster"]["durability"] == "memory"
    assert found["cluster"]["ordering"] == "two-phase"
    programs = {f"{what} {number}" for what in ("replica", "log") for number in range(3)} | {"client"}
    assert set(found["levels"][0]["cpu_us_per_operation"]) == programs
    assert list(tmp_path.iterdir()) == []


async def _reachable(directory):
    async with Client.from_dir(directory, deadline_s=5) as client:
        return [replica.reachable for replica in await client.status()]
