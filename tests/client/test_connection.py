"""Links and the asyncio shell against replicas that speak real TLS on loopback, well or badly."""

import asyncio
import json
import ssl

import pytest

from client import Overloaded, Unreachable
from client.connection import Timing
from client.errors import Undecided
from client.queries import number_in, read_report
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


@pytest.mark.parametrize("manner", ["babble", "oversized", "welcome-twice"])
async def test_what_is_no_message_ends_the_connection_and_harms_nobody(fleet, manner):
    fleet.replicas[1].manners.add(manner)
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        await until(lambda: "it sent what is no message" in client.driver.links[1].problem)
        assert await client.get("a") == b"b"


async def test_a_replica_that_disconnects_at_once_is_dialled_ever_more_slowly(fleet):
    fleet.replicas[1].manners.add("babble")
    timing = Timing(backoff_first_s=0.001, backoff_s_max=60.0)
    async with fleet, fleet.client(timing=timing) as client:
        await until(lambda: client.driver.links[1].backoff_s >= 0.064)


async def test_the_pinned_certificate_is_compared_even_if_tls_let_another_pass(fleet, tmp_path, monkeypatch):
    def trusting(_):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    monkeypatch.setattr("client.connection.client_context", trusting)
    init_cluster(tmp_path / "other", f=1, base_port=0)
    replica = fleet.replicas[1]
    await replica.start(tmp_path / "other" / "replica-1")
    async with fleet.client() as client:
        await until(client.driver.links[1].settled.is_set)
        assert "TLS certificate is not the one in" in client.driver.links[1].problem
        assert replica.seen["ClientHello"] == 0
    await replica.stop()


async def test_large_values_pass(fleet):
    value = bytes(2**20 - 100)
    async with fleet, fleet.client() as client:
        await asyncio.gather(*(client.put(f"k{i}", value) for i in range(20)))
        assert await client.get("k7") == value


async def test_too_much_at_once_is_overloaded(fleet):
    async with fleet.client(queue_operations_max=2, deadline_s=0.1) as client:
        results = await asyncio.gather(*(client.put("k", "v") for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [Unreachable, Unreachable, Overloaded]


async def test_a_report_may_hold_anything(fleet, monkeypatch):
    answers = ["[" * 60_000, '{"a": ' * 5000, '{"a": 1e999, "b": NaN}', "[1]", '{"view": -1, "executed": "x"}', ""]
    answers += ['{"x": ' + "[" * 500 + "]" * 500 + "}", json.dumps({"t": "\x1b[2J"}), '{"x": "' + "y" * 70_000 + '"}']
    found = [read_report(answer.encode()) for answer in answers]
    assert found[:6] == [{}, {}, {"a": None, "b": None}, {}, {"view": -1, "executed": "x"}, {}]
    assert number_in(found[4], "view") == number_in(found[4], "executed") == number_in({}, "view") == 0
    assert json.dumps(found[6]).count("[") == 7
    assert found[7:] == [{"t": r"\x1b[2J"}, {}]
    monkeypatch.setattr(fleet, "report", lambda number: {} if number else [])
    async with fleet, fleet.client() as client:
        await client.put("a", "b")
        status = await client.status()
        assert [(replica.reachable, replica.problem) for replica in status] == [
            (True, "its report is not readable")
        ] * 3
