"""Peers that hand out a poisoned, forged, stale or no state, or ask for nonsense: refused, counted, done without."""

import asyncio
import json
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from replica.core import transfer
from replica.core.events import AskPart as AskPartEffect
from replica.core.events import Install
from replica.core.snapshot import Source
from replica.core.treeparts import Kind, Want
from replica.shell import server
from replica.wire.messages import (
    AskCheckpoint,
    AskMembers,
    AskPart,
    CheckpointOffer,
    Fetch,
    GroupMessage,
    Held,
    MembersShown,
    Part,
    Ping,
    Pong,
    Subscribe,
)
from tests.replica.shell.repair import digests, events, forgotten
from tests.support.load import Load
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire

HUGE = 2**63 - 1
NODES = Want(Kind.NODES).encode()


async def left_behind(cluster, client, number: int = 2) -> None:
    """Stop a replica and have the others forget what it needs; end the first one, which shall be hostile, too."""
    async with Load(client) as load:
        await load.more(30)
        reached = cluster.nodes[number].core.received(0)
        await cluster.stop(number)
        await load.more(20)
        await forgotten(cluster, 0, reached + 1, by=(0, 1))
        await forgotten(cluster, 1, reached + 1, by=(0, 1))


async def catches_up(cluster, asked: list | None = None) -> Counter:
    """Start replica 2; it must install what is right and go on. Return what it refused before it was installed."""
    refused: Counter = Counter()

    def prepare(node) -> None:
        ask = node._effects[AskPartEffect]
        node._effects[AskPartEffect] = lambda effect: ((asked if asked is not None else []).append(effect), ask(effect))
        install = node._install

        def noted(effect) -> None:
            refused.update(node.refusals + node.core.refusals)
            install(effect)

        node._effects[Install] = noted

    cluster.start(2, prepare=prepare)
    await until(lambda: events(cluster, "state installed", 2), "the state installed", 40)
    await cluster.wait_ready()
    await cluster.wait_quiet()
    assert len(digests(cluster)) == 1
    return refused


def poison(kind: str, source: Source):
    def spoil(wanted, data: bytes) -> bytes | None:
        if wanted.source is not source or data is None:
            return data
        if kind == "gone":
            return None
        if kind == "another's":
            return data
        if kind == "cut":
            return data[:-1]
        if kind == "empty":
            return b""
        return data[:-1] + bytes([data[-1] ^ 1])

    return spoil


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        *product([Source.APPLICATION, Source.TABLE, Source.LOGS], ["flipped", "cut", "empty", "gone"]),
        (Source.LOGS, "another's"),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else value,
)
@on_loop
async def test_poisoned_parts(small, source, kind):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await left_behind(cluster, client)
        hostile = cluster.nodes[0].keeper
        part, spoil = hostile.part, poison(kind, source)

        was_spoiled = asyncio.Event()

        async def spoiled(slot, wanted):
            data = await part(slot, wanted)
            if kind == "another's" and wanted.source is source:
                was_spoiled.set()
                return await part(slot, replace(wanted, number=(wanted.number + 1) % 3))
            if spoil(wanted, data) != data:
                was_spoiled.set()
            return spoil(wanted, data)

        honest = cluster.nodes[1].keeper
        good_part = honest.part

        async def later(slot, wanted):
            if wanted.source is source:
                await was_spoiled.wait()
            return await good_part(slot, wanted)

        hostile.part, honest.part = spoiled, later
        asked: list = []
        refused = await catches_up(cluster, asked)
        name = "part-gone" if kind == "gone" else "part-poisoned"
        assert refused[name] >= 1
        assert json.loads(cluster.nodes[2].status_json())["refused"][name] >= 1
        assert {effect.ask for effect in asked} == {0, 1}


def forged_certificate(header: bytes, certificate: bytes) -> tuple[bytes, bytes]:
    return header, certificate[:-1] + bytes([certificate[-1] ^ 1])


def other_header(header: bytes, certificate: bytes) -> tuple[bytes, bytes]:
    return header[:20] + bytes([header[20] ^ 1]) + header[21:], certificate


def garbage(header: bytes, certificate: bytes) -> tuple[bytes, bytes]:
    return b"\xff" * 1000, b"\xff" * 1000


def one_entry_twice(header: bytes, certificate: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(certificate[4:8], "big")
    one = certificate[2 : 8 + size]
    return header, b"\x00\x02" + one + one


@pytest.mark.parametrize("forge", [forged_certificate, other_header, garbage, one_entry_twice])
@on_loop
async def test_forged_offers(small, forge):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await left_behind(cluster, client)
        hostile = cluster.nodes[0].keeper
        offer = hostile.offer

        async def forged():
            return forge(*await offer())

        hostile.offer = forged
        asked: list = []
        refused = await catches_up(cluster, asked)
        assert refused["state-refused"] >= 1
        assert {effect.ask for effect in asked} == {1}, "nothing was asked of the forger"


@pytest.mark.parametrize("answers", ["gone", "never", "never, and first"])
@on_loop
async def test_a_stale_offer(small, answers, monkeypatch):
    """A true one, of a state that is older than what the logs go on from, and no part of it."""
    monkeypatch.setattr(transfer, "PART_DEADLINE_MS", 200)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        hostile = cluster.nodes[0].keeper
        async with cluster.client() as client:
            async with Load(client) as load:
                await load.more(20)
            reached = cluster.nodes[2].core.received(0)
            await cluster.stop(2)
            async with Load(client) as load:
                await load.more(20)
                await forgotten(cluster, 0, reached + 1, by=(0, 1))
            stale = await hostile.offer()
            await left_behind_more(cluster, client)

        async def offer():
            return stale

        async def later():
            await asyncio.sleep(0.1)  # it is further away than the hostile one
            return await honest()

        if answers == "never, and first":
            honest = cluster.nodes[1].keeper.offer
            cluster.nodes[1].keeper.offer = later

        async def part(slot, wanted):
            return None if answers == "gone" else await never

        hostile.offer, hostile.part = offer, part
        never = asyncio.get_running_loop().create_future()
        await catches_up(cluster)


async def left_behind_more(cluster, client) -> None:
    slot = cluster.nodes[1].keeper.slot
    async with Load(client) as load:
        await until(lambda: cluster.nodes[1].keeper.slot > slot + 16, "further milestones")
        await load.more(5)


# Questions that are nonsense.


@pytest.mark.parametrize(
    "message",
    [
        AskPart(1, 9, 0, b""),
        AskPart(1, HUGE, 0, b""),
        AskPart(1, Source.APPLICATION, 0, b""),
        AskPart(1, Source.APPLICATION, 0, NODES[:-1]),
        AskPart(1, Source.APPLICATION, 0, b"\xff" * 38),
        AskPart(1, Source.APPLICATION, 1, NODES),
        AskPart(1, Source.LOGS, 65536, b""),
        AskPart(1, Source.LOGS, 2**64 - 1, b""),
        AskPart(1, Source.LOGS, 0, NODES),
        AskPart(1, Source.BATCHES, 0, NODES),
        Held(1, 1, 5),
        CheckpointOffer(b"", b""),
        Part(1, 0, 0, NODES, 1, b"x"),
        GroupMessage(1, b"x"),
    ],
    ids=str,
)
@on_loop
async def test_a_message_that_cannot_be(cluster, message):
    """The connection that it came on is ended; nothing else happens."""
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            wire.send(message)
            await wire.ended()
        node = cluster.nodes[0]
        assert node.refusals["malformed-message"] >= 1
        assert not node.keeper._leases
        async with cluster.client() as client:
            assert await client.incr("n") == 1


@pytest.mark.parametrize(
    "message",
    [
        Subscribe(HUGE),
        Subscribe(0),
        Fetch(0, HUGE),
        Fetch(1, HUGE),
        Fetch(3, 1),
        Fetch(2**64 - 1, 1),
        AskPart(HUGE, Source.APPLICATION, 0, NODES),
        AskPart(1, Source.LOGS, 65535, b""),
    ],
    ids=str,
)
@on_loop
async def test_a_question_beyond_everything_there_is(cluster, message):
    """The connection goes on, and so does the replica."""
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        await cluster.wait_quiet()
        node = cluster.nodes[0]
        last = node.trusted_log.last
        failures: list = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            wire.send(message)
            if isinstance(message, Fetch) and message.log < 3:
                held = await wire.receive(Held)
                assert held == Held(message.log, 1, node.core.received(message.log))
            if isinstance(message, AskPart):
                assert (await wire.receive(Part)).has == 0
            wire.send(Ping(7))
            assert await wire.receive(Pong) == Pong(7)
        assert not failures
        assert 0 not in cluster.stopped
        assert node.trusted_log.last == last
        assert not node.core.halted
        async with cluster.client() as client:
            assert await client.incr("n") == 1


@on_loop
async def test_a_part_that_the_leased_state_does_not_have(small):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await load.more(40)
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            wire.send(AskCheckpoint())
            await wire.receive(CheckpointOffer)
            (slot,) = cluster.nodes[0].keeper._leases
            wire.send(AskPart(slot, Source.LOGS, 2, b""))
            assert (await wire.receive(Part)).has == 1
            wire.send(AskPart(slot, Source.LOGS, 3, b""))
            await wire.ended()
        assert cluster.nodes[0].refusals["malformed-message"] == 1
        await cluster.wait_ready()


@on_loop
async def test_more_questions_at_once_than_one_may_have_open(small):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await load.more(40)
        node = cluster.nodes[0]
        async with Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            wire.send(AskCheckpoint())
            await wire.receive(CheckpointOffer)
            (slot,) = node.keeper._leases
            for _ in range(200):
                wire.send(AskPart(slot, Source.APPLICATION, 0, NODES))
            wire.send(Ping(1))
            await until(lambda: node.refusals["parts-at-once"] > 0, "some refused")
            assert node.refusals["parts-at-once"] <= 200 - server.PARTS_AT_ONCE_MAX
            await wire.receive(Pong)


@on_loop
async def test_links_that_nobody_asked_for_and_links_that_prove_nothing(small):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[2]
        node.lists.on_shown(MembersShown(0, b"x"), 0)
        assert node.refusals["members-unasked"] == 1
        node.lists.ask(0)
        node.lists.on_shown(MembersShown(0, b"x"), 0)
        assert node.refusals["members-refused"] == 1
        node.lists.on_shown(MembersShown(0, b"x"), 0)
        assert node.refusals["members-unasked"] == 2, "one answer to one question"
        assert node.home.cluster.genesis.list_number == 0
        assert not node.home.members_path.exists()


@on_loop
async def test_whoever_asks_is_told_that_no_list_followed(small):
    async with small as cluster:
        cluster.start(0)
        async with Wire(cluster, 0) as wire:
            await wire.hello()
            for number in (0, 1, HUGE):
                wire.send(AskMembers(number))
                assert await wire.receive(MembersShown) == MembersShown(number, b"")
