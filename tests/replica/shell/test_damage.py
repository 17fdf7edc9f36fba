"""Damage in the store: named, made good from peers, and until then the replica says nothing."""

import shutil
import sqlite3

import pytest

from tests.replica.shell.repair import DAMAGE, check_store, edit, events, is_repaired, rot, select, start_missing
from tests.support.load import Load
from tests.support.waiting import on_loop, until


async def starts_mute(cluster, number: int, *, damage: bool = True, why: str | None = None) -> None:
    """Start it alone: it names the damage, says why it does not speak, and neither speaks nor signs."""
    cluster.start(number)
    node = cluster.nodes[number]
    assert bool(events(cluster, DAMAGE, number)) == damage
    # Others' groups may be what its own entries depended on.
    reasons = [why] if why else ["must say what they hold", "of its own log cannot be read again yet"]
    assert any(reason in node.core.why_mute for reason in reasons)
    assert not node.core.is_live


@pytest.mark.parametrize("place", [0, 1, 5, -1])
@pytest.mark.parametrize("log", [0, 1, 2])
@on_loop
async def test_a_damaged_group(cluster, log, place):
    async with cluster:
        first, last = rot(cluster, 1, log, place)
        before = select(cluster, 1, "select max(last) from groups where log = 1")[0][0]
        own = f"entries {first} to {before} of its own log are not here; peers are asked for them"
        await starts_mute(cluster, 1, why=own if log == 1 else None)
        (line,) = events(cluster, DAMAGE, 1)
        assert (line["log"], line["first"]) == (log, first)
        assert str(cluster.folder(1) / "store.sqlite") in line["text"]
        assert f"group {first} to {last} of log {log} is damaged" in line["text"]
        await is_repaired(cluster, 1)


@pytest.mark.parametrize("column", ["attestation", "payloads"])
@pytest.mark.parametrize("value", ["x''", "x'00'", "'text'", "7", "zeroblob(100000)"])
@on_loop
async def test_a_row_of_any_other_content(cluster, column, value):
    async with cluster:
        edit(cluster, 1, f"update groups set {column} = {value} where log = 0 and first = 1")  # noqa: S608
        await starts_mute(cluster, 1)
        assert events(cluster, DAMAGE, 1)[0]["log"] == 0
        await is_repaired(cluster, 1)


@pytest.mark.parametrize("value", ["zeroblob(234)", "x'00'", "'text'", "7"])
@on_loop
async def test_an_altered_attestation_of_the_own_log(cluster, value):
    async with cluster:
        edit(cluster, 1, f"update own_attestations set attestation = {value} where first = 1")  # noqa: S608
        await starts_mute(cluster, 1, why="entries 1 to")
        await is_repaired(cluster, 1)


@on_loop
async def test_an_altered_attestation_of_the_last_own_group(cluster):
    """The trusted log could issue it again; peers have it as well."""
    async with cluster:
        last = "(select max(first) from groups where log = 1)"
        edit(cluster, 1, f"insert or replace into own_attestations values ({last}, zeroblob(234))")  # noqa: S608
        await starts_mute(cluster, 1, why="of its own log are not here")
        await is_repaired(cluster, 1)


@pytest.mark.parametrize("place", ["first", "middle"])
@pytest.mark.parametrize("log", [0, 1])
@on_loop
async def test_a_row_that_is_gone(cluster, log, place):
    firsts = [first for (first,) in select(cluster, 1, "select first from groups where log = ? order by first", log)]
    first = firsts[0] if place == "first" else firsts[len(firsts) // 2]
    async with cluster:
        edit(cluster, 1, "delete from groups where log = ? and first = ?", log, first)
        await starts_mute(cluster, 1, damage=False, why=f"entries {first} to" if log == 1 else None)
        await is_repaired(cluster, 1)


@on_loop
async def test_the_end_of_the_own_log_is_gone(cluster):
    """It looks like a log that ends earlier; the trusted log knows better."""
    async with cluster:
        edit(cluster, 1, "delete from groups where log = 1 and first > (select max(first) / 2 from groups)")
        await starts_mute(cluster, 1, damage=False, why="of its own log are not here")
        await is_repaired(cluster, 1)


@pytest.mark.parametrize("log", [0, 2])
@on_loop
async def test_many_damaged_groups_and_all_of_one_log(cluster, log):
    async with cluster:
        edit(cluster, 1, "update groups set payloads = zeroblob(length(payloads)) where log = ?", log)
        rot(cluster, 1, 1, 0)
        rot(cluster, 1, 1, 2)
        rot(cluster, 1, 1, 3)
        await starts_mute(cluster, 1, why="of its own log are not here")
        assert [line["log"] for line in events(cluster, DAMAGE, 1)].count(1) >= 3
        await is_repaired(cluster, 1)


@on_loop
async def test_what_lies_behind_damage_in_anothers_log_is_kept(cluster):
    """Only the damaged group is dropped and fetched again."""
    count = "select count(*) from groups where log = 0"
    ((before,),) = select(cluster, 1, count)
    async with cluster:
        bounds = [rot(cluster, 1, 0, place) for place in (1, before // 2)]
        cluster.start(1)
        assert {(line["log"], line["first"]) for line in events(cluster, DAMAGE, 1)} == {
            (0, first) for first, _ in bounds
        }
        assert select(cluster, 1, count) == [(before - 2,)]
        assert cluster.nodes[1].core.received(0) == bounds[0][0] - 1
        await is_repaired(cluster, 1)


@on_loop
async def test_a_store_that_is_older_than_the_trusted_log(cluster, tmp_path):
    """A backup of the store alone: what is missing comes from peers, as its trusted log was not rolled back."""
    old = tmp_path / "old"
    shutil.copytree(cluster.folder(1), old)
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            await client.put("later", "x")
        await cluster.wait_quiet()
        await cluster.stop(1)
        for path in cluster.folder(1).glob("store.sqlite*"):
            path.unlink()
        for path in old.glob("store.sqlite*"):
            shutil.copy(path, cluster.folder(1) / path.name)
        cluster.start(1)
        await is_repaired(cluster, 1)


@on_loop
async def test_a_store_that_is_gone(cluster):
    async with cluster:
        for path in cluster.folder(1).glob("store.sqlite*"):
            path.unlink()
        cluster.start(1)
        last = cluster.nodes[1].trusted_log.last
        assert f"entries 1 to {last} of its own log are not here" in cluster.nodes[1].core.why_mute
        await is_repaired(cluster, 1)


@on_loop
async def test_damage_in_the_stores_of_two(cluster):
    """Each has what the other lost."""
    async with cluster:
        rot(cluster, 0, 0, 2)
        rot(cluster, 1, 1, 4)
        cluster.start(0, 1)
        await until(lambda: all(node.core.is_live for node in cluster.nodes.values()), "both live")
        for number in (0, 1):
            await cluster.stop(number)
        rot(cluster, 0, 1, 1)
        rot(cluster, 1, 0, 3)
        cluster.start(0, 1)
        await until(lambda: all(node.core.is_live for node in cluster.nodes.values()), "both live once more")
        await is_repaired(cluster, 1)


@on_loop
async def test_more_own_groups_behind_the_damage_than_fit_into_memory(tmp_path, cluster):
    """And the last of them no peer has: only the own disk does, behind the damage."""
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client:
            for number in range(100):
                await client.put(str(number), "y")
        await cluster.wait_quiet()
        for number in range(3):
            await cluster.stop(number)
        own = [last for (last,) in select(cluster, 1, "select last from groups where log = 1 order by first")]
        assert len(own) > 64 + 20
        for other in (0, 2):
            edit(cluster, other, "delete from groups where log = 1 and last > ?", own[-10])
            # What followed from what they forget here, they must not have said: their logs stay as they were.
        rot(cluster, 1, 1, 3)
        await start_missing(cluster)
        await until(lambda: cluster.nodes[1].core.is_live, "speaking again")
        await cluster.wait_quiet()
        await cluster.stop(1)
        assert check_store(cluster, 1)[1] >= own[-1]


@pytest.mark.parametrize("where", ["header", "middle", "cut"])
@on_loop
async def test_a_file_that_sqlite_cannot_read(cluster, where):
    """What can be read of it is saved; the damaged file is kept aside, and peers have the rest."""
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
    async with cluster:
        cluster.start(1)
        assert str(path) in str(events(cluster, "log store damaged; what can be read of it is saved", 1)[0]["problems"])
        (saved,) = events(cluster, "log store salvaged", 1)
        assert "store.sqlite.damaged-1" in saved["damaged_file"]
        node = cluster.nodes[1]
        assert f"to {node.trusted_log.last} of its own log are not here" in node.core.why_mute
        await is_repaired(cluster, 1)


def copied(cluster, number: int, name: str) -> dict[str, bytes]:
    """A database as it stands, with the write-ahead log that an orderly stop would clear."""
    files = {file: cluster.folder(number) / file for file in (name, f"{name}-wal")}
    return {file: path.read_bytes() for file, path in files.items()}


def put_back(cluster, number: int, name: str, files: dict[str, bytes]) -> None:
    """Put a copy in the place of the database, with one bit in the middle of its write-ahead log flipped."""
    for file, raw in files.items():
        rotten = bytearray(raw)
        if file.endswith("-wal"):
            rotten[len(rotten) // 2] ^= 1
        (cluster.folder(number) / file).write_bytes(rotten)
    (cluster.folder(number) / f"{name}-shm").unlink(missing_ok=True)


@on_loop
async def test_rot_in_the_stores_write_ahead_log_is_named_and_repaired(cluster):
    """SQLite takes a rotten frame for the end of the log, and says nothing."""
    async with cluster:
        await start_missing(cluster)
        await cluster.wait_ready()
        async with cluster.client() as client:
            for number in range(20):
                await client.put(str(number), "y" * 50)
        await cluster.wait_quiet()
        files = copied(cluster, 1, "store.sqlite")
        last = cluster.nodes[1].trusted_log.last
        await cluster.stop(0)
        await cluster.stop(1)
        await cluster.stop(2)
        cluster.logged.lines.clear()
        put_back(cluster, 1, "store.sqlite", files)
        cluster.start(1)
        (line,) = events(cluster, "log store incomplete; peers are asked for the rest")
        assert (line["level"], line["last"]) == ("error", last)
        assert 1 < line["first"] <= last
        assert str(cluster.folder(1) / "store.sqlite") in line["text"]
        assert not cluster.nodes[1].core.is_live
        await is_repaired(cluster, 1)
        assert not events(cluster, line["event"]), "what is whole is not called damaged"


@on_loop
async def test_rot_in_the_states_write_ahead_log_is_named_and_repaired(small):
    cluster = small
    async with cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[1]
        async with cluster.client() as client, Load(client) as load:
            await load.more(30)
            await until(lambda: node.keeper.slot >= 16 and node.trusted_log.low > 1, "milestones, and truncation")
        await cluster.wait_quiet()
        files = copied(cluster, 1, "state.sqlite")
        for number in range(3):
            await cluster.stop(number)
        cluster.logged.lines.clear()
        put_back(cluster, 1, "state.sqlite", files)
        cluster.start(1)
        (line,) = events(cluster, "state file incomplete; peers are asked for the state")
        assert line["level"] == "error"
        assert str(cluster.folder(1)) in line["text"]
        await start_missing(cluster)
        await cluster.wait_ready()
        await until(lambda: cluster.nodes[1].core.is_live, "speaking again")
        async with cluster.client() as client, Load(client) as load:
            await load.more(30)
        await cluster.wait_equal()
