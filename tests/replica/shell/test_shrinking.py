"""Room that is not needed any more goes back to the disk: of both files, bit by bit, also of files made before."""

import os
import shutil
import sqlite3
import struct
from contextlib import closing
from typing import NamedTuple

import pytest

from replica.shell import keeper as keeper_module
from replica.shell import outbox as outbox_module
from replica.shell import sqlitefile
from replica.shell.sqlitefile import give_back
from replica.shell.statetree import StateDamagedError
from replica.shell.store import StoreDamagedError
from tests.replica.shell.repair import STATE_DAMAGE, events, select, start_missing
from tests.replica.shell.test_statestore import entries, milestone, read
from tests.replica.shell.test_statestore import open_store as open_state
from tests.replica.shell.test_store import fill, open_store
from tests.support.load import Load
from tests.support.waiting import on_loop, until

KIB = 1024
PAGE = 4 * KIB


@pytest.fixture(autouse=True)
def little_is_kept(monkeypatch):
    monkeypatch.setattr(sqlitefile, "FREE_PAGES_MIN", 8)


def emptied(db) -> None:
    """Move the write-ahead log into the file, as SQLite does when the log is long enough."""
    assert db.execute("pragma wal_checkpoint").fetchone()[0] == 0


def size(store) -> int:
    emptied(store._db)
    return store.path.stat().st_size


def pages(db) -> tuple[int, int]:
    """How many pages the file has, and how many of them hold nothing."""
    return tuple(db.execute(f"pragma {what}").fetchone()[0] for what in ("page_count", "freelist_count"))


def made_before(path) -> None:
    """Make of a file what an earlier version would have made: one that cannot give pages back."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma auto_vacuum = none")
        db.execute("vacuum")
        assert db.execute("pragma auto_vacuum").fetchone() == (0,)


def test_a_store_that_was_large_shrinks_and_holds_the_same(tmp_path):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=60, size=20_000)
        large = size(store)
        assert large > 6_000 * KIB
        store.truncate([110] * 3, 0, 1000)
        held = [list(store.groups(log)) for log in range(3)]
        assert size(store) == large, "deleting alone gives nothing back"
        calls = 1
        while store.give_back(100):
            calls += 1
        assert calls == -(-(large - size(store)) // (100 * PAGE))
        total, free = pages(store._db)
        assert 8 < (total - free) // 4 - 1 <= free <= (total - free) // 4
        assert size(store) == total * PAGE < large // 5
        assert [list(store.groups(log)) for log in range(3)] == held
        assert store.problems() == []
        assert not store.give_back(100), "what is left is for what comes next"


def test_a_file_keeps_a_quarter_of_what_it_uses(tmp_path):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=60, size=20_000)
        store.truncate([14] * 3, 0, 1000)
        total, free = pages(store._db)
        assert 8 < free < (total - free) // 4
        assert not store.give_back(1000)
        assert pages(store._db) == (total, free)


def test_a_state_that_was_large_shrinks_and_holds_the_same(tmp_path):
    many = entries(4000, size=500)
    few = dict(list(many.items())[:40])
    with closing(open_state(tmp_path)) as store:
        store.write(milestone(1, many.items()))
        store.write(milestone(2, [(key, None) for key in many if key not in few]))
        large = size(store)
        assert store.give_back(50)
        assert 50 <= (large - size(store)) // PAGE <= 50 + 1, "no more than was said; SQLite's own map may go as well"
        while store.give_back(50):
            pass
        assert size(store) < large // 4
        assert read(store)[0] == few
        store.write(milestone(3, many.items()))
        assert read(store)[0] == many


@pytest.mark.parametrize(("open_file", "name"), [(open_store, "store.sqlite"), (open_state, "state.db")])
def test_a_file_that_was_made_before_is_made_anew_once(tmp_path, monkeypatch, open_file, name):
    vacuums = []
    connect = sqlite3.connect

    def watched(*arguments, **options):
        db = connect(*arguments, **options)
        db.set_trace_callback(lambda text: vacuums.append(text) if text == "vacuum" else None)
        return db

    monkeypatch.setattr(sqlite3, "connect", watched)
    open_file(tmp_path).close()
    assert not vacuums, "a new one need not be"
    made_before(tmp_path / name)
    vacuums.clear()
    for _ in range(2):
        with closing(open_file(tmp_path)) as store:
            assert store._db.execute("pragma auto_vacuum").fetchone() == (2,)
    assert vacuums == ["vacuum"]


def test_what_a_file_made_before_holds_is_the_same_afterwards(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store, groups=30, size=3000)
    made_before(tmp_path / "store.sqlite")
    with closing(open_store(tmp_path)) as store:
        assert {log: list(store.groups(log)) for log in held} == held
        assert store.problems() == []
        store.truncate([50] * 3, 0, 1000)
        large = size(store)
        store.give_back(1000)
        assert size(store) < large


@pytest.mark.parametrize(
    ("open_file", "name", "error"),
    [(open_store, "store.sqlite", StoreDamagedError), (open_state, "state.db", StateDamagedError)],
)
def test_damage_to_the_list_of_free_pages_is_called_that(tmp_path, open_file, name, error):
    open_file(tmp_path).close()
    lose_free_pages(tmp_path / name)
    with closing(open_file(tmp_path)) as store, pytest.raises(error, match="damaged"):
        store.give_back(10)


def lose_free_pages(path) -> None:
    """Damage where the list of free pages begins, and how many they are: only who needs one, or gives them back, looks."""
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack(">II", 2**31 - 1, 100), 32)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_file_made_before_is_used_as_it_is_where_there_is_no_room(tmp_path, monkeypatch):
    with closing(open_store(tmp_path)) as store:
        fill(store, size=3000)
    made_before(tmp_path / "store.sqlite")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 64 * 1024 * KIB + 100_000))
    with closing(open_store(tmp_path)) as store:
        assert store._db.execute("pragma auto_vacuum").fetchone() == (0,)
        store.truncate([30] * 3, 0, 1000)
        assert not store.give_back(1000)
        fill(store, start=101)
        assert store.problems() == []


def test_a_file_made_before_that_cannot_be_written_anew_is_used_as_it_is(tmp_path):
    """Somebody reads it, for instance; or a page that nothing needs is damaged."""
    with closing(open_store(tmp_path)) as store:
        held = fill(store)
    made_before(tmp_path / "store.sqlite")
    with closing(sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)) as other:
        other.execute("pragma journal_mode = wal")
        other.execute("begin immediate")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlitefile, "BUSY_S", 0.01)
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                sqlitefile.open_file(tmp_path / "store.sqlite", "create table other (a)", durable=True)
            with closing(sqlitefile.open_file(tmp_path / "store.sqlite", "", durable=True)) as db:
                assert db.execute("pragma auto_vacuum").fetchone() == (0,)
                assert not give_back(db, 1000)
        other.execute("rollback")
    with closing(open_store(tmp_path)) as store:
        assert {log: list(store.groups(log)) for log in held} == held


@on_loop
async def test_a_replicas_store_shrinks_while_it_works(small, monkeypatch):
    """It had to keep much while nothing could be forgotten."""
    monkeypatch.setattr(outbox_module, "TIDY_PAUSE_S", 0.001)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[1]
        node.outbox._keep_bytes = 100 * 1024 * KIB
        async with cluster.client() as client, Load(client, size=20_000) as load:
            await load.more(100)
            large = select(cluster, 1, "pragma page_count")[0][0]
            assert large > 2_000 * KIB // PAGE
            node.outbox._keep_bytes = 0
            await load.more(100)
            await until(lambda: select(cluster, 1, "pragma page_count")[0][0] < large // 2, "a smaller file")
        await cluster.wait_equal()


@on_loop
async def test_a_replicas_state_shrinks_after_one_milestone(small, monkeypatch):
    """However much there is to give back: there may be no other milestone for a long time."""
    monkeypatch.setattr(keeper_module, "GIVE_PAGES", 20)
    monkeypatch.setattr(keeper_module, "GIVE_PAUSE_S", 0.001)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[1]

        def in_file(what: str) -> int:
            return select(cluster, 1, f"pragma {what}", name="state.sqlite")[0][0]

        async with cluster.client() as client:
            for number in range(60):
                await client.put(f"large {number}", "y" * 20_000)
            for number in range(60):
                await client.delete(f"large {number}")
            async with Load(client) as load:
                await load.more(100)
        await cluster.wait_quiet()
        slot = node.keeper.slot
        assert slot >= 60
        await until(lambda: in_file("freelist_count") <= max(8, in_file("page_count") // 5), "no more to give back")
        path = cluster.folder(1) / "state.sqlite"
        await until(lambda: path.stat().st_size == in_file("page_count") * PAGE, "seen on the disk")
        assert node.keeper.slot == slot


@on_loop
async def test_a_state_that_only_cannot_be_written_is_set_aside_for_the_next_start(small):
    """Else each start would load it, and end at its first milestone."""
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client(patience_ms=100) as client, Load(client, size=3000) as load:
            await load.more(30)
            await until(lambda: cluster.nodes[1].keeper.slot, "a milestone")
            await cluster.stop(1)
            path = cluster.folder(1) / "state.sqlite"
            with closing(sqlite3.connect(path)) as db:
                db.execute("pragma wal_checkpoint(truncate)")
            lose_free_pages(path)
            cluster.start(1)
            assert not events(cluster, STATE_DAMAGE), "what is read is sound"
            await until(lambda: 1 in cluster.stopped, "the replica stops")
            assert "damaged" in cluster.stopped[1]
            await cluster.stop(1)
            assert [file.name for file in cluster.folder(1).glob("state.sqlite.damaged-*")] == [
                "state.sqlite.damaged-1"
            ]
            await start_missing(cluster)
            await cluster.wait_ready()
            await until(lambda: cluster.nodes[1].core.is_live, "speaking again")
            slot = cluster.nodes[1].keeper.slot
            await load.more(60)
            await until(lambda: cluster.nodes[1].keeper.slot > slot, "milestones are durable again")
        await cluster.wait_equal()
