"""What a replica must not start with: each refused, by file and by what is wrong; and the trusted log's lock."""

import shutil

import pytest

from replica.shell.store import StoreError
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop
from trustlog import MisuseError


async def refuses(cluster, number: int, *texts: str) -> None:
    async with cluster:
        with pytest.raises(StoreError) as caught:
            cluster.start(number)
        for text in texts:
            assert text in str(caught.value)
        assert cluster.nodes.get(number) is None or not cluster.nodes[number].outbox.is_busy


@on_loop
async def test_the_store_of_another_replica(cluster):
    shutil.copy(cluster.folder(2) / "store.sqlite", cluster.folder(1) / "store.sqlite")
    await refuses(cluster, 1, "belongs to another replica or cluster")


@pytest.mark.parametrize("name", ["store.sqlite", "state.sqlite"])
@on_loop
async def test_a_file_of_another_cluster(cluster, tmp_path, name):
    other = Nodes(tmp_path / "other")
    async with other:
        other.start()
        await other.wait_ready()
    shutil.copy(other.folder(1) / name, cluster.folder(1) / name)
    await refuses(cluster, 1, name, "belongs to another replica or cluster")


@on_loop
async def test_a_trusted_log_that_is_older_than_the_store(cluster, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(cluster.folder(1) / "log", old)
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_quiet()
    shutil.rmtree(cluster.folder(1) / "log")
    shutil.copytree(old, cluster.folder(1) / "log")
    await refuses(cluster, 1, "store.sqlite", "its trusted log ends at", "rolled back", "would deny what was said")


@on_loop
async def test_a_trusted_log_that_another_process_uses(cluster):
    async with cluster:
        cluster.start(1)
        with pytest.raises(MisuseError, match="in use by another process"):
            cluster.make(1)
