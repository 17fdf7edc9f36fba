"""Watching real nodes in this loop: in order, nothing missed or repeated, through restarts, transfers and resuming."""

import asyncio
import json

import pytest

from client import Position, WatchAhead, WatchGone
from client.merging import Part
from replica.wire.changes import BOOKMARK_SLOTS, WINDOW_LINKS
from tests.replica.shell.repair import events, forgotten
from tests.support.load import Load
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until


async def take(changes, count):
    found = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found.append(await anext(changes))
    return found


def brief(found):
    return [(change.key, change.value) for change in found]


def test_order_prefix_and_what_is_not_told(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client:
                await client.put("u/0", "before")
                async with client.watch("u/") as changes:
                    await client.put("u/1", "one")
                    await client.put("other", "x")
                    await client.put("u/1", "one")  # changes nothing
                    await client.incr("u/n", 5)
                    await client.delete("u/1")
                    await client.put("u/large", bytes(100_000))
                    found = await take(changes, 4)
                    assert brief(found) == [(b"u/1", b"one"), (b"u/n", b"5"), (b"u/1", None), (b"u/large", None)]
                    assert [change.deleted for change in found] == [False, False, True, False]
                    assert found[3].size == 100_000
                    assert [change.slot for change in found] == sorted(change.slot for change in found)
                    assert changes.position >= found[-1].position
                async with client.watch("u/", after=found[1].position) as again:
                    assert brief(await take(again, 2)) == brief(found[2:])

    use()


def test_many_changes_with_a_slow_owner_and_bounded_memory(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client, client.watch() as changes:
                for _ in range(WINDOW_LINKS * 2):
                    await client.incr("n")
                watching = next(iter(nodes.nodes[0].watches._watching.values()))
                await until(lambda: len(watching.unacknowledged) == WINDOW_LINKS, "the window is full")
                assert len(changes._links) <= WINDOW_LINKS
                found = await take(changes, WINDOW_LINKS * 2)
                assert [int(change.value) for change in found] == list(range(1, WINDOW_LINKS * 2 + 1))

    use()


def test_a_watch_of_what_never_changes_moves_on(tmp_path):
    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            async with nodes.client() as client, client.watch("never") as changes:
                waiting = asyncio.ensure_future(anext(changes))
                start = changes.position
                while await client.slot() < start.slot + BOOKMARK_SLOTS:
                    await asyncio.gather(*(client.incr("n") for _ in range(5)))
                await until(lambda: changes.position > start, "the position moves on")
                assert changes.position.slot % BOOKMARK_SLOTS == 0
                waiting.cancel()

    use()


@pytest.mark.parametrize("away", [0, 2], ids=["the first primary", "a backup"])
def test_replicas_that_restart_in_turn(tmp_path, away):
    """A counter shows it: 1, 2, 3 and so on, each once, for one who watches all the time and one who comes and goes."""

    @on_loop
    async def use():
        async with Nodes(tmp_path / "c") as nodes:
            nodes.start()
            await nodes.wait_ready()
            async with nodes.client(patience_ms=100) as client, nodes.client() as one, nodes.client() as two:
                written = 0
                resumed = []
                position = Position(await two.slot())
                async with one.watch("n") as changes:
                    for number in (away, 1, away):
                        await nodes.stop(number)
                        for _ in range(10):
                            written = await client.incr("n")
                        nodes.start(number)
                        await nodes.wait_ready()
                        async with two.watch("n", after=position) as again:
                            # In the middle of what there is.
                            resumed += await take(again, 7)
                            position = again.position
                        for _ in range(5):
                            written = await client.incr("n")
                    found = await take(changes, written)
                assert [int(change.value) for change in found] == list(range(1, written + 1))
                async with two.watch("n", after=position) as again:
                    resumed += await take(again, written - len(resumed))
                assert [change.position for change in resumed] == [change.position for change in found]

    use()


@on_loop
async def test_what_is_gone_is_said_at_once_and_what_to_do(tmp_path):
    async with Nodes(tmp_path / "c") as nodes:
        nodes.start()
        async with nodes.client() as client:
            first = await client.slot()
            for _ in range(30):
                await client.put("k", bytes(1000))
                await client.put("k", b"")
            # One replica that keeps less than the others ends no watch, and takes part again later.
            nodes.nodes[2].watches.history._bytes_max = 5_000
            await client.put("k", "last")
            await nodes.wait_quiet()
            async with client.watch("k", after=Position(first)) as changes:
                await until(lambda: changes._merge.parts[2] is Part.GONE, "one says that it is gone")
                assert [change.value for change in await take(changes, 61)] == [bytes(1000), b""] * 30 + [b"last"]
                await until(lambda: changes._merge.parts[2] is Part.TELLING, "it tells again")
                await client.put("k", "more")
                assert brief(await take(changes, 1)) == [(b"k", b"more")]
            for node in nodes.nodes.values():
                node.watches.history._bytes_max = 5_000
            await client.put("k", "end")
            await nodes.wait_quiet()
            with pytest.raises(WatchGone, match="read the keys anew") as gone:
                await client.watch("k", after=Position(first)).__aenter__()
            assert gone.value.kept_from.slot > first
            async with client.watch("k", after=gone.value.kept_from) as changes:
                assert (await take(changes, 1))[0].slot > gone.value.kept_from.slot


@on_loop
async def test_a_position_that_does_not_exist_is_waited_for_then_refused(tmp_path, monkeypatch):
    async with Nodes(tmp_path / "c") as nodes:
        nodes.start()
        async with nodes.client() as client:
            await client.put("k", "v")
            await nodes.wait_quiet()
            slot = await client.slot()
            # One that comes while the replicas have patience.
            monkeypatch.setattr("replica.shell.changes.AHEAD_PATIENCE_S", 60.0)
            begins = asyncio.ensure_future(client.watch("k", after=Position(slot + 3)).__aenter__())
            await until(lambda: all(node.watches for node in nodes.nodes.values()), "all replicas were asked")
            assert not begins.done()
            for i in range(5):
                await client.put("k", f"{i}")
            changes = await begins
            assert brief(await take(changes, 2)) == [(b"k", b"3"), (b"k", b"4")]
            await changes.close()
            monkeypatch.setattr("replica.shell.changes.AHEAD_PATIENCE_S", 0.1)
            with pytest.raises(WatchAhead, match="does not exist") as ahead:
                await client.watch("k", after=Position(10**9)).__aenter__()
            assert slot + 5 <= ahead.value.executed < 10**9


@on_loop
async def test_a_replica_that_skipped_slots_by_a_transfer_announces_the_gap(small):
    """Others vouch meanwhile, and the watch misses nothing."""
    async with small as nodes:
        nodes.start()
        await nodes.wait_ready()
        async with nodes.client(patience_ms=100) as client, client.watch("counter") as changes:
            await client.incr("counter")
            async with Load(client) as load:
                await load.more(50)
                reached = [nodes.nodes[2].core.received(log) for log in range(3)]
                await nodes.stop(2)
                await load.more(50)
                await client.incr("counter")
                for log in (0, 1):
                    await forgotten(nodes, log, reached[log] + 1, by=(0, 1))
                nodes.start(2)
                await until(lambda: events(nodes, "state installed", 2), "the state installed")
            node = nodes.nodes[2]
            assert node.watches.history.floor > 1
            assert node.watches.history.floor == json.loads(node.status_json())["changes_kept_from"]
            await client.incr("counter")
            assert [change.value for change in await take(changes, 3)] == [b"1", b"2", b"3"]


@on_loop
async def test_a_liar_is_outvoted(tmp_path):
    """One replica that invents changes, hides them or says that they are gone makes no difference."""
    async with Nodes(tmp_path / "c") as nodes:
        nodes.start()
        await nodes.wait_ready()
        history = nodes.nodes[1].watches.history
        add = history.add
        history.add = lambda slot, _: add(slot, {slot: [(b"n", b"666")]} if slot % 3 else {})
        async with nodes.client() as client, client.watch("n") as changes:
            for _ in range(20):
                await client.incr("n")
            assert [int(change.value) for change in await take(changes, 20)] == list(range(1, 21))

            async def found_out():
                # What it says is compared only when it is not the last to say it.
                await client.incr("n")
                return changes._merge.parts[1] is Part.REFUSED

            await until(found_out, "the liar is found out")
            assert changes.telling == 2
