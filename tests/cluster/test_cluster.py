"""Real clusters: the store's operations, replicas killed and restarted, both orderings, other applications."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from client import NotExecuted, Undecided
from replica.core.genesis import Ordering
from tests.support.cluster import Processes, environment
from tests.support.waiting import on_loop, until

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("ordering", list(Ordering))
def test_operations_a_killed_backup_and_a_restart_of_all(tmp_path, ordering):
    with Processes(tmp_path / "c", ordering=ordering) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert await client.put("a", "1") is False
                assert await client.put("a", "2") is True
                assert await client.get("a") == b"2"
                assert await client.get("none") is None
                assert (await client.cas("a", "2", "3")).swapped
                refused = await client.cas("a", "2", "4")
                assert (refused.swapped, refused.present) == (False, b"3")
                assert [await client.incr("n", 5) for _ in range(2)] == [5, 10]
                await asyncio.gather(*(client.put(f"many/{number:03}", str(number)) for number in range(250)))
                found = [pair async for pair in client.scan("many/", page=100)]
                assert found == [(b"many/%03d" % number, b"%d" % number) for number in range(250)]
                assert await client.delete("a") is True
                assert await client.stale_get("n") == b"10"
                cluster.kill(2)
                assert await client.incr("n") == 11
                reports = await cluster.reports(client)
                assert set(reports) == {0, 1}
                assert reports[0]["ordering"] == ordering.label

        @on_loop
        async def after_restart():
            async with cluster.client() as client:
                assert await client.incr("n") == 12
                assert await client.get("many/007") == b"7"
                assert await client.get("a") is None
            reports = await cluster.wait_equal()
            assert not any(peer["exposed"] for report in reports.values() for peer in report["peers"])

        use()
        cluster.kill(0)
        cluster.kill(1)
        cluster.start_and_wait()
        after_restart()


def test_five_replicas_with_two_killed_keep_serving(tmp_path):
    with Processes(tmp_path / "c", f=2) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert await client.incr("n") == 1
                cluster.kill(3)
                assert await client.incr("n") == 2
                cluster.kill(4)
                for expected in range(3, 30):
                    assert await client.incr("n") == expected
                cluster.start(3)
                reports = await cluster.wait_equal(0, 1, 2, 3)
                assert reports[3]["operations"] == reports[0]["operations"]

        use()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_backup_that_restarts_in_the_middle_of_load(tmp_path, how):
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            acknowledged = {}
            done = asyncio.Event()

            async def work(worker: int, client) -> None:
                number = 0
                while not done.is_set():
                    key = f"{worker}-{number}"
                    await client.put(key, key * 3)
                    acknowledged[key] = key * 3
                    number += 1

            async def more(count: int) -> None:
                wanted = len(acknowledged) + count
                await until(lambda: len(acknowledged) >= wanted or any(task.done() for task in tasks), "more done")

            async with cluster.client() as client:
                tasks = [asyncio.create_task(work(worker, client)) for worker in range(8)]
                for _ in range(2):
                    await more(100)
                    status = await asyncio.to_thread(cluster.kill, 1, how)
                    assert status == (0 if how is signal.SIGTERM else -how)
                    await more(100)
                    cluster.start(1)
                    await cluster.wait_ready()
                await more(100)
                done.set()
                await asyncio.gather(*tasks)
                reports = await cluster.wait_equal()
                assert reports[1]["executed"] == reports[0]["executed"]
                assert reports[1]["operations"] == reports[0]["operations"]
                # It said its own part again: the order goes on with it as the second of two.
                cluster.kill(2)
                for key, value in list(acknowledged.items())[::5]:
                    assert await client.get(key) == value.encode()

        use()


@pytest.mark.parametrize(
    ("f", "ordering"), [(1, Ordering.THREE_PHASE), (1, Ordering.TWO_PHASE), (2, Ordering.THREE_PHASE)]
)
def test_the_primary_is_killed_under_load(tmp_path, f, ordering):
    """Every acknowledged operation survives, and clients see a pause and no error; with f = 2 twice in a row.

    One view change per killed primary: the first patience was enough. How long the pause is, the simulator asserts in
    virtual time and the benchmark measures.
    """
    with Processes(tmp_path / "c", f=f, ordering=ordering) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            counted: list[int] = []
            async with cluster.client() as client:
                stop = asyncio.Event()

                async def count():
                    while not stop.is_set():
                        counted.append(await client.incr("n", deadline_s=30))

                tasks = [asyncio.create_task(count()) for _ in range(20)]
                for primary in range(f):
                    before = len(counted)
                    await until(lambda before=before: len(counted) > before + 100, "load")
                    cluster.kill(primary)
                    known = len(counted)
                    await until(lambda known=known: len(counted) > known + 100, "service again")
                stop.set()
                await asyncio.gather(*tasks)
                assert sorted(counted) == list(range(1, len(counted) + 1)), "each increment exactly once"
                assert await client.get("n") == b"%d" % len(counted)
                views = {s.report["view"] for s in await client.status() if s.reachable}
                assert views == {f}

        use()
        # The dead primary comes back, reads the logs, and follows.
        cluster.start(0)

        @on_loop
        async def again():
            async with cluster.client() as client:

                async def follows():
                    found = {s.number: s.report for s in await client.status() if s.reachable}
                    return 0 in found and found[0]["view"] == f and found[0]["executed"] == found[f]["executed"]

                await until(follows, "the old primary follows")

        again()


@pytest.mark.parametrize("left", [1, 0])
def test_too_few_replicas_are_told_in_time(tmp_path, left):
    """Without f+1 replicas nothing can be decided: clients are told, and never left waiting."""
    with Processes(tmp_path / "c") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                await client.put("a", "1")
                for number in range(left, 3):
                    cluster.kill(number)
                began = time.monotonic()
                with pytest.raises((NotExecuted, Undecided)):
                    await client.put("a", "2", deadline_s=2)
                assert time.monotonic() - began < 6

        use()
        command = [sys.executable, "-m", "client.cli.main", "-c", str(cluster.directory), "--deadline", "2", "get", "a"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment(), check=False)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_another_application(tmp_path):
    with Processes(tmp_path / "c", application="replica.apps.counter:Counter") as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert [await client.execute(b"") for _ in range(3)] == [b"1", b"2", b"3"]

        use()


def test_an_application_of_ones_own(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "shouting.py").write_text(
        textwrap.dedent(
            """
            from replica.application import OperationError


            class Shouting:
                def apply(self, operation, context):
                    if operation == b"secret":
                        raise OperationError("not that")
                    context.state.put(b"last", operation)
                    return operation.upper() + b" at %d" % context.slot
            """
        )
    )
    options = {"application": "shouting:Shouting", "extra_environment": {"PYTHONPATH": str(tmp_path / "lib")}}
    with Processes(tmp_path / "c", **options) as cluster:
        cluster.start_and_wait()

        @on_loop
        async def use():
            async with cluster.client() as client:
                assert (await client.execute(b"hello")).startswith(b"HELLO at ")
                with pytest.raises(Exception, match="not that"):
                    await client.execute(b"secret")
                reports = await cluster.reports(client)
                assert {report["keys"] for report in reports.values()} == {1}

        use()
