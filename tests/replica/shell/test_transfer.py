"""A replica that was away for longer than the others keep their logs: transfer, then the logs, then it votes again."""

import json
from itertools import count

import pytest

from replica.core.events import AskPart
from replica.core.homecoming import Homecoming
from replica.core.snapshot import Source
from replica.core.tree import NODE_FANOUT, bucket_of
from tests.replica.shell.repair import check_store, digests, events, forgotten
from tests.support.load import Load, check_acknowledged
from tests.support.waiting import on_loop, until


class Watch:
    """What a replica's status says whenever it asks for a part."""

    def __init__(self) -> None:
        self.transfers: list[int | None] = []

    def __call__(self, node) -> None:
        ask = node._effects[AskPart]

        def noted(effect) -> None:
            self.transfers.append(json.loads(node.status_json())["transfer"])
            ask(effect)

        node._effects[AskPart] = noted


@pytest.mark.parametrize("away", [0, 2], ids=["the first primary", "a backup"])
@on_loop
async def test_away_for_longer_than_the_logs_are_kept(small, away):
    others = tuple(number for number in range(3) if number != away)
    watch = Watch()
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=100) as client, Load(client) as load:
            await load.more(50)
            node = cluster.nodes[away]
            own_last = node.trusted_log.last
            reached = [node.core.received(log) for log in range(3)]
            await cluster.stop(away)
            await load.more(50)
            for log in others:
                await forgotten(cluster, log, reached[log] + 1, by=others)
            before = load.count
            cluster.start(away, prepare=watch)
            await until(lambda: events(cluster, "state installed", away), "the state installed")
            node = cluster.nodes[away]
            await until(lambda: node.core.is_live, "speaking again")
            assert load.count > before, "requests went on"
            await load.more(50)
            # With one of the others away as well, every decision needs its vote.
            await cluster.stop(others[1])
            await load.more(50)
            cluster.start(others[1])
            await cluster.wait_ready()
        await cluster.wait_quiet()
        assert set(watch.transfers) - {None}, "its status said that a transfer is under way"
        assert node.trusted_log.last > own_last, "its own log went on"
        assert node.trusted_log.low > 1
        assert len(digests(cluster)) == 1
        assert not any(one.core.exposed for one in cluster.nodes.values())
        assert not events(cluster, "replica lied; not counted")
        async with cluster.client() as client:
            await check_acknowledged(client, load.acknowledged)


@on_loop
async def test_away_twice_and_stopped_in_the_middle_of_a_transfer(small):
    """What was installed before it stopped, or not, it begins with; the end is the same."""
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=100) as client, Load(client) as load:
            for crash in (True, False, True):
                await load.more(40)
                reached = cluster.nodes[2].core.received(0)
                await (cluster.crash(2) if crash else cluster.stop(2))
                await load.more(20)
                await forgotten(cluster, 0, reached + 1, by=(0, 1))
                cluster.start(2)
                node = cluster.nodes[2]
                await until(lambda node=node: node.core.transfer, "a transfer")
                await cluster.crash(2)
                cluster.start(2)
                node = cluster.nodes[2]
                await until(lambda node=node: node.core.is_live and node.core.executed > 0, "back")
        await cluster.wait_ready()
        await cluster.wait_quiet()
        assert len(digests(cluster)) == 1


@on_loop
async def test_a_store_that_is_deleted_and_whose_logs_peers_have_forgotten(small):
    """The trusted log is kept: the state comes by transfer, the own log from there on from peers."""
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=100) as client:
            async with Load(client) as load:
                await load.more(60)
            await forgotten(cluster, 1, 10, by=(0, 2))
            await cluster.wait_quiet()
            await cluster.stop(1)
            for path in [*cluster.folder(1).glob("store.sqlite*"), *cluster.folder(1).glob("state.sqlite*")]:
                path.unlink()
            cluster.start(1)
            node = cluster.nodes[1]
            last = node.trusted_log.last
            assert f"entries 1 to {last} of its own log are not here" in node.core.why_mute
            await until(lambda: events(cluster, "state installed", 1), "the state installed")
            await until(lambda: node.core.is_live, "speaking again")
            assert cluster.has_read.count(1) == 1 + 1 + 1, "at both starts, and what was transferred"
            await cluster.stop(2)
            assert await client.incr("needs its vote") == 1
            assert node.trusted_log.last > last
            cluster.start(2)
            await cluster.wait_ready()
            await cluster.wait_quiet()
            assert len(digests(cluster)) == 1
            await check_acknowledged(client, load.acknowledged)
        await cluster.stop(1)
        assert check_store(cluster, 1)[1] > last
        cluster.start(1)
        assert cluster.nodes[1].core.received(1) == cluster.nodes[1].trusted_log.last


def asked_buckets(asked: list[AskPart]) -> set[int]:
    """The buckets of the application's state that were asked for, each once, however often it was."""
    wants = [effect.want.want for effect in asked if effect.want.source is Source.APPLICATION]
    return {want.node * NODE_FANOUT + bucket for want in wants if want is not None for bucket in want.buckets}


def buckets_of(*keys: str) -> set[int]:
    return {bucket_of(key.encode()) for key in keys}


@on_loop
async def test_a_large_state_in_many_parts(small):
    """Several megabytes, buckets larger than a part among them; only what differs is fetched the second time.

    How many parts that are depends on how long the load lasts, and on answers that come late and are asked for again.
    Which buckets does not.
    """
    asked: list[AskPart] = []
    stored = [*(f"small-{number}" for number in range(150)), *(f"large-{number}" for number in range(8))]
    # Two of them share a bucket, which is sliced.
    stored.append(next(key for n in count() if buckets_of(key := f"large {n}") == buckets_of("large-0")))

    def note(node) -> None:
        ask = node._effects[AskPart]
        node._effects[AskPart] = lambda effect: (asked.append(effect), ask(effect))

    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            for key in stored:
                await client.put(key, bytes([len(key)]) * (1_000_000 if key.startswith("large") else 2000))
            await cluster.wait_quiet()
            for again in (False, True):
                reached = cluster.nodes[2].core.received(0)
                await cluster.stop(2)
                async with Load(client, workers=1, prefix=f"again {again} ") as load:
                    await forgotten(cluster, 0, reached + 1, by=(0, 1))
                    await load.more(1)
                await cluster.wait_quiet()
                await until(
                    lambda: len({node.keeper.slot for node in cluster.nodes.values()}) == 1, "both offer the same"
                )
                if not again:
                    for name in ("state", "store"):
                        for path in cluster.folder(2).glob(f"{name}.sqlite*"):
                            path.unlink()
                cluster.logged.lines.clear()
                asked.clear()
                cluster.start(2, prepare=note)
                await until(lambda: events(cluster, "state installed", 2), "the state installed")
                if again:
                    assert asked_buckets(asked)
                    assert asked_buckets(asked) <= buckets_of(*load.acknowledged)
                else:
                    assert asked_buckets(asked) >= buckets_of(*stored)
                    assert any(effect.want.want and effect.want.want.offset for effect in asked), "slices"
                    assert {effect.ask for effect in asked} == {0, 1}, "both were asked"
                await cluster.wait_ready()
                await cluster.wait_quiet()
                assert len(digests(cluster)) == 1


@on_loop
async def test_cut_off_for_long_and_not_restarted(small):
    """The running replica installs the state and begins anew; what it said last, it has not lost."""
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[2]
        async with cluster.client(patience_ms=100) as client, Load(client) as load:
            await load.more(30)
            for link in node.links.values():
                await link.close()
            await until(lambda: not node.core.is_appending and not node.outbox.is_busy, "its last word said")
            reached, last = node.core.received(0), node.trusted_log.last
            await forgotten(cluster, 0, reached + 1, by=(0, 1))
            await forgotten(cluster, 1, reached + 1, by=(0, 1))
            core = node.core
            for link in node.links.values():
                link.start()
            await until(lambda: events(cluster, "state installed", 2), "the state installed")
            assert node.core is not core
            await until(lambda: node.core.is_live, "speaking again")
            await cluster.stop(1)
            await load.more(20)
            assert node.trusted_log.last > last
            cluster.start(1)
            await cluster.wait_ready()
        await cluster.wait_quiet()
        assert len(digests(cluster)) == 1


@on_loop
async def test_a_replica_that_cannot_go_on_from_what_it_installed_stops_and_says_so(small):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await load.more(30)
            reached = cluster.nodes[2].core.received(0)
            await cluster.stop(2)
            await forgotten(cluster, 0, reached + 1, by=(0, 1))
            cluster.start(2)
            node = cluster.nodes[2]
            last = node.trusted_log.last

            def broken(_):
                raise RuntimeError("not that")

            node._replay = broken
            await until(lambda: 2 in cluster.stopped, "it stops")
            assert "cannot go on from the transferred state: RuntimeError: not that" in cluster.stopped[2]
            await load.more(10)
            assert node.trusted_log.last == last


@on_loop
async def test_a_restarted_replica_asks_each_peer_as_soon_as_it_is_there(small, monkeypatch):
    """Not only when the pause between its questions is over, which grows while nobody is there to answer."""
    monkeypatch.setattr(Homecoming, "due", lambda *_: [])
    async with small as cluster:
        cluster.start()
        await until(lambda: all(node.core.is_live for node in cluster.nodes.values()), "all of them speak")
