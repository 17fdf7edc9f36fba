"""Salvage: of a store with any page damaged, everything else is copied, and what is missing is named."""

import random
import sqlite3
from contextlib import closing

import pytest

from replica.shell import salvage as salvage_module
from replica.shell import sqlitefile
from replica.shell.salvage import Missing, salvage
from replica.shell.sqlitefile import StoreError
from replica.shell.statetree import guarded
from replica.shell.store import GroupDamagedError, Store
from tests.replica.shell.test_store import CLUSTER_ID, OWN, fill, open_store, tamper

PAGE = 4096
LOGS = (0, 1, 2)


@pytest.fixture
def filled(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store, groups=60, size=120)
    return tmp_path / "store.sqlite", held


def held_after(folder):
    with closing(open_store(folder)) as store:
        assert store.problems() == []
        return {log: list(store.groups(log)) for log in LOGS}


def is_named(row, missing):
    return any(m.log == row.log and m.first <= row.first and (m.last is None or row.last <= m.last) for m in missing)


def test_a_sound_store_is_copied_whole(filled):
    path, held = filled
    before = path.read_bytes()
    done = salvage(path, CLUSTER_ID, OWN)
    assert (done.groups, done.missing, done.unattested) == (180, (), ())
    assert done.aside.read_bytes() == before
    assert held_after(path.parent) == held
    assert sorted(p.name for p in path.parent.iterdir()) == ["store.sqlite", "store.sqlite.damaged-1"]


@pytest.mark.parametrize("rot", ["zeros", "noise"])
def test_any_page_may_be_damaged(filled, rot):
    path, held = filled
    sound = path.read_bytes()
    lost_by_page = {}
    for page in range(2, len(sound) // PAGE + 1):
        junk = bytes(PAGE) if rot == "zeros" else random.Random(page).randbytes(PAGE)
        path.write_bytes(sound[: (page - 1) * PAGE] + junk + sound[page * PAGE :])
        done = salvage(path, CLUSTER_ID, OWN)
        after = held_after(path.parent)
        lost = [row for log in LOGS for row in held[log] if row.first not in {r.first for r in after[log]}]
        assert all(is_named(row, done.missing) for row in lost)
        assert all(not is_named(row, done.missing) for log in LOGS for row in after[log])
        for log in LOGS:
            original = {row.first: row for row in held[log]}
            for row in after[log]:
                whole = original[row.first]
                assert (row.last, row.payloads) == (whole.last, whole.payloads)
                assert row.attestation == whole.attestation or (row.attestation, log) == (None, OWN)
        bare = {(row.first, row.last) for row in after[OWN] if row.attestation is None}
        assert set(done.unattested) == bare
        lost_by_page[page] = len(lost), len(bare)
    # Most pages take a few rows with them, and only the roots more.
    assert sum(lost > 0 for lost, _ in lost_by_page.values()) > 10
    assert sum(lost > 20 for lost, _ in lost_by_page.values()) <= 1
    assert any(bare for _, bare in lost_by_page.values())


def test_any_sector_may_be_full_of_ones(filled):
    """Some such pages make SQLite say that it has no memory; elsewhere that is no damage, here it is."""
    path, held = filled
    sound = path.read_bytes()
    for at in range(PAGE, len(sound), 1009):
        path.write_bytes(sound[:at] + b"\xff" * 64 + sound[at + 64 :])
        done = salvage(path, CLUSTER_ID, OWN)
        after = held_after(path.parent)
        assert all(
            is_named(row, done.missing) for log in LOGS for row in held[log] if row.first not in firsts(after[log])
        )


def test_a_row_for_which_there_is_no_memory_is_left_out(filled, monkeypatch):
    path, held = filled
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, statement, *parameters):
            if "payloads from groups where seq between" in statement and parameters[0][0] <= 7 <= parameters[0][1]:
                raise MemoryError
            return super().execute(statement, *parameters)

    def damaged(*arguments, **options):
        return connect(*arguments, **options, factory=Connection)

    monkeypatch.setattr(salvage_module.sqlite3, "connect", damaged)
    done = salvage(path, CLUSTER_ID, OWN)
    monkeypatch.undo()
    assert done.groups == 179
    (gap,) = done.missing
    assert all(is_named(row, done.missing) == (row.first == gap.first) for row in held[gap.log])


@pytest.mark.parametrize("statement", ["payloads from groups where seq between", "select log, first, seq from groups"])
def test_without_memory_nothing_is_left_out(filled, monkeypatch, statement):
    path, _ = filled
    before = path.read_bytes()
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, asked, *parameters):
            if statement in asked:
                raise MemoryError
            return super().execute(asked, *parameters)

    monkeypatch.setattr(sqlitefile, "PROBE_BYTES", 2**62)
    monkeypatch.setattr(salvage_module.sqlite3, "connect", lambda *a, **o: connect(*a, **o, factory=Connection))
    with pytest.raises(MemoryError):
        salvage(path, CLUSTER_ID, OWN)
    assert path.read_bytes() == before


def test_without_memory_a_store_is_not_damaged(tmp_path, monkeypatch):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=3, size=120)

        class NoMemory:
            def execute(self, *_):
                raise MemoryError

        monkeypatch.setattr(sqlitefile, "PROBE_BYTES", 2**62)
        monkeypatch.setattr(store, "_db", NoMemory())
        for asked in (store.problems, lambda: store.read(0, 1)):
            with pytest.raises(MemoryError):
                asked()
        monkeypatch.undo()


def test_without_memory_a_state_is_not_damaged(tmp_path):
    """Python's own work with a large state is guarded too; no room for that says nothing of the file."""
    with pytest.raises(MemoryError), guarded(tmp_path / "state.sqlite"):
        raise MemoryError


@pytest.mark.parametrize("failing", ["read", "problems"])
def test_a_page_that_sqlite_has_no_memory_for_is_damage(tmp_path, monkeypatch, failing):
    with closing(open_store(tmp_path)) as store:
        fill(store, groups=3, size=120)

        class NoMemory:
            def execute(self, *_):
                raise MemoryError

        monkeypatch.setattr(store, "_db", NoMemory())
        if failing == "problems":
            assert store.problems() == ["SQLite cannot make sense of a page"]
        else:
            with pytest.raises(GroupDamagedError, match="cannot make sense of a page"):
                store.read(0, 1)
        monkeypatch.undo()


def firsts(rows):
    return {row.first for row in rows}


def test_without_its_first_page_nothing_can_be_read(filled):
    path, _ = filled
    path.write_bytes(bytes(PAGE) + path.read_bytes()[PAGE:])
    done = salvage(path, CLUSTER_ID, OWN)
    assert (done.groups, done.missing) == (0, ())
    assert held_after(path.parent) == {log: [] for log in LOGS}


def test_what_is_in_the_write_ahead_log_is_copied_too(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store)
        files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "copy").mkdir()
    for name, content in files.items():
        if not name.endswith("-shm"):
            (tmp_path / "copy" / name).write_bytes(content)
    assert len(files["store.sqlite-wal"]) > 10 * PAGE
    done = salvage(tmp_path / "copy" / "store.sqlite", CLUSTER_ID, OWN)
    assert (done.groups, done.missing) == (60, ())
    assert held_after(tmp_path / "copy") == held
    # Both files are kept as they were found.
    for suffix in ("", "-wal"):
        assert done.aside.with_name(done.aside.name + suffix).read_bytes() == files["store.sqlite" + suffix]


def test_missing_ranges_at_the_beginning_in_the_middle_and_at_the_end(filled):
    path, held = filled
    with closing(open_store(path.parent)) as store:
        # The row is no group: its index entry still says that there was one.
        for log, first in ((1, 1), (1, 3), (1, 61), (2, 119)):
            tamper(store, "update groups set payloads = x'00' where log = ? and first = ?", log, first)
        tamper(store, "delete from own_attestations where first = 7")
        store._db.execute("update groups set payloads = 'x' where log = 0")
    done = salvage(path, CLUSTER_ID, OWN)
    assert done.missing == (Missing(0, 1, None), Missing(1, 1, 4), Missing(1, 61, 62), Missing(2, 119, None))
    with closing(open_store(path.parent)) as store:
        for row in held[OWN]:
            store.replace(row)
        store.write([held[1][0], held[1][1], held[1][30], held[2][59]], None, None)
    assert held_after(path.parent) == held


def test_own_groups_without_attestation_are_named(filled):
    path, _ = filled
    with closing(open_store(path.parent)) as store:
        tamper(store, "delete from own_attestations where first = 7")
    assert salvage(path, CLUSTER_ID, OWN).unattested == ((7, 8),)


@pytest.mark.parametrize(("cluster_id", "number"), [(bytes(32), OWN), (CLUSTER_ID, 1)])
def test_anothers_store_is_not_salvaged(filled, cluster_id, number):
    path, _ = filled
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"store\.sqlite: belongs to another"):
        salvage(path, cluster_id, number)
    assert path.read_bytes() == before


STEPS = 12


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_a_crash_on_the_way_leaves_one_of_them_whole(filled, monkeypatch, step):
    path, held = filled
    taken = []

    def stop(real):
        def run(*args, **kwargs):
            if len(taken) == step:
                raise KeyboardInterrupt
            taken.append(args)
            return real(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", stop(Store.write))
        for name in ("replace", "unlink"):
            patch.setattr(f"pathlib.Path.{name}", stop(getattr(type(path), name)))
        patch.setattr(salvage_module, "ROWS_AT_ONCE", 50)
        try:
            salvage(path, CLUSTER_ID, OWN)
        except KeyboardInterrupt:
            stopped = True
        else:
            stopped = False
    assert stopped == (step < STEPS)
    assert held_after(path.parent) == held
    if stopped:
        assert salvage(path, CLUSTER_ID, OWN).groups == 180
        assert held_after(path.parent) == held
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("select count(*) from groups").fetchone()[0] == 180
