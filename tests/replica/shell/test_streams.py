"""Reading logs: no gap and no repeat through cuts, slow readers hold up nobody, history comes from the store."""

import asyncio
import contextlib
import sqlite3

import pytest

from replica.core.group import decode_group
from replica.shell import streams as streams_module
from replica.shell.links import LinkConnection
from replica.shell.outbox import ReleasedGroup
from replica.shell.streams import Reader, Streams
from replica.wire.messages import Fetch, GroupMessage, Held, Subscribe, decode_message
from tests.replica.shell.outbox_bench import Author, Bench, turns
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire
from trustlog import APPEND_SIZE, AppendStatement


class Listener:
    """A connection's place: keeps the groups that it is sent; `room` says how many it takes before it is full."""

    def __init__(self, room=10**9) -> None:
        self.got: list[tuple[int, int, int]] = []
        self.held: list[Held] = []
        self.room = room
        self.is_open = True

    @property
    def writable(self) -> bool:
        return len(self.got) < self.room

    def send(self, message: GroupMessage | Held) -> None:
        if isinstance(message, Held):
            self.held.append(message)
            return
        statement = AppendStatement.decode(message.group[:APPEND_SIZE])
        self.got.append((message.log, statement.first, statement.last))

    def send_frame(self, frame: bytes) -> None:
        self.send(decode_message(frame[4:]))

    def check(self, first: int, last: int, log: int = 0) -> None:
        """Everything from `first` to `last`, once and in order."""
        assert {one for one, _, _ in self.got} <= {log}
        assert self.got, "nothing came"
        assert self.got[0][1] <= first <= self.got[0][2]
        assert all(a[2] + 1 == b[1] for a, b in zip(self.got, self.got[1:], strict=False))
        assert self.got[-1][2] == last


class Served:
    """A real outbox and store with streams on top, wired as a node does it; `read_up_to` lags as the core does."""

    def __init__(self, folder) -> None:
        self.bench = Bench(folder)
        self.bench._on_released = self._on_released
        self.bench.outbox._on_released = self._on_released
        self.read_up_to = 0
        self.received = {1: 0, 2: 0}
        self.seen: dict[int, int] = {}
        self.failures: list[BaseException] = []
        self.streams = Streams(
            0, 3, self.bench.store, self._received, lambda log: self.seen.get(log, 0), self.failures.append
        )

    def _received(self, log: int) -> int:
        return self.read_up_to if log == 0 else self.received[log]

    def _on_released(self, released: ReleasedGroup) -> None:
        self.bench.released.append(released)
        # As Node does: the core takes it in a later turn of the loop.
        asyncio.get_running_loop().call_soon(self._read, released.group.last)
        self.streams.publish(released)

    def _read(self, last: int) -> None:
        self.read_up_to = last

    def reader(self, first: int, room=10**9) -> Listener:
        listener = Listener(room)
        listener.reader = Reader(listener)
        self.streams.subscribe(listener.reader, first)
        return listener

    async def say(self, count: int, size=10) -> None:
        for _ in range(count):
            await self.bench.say(bytes(size), b"second")
        await turns(2)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.streams.close()
        await self.bench.close()


@pytest.mark.parametrize("recent_bytes", [0, 3000, 10**9], ids=["store only", "both", "memory"])
@on_loop
async def test_subscribing_in_the_middle_of_history(tmp_path, monkeypatch, recent_bytes):
    monkeypatch.setattr(streams_module, "RECENT_BYTES_MAX", recent_bytes)
    async with Served(tmp_path) as served:
        await served.say(30)
        for first in (1, 2, 31, 59, 60):
            listener = served.reader(first)
            await until(lambda listener=listener: listener.got and listener.got[-1][2] == 60, "history served")
            listener.check(first, 60)
        ahead = served.reader(61)
        await served.say(5)
        await until(lambda: ahead.got and ahead.got[-1][2] == 70, "the stream goes on")
        ahead.check(61, 70)


@on_loop
async def test_a_fetch_stops_at_the_limit_and_a_stream_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "RECENT_BYTES_MAX", 0)
    monkeypatch.setattr(streams_module, "SERVED_BYTES_MAX", 5000)
    async with Served(tmp_path) as served:
        await served.say(20, size=1000)
        fetching = Listener()
        served.streams.fetch(Reader(fetching), 0, 1)
        await until(lambda: fetching.got, "something fetched")
        await turns(20)
        assert 1 <= len(fetching.got) < 10
        served.reader(1)
        streaming = served.reader(1)
        await until(lambda: streaming.got and streaming.got[-1][2] == 40, "all streamed")
        streaming.check(1, 40)


@on_loop
async def test_a_slow_reader_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "RECENT_BYTES_MAX", 2000)
    async with Served(tmp_path) as served:
        slow, quick = served.reader(1, room=3), served.reader(1)
        await served.say(40)
        await until(lambda: quick.got and quick.got[-1][2] == 80, "the quick one is served")
        quick.check(1, 80)
        # What was sent to it before it said that it is full; nothing waits for it in memory.
        assert len(slow.got) <= 3 + 30
        assert served.streams._recent[0]._bytes <= 2000 + 500
        while slow.got[-1][2] < 80:
            slow.room = len(slow.got) + 5
            served.streams.resume(slow.reader)
            have = len(slow.got)
            await until(lambda have=have: len(slow.got) > have, "the slow one goes on")
        slow.check(1, 80)


@pytest.mark.parametrize("delay", range(12))
@on_loop
async def test_a_group_published_while_a_reader_catches_up_is_not_forgotten(tmp_path, delay):
    """The reader's last look and the publication fall into one turn of the loop, whatever their order."""
    async with Served(tmp_path) as served:
        await served.say(3)
        listener = served.reader(1)
        await turns(delay)
        # As `_spoken` does it, in this very turn.
        author_log = served.bench.log
        group = await asyncio.get_running_loop().run_in_executor(
            None, lambda: served.bench.outbox._speak([], served.bench.outbox._unstored, (b"last",))
        )
        listener2 = served.reader(1)
        await turns(delay)
        served._on_released(group)
        await until(lambda: listener.got and listener.got[-1][2] == author_log.last, "the last group", 3)
        await until(lambda: listener2.got and listener2.got[-1][2] == author_log.last, "the last group", 3)
        listener.check(1, 7)
        listener2.check(1, 7)


@on_loop
async def test_other_logs_are_served_from_memory_and_store(tmp_path):
    async with Served(tmp_path) as served:
        author = Author(1)
        groups = [author.say(b"%d" % number) for number in range(6)]
        for group in groups[:3]:
            served.bench.outbox.received(group)
        await served.say(1)  # stores them
        for group in groups[3:]:
            served.streams.heard(group)
        for first, expected in ((1, (1, 3)), (3, (3, 3)), (4, (4, 6)), (6, (6, 6))):
            listener = Listener()
            served.streams.fetch(Reader(listener), 1, first)
            await until(lambda listener=listener: listener.got, "fetched")
            await turns(5)
            listener.check(*expected, log=1)
        for log, first in ((1, 7), (2, 1), (9, 1)):
            listener = Listener()
            served.streams.fetch(Reader(listener), log, first)
            await asyncio.sleep(0.05)
            assert listener.got == []


# Whole nodes.


async def fill(cluster, count=10) -> None:
    async with cluster.client() as client:
        for number in range(count):
            await client.put(str(number), "x")


@contextlib.contextmanager
def heard_by(node, peer):
    """Keep (whom it came from, first, last) of what this node hears of a peer's own log, from the peer and from third parties."""
    heard = []
    real = LinkConnection.message_received

    def message_received(connection, message):
        if connection._link.node is node and isinstance(message, GroupMessage) and message.log == peer:
            statement = AppendStatement.decode(message.group[:APPEND_SIZE])
            heard.append((connection._link.place.number, statement.first, statement.last))
        real(connection, message)

    LinkConnection.message_received = message_received
    try:
        yield heard
    finally:
        LinkConnection.message_received = real


@on_loop
async def test_what_waits_behind_a_gap_is_not_kept_secret(tmp_path):
    """Whoever comes back rolled back must hear of it from everyone who knows, also from who cannot show it yet."""
    async with Served(tmp_path) as served:
        listener = served.reader(1)
        for received, seen in ((0, 0), (0, 9), (4, 9), (9, 9)):
            served.received[2], served.seen[2] = received, seen
            count = len(listener.held)
            served.streams.fetch(listener.reader, 2, 1)
            await until(lambda count=count: len(listener.held) > count, "an answer")
            assert listener.held[-1] == Held(2, received + 1, seen)


@on_loop
async def test_a_cut_link_resumes_without_gap_or_repeat(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await cluster.wait_ready()
        with heard_by(cluster.nodes[1], 0) as heard:
            async with cluster.client() as client:
                for number in range(60):
                    await client.put(str(number), "x")
                    if number % 7 == 3:
                        link = cluster.nodes[1].links[0]
                        await until(lambda link=link: link.is_up, "the link up again")
                        link.connection.abort()
            await cluster.wait_quiet()
        assert cluster.nodes[1].core.received(0) == cluster.nodes[0].trusted_log.last
        taken = told = 0
        for teller, first, last in heard:
            assert first <= taken + 1, f"a gap before {first}"
            if teller == 0:  # what was fetched elsewhere while the link was cut does not count as a repeat
                assert last > told, f"{first} to {last} came again"
                told = last
            taken = max(taken, last)
        assert taken == cluster.nodes[0].trusted_log.last
        assert sum("disconnected" in text for text in cluster.logged.texts()) >= 1


@on_loop
async def test_third_logs_are_served_and_prove_themselves(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await fill(cluster)
        await cluster.wait_equal()
        last = cluster.nodes[2].trusted_log.last
        async with Wire(cluster, 0, as_replica=1) as wire:
            await wire.replica_hello(1)
            wire.send(Fetch(2, 1))
            reached = 0
            while reached < last:
                message = await wire.receive(GroupMessage)
                assert message.log == 2
                group = cluster.nodes[1].verifier.verify(2, message.group)
                assert group.first == reached + 1
                reached = group.last


@on_loop
async def test_a_restarted_node_serves_its_history_from_the_store(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        await fill(cluster)
        await cluster.wait_equal()
        last = cluster.nodes[0].trusted_log.last
        await cluster.stop(0)
        cluster.start(0)
        limits = cluster.cluster.genesis.limits
        for first in (1, last // 2, last):
            async with Wire(cluster, 0, as_replica=1) as wire:
                await wire.replica_hello(1)
                wire.send(Subscribe(first))
                reached = first - 1
                while reached < last:
                    message = await wire.receive(GroupMessage)
                    group = cluster.nodes[1].verifier.verify(0, message.group)
                    assert group.first <= reached + 1 <= group.last
                    assert decode_group(message.group, limits).payloads == group.payloads
                    reached = group.last


@on_loop
async def test_a_peer_that_does_not_read_holds_up_nobody(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with Wire(cluster, 0, as_replica=2) as wire, cluster.client() as client:
            await wire.replica_hello(2)
            wire.send(Subscribe(1))
            await wire.drain()
            wire.writer.transport.pause_reading()
            for number in range(40):
                await client.put(f"large-{number % 4}", bytes(300_000))
            reading = [c for c in cluster.nodes[0].server._connections if c.replica == 2 and c.transport is not None]
            # 12 MB were said; what waits for it is bounded by the write buffer's limits.
            assert max(c.transport.get_write_buffer_size() for c in reading) < 8 * 1024 * 1024
            await cluster.wait_equal()


@on_loop
async def test_a_store_that_cannot_be_read_is_not_passed_over_in_silence(tmp_path, monkeypatch):
    def broken(*_):
        raise sqlite3.DatabaseError("disk image is malformed")

    async with Served(tmp_path) as served:
        served.read_up_to = 1
        monkeypatch.setattr(served.bench.store, "groups", broken)
        served.reader(1)
        await until(lambda: served.failures, "the failure")
        assert isinstance(served.failures[0], sqlite3.DatabaseError)
