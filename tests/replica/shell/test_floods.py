"""One client key that asks for too much: links between correct replicas stand, and others have their turn."""

import asyncio
import contextlib
import time

import pytest

from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.core import rooms
from replica.core.envelope import Operations, SessionId, encode_operations
from replica.core.events import Send
from replica.shell import replies
from replica.shell.turns import TURN_S
from replica.wire.frames import WRITE_BUFFER_HIGH
from replica.wire.messages import Notice, Ping, Pong, Reply, Request, StaleRead, Welcome
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire


def signed(cluster, key, session, first, *operations, acknowledged=1):
    """Return an envelope of this key's, as it is sent."""
    content = Operations(session, first, acknowledged, operations)
    raw = encode_operations(cluster.cluster.cluster_id, key.public_key, content)
    return raw + key.sign(raw)


def readers(node):
    """Return the connections on which other replicas read this one's log."""
    return [connection for connection in node.server._connections if connection.role == "replica"]


@on_loop
async def test_a_full_queue_ends_no_link_between_correct_replicas(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_PER_CLIENT_MAX", 4)
    monkeypatch.setattr(rooms, "RELAYED_PER_CLIENT_MAX", 3)
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        nodes, key = cluster.nodes, ClientKey.generate()
        # The primary hears no votes: what it has, waits, and what backups relay finds its queue full.
        for link in nodes[0].links.values():
            link.hold_back(pause=True)
        async with Wire(cluster, 0) as at_primary, Wire(cluster, 1) as at_backup:
            for number, wire in enumerate((at_primary, at_backup)):
                assert isinstance(await wire.hello(key), Welcome)
                put = kv.put(b"k", b"v")
                wire.send(*(Request(signed(cluster, key, SessionId(1, 0), 1 + 10 * number + i, put)) for i in range(4)))
            await until(lambda: nodes[0].core.refusals["relay-queue-full"], "a relay that finds no room")
            at_primary.send(Request(signed(cluster, key, SessionId(1, 0), 90, put)))
            assert (await at_primary.receive(Notice)).code == "busy", "its own client is told"
        assert all(link.is_up for node in nodes.values() for link in node.links.values())
        assert not any(
            node.refusals[why] for node in nodes.values() for why in ("unexpected-message", "notice-from-peer")
        )


@on_loop
async def test_a_link_bears_a_notice(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        for connection in readers(cluster.nodes[0]):
            connection.send(Notice("busy", "nothing that concerns a reader"))
        await until(lambda: all(cluster.nodes[i].refusals["notice-from-peer"] for i in (1, 2)), "the notices read")
        assert all(cluster.nodes[i].links[0].is_up for i in (1, 2))
        assert not any(cluster.nodes[i].refusals["unexpected-message"] for i in (1, 2))
        async with cluster.client() as client:
            await client.put("k", "v")


@contextlib.asynccontextmanager
async def unread(cluster, key, count):
    """Hold so many connections of a key to replica 0, none of which is read."""
    async with contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(Wire(cluster, 0)) for _ in range(count)]
        for wire in wires:
            assert isinstance(await wire.hello(key), Welcome)
            wire.writer.transport.pause_reading()
        yield wires


async def executed(cluster, key):
    """Have large results kept; return the envelope that asked for them."""
    async with cluster.client(key=key) as client:
        await client.put("k", bytes(900_000))
        session, first = client.driver.core.session, client.driver.core._next
    envelope = signed(cluster, key, session, first, *[kv.get(b"k")] * 5, acknowledged=first)
    async with Wire(cluster, 0) as wire:
        assert isinstance(await wire.hello(key), Welcome)
        wire.send(Request(envelope))
        assert len((await wire.receive(Reply)).reply) > 4_500_000
    return envelope


@on_loop
async def test_a_replay_is_answered_where_it_was_asked_only(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        key = cluster.key()
        envelope = await executed(cluster, key)
        async with Wire(cluster, 0) as asking, Wire(cluster, 0) as other:
            for wire in (asking, other):
                assert isinstance(await wire.hello(key), Welcome)
            asking.send(Request(envelope))
            await asking.receive(Reply)
            other.send(Ping(7))
            assert await other.receive() == Pong(7), "nothing came before that"


@on_loop
async def test_replies_that_wait_for_one_key_are_bounded(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        node, key = cluster.nodes[0], cluster.key()
        envelope = await executed(cluster, key)
        async with unread(cluster, key, 12) as wires:

            def no_room():
                for wire in wires:
                    wire.send(Request(envelope))
                return node.refusals["reply-not-read"] >= 12

            await until(no_room, "replies for which there is no room")
            connections = node.server.clients[key.public_key]
            assert sum(connection.waiting_bytes for connection in connections) < replies.CLIENT_BYTES_MAX + 12 * 70_000


@on_loop
async def test_whoever_reads_least_makes_room_when_too_much_waits_in_all(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replies, "ALL_BYTES_MAX", 3_000_000)
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        node, keys = cluster.nodes[0], [ClientKey.generate() for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            for key in keys:
                await stack.enter_async_context(unread(cluster, key, 1))
            connections = [node.server.clients[key.public_key][0] for key in keys]
            # More than a socket holds, and all waits: nothing is sent before the next turn of the loop.
            for key, size in zip(keys, (800_000, 1_500_000, 900_000), strict=True):
                node._effects[Send](Send(key.public_key, bytes(size)))
            assert [connection.is_open for connection in connections] == [True, False, True]
            assert node.refusals["does-not-read"] == 1


@on_loop
async def test_what_waits_under_tls_is_known(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start(0)
        async with unread(cluster, cluster.key(), 1):
            (connection,) = cluster.nodes[0].server.clients[cluster.key().public_key]
            connection.send_frame(bytes(16_000_000))
            await asyncio.sleep(0)
            assert connection.waiting_bytes > 4_000_000
            assert not connection.writable


@on_loop
async def test_questions_on_many_connections_of_one_key_leave_others_their_turn(tmp_path, monkeypatch):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        node, keys = cluster.nodes[0], [ClientKey.generate() for _ in range(2)]
        asked, peek = [], node.core.executor.peek

        def slowly(operation, client):
            begun = time.perf_counter()
            while time.perf_counter() - begun < 2 * TURN_S:
                pass
            asked.append(client)
            return peek(operation, client)

        monkeypatch.setattr(node.core.executor, "peek", slowly)
        question = StaleRead(1, kv.get(b"k"))
        async with contextlib.AsyncExitStack() as stack:
            flood = [await stack.enter_async_context(Wire(cluster, 0)) for _ in range(30)]
            quiet = await stack.enter_async_context(Wire(cluster, 0))
            for wire in (*flood, quiet):
                assert isinstance(await wire.hello(keys[wire is quiet]), Welcome)
            for wire in flood:
                wire.send(*[question] * 20)
            await until(lambda: len(asked) >= 30, "the flood's first questions")
            before = len(asked)
            for _ in range(5):
                quiet.send(question)
                await quiet.receive()
            assert asked.count(keys[1].public_key) == 5
            # With a turn for each connection it would be 30 of the flood's for each of these.
            assert len(asked) - before < 50


@on_loop
async def test_what_needs_no_order_needs_no_signature(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rooms, "REQUESTS_PER_CLIENT_MAX", 2)
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        node, key = cluster.nodes[0], cluster.key()
        envelope = await executed(cluster, key)
        verified = []
        monkeypatch.setattr(node, "verify_envelope", lambda one: verified.append(one) or True)
        for link in node.links.values():
            link.hold_back(pause=True)
        async with Wire(cluster, 0) as wire:
            assert isinstance(await wire.hello(key), Welcome)
            wire.send(Request(envelope[:-1] + bytes([envelope[-1] ^ 1])))
            assert len((await wire.receive(Reply)).reply) > 4_500_000, "answered before"
            assert not verified
            waits = [signed(cluster, key, SessionId(1, 7), 1 + number, kv.get(b"k")) for number in range(3)]
            wire.send(*map(Request, waits[:2]))
            await until(lambda: node.core.requests_waiting == 2, "two that wait")
            wire.send(*map(Request, waits))
            assert (await wire.receive(Notice)).code == "busy"
            assert [one.raw for one in verified] == waits[:2]
            assert (node.refusals["request-queue-full"], node.core.refusals["request-queue-full"]) == (1, 0)


@on_loop
async def test_what_the_way_to_the_primary_does_not_take_is_handed_over_when_it_does(tmp_path, monkeypatch):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        node, key = cluster.nodes[1], cluster.key()
        link = node.links[0].connection
        async with cluster.client(key=key) as client:
            await client.put("k", "v")
            session, first = client.driver.core.session, client.driver.core._next
        async with Wire(cluster, 1) as wire:
            assert isinstance(await wire.hello(key), Welcome)
            link.pause_writing()
            wire.send(Request(signed(cluster, key, session, first, kv.get(b"k"), acknowledged=first)))
            await until(lambda: node.refusals["relay-not-sent"] >= 3, "some ticks that found it full")
            (waiting,) = node.core._known.requests
            await until(lambda: waiting.relayed_ms is None, "the core knows that it was not sent")
            link.resume_writing()
            await wire.receive(Reply)


@on_loop
async def test_a_link_takes_only_so_much_in_one_turn_of_the_loop(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        link, size = cluster.nodes[1].links[0], 100_000
        taken = 0
        while taken < 100 and link.send(Request(bytes(size))):
            taken += 1
        assert WRITE_BUFFER_HIGH <= taken * size <= WRITE_BUFFER_HIGH + 2 * size
