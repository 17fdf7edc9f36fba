"""A replica whose disk was put back to an older copy: whatever it has left, it must not say another word."""

import shutil

import pytest

from replica.shell.store import StoreError
from tests.replica.shell.repair import forgotten
from tests.support.load import Load
from tests.support.waiting import on_loop, until
from trustlog import open_log

ROLLED_BACK = "rolled back"


class Copy:
    """A stopped replica's folder, to put back later; the tests' own word for what a restored backup does."""

    def __init__(self, cluster, number: int, to) -> None:
        self.folder, self.to = cluster.folder(number), to
        shutil.copytree(self.folder, to)

    def put_back(self, *names: str) -> int:
        """Put back the whole folder, or some of what is in it; return where the trusted log ends then."""
        for path in list(self.folder.iterdir()):
            if not names or path.name.startswith(names):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.to.iterdir():
            if not names or path.name.startswith(names):
                target = self.folder / path.name
                shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)
        with open_log(self.folder / "log") as log:
            return log.last


async def refused(cluster, number: int, last: int) -> None:
    """It stops by itself, names why, and its trusted log ends where it did."""
    await until(lambda: number in cluster.stopped, "the replica stops")
    assert ROLLED_BACK in cluster.stopped[number]
    assert "must not speak again" in cluster.stopped[number]
    assert f"ends at {last}" in cluster.stopped[number]
    assert cluster.nodes[number].trusted_log.last == last
    await cluster.stop(number)
    with open_log(cluster.folder(number) / "log") as log:
        assert log.last == last


@pytest.mark.parametrize("number", [0, 1], ids=["primary", "backup"])
@on_loop
async def test_store_and_trusted_log_of_yesterday(cluster, tmp_path, number):
    copy = Copy(cluster, number, tmp_path / "old")
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=50) as client:
            await client.put("later", "x")
            await cluster.wait_quiet()
            await cluster.stop(number)
            last = copy.put_back()
            pending = client.submit(b"")  # there is something to order all the time
            cluster.start(number)
            await refused(cluster, number, last)
            # It has kept what proves it: trying again does not even need the peers.
            with pytest.raises(StoreError, match=ROLLED_BACK):
                cluster.start(number)
            assert cluster.nodes[number].trusted_log.last == last
            await cluster.stop(number)
            pending.cancel()
        peers = [node for other, node in cluster.nodes.items() if other != number]
        assert not any(node.core.exposed for node in peers), "it said nothing, so nobody has anything against it"


@on_loop
async def test_peers_that_are_away_when_it_starts(cluster, tmp_path):
    """Alone it cannot know, and is mute; the first peer that comes proves it."""
    copy = Copy(cluster, 1, tmp_path / "old")
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_quiet()
        for number in range(3):
            await cluster.stop(number)
        last = copy.put_back()
        cluster.start(1)
        assert "1 peers must say what they hold of its log, 0 did" in cluster.nodes[1].core.why_mute
        cluster.start(2)
        await refused(cluster, 1, last)


@on_loop
async def test_what_it_said_since_is_forgotten_by_all(small, tmp_path):
    """Peers have not kept the groups that would prove it; the state that they attested says it as well."""
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=50) as client, Load(client) as load:
            await load.more(30)
            await cluster.stop(1)
            copy = Copy(cluster, 1, tmp_path / "old")
            cluster.start(1)
            await cluster.wait_ready()
            await load.more(60)
            reached = cluster.nodes[1].trusted_log.last
            await load.more(60)
            await cluster.stop(1)
            await forgotten(cluster, 1, reached, by=(0, 2))
            last = copy.put_back()
            assert last < reached
            cluster.start(1)
            await refused(cluster, 1, last)
            await load.more(10)
        assert not any(node.core.exposed for node in cluster.nodes.values())


@on_loop
async def test_the_trusted_log_alone(cluster, tmp_path):
    copy = Copy(cluster, 1, tmp_path / "old")
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_quiet()
        await cluster.stop(1)
        last = copy.put_back("log")
        with pytest.raises(StoreError, match=ROLLED_BACK):
            cluster.start(1)
        assert cluster.nodes[1].trusted_log.last == last


@on_loop
async def test_the_trusted_log_alone_and_no_store(cluster, tmp_path):
    """Nothing on the disk contradicts it; peers do."""
    copy = Copy(cluster, 1, tmp_path / "old")
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_quiet()
        await cluster.stop(1)
        last = copy.put_back("log")
        for path in cluster.folder(1).glob("*.sqlite*"):
            path.unlink()
        cluster.start(1)
        await refused(cluster, 1, last)


@on_loop
async def test_a_hostile_peer_that_only_says_so_proves_nothing(cluster):
    """Replica 0 claims to hold more of its log and shows nothing: replica 1 asks on, and speaks when the other answers."""
    async with cluster:

        def boast(node) -> None:
            received = node.streams._received
            node.streams._received = lambda log: received(log) + (1000 if log == 1 else 0)

        cluster.start(0, prepare=boast)
        cluster.start(1)
        node = cluster.nodes[1]
        await until(lambda: node.links[0].is_up, "the link")
        assert not node.core.is_live
        cluster.start(2)
        await until(lambda: node.core.is_live, "speaking")
        async with cluster.client() as client:
            assert await client.incr("n") == 1
        assert 1 not in cluster.stopped
