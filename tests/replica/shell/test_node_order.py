"""The same order in whole replicas under load, seen at the disk, at the trusted log and at the sockets."""

import asyncio
import sqlite3

from replica.core.events import Tick
from replica.core.group import decode_group
from replica.wire.frames import MessageProtocol
from replica.wire.messages import GroupMessage, decode_message
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop
from trustlog import AppendStatement


class Watch:
    """One node's seams. What it finds wrong is kept: most of it runs where an exception would be lost."""

    def __init__(self, node) -> None:
        self.node = node
        self.wrong: list[str] = []
        self.appends = 0
        self.attested = node.trusted_log.last
        self._causes: dict[int, int] = {}
        node.trusted_log.append, self._append = self.append, node.trusted_log.append
        node.outbox.append, self._say = self.say, node.outbox.append

    def say(self, payloads) -> None:
        """The core asks for an append: everything it has received until now is a cause."""
        core = self.node.core
        self._causes = {log: core.received(log) for log in self.node.links}
        self._own = tuple(payloads)
        self._say(payloads)

    def append(self, digests, *, context):
        """In the outbox's thread: another connection to the file must see the causes and the payloads."""
        db = sqlite3.connect(self.node.store.path)
        for log, last in self._causes.items():
            rows = db.execute("select first, last from groups where log = ? order by first", (log,)).fetchall()
            reached = 0
            for first, end in rows:
                reached = end if first == reached + 1 else reached
            if reached < last:
                self.wrong.append(f"log {log} is stored up to {reached}, was received up to {last}")
        first = self.node.trusted_log.last + 1
        own = db.execute("select last from groups where log = ? and first = ?", (self.node.number, first)).fetchone()
        if own != (first + len(digests) - 1,):
            self.wrong.append(f"own group {first} is not stored")
        db.close()
        attestation = self._append(digests, context=context)
        self.attested = AppendStatement.decode(attestation.statement).last
        self.appends += 1
        return attestation

    def sent(self, frame: bytes, limits) -> None:
        message = decode_message(frame[4:])
        if isinstance(message, GroupMessage) and message.log == self.node.number:
            statement = AppendStatement.decode(decode_group(message.group, limits).attestation.statement)
            if statement.last > self.attested:
                self.wrong.append(f"group up to {statement.last} was sent, attested is {self.attested}")


async def load(cluster, watches) -> int:
    """Run a little load and return how many groups of their own the watched nodes sent."""
    await cluster.wait_ready()
    sent = 0
    real = MessageProtocol.send_frame
    limits = cluster.cluster.genesis.limits

    def send_frame(connection, frame):
        nonlocal sent
        node = getattr(connection, "_node", None)
        if node is not None and node.number in watches:
            watches[node.number].sent(frame, limits)
            sent += 1
        real(connection, frame)

    MessageProtocol.send_frame = send_frame
    try:
        async with cluster.client() as client:
            for round_ in range(5):
                await asyncio.gather(*(client.put(f"{round_}-{i}", "x" * 100) for i in range(20)))
        await cluster.wait_equal()
    finally:
        MessageProtocol.send_frame = real
    return sent


@on_loop
async def test_whole_replicas_keep_the_order(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        watches = {}
        cluster.start(prepare=lambda node: watches.update({node.number: Watch(node)}))
        assert await load(cluster, watches) > 50
        for watch in watches.values():
            assert watch.wrong == []
            assert watch.appends > 3


@on_loop
async def test_the_watch_sees_causes_that_are_stored_too_late(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        watches = {}

        def prepare(node):
            watches[node.number] = Watch(node)
            write = node.store.write
            node.store.write = lambda received, attested, own: write([], attested, own)

        cluster.start(prepare=prepare)
        await load(cluster, watches)
        assert any("is stored up to 0" in text for text in watches[0].wrong)


@on_loop
async def test_the_watch_sees_a_group_that_is_sent_before_it_is_attested(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        watches = {}
        cluster.start(prepare=lambda node: watches.update({node.number: Watch(node)}))
        # A watch that never hears of an attestation is one whose node sends without.
        real = watches[0]._append
        watches[0].node.trusted_log.append = real
        await load(cluster, watches)
        assert any("was sent, attested is 0" in text for text in watches[0].wrong)


@on_loop
async def test_one_drain_of_the_events_a_turn_also_while_work_is_left(tmp_path):
    """Otherwise every event that comes meanwhile begins another chain of drains, and timers wait for all of them."""
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start(0)
        node = cluster.nodes[0]
        turns = calls = 0
        handle = node.core.handle

        def busy(*events):
            nonlocal calls
            calls += 1
            effects = handle(*events)
            node.core.has_more = turns < 30
            return effects

        node.core.handle = busy
        for turns in range(1, 31):
            node.post(Tick(turns, 0))
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert 25 <= calls <= 40
