"""Limits of connections, made small: places for strangers and clients, deadlines, buffers, turns of the loop."""

import asyncio
import contextlib
import struct
import tracemalloc

import msgpack
import pytest

from replica.apps import kv
from replica.cluster.keys import ClientKey
from replica.core.events import Send
from replica.core.layout import LayoutError
from replica.shell import accepting as server
from replica.shell import replies as replies_module
from replica.wire import frames
from replica.wire.frames import WRITE_BUFFER_HIGH, MessageProtocol
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    Ping,
    Pong,
    Refused,
    StaleRead,
    Welcome,
    decode_message,
    encode_frame,
)
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire, silent_socket


class Pipe:
    """A transport that keeps what is written and counts as full above a limit."""

    def __init__(self, full_above=10**9) -> None:
        self.written = bytearray()
        self.full_above = full_above
        self.reading, self.closed = True, False
        self.protocol = None

    def set_write_buffer_limits(self, high):
        self.high = high

    def get_write_buffer_size(self):
        return len(self.written)

    def writelines(self, parts):
        self.written += b"".join(parts)
        if len(self.written) > self.full_above and self.protocol.writable:
            self.protocol.pause_writing()

    def take(self):
        """The other side reads everything."""
        self.written.clear()
        if not self.protocol.writable:
            self.protocol.resume_writing()

    def pause_reading(self):
        assert self.reading
        self.reading = False

    def resume_reading(self):
        assert not self.reading
        self.reading = True

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    abort = close


class Answering(MessageProtocol):
    """Answers every Ping with as much as it is told."""

    def __init__(self, pipe, answer=b"", holds_back=True) -> None:
        super().__init__()
        self.holds_back = holds_back
        self.handled, self.answer = [], answer
        pipe.protocol = self
        self.connection_made(pipe)

    def message_received(self, message):
        self.handled.append(message.number)
        if self.answer:
            self.send_frame(self.answer)


def pings(count: int) -> bytes:
    return b"".join(encode_frame(Ping(number)) for number in range(count))


@on_loop
async def test_every_way_to_cut_a_stream_gives_the_same_messages():
    stream = pings(20)
    for size in (1, 2, 3, 7, 50, len(stream)):
        pipe = Pipe()
        connection = Answering(pipe)
        for start in range(0, len(stream), size):
            connection.data_received(stream[start : start + size])
        assert connection.handled == list(range(20))


@on_loop
async def test_many_messages_take_turns_with_others():
    pipe = Pipe()
    connection = Answering(pipe)
    stream = pings(5 * frames.TURN_MESSAGES_MAX + 3)
    connection.data_received(stream[:-1])
    assert len(connection.handled) == frames.TURN_MESSAGES_MAX
    assert not pipe.reading
    connection.data_received(stream[-1:])  # what was on its way already
    turns = 0
    while len(connection.handled) < 5 * frames.TURN_MESSAGES_MAX + 3:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 5
    assert connection.handled == list(range(len(connection.handled)))
    assert pipe.reading


@on_loop
async def test_answers_that_wait_hold_questions_back(monkeypatch):
    monkeypatch.setattr(frames, "WRITE_BUFFER_HIGH", 10_000)
    pipe = Pipe(full_above=10_000)
    connection = Answering(pipe, answer=bytes(3000))
    connection.data_received(pings(50))
    for _ in range(30):
        await asyncio.sleep(0)
    # Nobody reads the answers: what waits stays about the limit, and no question is lost.
    assert len(connection.handled) <= 8
    assert len(pipe.written) <= 24_000
    assert not pipe.reading
    while len(connection.handled) < 50:
        before = len(connection.handled)
        pipe.take()
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(connection.handled) > before
    assert connection.handled == list(range(50))
    assert not pipe.closed


@on_loop
async def test_an_end_that_does_not_hold_back_always_reads():
    pipe = Pipe(full_above=100)
    connection = Answering(pipe, answer=bytes(300), holds_back=False)
    connection.data_received(pings(50))
    await asyncio.sleep(0)
    connection.data_received(pings(50))
    assert len(connection.handled) == 100
    assert pipe.reading


@on_loop
async def test_an_end_that_takes_turns_waits_for_others_and_not_for_its_answers():
    pipe = Pipe(full_above=100)
    connection = Answering(pipe, answer=bytes(300), holds_back=False)
    connection.takes_turns = True
    connection.data_received(pings(3 * frames.TURN_MESSAGES_MAX))
    assert len(connection.handled) == frames.TURN_MESSAGES_MAX
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(connection.handled) == 3 * frames.TURN_MESSAGES_MAX
    assert pipe.reading


@on_loop
async def test_one_that_is_held_reads_nothing_until_it_may():
    pipe = Pipe()
    connection = Answering(pipe, holds_back=False)
    connection.takes_turns = True
    connection.hold(pause=True)
    assert not pipe.reading
    connection.data_received(pings(3))  # what was on its way already
    for _ in range(5):
        await asyncio.sleep(0)
    assert not connection.handled
    connection.hold(pause=False)
    assert pipe.reading
    assert connection.handled == [0, 1, 2]
    # Also in a pause between two turns, which would end by itself.
    connection.data_received(pings(2 * frames.TURN_MESSAGES_MAX))
    connection.hold(pause=True)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not pipe.reading
    assert len(connection.handled) == frames.TURN_MESSAGES_MAX + 3


@on_loop
async def test_what_waits_within_one_turn_is_bounded(monkeypatch):
    monkeypatch.setattr(frames, "WRITE_BUFFER_MAX", 10_000)
    pipe = Pipe()
    connection = Answering(pipe, answer=bytes(3000), holds_back=False)
    connection.data_received(pings(50))
    assert pipe.closed
    assert len(connection.handled) == 4
    assert connection.refusals == {"does-not-read": 1}


@on_loop
async def test_a_connection_that_ends_in_a_pause():
    pipe = Pipe()
    connection = Answering(pipe)
    connection.data_received(pings(2 * frames.TURN_MESSAGES_MAX))
    connection.connection_lost(None)
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(connection.handled) == frames.TURN_MESSAGES_MAX


@pytest.mark.parametrize("size", [64 * 1024, FRAME_BYTES_MAX])
@pytest.mark.parametrize("opening", [b"", b"\x92\x0f", b"\x9c", b"\xdc\x00\x0c"])
def test_deep_bodies_cost_little_before_they_are_refused(size, opening):
    for filling in (b"\x91", b"\x9c", b"\xdc\x00\x0c", b"\x81", b"\x90", b"\xdc\xff\xff", b"\xdd\x00\xff\xff\xff"):
        body = (opening + filling * size)[:size]
        tracemalloc.start()
        with pytest.raises(LayoutError):
            decode_message(body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < size + 256 * 1024, filling


# With a live node.


@contextlib.asynccontextmanager
async def small(tmp_path, monkeypatch, **limits):
    """Three nodes with small limits, and a client that works before and after."""
    for name, value in limits.items():
        monkeypatch.setattr(frames if name.startswith("WRITE") else server, name, value)
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("before", "1")
            yield cluster, client
            await client.put("after", "1")


@on_loop
async def test_strangers_make_room_for_newcomers_oldest_first(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch, STRANGERS_MAX=5) as (cluster, _):
        refusals = cluster.nodes[0].refusals
        sockets = [silent_socket(cluster.cluster.replicas[0]) for _ in range(12)]
        try:
            await until(lambda: refusals["too-many-strangers"] == 7, "seven made room")
            assert len(cluster.nodes[0].server._strangers) == 5
            for one in sockets[:7]:
                one.settimeout(2)
                # In a thread: the node runs in this one.
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.to_thread(one.recv, 1) == b""
            async with Wire(cluster) as wire:
                assert isinstance(await wire.hello(), Welcome)
            async with Wire(cluster, as_replica=1) as wire:
                assert isinstance(await wire.replica_hello(1), Welcome)
        finally:
            for one in sockets:
                one.close()


@on_loop
async def test_strangers_meet_the_deadline_and_give_back_their_places(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch, HANDSHAKE_S=0.2) as (cluster, _):
        node = cluster.nodes[0]
        sockets = [silent_socket(cluster.cluster.replicas[0]) for _ in range(10)]
        async with Wire(cluster) as silent:
            await silent.challenged()
            await silent.ended(5)
        await until(lambda: not node.server._strangers, "no strangers left")
        assert node.refusals["handshake-timeout"] + node.refusals["tls-failed"] == 11
        for one in sockets:
            one.close()


@on_loop
async def test_clients_have_places_of_their_own(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch, CLIENTS_MAX=3) as (cluster, _):
        async with Wire(cluster) as one, Wire(cluster) as two:
            assert isinstance(await one.hello(ClientKey.generate()), Welcome)
            assert isinstance(await two.hello(ClientKey.generate()), Welcome)
            async with Wire(cluster) as three:
                refused = await three.hello(ClientKey.generate())
                assert isinstance(refused, Refused)
                assert refused.code == "too-many-clients"
            # Replicas are not clients.
            async with Wire(cluster, as_replica=2) as replica:
                assert isinstance(await replica.replica_hello(2), Welcome)
        await until(lambda: cluster.nodes[0].server.client_count == 1, "the places given back")
        async with Wire(cluster) as again:
            assert isinstance(await again.hello(ClientKey.generate()), Welcome)


@on_loop
async def test_one_client_does_not_take_all_places(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch, CONNECTIONS_PER_CLIENT_MAX=2) as (cluster, _):
        key = ClientKey.generate()
        async with Wire(cluster) as one, Wire(cluster) as two, Wire(cluster) as three:
            assert isinstance(await one.hello(key), Welcome)
            assert isinstance(await two.hello(key), Welcome)
            assert isinstance(await three.hello(key), Refused)


@on_loop
async def test_one_replica_does_not_take_all_places(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch, CONNECTIONS_PER_REPLICA_MAX=3) as (cluster, _):
        node = cluster.nodes[0]
        async with contextlib.AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(Wire(cluster, as_replica=2)) for _ in range(8)]
            for wire in wires:
                assert isinstance(await wire.replica_hello(2), Welcome)
            own = [c for c in node.server._connections if c.replica == 2 and c.is_open]
            assert len(own) <= 3
            # The newest stay: the older ones may be what a restart left behind.
            wires[-1].send(Ping(5))
            assert await wires[-1].receive(Pong) == Pong(5)
        assert node.refusals["too-many-connections-of-a-replica"] >= 5
        assert all(c.replica != 1 or c.is_open for c in node.server._connections)


@on_loop
async def test_idle_ones_are_hung_up_on(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch, IDLE_S=0.3) as (cluster, _), Wire(cluster) as wire:
        await wire.hello(ClientKey.generate())
        await wire.ended(8)
        assert cluster.nodes[0].refusals["idle"] >= 1


@on_loop
async def test_a_client_that_never_reads_its_replies_gets_no_more_of_them(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch) as (cluster, client):
        node = cluster.nodes[1]
        await client.put("large", bytes(200_000))
        # What came from the primary is answered on the newest connections of a client's key: this one does not read.
        async with Wire(cluster, 1) as wire:
            assert isinstance(await wire.hello(cluster.key()), Welcome)
            wire.writer.transport.pause_reading()
            for _ in range(100):
                assert len(await client.get("large")) == 200_000
                if node.refusals["reply-not-read"]:
                    break
            assert node.refusals["reply-not-read"] >= 1
            waiting = [c.transport.get_write_buffer_size() for c in node.server._connections if c.transport is not None]
            assert max(waiting) < WRITE_BUFFER_HIGH + 300_000, "the limit and the reply that crossed it"


@on_loop
async def test_a_flood_of_large_answers_leaves_room_for_others(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch) as (cluster, client):
        await client.put("large", bytes(500_000))
        async with Wire(cluster) as wire:
            await wire.hello(ClientKey.generate())
            wire.writer.transport.pause_reading()
            wire.write(encode_frame(StaleRead(1, kv.get(b"large"))) * 2000)
            (connection,) = (
                c for c in cluster.nodes[0].server._connections if c.client not in {None, cluster.key().public_key}
            )
            largest = 0
            for _ in range(50):
                await client.put("x", "y")
                if connection.transport is not None:
                    largest = max(largest, connection.transport.get_write_buffer_size() + connection._to_send_bytes)
            assert 0 < largest < 4 * 1024 * 1024


@on_loop
async def test_stale_reads_of_one_connection_are_done_one_a_turn(tmp_path, monkeypatch):
    async with small(tmp_path, monkeypatch) as (cluster, _), Wire(cluster) as wire:
        await wire.hello(ClientKey.generate())
        executor = cluster.nodes[0].core.executor
        peek, loop = executor.peek, asyncio.get_running_loop()
        done, in_this_turn, most = 0, 0, 0

        def turn_ends():
            nonlocal in_this_turn
            in_this_turn = 0

        def counted(operation, client):
            nonlocal done, in_this_turn, most
            loop.call_soon(turn_ends)
            done, in_this_turn = done + 1, in_this_turn + 1
            most = max(most, in_this_turn)
            return peek(operation, client)

        monkeypatch.setattr(executor, "peek", counted)
        wire.write(b"".join(encode_frame(StaleRead(number, kv.get(b"k"))) for number in range(200)))
        await until(lambda: done == 200, "every stale read is answered")
        assert most == 1


def test_a_body_is_one_message_exactly():
    good = msgpack.packb((15, 1))
    assert decode_message(good) == Ping(1)
    for bad in (good + b"\0", good[:-1], good * 2, msgpack.packb([good]), struct.pack(">I", 3)):
        with pytest.raises(LayoutError):
            decode_message(bad)


@on_loop
async def test_a_reply_goes_to_who_asked_and_otherwise_to_the_newest_few(tmp_path, monkeypatch):
    """A reply is encrypted for each connection; a key may have hundreds of them."""
    monkeypatch.setattr(replies_module, "ANSWERED_MAX", 2)
    async with small(tmp_path, monkeypatch) as (cluster, _):
        key = ClientKey.generate()
        async with contextlib.AsyncExitStack() as stack:
            wires = []
            for number in (0, 0, 0, 1, 1, 1):
                wires.append(await stack.enter_async_context(Wire(cluster, number)))
                assert isinstance(await wires[-1].hello(key), Welcome)
            answered = []
            for node in (cluster.nodes[0], cluster.nodes[1]):
                for number, connection in enumerate(node.server.clients[key.public_key]):
                    monkeypatch.setattr(
                        connection, "send_frame", lambda _, at=(node.number, number): answered.append(at)
                    )
                asked = node.server.clients[key.public_key][0]
                node.reply(Send(key.public_key, b"reply", asked if node.number == 0 else None))
            assert answered == [(0, 0), (1, 1), (1, 2)]
            answered.clear()
            cluster.nodes[0].reply(Send(key.public_key, b"reply", object(), again=True))
            assert answered == [], "whoever asked once more is gone"
            cluster.nodes[0].reply(Send(key.public_key, b"reply", object()))
            assert answered == [(0, 1), (0, 2)], "whoever asked may have come back"
