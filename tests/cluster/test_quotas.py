"""Quotas of clients at real replicas: one key is held to its rate, another is not, and no primary is blamed for it."""

import asyncio
import json
import time

import pytest

from client.api import CLIENT_FOLDER
from tests.cluster.test_clients import DEADLINE_S, Policed
from tests.support.waiting import on_loop_for, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
RATE = 5
COUNT = 40


class Limited(Policed):
    def of(self, key, **settings):
        return self.client(deadline_s=120.0, key=key, **settings)

    async def refused(self):
        async with self.of(self.other) as client:
            reports = await self.reports(client)
        assert {report["view"] for report in reports.values()} == {0}
        return [reports[number]["refused"].get("request-over-quota", 0) for number in sorted(reports)]


async def count_up(client, name, ended):
    total = begun = await client.incr(name)
    while not ended.is_set():
        total += 1
        assert await client.incr(name) == total
    return total - begun


def test_one_key_is_held_to_its_rate_and_the_other_is_not(tmp_path):
    with Limited(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        mine = cluster.directory / CLIENT_FOLDER
        assert "allow it first" in cluster.clients("quota", mine, "--operations-per-s", RATE, expected=2).stderr
        cluster.clients("allow", mine, "--name", "meter")
        cluster.clients("quota", mine, "--operations-per-s", RATE)
        assert cluster.listed()["keys"][0]["quota"] == {"operations_per_s": RATE}

        async def use(wanted):
            """Return how long `wanted` operations of the one key took, and how many the other did meanwhile."""
            ended = asyncio.Event()
            async with cluster.of(cluster.mine) as slow, cluster.of(cluster.other) as fast:
                await slow.put("begun", "1")
                others = [asyncio.ensure_future(count_up(fast, f"fast-{i}", ended)) for i in range(8)]
                begun = time.monotonic()
                for _ in range(wanted):
                    await slow.incr("slow")
                took = time.monotonic() - begun
                ended.set()
                return took, sum(await asyncio.gather(*others))

        @on_loop_for(DEADLINE_S)
        async def held():
            took, others = await use(COUNT)
            # One second's worth is there at the beginning, at each of three replicas at the most.
            assert took >= (COUNT - 3 * RATE) / RATE
            assert others > 4 * COUNT
            assert (await cluster.refused())[0] > 0

        held()

        # One envelope with many operations is taken whole, and is a debt: what comes next waits for it.
        @on_loop_for(DEADLINE_S)
        async def in_one():
            async with cluster.of(cluster.mine) as client:
                begun = time.monotonic()
                await asyncio.gather(*(client.incr("one") for _ in range(COUNT)))
                await client.incr("one")
                assert time.monotonic() - begun >= COUNT / RATE - 3
            await cluster.refused()

        in_one()
        for number in range(3):
            cluster.kill(number)
        cluster.start_and_wait()
        assert cluster.listed()["keys"][0]["quota"] == {"operations_per_s": RATE}

        @on_loop_for(DEADLINE_S)
        async def taken_away():
            await asyncio.to_thread(cluster.clients, "quota", mine, "--none")
            await use(COUNT)
            assert await cluster.refused() == [0, 0, 0]

        taken_away()


def test_quotas_are_shown_and_wrong_ones_refused(tmp_path):
    with Limited(tmp_path / "c") as cluster:
        cluster.start_and_wait()
        mine = cluster.directory / CLIENT_FOLDER
        for words, text in (
            ((), "give limits"),
            (("--none", "--envelopes", 1), "give limits"),
            (("--envelopes", 257), "1<=x<=256"),
            (("--operations-per-s", 0), "1<=x<=1000000"),
            (("--bytes", 16 * 1024 * 1024 + 1), "1<=x<=16777216"),
        ):
            assert text in cluster.clients("quota", *words, expected=2).stderr
        done = json.loads(cluster.clients("quota", "--envelopes", 2, "--bytes", 5000, "-o", "json").stdout)
        assert (done["command"], done["key"], done["quota"]) == (1, "default", "envelopes=2,bytes=5000")
        cluster.clients("allow", mine, "--name", "meter")
        cluster.clients("quota", mine, "--operations-per-s", 7)
        listed = cluster.listed()
        assert listed["quota"] == {"envelopes": 2, "bytes": 5000}
        assert listed["keys"][0]["quota"] == {"operations_per_s": 7}
        lines = cluster.clients("list", "-o", "plain").stdout.splitlines()
        assert lines[0].endswith(" quota=envelopes=2,bytes=5000")
        assert lines[1].endswith(" allowed everything operations_per_s=7 meter")
        assert "operations_per_s=7" in cluster.clients("list").stdout.replace("\n", "")

        # With the default many envelopes at a time are held back and all of them done.
        @on_loop_for(DEADLINE_S)
        async def use():
            async with cluster.of(cluster.other) as client:
                await client.put("begun", "1")

                async def burst():
                    for _ in range(20):
                        await asyncio.gather(*(client.incr("n") for _ in range(3)))

                await asyncio.gather(*(burst() for _ in range(8)))
                assert await client.get("n") == b"480"
                return await client.status()

        use()

        @on_loop_for(DEADLINE_S)
        async def same():
            async def equal():
                async with cluster.of(cluster.other) as client:
                    reports = await cluster.reports(client)
                return len({repr(one["client_keys"]) for one in reports.values()}) == 1

            await until(equal, "all agree", 30)

        same()
