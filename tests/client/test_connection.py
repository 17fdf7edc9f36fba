"""Links and the asyncio shell against replicas that speak real TLS on loopback, well or badly."""

import asyncio

import pytest

from client import Unreachable
from client.connection import Timing
from client.errors import Undecided
from replica.cluster.provision import init_cluster
from tests.client.fake_cluster import until

pytestmark = pytest.mark.asyncio


async def test_a_stranger_with_another_certificate_is_not_spoken_to(fleet, tmp_path):
    init_cluster(tmp_path / "other", f=1, base_port=0)
    await fleet.replicas[1].start(tmp_path / "other" / "replica-1")
    await fleet.replicas[0].start()
    await fleet.replicas[2].start()
    async with fleet.client() as client:
        await client.put("a", "b")
        await until(client.driver.links[1].settled.is_set)
        assert client.driver.core.connected == {0, 2}
        assert "certificate is not the one in the cluster file" in client.driver.describe_links()
        assert fleet.replicas[1].seen == {}
    await fleet.__aexit__()


@pytest.mark.parametrize(
    ("manner", "words"),
    [("other-cluster", "use the same cluster.toml on both sides"), ("other-number", "says that it is replica 9")],
)
async def test_a_replica_that_says_it_is_another_is_not_answered(fleet, manner, words):
    fleet.replicas[2].manners.add(manner)
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        await until(lambda: words in client.driver.describe_links())
        assert fleet.replicas[2].seen["ClientHello"] == 0
        if manner == "other-cluster":
            assert fleet.cluster.digest.hex()[:16] in client.driver.describe_links()


async def test_a_mute_replica_ends_with_the_attempts_deadline(fleet):
    fleet.replicas[0].manners.add("mute")
    async with fleet, fleet.client(timing=Timing(connect_s=0.05, backoff_first_s=0.01)) as client:
        await client.put("a", "b")
        await until(lambda: "no answer within 0.05 s" in client.driver.describe_links())


async def test_a_half_open_connection_is_found_and_dialled_again(fleet):
    fleet.replicas[2].manners.add("half-open")
    async with fleet, fleet.client() as client:
        await until(lambda: client.driver.core.connected == {0, 1, 2})
        await until(lambda: fleet.replicas[2].seen["ClientHello"] >= 2)
        assert fleet.replicas[2].seen["Ping"] >= 1
        # The replicas that answer pings keep their connection.
        assert fleet.replicas[0].seen["ClientHello"] == 1
        assert fleet.replicas[0].seen["Ping"] >= 1


async def test_a_replica_that_comes_back_is_used_again(fleet):
    async with fleet, fleet.client() as client:
        await client.put("a", "1")
        await fleet.replicas[0].stop()
        await client.put("a", "2")
        await fleet.replicas[1].stop()
        with pytest.raises((Unreachable, Undecided)):
            await client.put("a", "3", deadline_s=0.2)
        await fleet.replicas[0].start()
        await client.put("a", "4")
        assert await client.get("a") == b"4"


async def test_nobody_there_is_unreachable_within_the_deadline(fleet):
    async with fleet.client(deadline_s=0.2) as client:
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable, match=r"0 replicas are connected, 2 are needed.*replica 0 \(127.0.0.1:"):
            await client.put("a", "b")
        assert asyncio.get_running_loop().time() - began < 5


async def test_f_liars_change_nothing_and_n_minus_f_silent_ones_end_in_undecided(fleet):
    fleet.replicas[0].manners.add("liar")
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        assert await client.get("a") == b"b"
        assert await client.stale_get("a") == b"b"
        fleet.replicas[0].manners.clear()
        fleet.replicas[1].manners.add("silent")
        fleet.replicas[2].manners.add("silent")
        with pytest.raises(Undecided, match="outcome unknown"):
            await client.put("a", "c", deadline_s=0.3)


async def test_a_silent_primary_is_passed_by(fleet):
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        fleet.replicas[0].manners.add("silent")
        await client.put("a", "c")
        assert fleet.replicas[1].seen["Request"] >= 1
        assert fleet.replicas[1].seen["StatusQuery"] >= 1


async def test_the_clients_belief_in_the_primary_follows_reports(fleet):
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        assert client.driver.core.primary == 0
        fleet.view = 1
        fleet.replicas[0].manners.add("silent")
        await client.put("a", "c")
        await until(lambda: client.driver.core.primary == 1)


async def test_callers_in_one_turn_share_an_envelope_and_a_cancelled_one_harms_nobody(fleet):
    async with fleet, fleet.client() as client:
        await client.put("warm", "up")
        executed = fleet.executed
        tasks = [asyncio.create_task(client.incr("n")) for _ in range(200)]
        await asyncio.sleep(0)
        tasks[7].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results.pop(7), asyncio.CancelledError)
        assert len(set(results)) == 199
        assert fleet.executed == executed + 1


async def test_leaving_fails_what_waits(fleet):
    client = fleet.client()
    async with client:
        waiting = asyncio.ensure_future(client.submit(b"x"))
    with pytest.raises(Unreachable.__mro__[1], match="closed before"):
        await waiting
    with pytest.raises(RuntimeError, match="not open"):
        client.submit(b"x")


async def test_stale_answers_need_f_plus_1_equal_ones(fleet):
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        answer = await client.stale(b"\x02\x00\x01a")
        assert answer.value == b"\x01b"
        assert len(answer.replicas) >= 2
        fleet.replicas[0].manners.add("half-open")
        fleet.replicas[1].manners.add("half-open")
        with pytest.raises((Undecided, Unreachable)):
            await client.stale_get("a", deadline_s=0.2)
        assert client.driver.queries.stale == {}


async def test_status_shows_reachable_and_unreachable_replicas(fleet):
    async with fleet:
        await fleet.replicas[1].stop()
        async with fleet.client() as client:
            found = await client.status()
            assert [replica.reachable for replica in found] == [True, False, True]
            assert found[0].report["number"] == 0
            assert found[1].problem
            assert client.driver.queries.reports == {}
