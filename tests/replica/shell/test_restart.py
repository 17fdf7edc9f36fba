"""Restarts: from the persisted milestone on, of all at once, and with a damaged state file."""

import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from replica.core.tree import bucket_digest, encode_bucket
from replica.shell import recovery
from replica.shell.statestore import _digest_of
from tests.replica.shell.repair import DAMAGE, STATE_DAMAGE, digests, edit, events, forgotten, select
from tests.support.load import Load, check_acknowledged
from tests.support.waiting import on_loop, until


async def settled(cluster) -> None:
    """Wait until nothing moves, the disks and what they are to forget included."""
    await cluster.wait_ready()
    await cluster.wait_quiet()
    await until(
        lambda: all(n.keeper._writing is None and n.outbox._tidying is None for n in cluster.nodes.values()), "tidy"
    )


@pytest.fixture
def replayed(monkeypatch) -> Counter:
    """Groups that a start has verified, by log; and per log, the lowest index, under its negative number - 1."""
    counted: Counter = Counter()
    verify = recovery.Replay._verify

    def noted(replay, row):
        counted[row.log] += 1
        lowest = counted.get(-row.log - 1, row.last)
        counted[-row.log - 1] = min(lowest, row.last)
        return verify(replay, row)

    monkeypatch.setattr(recovery.Replay, "_verify", noted)
    return counted


@on_loop
async def test_a_restart_reads_only_the_logs_from_the_milestone_on(small, replayed):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await load.more(200)
        await settled(cluster)
        node = cluster.nodes[1]
        state, executed, slot = node.core.executor.digest(), node.core.executed, node.keeper.slot
        ends = [node.core.received(log) for log in range(3)]
        assert slot > executed - 24
        await cluster.stop(1)
        assert select(cluster, 1, "select slot from milestone", name="state.sqlite") == [(slot,)]
        replayed.clear()
        cluster.start(1)
        node = cluster.nodes[1]
        assert node.keeper.slot == slot
        assert (node.core.executed, node.core.executor.digest()) == (executed, state)
        assert [node.core.received(log) for log in range(3)] == ends
        groups = sum(replayed[log] for log in range(3))
        assert 0 < groups < 100, "only the end of the logs was read"
        # Its own log goes on.
        await cluster.wait_ready()
        await cluster.stop(2)
        async with cluster.client(patience_ms=50) as client:
            assert await client.incr("needs its vote") == 1
        assert node.trusted_log.last > ends[1]
        assert not any(one.core.exposed for one in cluster.nodes.values())


@on_loop
async def test_a_restart_skips_what_the_store_still_has_below_the_cut(small, replayed):
    """Retained logs are for peers: a start does not read them."""
    small.set(log_level='"warning"')
    for number in range(3):
        settings = small.folder(number) / "replica.toml"
        settings.write_text(settings.read_text().replace("retain_mib = 0", "retain_mib = 64"))
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await load.more(200)
        await settled(cluster)
        await cluster.stop(0)
        held = select(cluster, 0, "select count(*) from groups")[0][0]
        assert select(cluster, 0, "select min(first) from groups")[0][0] == 1
        replayed.clear()
        cluster.start(0)
        cut = cluster.nodes[0].core.cut
        groups = sum(replayed[log] for log in range(3))
        assert 0 < groups < held / 3
        assert all(replayed[-log - 1] > 1 for log in range(3)), cut
        await settled(cluster)
        assert len(digests(cluster)) == 1


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "crashed"])
@on_loop
async def test_all_at_once_and_again(small, crash):
    async with small as cluster:
        acknowledged = {}
        for _ in range(3):
            cluster.start()
            await cluster.wait_ready()
            async with cluster.client(patience_ms=100) as client:
                await check_acknowledged(client, acknowledged)
                async with Load(client, deadline_s=3) as load:
                    await load.more(60)
                acknowledged |= load.acknowledged
            for number in range(3):
                await (cluster.crash(number) if crash else cluster.stop(number))
        cluster.start()
        await settled(cluster)
        assert len(digests(cluster)) == 1
        assert not any(node.core.exposed for node in cluster.nodes.values())


@on_loop
async def test_a_view_that_is_read_again_is_no_news(cluster):
    async with cluster:
        cluster.start(1, 2)
        async with cluster.client(patience_ms=100) as client:
            await client.put("without", "the first primary")
        assert {line["level"] for line in events(cluster, "entering view")} == {"warning"}
        await cluster.wait_quiet()
        await cluster.stop(1)
        cluster.logged.lines.clear()
        cluster.start(1)
        entered = events(cluster, "entering view", 1)
        (listening,) = events(cluster, "listening", 1)
        assert {line["level"] for line in entered} == {"info"}
        assert listening["view"] == max(line["view"] for line in entered) >= 1


def flip(path, needle: bytes) -> None:
    """Flip a bit in the last place of the file where these bytes stand."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma wal_checkpoint(truncate)")
    raw = bytearray(path.read_bytes())
    at = raw.rfind(needle)
    assert at >= 0
    raw[at + len(needle) // 2] ^= 1
    path.write_bytes(raw)


def flip_entry(cluster, number: int) -> None:
    (value,) = select(cluster, number, "select value from entries where tree = 0 limit 1", name="state.sqlite")[0]
    flip(cluster.folder(number) / "state.sqlite", value)


def flip_column(name: str):
    def change(cluster, number: int) -> None:
        (value,) = select(cluster, number, f"select {name} from milestone", name="state.sqlite")[0]  # noqa: S608
        flip(cluster.folder(number) / "state.sqlite", value)

    return change


def forge_certificate(cluster, number: int) -> None:
    """One that its check digest is made for: only its signatures show it."""
    row = select(cluster, number, "select slot, header, certificate from milestone", name="state.sqlite")[0]
    parts = select(cluster, number, "select kind, content from parts order by kind, number", name="state.sqlite")
    certificate = row[2][:-1] + bytes([row[2][-1] ^ 1])
    logs, batches = ([content for kind, content in parts if kind == wanted] for wanted in (0, 1))
    check = _digest_of(row[0], row[1], certificate, tuple(logs), tuple(batches))
    edit(
        cluster,
        number,
        "update milestone set certificate = ?, check_digest = ?",
        certificate,
        check,
        name="state.sqlite",
    )


def lose_a_part(cluster, number: int) -> None:
    edit(cluster, number, "delete from parts where kind = 0 and number = 1", name="state.sqlite")


def lose_an_entry(cluster, number: int) -> None:
    edit(
        cluster,
        number,
        "delete from entries where tree = 0 and bucket = (select min(bucket) from entries where tree = 0)",
        name="state.sqlite",
    )


def forge_entry(cluster, number: int) -> None:
    """An entry that its bucket's digest is made for: only the root, which a quorum attested, shows it."""
    bucket, key = select(
        cluster, number, "select bucket, key from entries where tree = 0 limit 1", name="state.sqlite"
    )[0]
    place = (bucket, key)
    edit(
        cluster,
        number,
        "update entries set value = 'forged' where tree = 0 and bucket = ? and key = ?",
        *place,
        name="state.sqlite",
    )
    edit(
        cluster,
        number,
        "update entries set value = cast(value as blob) where bucket = ? and key = ?",
        *place,
        name="state.sqlite",
    )
    rows = select(
        cluster,
        number,
        "select key, value from entries where tree = 0 and bucket = ? order by key",
        bucket,
        name="state.sqlite",
    )
    digest = bucket_digest(encode_bucket(rows))
    edit(
        cluster,
        number,
        "update buckets set digest = ? where tree = 0 and bucket = ?",
        digest,
        bucket,
        name="state.sqlite",
    )


def cut_off(cluster, number: int) -> None:
    path = cluster.folder(number) / "state.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma wal_checkpoint(truncate)")
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def not_a_database(cluster, number: int) -> None:
    (cluster.folder(number) / "state.sqlite").write_bytes(b"\x5a" * 20_000)


DAMAGES = {
    "an entry": flip_entry,
    "the header": flip_column("header"),
    "the certificate": flip_column("certificate"),
    "a forged certificate": forge_certificate,
    "a log's state gone": lose_a_part,
    "an entry gone": lose_an_entry,
    "a forged entry": forge_entry,
    "half of the file": cut_off,
    "no database": not_a_database,
}


@pytest.mark.parametrize("damage", list(DAMAGES.values()), ids=list(DAMAGES))
@on_loop
async def test_a_damaged_state_file_is_moved_aside_and_fetched_from_peers(small, damage):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=50) as client:
            async with Load(client) as load:
                await load.more(60)
            await forgotten(cluster, 1, 4, by=(0, 1, 2))
            await settled(cluster)
            await cluster.stop(1)
            damage(cluster, 1)
            cluster.start(1)
            node = cluster.nodes[1]
            (line,) = events(cluster, STATE_DAMAGE, 1)
            assert "state.sqlite.damaged-" in line["moved_to"]
            assert cluster.folder(1).joinpath("state.sqlite.damaged-1").exists()
            assert "state.sqlite" in line["error"] or "digest" in line["error"] or "certificate" in line["error"]
            assert (node.core.executed, node.core.is_live) == (0, False)
            await until(lambda: events(cluster, "state installed", 1), "the state installed")
            await cluster.wait_ready()
            await cluster.stop(2)
            assert await client.incr("needs its vote") == 1
            cluster.start(2)
            await check_acknowledged(client, load.acknowledged)
        await settled(cluster)
        assert len(digests(cluster)) == 1
        slot = node.keeper.slot
        await cluster.stop(1)
        cluster.logged.lines.clear()
        cluster.start(1)
        assert cluster.nodes[1].keeper.slot == slot > 0
        assert not events(cluster, STATE_DAMAGE)
        assert not events(cluster, DAMAGE)
