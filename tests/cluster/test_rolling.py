"""What an operator does, and what machines do, to one replica at a time while clients work: no request fails.

`make test-rolling` takes longer over it: five replicas too, and each stopped for ten seconds (STOPPED_S).

The clients are paced. With all replicas on one machine, and all the load that it carries, one that was away never reads up: its
share of the processors is no larger than the others'. An operator waits until it is ready, and so do these tests.
"""

import asyncio
import contextlib
import os
import signal
import time

import pytest
import uvloop

from tests.support.cluster import Processes
from tests.support.waiting import until
from trustlog import BackendKind

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STOPPED_S = float(os.environ.get("STOPPED_S", "0"))
FAULTS = (1, 2) if STOPPED_S else (1,)
CLIENTS = 2
PAUSE_S = 0.2
MORE = 20
DEADLINE_S = 30.0
READY_S = 120.0


class Paced:
    """Clients that each put ever new keys and count up; whatever fails, or is answered wrongly, ends the test."""

    def __init__(self, cluster) -> None:
        self._cluster = cluster
        self._ended = asyncio.Event()
        self.totals = [0] * CLIENTS

    async def work(self, number: int, client) -> None:
        while not self._ended.is_set():
            total = self.totals[number] + 1
            await client.put(f"key-{number}-{total}", f"{total}", deadline_s=DEADLINE_S)
            assert await client.incr(f"counter-{number}", deadline_s=DEADLINE_S) == total
            self.totals[number] = total
            await asyncio.sleep(PAUSE_S)

    async def more(self, count: int = MORE) -> None:
        wanted = sum(self.totals) + count
        await until(lambda: sum(self.totals) >= wanted, f"{count} more are done", 60)

    async def until_all_are_ready(self) -> None:
        async def ready():
            reports = await self._cluster.reports(client)
            self.seen = {number: (one["executed"], one["not_ready"]) for number, one in reports.items()}
            return len(reports) == self._cluster.cluster.genesis.n and not any(
                one["not_ready"] for one in reports.values()
            )

        async with self._cluster.client() as client:
            try:
                await until(ready, "all are ready", READY_S)
            except AssertionError as error:
                raise AssertionError(f"{error}: {self.seen}") from None

    async def run(self, disturb) -> None:
        """Do `disturb(number)` to each replica meanwhile; then check that all is there and counted once."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._cluster.client()) for _ in range(CLIENTS)]
            async with asyncio.TaskGroup() as tasks:
                for number, client in enumerate(clients):
                    tasks.create_task(self.work(number, client))
                await self.more()
                for number in range(self._cluster.cluster.genesis.n):
                    await disturb(number)
                    await self.until_all_are_ready()
                    await self.more()
                self._ended.set()
            for number, client in enumerate(clients):
                assert int(await client.get(f"counter-{number}")) == self.totals[number]
                for total in range(1, self.totals[number] + 1, 7):
                    assert await client.get(f"key-{number}-{total}") == b"%d" % total
        reports = await self._cluster.wait_equal()
        assert all(one["verdict"] == "trusted" for report in reports.values() for one in report["verdicts"])


def use(directory, f: int, disturb) -> None:
    """Do `disturb(cluster, clients, number)` to each replica of a cluster that is used; then it ends as it should."""
    with Processes(directory / "c", f=f, log_kind=BackendKind.PROCESS) as cluster:
        cluster.start_and_wait()

        async def run():
            clients = Paced(cluster)
            await clients.run(lambda number: disturb(cluster, clients, number))

        uvloop.run(run())
        assert all(cluster.kill(number, signal.SIGTERM) == 0 for number in range(cluster.cluster.genesis.n))


@pytest.mark.parametrize("f", FAULTS)
def test_restarted_one_after_the_other(tmp_path, f):
    """A rolling upgrade: each is asked to end, started again, and is ready before the next one is."""

    async def disturb(cluster, clients, number):
        assert await asyncio.to_thread(cluster.kill, number, signal.SIGTERM) == 0
        await clients.more()
        cluster.start(number)

    use(tmp_path, f, disturb)


@pytest.mark.long
@pytest.mark.parametrize("f", FAULTS)
def test_stopped_for_a_while(tmp_path, f):
    """kill -STOP of each in turn, the primary among them: its connections stay, and nothing comes from it."""

    async def disturb(cluster, clients, number):
        ends = time.monotonic() + STOPPED_S
        os.kill(cluster.pid(number), signal.SIGSTOP)
        try:
            await clients.more()
            await until(lambda: time.monotonic() >= ends, "it was away long enough", STOPPED_S + 20)
        finally:
            os.kill(cluster.pid(number), signal.SIGCONT)

    use(tmp_path, f, disturb)
