"""The asyncio client and its synchronous twin, as a user meets them."""

import threading

import pytest

from client import (
    Client,
    NoLongerAllowed,
    NotAllowed,
    NotExecuted,
    NotPermitted,
    OperationFailed,
    SessionExpired,
    SyncClient,
    Undecided,
)
from client.api import error_of
from client.connection import printable
from replica.application import Right
from replica.apps.kv import CasResult
from replica.core.clients import Allow, Permission, Revoke
from replica.core.envelope import Result, Status
from tests.client.fake_cluster import FAST


@pytest.mark.asyncio
async def test_every_call_of_the_key_value_store(fleet):
    async with fleet, fleet.client() as client:
        assert await client.put("k", "v") is False
        assert await client.put("k", b"w") is True
        assert await client.get("k") == b"w"
        assert await client.get("none") is None
        assert await client.cas("k", "x", "y") == CasResult(False, b"w")
        assert await client.cas("k", "w", "y") == CasResult(True, None)
        assert await client.cas("new", None, "1") == CasResult(True, None)
        assert await client.incr("new", 41) == 42
        assert await client.incr("new", -2) == 40
        assert await client.delete("k") is True
        assert await client.delete("k") is False
        assert await client.stale_get("new") == b"40"
        assert await client.stale_get("none") is None
        for i in range(7):
            await client.put(f"p/{i}", str(i))
        assert [key async for key, _ in client.scan("p/", page=3)] == [b"p/%d" % i for i in range(7)]
        page = await client.scan_page("p/", limit=2, after="p/3")
        assert (page.items, page.more) == (((b"p/4", b"4"), (b"p/5", b"5")), True)


@pytest.mark.asyncio
async def test_refusals_and_misuse(fleet):
    async with fleet, fleet.client() as client:
        await client.put("text", "x")
        with pytest.raises(OperationFailed, match="not a whole number"):
            await client.incr("text")
        with pytest.raises(OperationFailed, match="refused"):
            await client.execute(b"?")
        with pytest.raises(ValueError, match="1 to 4096"):
            await client.put("", "x")
        with pytest.raises(TypeError, match="bytes or str, not int"):
            await client.put("k", 1)
        with pytest.raises(ValueError, match="limit is 1048576"):
            await client.put("k", bytes(2**20))
        with pytest.raises(ValueError, match="deadline"):
            await client.put("k", "v", deadline_s=0)
        with pytest.raises(RuntimeError, match="open already"):
            await client.__aenter__()


def test_results_that_are_no_success_say_what_is_known():
    kinds = {
        Status.ERROR: (OperationFailed, "refused the operation: no\\?"),
        Status.EXPIRED: (SessionExpired, "outcome unknown"),
        Status.OUT_OF_WINDOW: (Undecided, "outcome unknown"),
        Status.FORGOTTEN: (Undecided, "outcome unknown"),
        Status.NOT_ALLOWED: (NoLongerAllowed, "outcome unknown: this client's key was revoked"),
        Status.NOT_PERMITTED: (NotPermitted, "not permitted: no\\\\?"),
    }
    for status, (kind, words) in kinds.items():
        with pytest.raises(kind, match=words):
            raise error_of(Result(status, 1, b"no\x07"))


def test_what_this_clients_key_may_not_do(served):
    with SyncClient(served.client()) as client:
        key = client.public_key
        client.put("a/1", "x")
        served.order(Allow(1, key, "", (Permission(Right.READ, b"a/"),)))
        assert client.get("a/1") == b"x"
        for call in (client.get, client.stale_get):
            with pytest.raises(NotPermitted, match='not permitted: this key may not read "b"') as refused:
                call("b")
            assert refused.value.reason == 'this key may not read "b"'
            assert isinstance(refused.value, OperationFailed)
        served.order(Revoke(2, key))
        # It has a session, as far as it knows: what it sent may have been executed before.
        with pytest.raises(NoLongerAllowed, match="outcome unknown"):
            client.get("a/1")
        for _ in range(2):
            with pytest.raises(NotAllowed, match=f"not executed: .* {key.hex()}; its operator may"):
                client.get("a/1")
        with pytest.raises(NotAllowed, match="not read"):
            client.stale_get("a/1")
        served.order(Allow(3, key))
        assert client.get("a/1") == b"x"


def test_the_synchronous_twin_and_several_threads(served):
    with SyncClient(served.client()) as client:
        assert client.put("a", "b") is False
        assert client.get("a") == b"b"
        assert client.stale_get("a") == b"b"
        assert client.cas("a", "b", "c").swapped
        assert client.delete("a")
        assert client.execute(b"\x02\x00\x01a") == b"\x00"
        assert client.stale(b"\x02\x00\x01a").value == b"\x00"
        assert [replica.number for replica in client.status()] == [0, 1, 2]
        threads = [threading.Thread(target=client.incr, args=("n",)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.incr("n", 0) == 20
        assert list(client.scan("n", page=1)) == [(b"n", b"20")]
        with pytest.raises(OperationFailed):
            client.execute(b"?")
    client.close()
    with pytest.raises(RuntimeError, match="not open"):
        client.get("a")


def test_the_synchronous_twin_needs_no_cluster_to_end(fleet):
    client = Client(fleet.cluster, fleet.client()._key, deadline_s=0.1, timing=FAST)
    with SyncClient(client) as twin, pytest.raises(NotExecuted):
        twin.get("a")


def test_foreign_texts_are_printable_and_bounded():
    assert printable("a\x1b[2Jb\n") == "a?[2Jb?"
    assert len(printable("x" * 10_000)) == 301


@pytest.mark.asyncio
async def test_several_keys_and_conditions(fleet):
    async with fleet, fleet.client() as client:
        assert await client.put_new("k", "1") is True
        assert await client.put_new("k", "2") is False
        assert await client.append("k", "23") == 3
        await client.put_many({"a": "1", b"b": b"2"})
        assert await client.get_many(["a", "none", "b", "k"]) == [b"1", None, b"2", b"123"]
        assert await client.size() == 3
        assert await client.take("k") == b"123"
        assert await client.take("k") is None
        assert await client.delete_many(["a", "b", "none"]) == 2
        with pytest.raises(ValueError, match="from 1 to 4096 keys"):
            await client.get_many([])
        with pytest.raises(TypeError, match="bytes or str"):
            await client.put_many({"a": 1})


@pytest.mark.asyncio
async def test_transactions(fleet):
    async with fleet, fleet.client() as client, fleet.client() as other:
        await client.put("a", "10")
        attempts = 0

        async def disturbed(transaction):
            nonlocal attempts
            attempts += 1
            seen = int(await transaction.get("a"))
            assert await transaction.get("a") == b"%d" % seen
            if attempts < 3:
                await other.put("a", str(seen))  # the same bytes: it was written all the same
            transaction.put("a", str(seen - 1))
            transaction.incr("b")
            transaction.delete("none")
            return seen

        assert await client.transact(disturbed) == 10
        assert attempts == 3
        assert await client.get_many(["a", "b"]) == [b"9", b"1"]

        async def refused(transaction):
            transaction.put("a", "x")
            transaction.incr("text")

        await client.put("text", "abc")
        with pytest.raises(OperationFailed, match="operation 1: the present value is not a whole number"):
            await client.transact(refused)
        assert await client.get("a") == b"9"

        async def always(transaction):
            await transaction.get("a")
            await other.incr("a")

        with pytest.raises(NotExecuted, match="at every attempt"):
            await client.transact(always, deadline_s=0.3)


@pytest.mark.asyncio
async def test_a_transaction_of_unknown_outcome_is_not_repeated(fleet):
    async with fleet, fleet.client() as client:
        attempts = 0

        async def work(transaction):
            nonlocal attempts
            attempts += 1
            await transaction.get("a")
            transaction.incr("a")
            for replica in fleet.replicas:
                replica.manners.add("silent")

        with pytest.raises(Undecided, match="outcome unknown"):
            await client.transact(work, deadline_s=0.5)
        assert attempts == 1


def test_the_synchronous_twin_has_every_call(served):
    """Whatever the asyncio client offers by a name without an underscore."""
    offered = {name for name in dir(Client) if not name.startswith("_")} - {"submit", "driver"}
    assert offered <= set(dir(SyncClient))
    with SyncClient(served.client()) as client:
        client.put_many({"a": "1"})

        def work(transaction):
            seen = int(transaction.get("a"))
            transaction.put("b", str(seen))
            transaction.incr("a")
            return seen

        assert client.transact(work) == 1
        assert client.get_many(["a", "b"]) == [b"2", b"1"]
        assert client.append("b", "0") == 2
        assert client.put_new("b", "x") is False
        assert client.take("b") == b"10"
        assert client.size() == 1
        assert client.delete_many(["a"]) == 1
        assert client.slot() > 0
