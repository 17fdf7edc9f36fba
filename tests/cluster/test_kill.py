"""kill -9 of real replicas: of all at once under load, and at a spread of their fsyncs. Nothing acknowledged is lost."""

import asyncio
import contextlib
import os
import shutil
import signal

import pytest
import uvloop

from client import NotExecuted, Undecided
from replica.core.genesis import Limits, Ordering
from tests.support.cluster import Processes
from tests.support.load import Load, check_acknowledged
from tests.support.waiting import on_loop

pytestmark = pytest.mark.cluster

LIMITS = Limits(checkpoint_interval=4, window=8)  # a milestone every 32 slots
# How often a replica is killed at one of its fsyncs: `make kill` asks for more.
KILLS = int(os.environ.get("KILLS", "10"))


class Insistent(Load):
    """Goes on whatever becomes of its requests; an outcome that nobody knows is none that was acknowledged."""

    def __init__(self, client, **options) -> None:
        super().__init__(client, **options)
        self.counted: list[int] = []

    async def _work(self, worker: int) -> None:
        number = 0
        while not self._stopping:
            number += 1
            key = f"{id(self)}-{worker}-{number}"
            with contextlib.suppress(NotExecuted, Undecided):
                await self.client.put(key, key * 20, deadline_s=self._deadline_s)
                self.acknowledged[key] = key * 20
            with contextlib.suppress(NotExecuted, Undecided):
                self.counted.append(await self.client.incr("n", deadline_s=self._deadline_s))


@pytest.mark.parametrize("ordering", [pytest.param(Ordering.TWO_PHASE, marks=pytest.mark.long), Ordering.THREE_PHASE])
def test_all_at_once_under_load(tmp_path, ordering):
    with Processes(tmp_path / "c", ordering=ordering, limits=LIMITS) as cluster:
        cluster.set(retain_mib=0)

        @on_loop
        async def use():
            acknowledged: dict[str, str] = {}
            counted: list[int] = []
            for _ in range(3):
                cluster.start()
                await cluster.wait_ready()
                async with cluster.client(patience_ms=200) as client:
                    await check_acknowledged(client, acknowledged)
                    async with Insistent(client, workers=8, deadline_s=2.0) as load:
                        await load.more(80)
                        for number in range(3):
                            os.kill(cluster.pid(number), signal.SIGKILL)
                        for number in range(3):
                            assert await asyncio.to_thread(cluster.exit_status, number) == -signal.SIGKILL
                acknowledged |= load.acknowledged
                counted += load.counted
            cluster.start()
            reports = await cluster.wait_equal()
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])
            assert min(report["persisted"] for report in reports.values()) > 0, "it began from milestones"
            async with cluster.client() as client:
                await check_acknowledged(client, acknowledged)
                # Exactly once: nothing that was counted and acknowledged is counted twice or forgotten.
                assert len(set(counted)) == len(counted)
                assert await client.incr("n") > max(counted)

        use()


def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        if os.environ.get("REQUIRE_TOOLS"):
            pytest.fail("strace is not installed, and REQUIRE_TOOLS is set")
        pytest.skip("strace is not installed: apt-get install strace")
    return found


def spread(count: int) -> list[int]:
    """At which fsync to kill, time after time: soon after the start, and later and later, in turn."""
    soon = list(range(1, count // 2 + 1))
    late = [20 + 7 * number for number in range(count - len(soon))]
    return [one for pair in zip(late, [*soon, 0], strict=False) for one in pair if one]


@pytest.mark.timeout(60 + 12 * KILLS)
@pytest.mark.parametrize(
    "number", [pytest.param(0, id="primary"), pytest.param(1, id="backup", marks=pytest.mark.long)]
)
def test_killed_at_an_fsync(tmp_path, number):
    """The signal comes at the n-th fsync or fdatasync of one of its threads, before the kernel carries it out."""
    tool = strace()
    others = [other for other in range(3) if other != number]
    with Processes(tmp_path / "c", limits=LIMITS) as cluster:
        cluster.set(retain_mib=0)
        cluster.start()

        @on_loop
        async def begin():
            await cluster.wait_ready()

        begin()
        cluster.kill(number)

        async def killed_at(load, nth: int) -> bool:
            """Run it until that kill; return whether it was live before."""
            inject = f"inject=fsync,fdatasync:signal=SIGKILL:when={nth}"
            cluster.start(
                number, under=[tool, "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", inject]
            )
            lived = False
            async with cluster.client() as observer:
                while cluster.is_running(number):
                    reports = await cluster.reports(observer, deadline_s=1.0)
                    lived = lived or (number in reports and reports[number]["mute"] is None)
                    await load.more(2)
            assert cluster.exit_status(number) == -signal.SIGKILL, cluster.log_text(number)[-2000:]
            return lived

        async def work():
            async with cluster.client(patience_ms=200) as client:
                async with Insistent(client, workers=3, deadline_s=20.0) as load:
                    lived = [await killed_at(load, nth) for nth in spread(KILLS // 2)]
                assert sum(lived) >= len(lived) // 3, (
                    "it came back, and spoke, most of the times that it had the time to"
                )
                cluster.start(number)
                await cluster.wait_ready()
                # It comes back live and agrees: with another away, it is one of the two that every decision needs.
                cluster.kill(others[1])
                await client.put("needs its vote", "1", deadline_s=30)
                cluster.start(others[1])
                reports = await cluster.wait_equal()
                assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])
                assert len({report["keys"] for report in reports.values()}) == 1
                await check_acknowledged(client, load.acknowledged)
                assert len(set(load.counted)) == len(load.counted)
                assert await client.incr("n") > max(load.counted)

        uvloop.run(work())


def test_the_spread_is_of_different_places():
    for count in (5, 25):
        assert len(set(spread(count))) == count
    assert min(spread(25)) == 1
    assert max(spread(25)) > 100


@pytest.mark.parametrize("missing", [False, True])
def test_a_missing_strace_is_named(monkeypatch, missing):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    if missing:
        monkeypatch.setenv("REQUIRE_TOOLS", "1")
    else:
        monkeypatch.delenv("REQUIRE_TOOLS", raising=False)
    with pytest.raises(pytest.fail.Exception if missing else pytest.skip.Exception, match="strace is not installed"):
        strace()
