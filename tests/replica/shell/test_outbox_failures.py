"""A disk or a trusted log that fails: nothing is released, nothing more is tried, the replica stops and says why."""

import asyncio
import errno
import sqlite3
import threading

import pytest

from replica.shell import outbox as outbox_module
from tests.replica.shell.outbox_bench import Bench, check_order
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from trustlog import MisuseError, in_memory
from trustlog.log import AttestedLog, LogState

DISK_FULL = sqlite3.OperationalError("database or disk is full")
IO_ERROR = OSError(errno.EIO, "Input/output error")


def fail_from(target, name, count, error):
    """Have the method raise from its call number `count` on; return the list of calls."""
    calls = []
    real = getattr(target, name)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) >= count:
            raise error
        return real(*args, **kwargs)

    setattr(target, name, failing)
    return calls


@pytest.mark.parametrize("error", [DISK_FULL, IO_ERROR], ids=["full", "eio"])
@on_loop
async def test_a_store_that_fails_once_ends_it_for_good(tmp_path, monkeypatch, error):
    monkeypatch.setattr(outbox_module, "STORE_AFTER_S", 0.0)
    bench = Bench(tmp_path)
    await bench.say(b"one")
    real = bench.store.write
    fail_from(bench.store, "write", 1, error)
    bench.receive(1, b"a cause")
    bench.append(b"two")
    await until(lambda: bench.failed, "the failure told")
    # The disk works again. The cause above is lost, so nothing that depends on it may ever be said.
    bench.store.write = real
    bench.receive(2, b"later")
    bench.receive(1, b"later")
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert bench.log.last == 1
    assert [released.group.first for released in bench.released] == [1]
    assert bench.failed == [error]
    await bench.close()
    assert bench.log.last == 1


@on_loop
async def test_closing_after_a_failure_does_not_fail_again(tmp_path):
    bench = Bench(tmp_path)
    await bench.say(b"one")
    fail_from(bench.store, "write", 1, DISK_FULL)
    bench.append(b"two")
    await until(lambda: bench.failed, "the failure told")
    bench.receive(1, b"more")
    await bench.close()
    assert len(bench.failed) == 1


class FailingState:
    """Where a trusted log keeps its state: fails after some."""

    def __init__(self, good: int) -> None:
        self.good = good

    def save(self, state: bytes) -> None:
        self.good -= 1
        if self.good < 0:
            raise IO_ERROR


@on_loop
async def test_a_trusted_log_that_fails_releases_nothing(tmp_path):
    made = in_memory()
    log = AttestedLog(made._private_key, made.kind, LogState.empty(made.log_id), FailingState(2))
    bench = Bench(tmp_path, log=log)
    await bench.say(b"one")
    await bench.say(b"two")
    await bench.say(b"three")
    assert bench.failed == [IO_ERROR]
    assert len(bench.released) == 2
    assert bench.store.last_group(0).attestation is None
    with pytest.raises(MisuseError, match="could not be saved"):
        log.append([bytes(32)], context=bytes(32))
    await bench.close()


@on_loop
async def test_one_group_at_a_time(tmp_path):
    async with Bench(tmp_path) as bench:
        bench.append(b"one")
        with pytest.raises(RuntimeError, match="before the first was released"):
            bench.outbox.append((b"two",))
        await until(lambda: bench.released, "the first")
        check_order(bench.steps)


@on_loop
async def test_what_arrives_during_an_append_is_stored_although_nothing_is_said_afterwards(tmp_path, monkeypatch):
    """Its time to be stored comes while the append is still under way."""
    monkeypatch.setattr(outbox_module, "STORE_AFTER_S", 0.0)
    async with Bench(tmp_path) as bench:
        goes_on, timer_came = threading.Event(), []
        real = bench.log.append
        bench.log.append = lambda *args, **kwargs: goes_on.wait(10) and real(*args, **kwargs)
        start = bench.outbox._start
        bench.outbox._start = lambda: (timer_came.append(bench.outbox._work is not None), start())
        bench.append(b"one")
        bench.receive(1, b"meanwhile")
        await until(lambda: timer_came[-1], "the time to store it, too early")
        goes_on.set()
        await until(lambda: (1, 1) in bench.store.visible(), "what arrived is stored")
        assert len(bench.released) == 1


@on_loop
async def test_closing_in_the_middle_finishes_what_was_begun(tmp_path):
    bench = Bench(tmp_path)
    bench.receive(1, b"cause")
    bench.append(b"one")
    bench.receive(2, b"arrives during the append")
    stored = bench.steps
    await bench.outbox.close()
    assert check_order(stored) == 1
    assert bench.store.visible() == {(0, 1), (1, 1), (2, 1)}
    # The attestation is stored as well: nothing has to be issued again.
    assert bench.store.last_group(0).attestation is not None
    bench.store.close()


@on_loop
async def test_closing_finishes_what_waited_for_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox_module, "STORE_AFTER_S", 0.0)
    bench = Bench(tmp_path)
    bench.receive(1, b"stored by itself")
    bench.outbox._start()
    bench.append(b"waits for that")
    await bench.outbox.close()
    assert check_order(bench.steps) == 1
    assert bench.store.last_group(0).attestation is not None
    bench.store.close()


@on_loop
async def test_an_error_inside_stops_the_replica_before_it_says_more(tmp_path):
    """An application that runs out of memory, or a defect: the core may have changed by half."""
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("a", "1")
            node = cluster.nodes[1]
            await cluster.wait_quiet()

            def apply(operation, context):
                raise MemoryError("planted")

            node.core.executor._application.apply = apply
            said = node.trusted_log.last
            await client.put("b", "2")
            reason = await until(lambda: cluster.stopped.get(1), "replica 1 stopped")
            assert "internal error: MemoryError: planted" in reason
            await client.put("c", "3")
            # What it said before the operation was executed may be out; nothing came after that.
            assert node.trusted_log.last <= said + 2


@pytest.mark.parametrize("what", ["store", "trusted log"])
@on_loop
async def test_the_node_stops_and_says_why(tmp_path, what):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("a", "1")
            node = cluster.nodes[1]
            await cluster.wait_quiet()
            error = DISK_FULL if what == "store" else IO_ERROR
            if what == "store":
                fail_from(node.store, "write", 1, error)
            else:
                fail_from(node.trusted_log._store, "save", 1, error)
            said = node.trusted_log.last
            await client.put("b", "2")  # the other two decide
            reason = await until(lambda: cluster.stopped.get(1), "replica 1 stopped")
            assert "cannot make its log durable" in reason
            assert str(error) in reason
            assert node.trusted_log.last == said
            assert cluster.nodes[0].core.received(1) <= said
            await client.put("c", "3")
            assert node.core.executed < cluster.nodes[0].core.executed  # it takes nothing in any more
            # As the daemon does it: closing a stopped replica must not raise.
            await cluster.stop(1)
        assert any(line["level"] == "critical" and line["reason"] == reason for line in cluster.logged.lines)


@on_loop
async def test_a_disk_full_at_the_end_is_told_and_loses_nothing_said(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("a", "1")
        await cluster.wait_quiet()
        last = cluster.nodes[0].trusted_log.last
        fail_from(cluster.nodes[0].store, "write", 1, DISK_FULL)
        cluster.nodes[0].outbox._unstored = cluster.nodes[0].outbox._unstored or (1, bytes(234))
        await cluster.stop(0)
        assert any("disk is full" in text for text in cluster.logged.texts())
        cluster.start(0)
        assert cluster.nodes[0].trusted_log.last == last
