"""Damaging a stopped replica's store, and checking that what a replica has there is whole."""

import sqlite3
from contextlib import closing

from replica.shell.store import Store
from replica.shell.verify import GroupVerifier
from tests.support.waiting import until

DAMAGE = "damage in the store; peers are asked for what is missing"
STATE_DAMAGE = "state file damaged; peers are asked for the state"


def edit(cluster, number: int, statement: str, *values, name="store.sqlite") -> None:
    with closing(sqlite3.connect(cluster.folder(number) / name)) as db, db:
        assert db.execute(statement, values).rowcount != 0


def select(cluster, number: int, statement: str, *values, name="store.sqlite") -> list[tuple]:
    with closing(sqlite3.connect(cluster.folder(number) / name)) as db:
        return db.execute(statement, values).fetchall()


def rot(cluster, number: int, log: int, place: int) -> tuple[int, int]:
    """Flip a bit of a group's payloads; place: which of the log's groups, negative from the end. Return its bounds."""
    rows = select(cluster, number, "select first, last, payloads from groups where log = ? order by first", log)
    first, last, payloads = rows[place]
    rotten = payloads[:-1] + bytes([payloads[-1] ^ 1])
    edit(cluster, number, "update groups set payloads = ? where log = ? and first = ?", rotten, log, first)
    return first, last


def events(cluster, event: str, number: int | None = None) -> list[dict]:
    """What was logged under this name, by a replica or by any."""
    return [line for line in cluster.logged.lines if line["event"] == event and number in {None, line["replica"]}]


def check_store(cluster, number: int) -> list[int]:
    """Check that every log on this disk is without a gap and verifies; return up to where each reaches."""
    verifier = GroupVerifier(cluster.cluster.genesis)
    ends = []
    with closing(Store(cluster.folder(number) / "store.sqlite", cluster.cluster.cluster_id, number)) as store:
        for log in range(cluster.cluster.genesis.n):
            reached, head = (store.first_index(log) or 1) - 1, None
            for row in store.groups(log):
                group = verifier.verify(log, row.raw)
                assert (group.first, group.last) == (row.first, row.last)
                assert row.first == reached + 1, f"log {log}: nothing between {reached} and {row.first}"
                assert head in {None, group.head_before}
                reached, head = row.last, group.head_after
            ends.append(reached)
    return ends


async def is_repaired(cluster, number: int) -> None:
    """Start what stands still; check that this replica goes on, votes, and has everything on its own disk again."""
    last = select(cluster, number, "select max(last) from groups where log = ?", number)[0][0] or 0
    await start_missing(cluster)
    await cluster.wait_ready()
    async with cluster.client(patience_ms=50) as client:
        await client.put("again", "1")
        # With one of the others away, nothing is decided without it.
        away = next(other for other in sorted(cluster.nodes, reverse=True) if other != number)
        await cluster.stop(away)
        assert await client.incr("needs its vote", deadline_s=30) == 1
        cluster.start(away)
    await cluster.wait_ready()
    await cluster.wait_quiet()
    assert not any(node.core.exposed for node in cluster.nodes.values())
    node = cluster.nodes[number]
    assert node.trusted_log.last > last
    ends = [other.trusted_log.last for _, other in sorted(cluster.nodes.items())]
    await cluster.stop(number)
    assert check_store(cluster, number) == ends
    cluster.logged.lines.clear()
    cluster.start(number)
    assert not events(cluster, DAMAGE)
    assert cluster.nodes[number].core.received(number) == ends[number]
    await until(lambda: cluster.nodes[number].core.is_live, "live once more")


async def start_missing(cluster) -> None:
    for number in range(cluster.cluster.genesis.n):
        if number not in cluster.nodes:
            cluster.start(number)


def held_from(cluster, number: int, log: int) -> int:
    """The first index of `log` that a running replica's store holds."""
    return cluster.nodes[number].store.first_index(log) or 0


async def forgotten(cluster, log: int, index: int, *, by: tuple[int, ...]) -> None:
    """Wait until these replicas have forgotten `index` of `log`."""
    await until(lambda: all(held_from(cluster, number, log) > index for number in by), f"{index} of {log} forgotten")


def digests(cluster) -> set[bytes]:
    return {node.core.executor.digest() for node in cluster.nodes.values()}
