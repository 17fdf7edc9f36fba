"""Measuring: medians, rounds, many clients, processor time from /proc."""

import os

import pytest

from client.measure import ClientSink, Load, Plan, Run, measure, run_of, summarise, with_more_clients
from client.processes import cpu_seconds, machine_cpu_seconds
from client.surroundings import describe, file_system_of
from client.workload import Recording
from tests.client.fake_cluster import until
from tests.support.waiting import wait_for


def test_levels_are_medians_of_runs():
    runs = [Run(n, 2.0, p, 10 * p, {"x": c}) for n, p, c in ((100, 1.0, 9.0), (400, 3.0, 1.0), (200, 2.0, 5.0))]
    level = summarise(Load(10, value_bytes=1000), runs)
    assert (level.ops_per_second, level.slowest, level.fastest) == (100.0, 50.0, 200.0)
    assert (level.concurrency, level.rate, level.value_bytes, level.mb_per_second) == (10, None, 1000, 0.1)
    assert (level.p50_ms, level.p99_ms, level.cpu_us_per_operation) == (2.0, 20.0, {"x": 5.0})


def test_processor_time_comes_from_proc():
    before = cpu_seconds(os.getpid())
    machine = machine_cpu_seconds()
    # The two are counted apart, and the machine's now and then a step later.
    wait_for(lambda: sum(range(10_000)) and cpu_seconds(os.getpid()) > before, "this process's time to be counted")
    wait_for(lambda: sum(range(10_000)) and machine_cpu_seconds() > machine, "the machine's time to be counted")
    with pytest.raises(OSError, match="No such file"):
        cpu_seconds(2**30)


def test_surroundings_are_described(tmp_path):
    found = describe()
    assert found["cpus"] >= 1
    assert found["packages"]["msgpack"]
    assert file_system_of(tmp_path) != "unknown"


def test_every_size_is_measured_with_every_load():
    plan = Plan(levels=(1, 2), value_sizes=(100, 1024))
    assert plan.loads == [Load(1), Load(2), Load(1, value_bytes=1024), Load(2, value_bytes=1024)]
    assert Plan(levels=(1, 2), rates=(5.0,)).loads == [Load(None, 5.0)]
    assert [str(load) for load in (Load(1), Load(None, 5.0), Load(2, value_bytes=0))] == [
        "1 at a time",
        "5 per second",
        "2 at a time, values of 0 bytes",
    ]


def test_a_generator_that_may_be_the_limit_is_seen():
    recording = Recording(seconds=2.0, operations=4)
    for _ in range(4):
        recording.latencies.record(0.5)
    run = run_of(recording, {"client": 1.9, "replica 0": 1.0}, machine=3.5)
    assert (run.generator_cpus, run.others_cpus) == (0.95, pytest.approx(0.3))
    assert run.cpu_us == {"client": 475_000.0, "replica 0": 250_000.0}
    assert summarise(Load(1), [run]).generator_is_limit
    assert not summarise(Load(1), [run_of(recording, {"client": 1.7}, machine=3.5)]).generator_is_limit
    # /proc counts in steps, so the parts can come to more than the whole.
    assert run_of(recording, {"client": 1.7}, machine=1.6).others_cpus == 0.0


@pytest.mark.asyncio
async def test_a_measurement_counts_what_was_done(fleet):
    told = []
    async with fleet, fleet.client() as client:
        plan = Plan(levels=(1, 5), runs=2, seconds=0.05, warm_up_s=0.01)
        levels = await measure([client], plan, {"client": os.getpid()}, told.append)
    assert [level.concurrency for level in levels] == [1, 5]
    assert all(level.ops_per_second > 0 for level in levels)
    assert all(0 < level.p50_ms <= level.p99_ms <= level.p999_ms <= level.max_ms for level in levels)
    rounds = [f"{load} at a time, run {number} of 2" for number in (1, 2) for load in (1, 5)]
    assert told == ["warming up", *rounds]


@pytest.mark.asyncio
async def test_an_open_loop_is_measured_at_its_rate(fleet):
    async with fleet, fleet.client() as client:
        plan = Plan(rates=(200.0,), runs=1, seconds=0.1, warm_up_s=0.01)
        (level,) = await measure([client], plan, {"client": os.getpid()}, lambda _: None)
    assert (level.concurrency, level.rate, level.not_started) == (None, 200.0, 0)
    assert level.late_p99_ms > 0


@pytest.mark.asyncio
async def test_more_clients_have_keys_and_connections_of_their_own(fleet, monkeypatch):
    monkeypatch.setattr("client.measure.OPENED_AT_ONCE", 2)
    async with fleet, fleet.client(deadline_s=30) as first:
        async with with_more_clients(first, 6, deadline_s=30) as clients:
            assert len({client._key.public_key for client in clients}) == len(clients) == 6
            # f + 1 serve already before the last one is connected.
            await until(lambda: all(len(replica.connections) >= 6 for replica in fleet.replicas), seconds=30)
            operation = ClientSink(clients[-1]).put(b"k", b"v")
            ClientSink.check(await operation)
        assert clients[0].driver is not None
        with pytest.raises(RuntimeError, match="not open"):
            _ = clients[1].driver
