"""A crash at every point of the outbox, and what the next start makes of it: nothing said is denied or lost."""

import sqlite3

import pytest

from replica.apps import kv
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop, until

CRASH_POINTS = [
    "before the store",
    "after the store",
    "after the trusted append",
    "after the release",
]


class PowerCut(BaseException):
    """Nothing catches it: what runs, ends here."""


def cut_power(node, point: str) -> None:
    """Have the node's outbox end at this point of its next group."""
    store, log = node.store, node.trusted_log
    write, append = store.write, log.append

    def cut_write(received, attested, own):
        if own is None:
            write(received, attested, own)
        elif point == "before the store":
            raise PowerCut(point)
        else:
            write(received, attested, own)
            if point == "after the store":
                raise PowerCut(point)

    def cut_append(digests, *, context):
        attestation = append(digests, context=context)
        if point == "after the trusted append":
            raise PowerCut(point)
        return attestation

    store.write, log.append = cut_write, cut_append


@pytest.mark.parametrize("number", [0, 1], ids=["primary", "backup"])
@pytest.mark.parametrize("point", CRASH_POINTS)
@on_loop
async def test_a_crash_and_a_restart(tmp_path, point, number):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client(patience_ms=50) as client:
            await client.put("before", "1")
            await cluster.wait_quiet()
            node = cluster.nodes[number]
            before = node.trusted_log.last
            head = node.trusted_log.head
            if point == "after the release":
                await client.put("during", "2")
            else:
                cut_power(node, point)
                pending = client.submit(kv.put(b"during", b"2"))
                await until(lambda: cluster.stopped.get(number), "the crash")
            await cluster.crash(number)
            cluster.start(number)
            again = cluster.nodes[number]
            # It goes on right after what was attested: the same, if nothing was, and begins to speak at once.
            if point in {"after the trusted append", "after the release"}:
                assert again.core.received(number) > before
            else:
                assert (again.core.received(number), again.core.head(number)) == (before, head)
            *stored, _ = again.store.groups(number)
            assert all(group.attestation for group in stored)
            if point != "after the release":
                await pending
            assert await client.get("before") == b"1"
            assert await client.get("during") == b"2"
            assert await client.incr("counter") == 1
        reports = await cluster.wait_equal()
        assert {report["executed"] for report in reports.values()} == {reports[0]["executed"]}
        # Nobody was accused: what was said before and after the crash is one history.
        assert all(not n.core.exposed for n in cluster.nodes.values())


@on_loop
async def test_all_of_them_crash_after_attesting(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("a", "1")
            await cluster.wait_quiet()
            for node in cluster.nodes.values():
                cut_power(node, "after the trusted append")
            pending = client.submit(kv.put(b"b", b"2"))
            await until(lambda: 0 in cluster.stopped, "the primary's crash")
            for number in range(3):
                await cluster.crash(number)
            cluster.start()
            await pending
            assert await client.get("a") == b"1"
            assert await client.get("b") == b"2"


@on_loop
async def test_what_was_received_and_not_stored_is_read_again(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            for number in range(10):
                await client.put(str(number), "x")
            # Whatever waits to be stored is lost.
            await cluster.crash(2)
            await client.put("more", "y")
            cluster.start(2)
        await cluster.wait_equal()
        states = {node.core.executor.digest() for node in cluster.nodes.values()}
        assert len(states) == 1


@on_loop
async def test_a_crash_while_recovering_changes_nothing(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("a", "1")
        await cluster.wait_quiet()
        cut_power(cluster.nodes[1], "after the trusted append")
        async with cluster.client() as client:
            await client.put("b", "2")
        await until(lambda: 1 in cluster.stopped, "the crash")
        await cluster.crash(1)
        for _ in range(3):
            node = cluster.make(1)
            node._replay(node.store)  # issues the last attestation again, stores it
            assert node.core.received(1) == node.trusted_log.last
            await cluster.crash(1)
        cluster.start(1)
        await cluster.wait_equal()


@on_loop
async def test_an_attestation_that_the_trusted_log_cannot_issue_again_comes_from_peers(tmp_path):
    async with Nodes(tmp_path / "c") as cluster:
        cluster.start()
        async with cluster.client() as client:
            for number in range(5):
                await client.put(str(number), "x")
        await cluster.wait_quiet()
        await cluster.stop(1)
        # Only the very last group's can be.
        with sqlite3.connect(cluster.folder(1) / "store.sqlite") as db:
            first = db.execute("select min(first) from own_attestations").fetchone()[0]
            db.execute("delete from own_attestations where first = ?", (first,))
        db.close()
        cluster.start(1)
        assert "of its own log are not here; peers are asked" in cluster.nodes[1].core.why_mute
        await until(lambda: cluster.nodes[1].core.is_live, "speaking again")
        await cluster.stop(1)
        # They are on its own disk again.
        cluster.start(1)
        assert cluster.nodes[1].core.received(1) == cluster.nodes[1].trusted_log.last
