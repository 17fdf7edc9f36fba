"""Stores that a replica must not start with: each refused, by file and by what is wrong; and the trusted log's lock."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from replica.shell.store import StoreError
from tests.support.nodes import Nodes
from tests.support.waiting import on_loop
from trustlog import MisuseError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a cluster that has ordered something and stands still now."""

    @on_loop
    async def make():
        async with Nodes(directory) as cluster:
            cluster.start()
            async with cluster.client() as client:
                for number in range(8):
                    await client.put(str(number), "x" * 50)
            await cluster.wait_quiet()

    directory = tmp_path_factory.mktemp("model") / "c"
    make()
    return directory


@pytest.fixture
def cluster(model, tmp_path) -> Nodes:
    """A copy of it that a test may damage."""
    return Nodes(Path(shutil.copytree(model, tmp_path / "c")))


def edit(cluster, number: int, statement: str, *values) -> None:
    db = sqlite3.connect(cluster.folder(number) / "store.sqlite")
    with db:
        assert db.execute(statement, values).rowcount != 0
    db.close()


async def refuses(cluster, number: int, *texts: str) -> None:
    async with cluster:
        with pytest.raises(StoreError) as caught:
            cluster.start(number)
        for text in texts:
            assert text in str(caught.value)
        assert cluster.nodes.get(number) is None or not cluster.nodes[number].outbox.is_busy


@pytest.mark.parametrize("log", [0, 1, 2])
@on_loop
async def test_a_damaged_row_is_named(cluster, log):
    db = sqlite3.connect(cluster.folder(1) / "store.sqlite")
    first, last, payloads = db.execute(
        "select first, last, payloads from groups where log = ? order by first limit 1 offset 1", (log,)
    ).fetchone()
    db.close()
    rotten = payloads[:-1] + bytes([payloads[-1] ^ 1])
    edit(cluster, 1, "update groups set payloads = ? where log = ? and first = ?", rotten, log, first)
    await refuses(
        cluster, 1, str(cluster.folder(1) / "store.sqlite"), f"group {first} to {last} of log {log}", "damaged"
    )


@pytest.mark.parametrize("column", ["attestation", "payloads"])
@pytest.mark.parametrize("value", ["x''", "x'00'", "'text'", "7", "zeroblob(100000)"])
@on_loop
async def test_a_row_of_any_other_content_is_refused(cluster, column, value):
    edit(cluster, 1, "update groups set " + column + " = " + value + " where log = 0 and first = 1")  # noqa: S608
    await refuses(cluster, 1, "store.sqlite", "of log 0")


@on_loop
async def test_an_altered_attestation_of_the_own_log_is_named(cluster):
    edit(cluster, 1, "update own_attestations set attestation = zeroblob(234) where first = 1")
    await refuses(cluster, 1, "of log 1", "damaged")


@on_loop
async def test_the_store_of_another_replica(cluster):
    shutil.copy(cluster.folder(2) / "store.sqlite", cluster.folder(1) / "store.sqlite")
    await refuses(cluster, 1, "belongs to another replica or cluster")


@on_loop
async def test_the_store_of_another_cluster(cluster, tmp_path):
    other = Nodes(tmp_path / "other")
    async with other:
        other.start()
        await other.wait_ready()
    shutil.copy(other.folder(1) / "store.sqlite", cluster.folder(1) / "store.sqlite")
    await refuses(cluster, 1, "belongs to another replica or cluster")


@on_loop
async def test_a_store_that_is_older_than_the_trusted_log(cluster, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(cluster.folder(1), old)
    async with cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_equal()
    for name in ("store.sqlite", "store.sqlite-wal", "store.sqlite-shm"):
        (cluster.folder(1) / name).unlink(missing_ok=True)
        if (old / name).exists():
            shutil.copy(old / name, cluster.folder(1) / name)
    await refuses(cluster, 1, "own log up to", "trusted log ends at", "would deny what was said")


@on_loop
async def test_a_store_that_is_gone(cluster):
    for path in cluster.folder(1).glob("store.sqlite*"):
        path.unlink()
    await refuses(cluster, 1, "own log up to 0", "trusted log ends at")


@on_loop
async def test_a_trusted_log_that_is_older_than_the_store(cluster, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(cluster.folder(1) / "log", old)
    async with cluster:
        cluster.start()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_equal()
    shutil.rmtree(cluster.folder(1) / "log")
    shutil.copytree(old, cluster.folder(1) / "log")
    await refuses(cluster, 1, "One of them is not the newest")


@on_loop
async def test_own_rows_that_are_gone_in_the_middle(cluster):
    edit(cluster, 1, "delete from groups where log = 1 and first = (select min(first) from groups where log = 1)")
    await refuses(cluster, 1, "store.sqlite", "own log")


@on_loop
async def test_causes_that_are_gone(cluster):
    edit(cluster, 1, "delete from groups where log = 0 and first = (select min(first) from groups where log = 0)")
    async with cluster:
        with pytest.raises(StoreError, match=r"store\.sqlite.*own log"):
            cluster.start(1)


@pytest.mark.parametrize("where", ["header", "middle", "cut"])
@on_loop
async def test_a_file_that_sqlite_cannot_read(cluster, where):
    path = cluster.folder(1) / "store.sqlite"
    db = sqlite3.connect(path)
    db.execute("pragma wal_checkpoint(truncate)")
    db.close()
    raw = bytearray(path.read_bytes())
    if where == "header":
        raw[:100] = b"x" * 100
    elif where == "middle":
        raw[4096:] = b"\x5a" * (len(raw) - 4096)
    else:
        del raw[2 * 4096 :]
    path.write_bytes(raw)
    await refuses(cluster, 1, str(path))


@on_loop
async def test_a_trusted_log_that_another_process_uses(cluster):
    async with cluster:
        cluster.start(1)
        with pytest.raises(MisuseError, match="in use by another process"):
            cluster.make(1)
