"""What is kept of the logs: bounded by bytes, by what the state covers, and by whoever is reading a state right now."""

import asyncio
import errno
import sqlite3
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from replica.core.snapshot import Source
from replica.shell import keeper as keeper_module
from replica.shell.statestore import StateStore
from replica.wire.messages import AskCheckpoint, AskPart, CheckpointOffer, Part
from tests.replica.shell.repair import forgotten, held_from, select
from tests.support.load import Load, check_acknowledged
from tests.support.waiting import on_loop, until
from tests.support.wire import Wire
from trustlog import open_log

KIB = 1024


def held_bytes(cluster, number: int) -> int:
    return select(cluster, number, "select sum(length(payloads)) from groups")[0][0]


def retain(cluster, mib: int) -> None:
    for number in range(cluster.cluster.genesis.n):
        settings = cluster.folder(number) / "replica.toml"
        settings.write_text(settings.read_text().replace("retain_mib = 0", f"retain_mib = {mib}"))


@on_loop
async def test_nothing_is_retained_that_the_state_covers(small):
    """The store and the trusted log follow the milestones; memory of what was said does not grow."""
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        low = [1] * 3
        async with cluster.client() as client, Load(client, size=1000) as load:
            for _ in range(4):
                await load.more(60)
                for number, node in cluster.nodes.items():
                    assert held_bytes(cluster, number) < 400 * KIB
                    before, low[number] = low[number], node.trusted_log.low
                    assert before < low[number] <= node.keeper.needed_from()[number] + 1
        assert load.count * 3 * 1000 > 400 * KIB, "more was said than may be kept"
        for number, node in list(cluster.nodes.items()):
            await until(
                lambda node=node: node.trusted_log.low == node.keeper.needed_from()[node.number] + 1, "forgotten"
            )
            low[number] = node.trusted_log.low
            await cluster.stop(number)
            with open_log(cluster.folder(number) / "log") as log:
                assert log.low >= low[number], "it is on the disk"


@on_loop
async def test_as_much_is_retained_as_the_settings_say(small):
    retain(small, 1)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        held = []
        async with cluster.client() as client, Load(client, size=20_000) as load:
            while load.count < 300:
                await load.more(30)
                held.append(max(held_bytes(cluster, number) for number in range(3)))
        # What the newest milestone does not cover yet comes on top: some 16 slots, of up to 4 requests here.
        assert max(held) < 1024 * KIB + 24 * 4 * 20 * KIB
        assert min(held[len(held) // 2 :]) > 600 * KIB, "and it was not thrown away early"
        assert min(held_from(cluster, number, 0) for number in range(3)) > 1


class Clock:
    """The keeper's clock; it stands still."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(keeper_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(keeper_module, "LEASE_S", 30.0)


async def leased(cluster, wire) -> int:
    """Have node 0 lease its newest milestone to this connection; return its slot."""
    wire.send(AskCheckpoint())
    await wire.receive(CheckpointOffer)
    return max(cluster.nodes[0].keeper._leases)


@asynccontextmanager
async def leasing(cluster):
    """A load that makes milestones, and a connection to which node 0 leased one; with its slot."""
    async with cluster.client() as client, Load(client) as load, Wire(cluster, 0, as_replica=2) as wire:
        await wire.replica_hello(2)
        await load.more(30)
        await until(lambda: cluster.nodes[0].keeper.slot, "a milestone")
        yield wire, await leased(cluster, wire)


async def part(wire, slot: int) -> Part:
    wire.send(AskPart(slot, Source.LOGS, 1, b""))
    return await wire.receive(Part)


@on_loop
async def test_a_lease_holds_back_forgetting_and_ends(small, monkeypatch):
    clock = Clock(monkeypatch)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[0]
        async with leasing(cluster) as (wire, slot):
            cut = node.keeper._leases[slot].cut
            first = await part(wire, slot)
            for _ in range(2):
                reached = node.keeper.slot
                await until(lambda reached=reached: node.keeper.slot > reached + 32, "further milestones")
                for log in range(3):
                    await forgotten(cluster, log, cut[log] + 1, by=(1,))
                    assert held_from(cluster, 0, log) <= cut[log] + 1, "the one who reads that state goes on here"
                assert node.trusted_log.low <= cut[0] + 1
                # It is as it was, whatever was written since, and asking keeps it.
                clock.now += 20
                assert await part(wire, slot) == first
                assert first.has == 1
            clock.now += 31
            await until(lambda: slot not in node.keeper._leases, "the lease ended")
            assert (await part(wire, slot)).has == 0
            await forgotten(cluster, 0, cut[0] + 1, by=(0,))
            await until(lambda: node.trusted_log.low > cut[0] + 1, "the trusted log forgets as well")


@on_loop
async def test_a_lease_is_not_renewed_for_ever(small, monkeypatch):
    clock = Clock(monkeypatch)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[0]
        async with leasing(cluster) as (wire, slot):
            for _ in range(45):
                clock.now += 20
                assert (await part(wire, slot)).has == 1
            clock.now += 1
            await until(lambda: slot not in node.keeper._leases, "the lease ended")
            assert (await part(wire, slot)).has == 0


@on_loop
async def test_what_a_lease_held_back_is_forgotten_when_it_ends_and_not_at_the_next_milestone(small, monkeypatch):
    clock = Clock(monkeypatch)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[0]
        async with cluster.client() as client, Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            async with Load(client) as load:
                await load.more(30)
                await until(lambda: node.keeper.slot, "a milestone")
                slot = await leased(cluster, wire)
                await until(lambda: node.keeper.slot > slot, "a further milestone")
            await cluster.wait_quiet()
            cut, newest = node.keeper._leases[slot].cut, node.keeper.slot
            assert held_from(cluster, 0, 0) <= cut[0] + 1
            clock.now += 31
            await forgotten(cluster, 0, cut[0] + 1, by=(0,))
            assert node.keeper.slot == newest


@pytest.mark.parametrize("limit", ["leases", "bytes"])
@on_loop
async def test_leases_are_bounded_by_number_and_by_what_they_cost(small, monkeypatch, limit):
    clock = Clock(monkeypatch)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[0]
        async with cluster.client() as client, Load(client) as load, Wire(cluster, 0, as_replica=2) as wire:
            await wire.replica_hello(2)
            await load.more(20)
            await until(lambda: node.keeper.slot, "a milestone")
            seen = []
            for _ in range(keeper_module.LEASES_MAX + 3):
                clock.now += 0.1
                seen.append(await leased(cluster, wire))
                reached = node.keeper.slot
                await until(lambda reached=reached: node.keeper.slot > reached, "a further milestone")
                assert len(node.keeper._leases) <= keeper_module.LEASES_MAX
            assert set(node.keeper._leases) <= set(seen[-keeper_module.LEASES_MAX :])
            if limit == "bytes":
                monkeypatch.setattr(keeper_module, "WAL_BYTES_MAX", 0)
                await until(lambda: not node.keeper._leases, "all of them ended")
                assert (await part(wire, seen[-1])).has == 0


# The state file cannot be written.


def full(cluster, node) -> None:
    """SQLite's own word for a full disk, at the next page that the file would grow by."""
    db = node.keeper._store._db
    db.execute(f"pragma max_page_count = {db.execute('pragma page_count').fetchone()[0]}")


def failing(error):
    def fail(cluster, node) -> None:
        write = node.keeper._store.write

        def broken(milestone, *, replace_all=False):
            write(milestone, replace_all=replace_all)
            raise error

        node.keeper._store.write = broken

    return fail


def rotten(cluster, node) -> None:
    """An entry that was altered under the running replica: the next milestone must not be made of it."""
    with sqlite3.connect(cluster.folder(node.number) / "state.sqlite") as db:
        db.execute("update buckets set digest = zeroblob(32) where tree = 0")
    db.close()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (full, "database or disk is full"),
        (failing(OSError(errno.ENOSPC, "No space left on device")), "No space left on device"),
        (failing(OSError(errno.EIO, "Input/output error")), "Input/output error"),
        (failing(sqlite3.OperationalError("disk I/O error")), "disk I/O error"),
        (rotten, "the digests are not those of what was written"),
    ],
    ids=["full", "ENOSPC", "EIO", "SQLite's EIO", "rotten"],
)
@on_loop
async def test_a_state_file_that_cannot_be_written_stops_the_replica(small, fault, named):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[1]
        async with cluster.client(patience_ms=100) as client:
            async with Load(client, size=3000) as load:
                await until(lambda: node.keeper.slot, "a first milestone")
                fault(cluster, node)
                await until(lambda: 1 in cluster.stopped, "the replica stops")
                assert "cannot make its state durable" in cluster.stopped[1]
                assert named in cluster.stopped[1]
                # What was under way when it stopped ends; nothing follows it, whatever the others say.
                await until(lambda: node.outbox._work is None, "the outbox idle")
                last = node.trusted_log.last
                await load.more(60)
                assert node.trusted_log.last == last
            await cluster.stop(1)
            with open_log(cluster.folder(1) / "log") as log:
                assert log.last == last
            assert not list(cluster.folder(1).glob("state.sqlite.*-*")), "the next start sees whether it is sound"
            # With a disk that works it goes on.
            cluster.start(1)
            await cluster.wait_ready()
            await cluster.wait_quiet()
            await check_acknowledged(client, load.acknowledged)
        assert cluster.nodes[1].core.executor.digest() == cluster.nodes[0].core.executor.digest()


@on_loop
async def test_a_failure_of_the_state_file_during_an_install_stops_it_too(small):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=100) as client, Load(client) as load:
            await load.more(30)
            reached = cluster.nodes[2].core.received(0)
            await cluster.stop(2)
            await forgotten(cluster, 0, reached + 1, by=(0, 1))
            cluster.start(2, prepare=lambda node: failing(OSError(errno.ENOSPC, "No space left"))(cluster, node))
            last = cluster.nodes[2].trusted_log.last
            await until(lambda: 2 in cluster.stopped, "the replica stops")
            assert "No space left" in cluster.stopped[2]
            assert cluster.nodes[2].trusted_log.last == last
            await cluster.crash(2)
            cluster.start(2)
            await until(lambda: cluster.nodes[2].core.is_live, "with room on the disk it comes back")
            await load.more(20)


@on_loop
async def test_closing_while_a_milestone_is_written(small):
    """What is being written is finished: the file has one whole milestone or the other."""
    writing = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with small as cluster:

        def slow(node) -> None:
            if node.number != 2:
                return
            write = node.keeper._store.write

            def announced(milestone, *, replace_all=False):
                loop.call_soon_threadsafe(writing.set)
                write(milestone, replace_all=replace_all)

            node.keeper._store.write = announced

        cluster.start(prepare=slow)
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await writing.wait()
            await cluster.stop(2)
            await load.more(5)
        held = StateStore(cluster.folder(2) / "state.sqlite", cluster.cluster.cluster_id, 2)
        with held.load() as view:
            assert view.slot % 8 == 0
            assert list(view.trees[0].entries())
        held.close()
