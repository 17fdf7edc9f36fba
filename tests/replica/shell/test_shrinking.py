"""Room that is not needed any more goes back to the disk: of both files, bit by bit, also of files made before."""

import os
import shutil
import sqlite3
import struct
from contextlib import closing
from typing import NamedTuple

import pytest
import structlog
from structlog.testing import capture_logs

from replica.shell import keeper as keeper_module
from replica.shell import outbox as outbox_module
from replica.shell import recovery, shrinking
from replica.shell.statetree import StateDamagedError
from replica.shell.store import StoreDamagedError
from tests.replica.shell.repair import STATE_DAMAGE, events, select, start_missing
from tests.replica.shell.test_statestore import entries, milestone, read
from tests.replica.shell.test_statestore import open_store as open_state
from tests.replica.shell.test_store import CLUSTER_ID as STORE_CLUSTER_ID
from tests.replica.shell.test_store import fill, open_store
from tests.support.load import Load
from tests.support.waiting import on_loop, until

KIB = 1024
PAGE = 4 * KIB


@pytest.fixture(autouse=True)
def little_is_kept(monkeypatch):
    monkeypatch.setattr(shrinking, "FREE_PAGES_MIN", 8)
    monkeypatch.setattr(shrinking, "STEP_S", 60.0)


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
        assert store.path.stat().st_size == pages(store._db)[0] * PAGE, "seen on the disk at once"
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


def test_a_step_is_over_after_some_time_however_much_is_left(tmp_path, monkeypatch):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=60, size=20_000)
        store.truncate([110] * 3, 0, 1000)
        total, _ = pages(store._db)
        monkeypatch.setattr(shrinking, "STEP_S", 0.0)
        assert store.give_back(100)
        assert pages(store._db)[0] == total - 1


def test_while_a_view_of_before_is_read_nothing_is_given_back(tmp_path):
    """It would make the write-ahead log grow, and the file no shorter."""
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=60, size=20_000)
        large = size(store)
        with closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from groups").fetchone()
            store.truncate([110] * 3, 0, 1000)
            before = (*pages(store._db), store.wal_bytes())
            assert not store.give_back(100)
            assert (*pages(store._db), store.wal_bytes()) == before
            reader.execute("rollback")
        while store.give_back(100):
            pass
        assert store.path.stat().st_size < large // 5


def test_what_a_reader_held_up_is_seen_on_the_disk_when_it_has_gone(tmp_path):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=60, size=20_000)
        store.truncate([110] * 3, 0, 1000)
        emptied(store._db)
        large = store.path.stat().st_size
        with closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from groups").fetchone()
            assert not store.give_back(100_000), "that was all, in one step"
            assert store.path.stat().st_size == large
        assert not store.give_back(100_000)
        assert store.path.stat().st_size < large // 5


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def with_room(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))


def test_on_a_disk_that_is_nearly_full_nothing_is_moved(tmp_path, monkeypatch):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=60, size=20_000)
        store.truncate([110] * 3, 0, 1000)
        before = pages(store._db)
        with_room(monkeypatch, shrinking.ROOM_BYTES - 1)
        assert not store.give_back(100)
        assert pages(store._db) == before
        with_room(monkeypatch, shrinking.ROOM_BYTES)
        assert store.give_back(100)


@pytest.mark.parametrize("trouble", ["full", "busy"])
@pytest.mark.parametrize("open_file", [open_store, open_state])
def test_what_cannot_be_given_back_now_stops_nobody(tmp_path, trouble, open_file, monkeypatch):
    monkeypatch.setattr("replica.shell.sqlitefile.BUSY_S", 0.01)
    with closing(open_file(tmp_path)) as store:
        store._db.execute("create table large (a)")
        store._db.execute("insert into large values (zeroblob(2000000))")
        store._db.execute("delete from large")
        before = pages(store._db)
        if trouble == "full":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shrinking, "_move_log", failing)
                assert not store.give_back(100)
        else:
            with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
                other.execute("begin immediate")
                assert not store.give_back(100)
        assert pages(store._db) == before
        assert store.give_back(100)


def failing(_) -> bool:
    raise sqlite3.OperationalError("database or disk is full")


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


def opened_store(folder):
    """Open the store as a replica does; return it, and what is logged that is not good."""
    with capture_logs() as lines:
        store = recovery.open_store(
            folder / "store.sqlite", STORE_CLUSTER_ID, 0, durable=True, log=structlog.get_logger()
        )
    return store, lines


@pytest.mark.parametrize(("open_file", "name"), [(open_store, "store.sqlite"), (open_state, "state.db")])
def test_a_file_that_was_made_before_is_made_anew_once_when_that_is_asked_for(tmp_path, open_file, name):
    with closing(open_file(tmp_path)) as store:
        assert store._db.execute("pragma auto_vacuum").fetchone() == (2,), "a new one need not be"
    made_before(tmp_path / name)
    with closing(open_file(tmp_path)) as store:
        assert store._db.execute("pragma auto_vacuum").fetchone() == (0,), "opening alone does not take seconds"
        assert store.make_shrinkable() == ""
        assert store._db.execute("pragma auto_vacuum").fetchone() == (2,)
        vacuums = []
        store._db.set_trace_callback(lambda text: vacuums.append(text) if text == "vacuum" else None)
        assert store.make_shrinkable() == ""
        assert not vacuums


def test_what_a_store_made_before_holds_is_the_same_afterwards(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store, groups=30, size=3000)
    made_before(tmp_path / "store.sqlite")
    store, lines = opened_store(tmp_path)
    with closing(store):
        assert {log: list(store.groups(log)) for log in held} == held
        assert store.problems() == []
        assert store.wal_bytes() == 0
        store.truncate([50] * 3, 0, 1000)
        large = size(store)
        store.give_back(1000)
        assert size(store) < large
    assert not lines


def test_a_damaged_store_made_before_is_salvaged_and_not_written_over(tmp_path):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=30, size=3000)
    made_before(tmp_path / "store.sqlite")
    lose_free_pages(tmp_path / "store.sqlite")
    raw = (tmp_path / "store.sqlite").read_bytes()
    store, lines = opened_store(tmp_path)
    with closing(store):
        assert store._db.execute("pragma auto_vacuum").fetchone() == (2,)
    assert (tmp_path / "store.sqlite.damaged-1").read_bytes() == raw
    assert [line["event"].split(";")[0] for line in lines] == ["log store damaged", "log store salvaged"]


def test_a_file_made_before_keeps_its_size_where_there_is_no_room_and_that_is_said(tmp_path, monkeypatch):
    with closing(open_store(tmp_path)) as store:
        fill(store, size=3000)
    made_before(tmp_path / "store.sqlite")
    used = (tmp_path / "store.sqlite").stat().st_size
    needed = 2 * used + 64 * 1024 * KIB
    with_room(monkeypatch, needed - 1)
    store, lines = opened_store(tmp_path)
    with closing(store):
        assert store._db.execute("pragma auto_vacuum").fetchone() == (0,)
        store.truncate([30] * 3, 0, 1000)
        assert not store.give_back(1000)
        fill(store, start=101)
        assert store.problems() == []
    (line,) = lines
    assert line["log_level"] == "warning"
    assert line["path"] == str(tmp_path / "store.sqlite")
    assert f"{needed} bytes of room are needed" in line["why"]


def test_a_file_made_before_that_somebody_writes_is_used_as_it_is_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("replica.shell.sqlitefile.BUSY_S", 0.01)
    with closing(open_store(tmp_path)) as store:
        held = fill(store)
    made_before(tmp_path / "store.sqlite")
    with closing(open_store(tmp_path)) as store:
        with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            assert "locked" in store.make_shrinkable()
        assert {log: list(store.groups(log)) for log in held} == held


@on_loop
async def test_both_files_of_a_replica_are_made_anew_when_it_starts(small):
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        async with cluster.client() as client, Load(client) as load:
            await load.more(30)
            await until(lambda: cluster.nodes[1].keeper.slot, "a milestone")
        await cluster.stop(1)
        for name in ("store.sqlite", "state.sqlite"):
            made_before(cluster.folder(1) / name)
        cluster.start(1)
        for name in ("store.sqlite", "state.sqlite"):
            assert select(cluster, 1, "pragma auto_vacuum", name=name) == [(2,)]
        await cluster.wait_ready()
        await cluster.wait_equal()


@on_loop
async def test_a_replicas_store_shrinks_until_nothing_is_left_to_give(small, monkeypatch):
    """It had to keep much while nothing could be forgotten. One milestone is enough: there may be no other for long."""
    monkeypatch.setattr(outbox_module, "TIDY_PAUSE_S", 0.001)
    monkeypatch.setattr(outbox_module, "TIDY_PAGES", 5)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[1]
        node.outbox._keep_bytes = 100 * 1024 * KIB
        async with cluster.client() as client, Load(client, size=20_000) as load:
            await load.more(100)
        await cluster.wait_quiet()
        large, _ = pages_of(cluster, "store.sqlite")
        assert large > 2_000 * KIB // PAGE
        node.outbox._keep_bytes = 0
        node.outbox.forget(node.keeper.needed_from())
        await until(lambda: pages_of(cluster, "store.sqlite")[0] < large // 2, "a smaller file")
        await until(lambda: is_small(*pages_of(cluster, "store.sqlite")), "no more to give back")
        await cluster.wait_equal()


def pages_of(cluster, name: str) -> tuple[int, int]:
    """How many pages replica 1's file has, and how many of them hold nothing."""
    (one,), (two,) = (select(cluster, 1, f"pragma {what}", name=name) for what in ("page_count", "freelist_count"))
    return one[0], two[0]


def is_small(total: int, free: int) -> bool:
    return free <= max(8, (total - free) // 4)


@on_loop
async def test_a_replicas_state_shrinks_after_one_milestone(small, monkeypatch):
    """However much there is to give back: there may be no other milestone for a long time."""
    monkeypatch.setattr(keeper_module, "GIVE_PAGES", 20)
    monkeypatch.setattr(keeper_module, "GIVE_PAUSE_S", 0.001)
    async with small as cluster:
        cluster.start()
        await cluster.wait_ready()
        node = cluster.nodes[1]

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
        await until(lambda: is_small(*pages_of(cluster, "state.sqlite")), "no more to give back")
        path = cluster.folder(1) / "state.sqlite"
        await until(lambda: path.stat().st_size == pages_of(cluster, "state.sqlite")[0] * PAGE, "seen on the disk")
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
