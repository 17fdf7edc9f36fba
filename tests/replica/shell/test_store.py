"""The log store: what is deleted and what is kept, what damage does to reading, and how it is repaired."""

import random
import sqlite3
import stat
from collections import deque
from contextlib import closing
from itertools import chain

import pytest

from replica.core.group import encode_payloads
from replica.shell import store as store_module
from replica.shell.sqlitefile import is_damage
from replica.shell.store import (
    ATTESTATION_BYTES,
    GroupDamagedError,
    Store,
    StoreDamagedError,
    StoredGroup,
    StoreError,
)

CLUSTER_ID = bytes(range(32))
OWN = 0
ATTESTATION = bytes(ATTESTATION_BYTES)


def open_store(folder, **options):
    return Store(folder / "store.sqlite", CLUSTER_ID, OWN, **options)


def group(log, first, count=2, size=100, attestation=ATTESTATION):
    payloads = encode_payloads((bytes([log]) * size,) * count)
    return StoredGroup(log, first, first + count - 1, attestation, payloads)


def fill(store, groups=20, logs=(0, 1, 2), count=2, size=100, start=1):
    """Write groups as a replica does; return what is held of each log."""
    held = {log: [] for log in logs}
    for number in range(groups):
        rows = [group(log, start + number * count, count, size) for log in logs]
        own = [row for row in rows if row.log == OWN]
        before = held[OWN][-1] if OWN in logs and held[OWN] else None
        store.write(
            [row for row in rows if row.log != OWN],
            None if before is None else (before.first, ATTESTATION),
            StoredGroup(OWN, own[0].first, own[0].last, None, own[0].payloads) if own else None,
        )
        for row in rows:
            held[row.log].append(row)
    if OWN in logs and held[OWN]:
        store.write([], (held[OWN][-1].first, ATTESTATION), None)
    return held


def size_of(groups):
    return sum(len(row.payloads) + ATTESTATION_BYTES for row in groups)


def tamper(store, sql, *values):
    with closing(sqlite3.connect(store.path)) as db, db:
        assert db.execute(sql, values).rowcount == 1


@pytest.fixture
def store(tmp_path):
    with closing(open_store(tmp_path)) as opened:
        yield opened


# Truncation


def test_nothing_is_deleted_below_the_limit_or_above_the_cut(store):
    held = fill(store)
    total = size_of(chain(*held.values()))
    assert store.held_bytes() == total
    assert store.truncate([40, 40, 40], total, 1000) == [1, 1, 1]
    assert store.truncate([1, 1, 1], 0, 1000) == [1, 1, 1]
    assert store.held_bytes() == total


def test_the_oldest_go_first_until_it_is_enough(store):
    held = fill(store)
    one = size_of(held[0][:1])
    total = store.held_bytes()
    # Four groups too many: the two oldest of one log, the oldest of the others.
    assert sorted(store.truncate([40, 40, 40], total - 4 * one, 1000)) == [3, 3, 5]
    assert store.held_bytes() == total - 4 * one
    # A byte too many costs a group.
    store.truncate([40, 40, 40], total - 4 * one - 1, 1000)
    assert store.held_bytes() == total - 5 * one


def test_cuts_differ_by_log_and_the_last_group_stays(store):
    held = fill(store)
    assert store.truncate([10, 0, 1000], 0, 1000) == [11, 1, 39]
    assert [row.first for row in store.groups(0)] == [row.first for row in held[0] if row.last > 10]
    assert list(store.groups(1)) == held[1]
    assert list(store.groups(2)) == [store.last_group(2)] == held[2][-1:]
    # A group that straddles the cut is needed whole.
    assert store.truncate([12, 0, 0], 0, 1000) == [13, 1, 39]
    assert store.truncate([13, 0, 0], 0, 1000) == [13, 1, 39]
    assert store.truncate([14, 0, 0, 5], 0, 1000) == [15, 1, 39, None]
    attested = store._db.execute("select min(first) from own_attestations").fetchone()[0]
    assert attested == 15


def test_a_call_deletes_no_more_than_it_may(store, monkeypatch):
    held = fill(store)
    assert store.truncate([40] * 3, 0, 4) != store.truncate([40] * 3, 0, 4)
    assert store.held_bytes() == size_of(held[0]) * 3 - 8 * size_of(held[0][:1])
    monkeypatch.setattr(store_module, "TRUNCATE_BYTES_MAX", 1)
    before = store.held_bytes()
    store.truncate([40] * 3, 0, 4)
    assert store.held_bytes() == before - size_of(held[0][:1])


def test_a_log_that_stands_still_does_not_hold_up_the_others(store):
    """Whatever was stored first: log 2's groups are all above its cut, and older than the rest."""
    fill(store, 50, logs=(2,))
    fill(store, 50, logs=(0, 1))
    assert store.truncate([200, 200, 0], 0, 10) == [11, 11, 1]


def test_each_log_stays_without_gaps_where_rows_were_stored_out_of_order(store):
    store.write([group(1, 5), group(1, 1), group(2, 1), group(2, 3), group(1, 3), group(1, 7)], None, None)
    seen = []
    for _ in range(3):
        store.truncate([0, 100, 100], 0, 1)
        seen.append([[row.first for row in store.groups(log)] for log in (1, 2)])
    store.write([group(1, 13), group(1, 9), group(1, 11)], None, None)
    one = size_of([group(1, 1)])
    store.truncate([0, 100, 100], store.held_bytes() - one, 10)
    store.truncate([0, 100, 100], store.held_bytes() - one, 10)
    assert [row.first for row in store.groups(1)] == [9, 11, 13]
    store.truncate([0, 100, 100], store.held_bytes() - one, 10)
    assert [row.first for row in store.groups(1)] == [11, 13]
    for logs in seen:
        assert logs[0] == [1, 3, 5, 7][-len(logs[0]) :]
        assert logs[1] == [1, 3][-len(logs[1]) :]


def test_the_file_does_not_grow_without_bound(tmp_path):
    keep = 150_000
    sizes = []
    with closing(open_store(tmp_path, durable=False)) as store:
        store._db.execute("pragma wal_autocheckpoint = 20")
        for step in range(400):
            fill(store, 1, size=random.Random(step).choice([10, 400, 3000]), start=1 + 2 * step)
            end = 2 * step + 2
            store.truncate([end - 20] * 3, keep, 16)
            assert store.held_bytes() < keep + 200_000
            sizes.append((tmp_path / "store.sqlite").stat().st_size)
        held = [list(store.groups(log)) for log in range(3)]
    assert sizes[50] > 100_000
    assert sizes[-1] <= max(sizes[:150])
    # What is held is the newest of each log, without a gap.
    for rows in held:
        assert [row.first for row in rows] == list(range(rows[0].first, 801, 2))
    with closing(open_store(tmp_path)) as store:
        assert store.problems() == []
        assert store.held_bytes() == size_of(chain(*held))


def test_totals_follow_every_change_and_are_found_again(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store)
        store.write(held[1] + held[2], None, None)  # again: ignored
        total = size_of(chain(*held.values()))
        assert store.held_bytes() == total
        store.drop_from(1, 21)
        store.replace(group(OWN, 1, count=2, size=500))
        store.drop_unattested(OWN, 39)
        expected = size_of(chain(*(store.groups(log) for log in range(3))))
        assert store.held_bytes() == expected != total
    for damage in (
        "delete from held",
        "update held set bytes = -1 where log = 2",
        "update held set bytes = bytes * 1000 where log = 1",
        "update held set groups = groups + 1 where log = 1",
        "update held set groups = 'x' where log = 1",
        "update held set log = 9 where log = 1",
        "drop table held",
    ):
        with closing(sqlite3.connect(tmp_path / "store.sqlite")) as db, db:
            db.execute(damage)
        with closing(open_store(tmp_path)) as store:
            assert store.held_bytes() == expected, damage


# Reading


def test_reading_begins_with_the_group_that_holds_the_index(store):
    held = fill(store, count=3)
    for index in range(1, 61):
        assert store.read(1, index, 1)[0].first <= index <= store.read(1, index, 1)[0].last
        assert list(store.groups(1, index)) == [row for row in held[1] if row.last >= index]
    assert store.read(1, 61) == []


def test_reading_near_the_end_does_not_pass_over_the_whole_log(store):
    fill(store, 200)
    steps = [0]
    counted = []
    store._db.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)
    for index in (3, 390):
        steps[0] = 0
        store.read(1, index, 1)
        counted.append(steps[0])
    assert counted[1] < counted[0] * 2


DAMAGES = [
    "update groups set payloads = 'text' where log = 1 and first = 21",
    "update groups set payloads = x'00' where log = 1 and first = 21",
    "update groups set payloads = x'0003' where log = 1 and first = 21",
    "update groups set attestation = 'text' where log = 1 and first = 21",
    "update groups set attestation = 4 where log = 1 and first = 21",
    "update groups set last = 27 where log = 1 and first = 21",
    "update groups set last = 2 where log = 1 and first = 21",
    "update groups set last = 'x' where log = 1 and first = 21",
    "update groups set payloads = cast(x'ff00ff' as text) where log = 1 and first = 21",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_group_is_named_after_the_good_ones_before_it(store, damage):
    held = fill(store)
    tamper(store, damage)
    reading = store.groups(1)
    assert [next(reading) for _ in range(10)] == held[1][:10]
    named = r"store\.sqlite: the group 21 .* of log 1 is damaged; restore"
    with pytest.raises(GroupDamagedError, match=named) as found:
        next(reading)
    assert (found.value.log, found.value.first) == (1, 21)
    # The other logs are not touched by it, nor is what comes before and after.
    assert list(store.groups(0)) == held[0]
    assert list(store.groups(1, 23)) == held[1][11:]
    assert store.read(1, 15)[-1].last == 20
    # Dropped alone, or from there on, and fetched again.
    store.drop(1, 21)
    assert list(store.groups(1)) == held[1][:10] + held[1][11:]
    store.drop_from(1, 21)
    store.write(held[1][10:], None, None)
    assert list(store.groups(1)) == held[1]
    assert store.held_bytes() == size_of(chain(*held.values()))


def test_dropping_takes_the_group_that_holds_the_index(store):
    fill(store, count=3)
    store.drop_from(1, 31)
    assert store.last_group(1).last == 30
    store.drop_from(1, 30)
    assert store.last_group(1).last == 27
    store.drop_from(1, 0)
    assert store.last_group(1) is store.first_index(1) is None
    with pytest.raises(ValueError, match="own log"):
        store.drop_from(OWN, 1)
    with pytest.raises(ValueError, match="own log"):
        store.drop(OWN, 1)


def test_an_own_group_is_replaced_by_a_peers_copy(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store)
        tamper(store, "update groups set payloads = x'00' where log = 0 and first = 21")
        tamper(store, "delete from own_attestations where first = 21")
        tamper(store, "delete from groups where log = 0 and first = 11")
        with pytest.raises(GroupDamagedError):
            list(store.groups(OWN, 21))
        store.replace(held[OWN][10])
        store.replace(held[OWN][5])
        with pytest.raises(ValueError, match="another's"):
            store.replace(held[1][0])
        with pytest.raises(StoreError, match=r"21 to 23 would overlap another; restore"):
            store.replace(group(OWN, 21, count=3))
        with pytest.raises(StoreError, match="would overlap"):
            store.replace(group(OWN, 22, count=1))
    with closing(open_store(tmp_path)) as store:
        assert list(store.groups(OWN)) == held[OWN]
        assert store.held_bytes() == size_of(chain(*held.values()))


def test_damage_to_the_file_itself_is_told_from_other_failures(tmp_path):
    with closing(open_store(tmp_path)) as store:
        fill(store, size=3000)
        store._db.execute("pragma wal_checkpoint(truncate)")
        root = store._db.execute("select rootpage from sqlite_master where name = 'groups'").fetchone()[0]
        assert store.problems() == []
    path = tmp_path / "store.sqlite"
    sound = path.read_bytes()
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xff" * 4096)
    with closing(open_store(tmp_path)) as store:
        assert store.problems()
        with pytest.raises(GroupDamagedError, match="malformed"):
            list(store.groups(1))
    path.write_bytes(b"\xff" * 100 + sound[100:])
    with pytest.raises(StoreDamagedError, match=r"store\.sqlite: the file is damaged"):
        open_store(tmp_path)
    path.write_bytes(sound)
    with closing(open_store(tmp_path)) as store:
        store._db.execute(f"pragma max_page_count = {len(sound) // 4096}")
        with pytest.raises(sqlite3.OperationalError, match="full") as full:
            fill(store, 100, start=1001, size=3000)
        assert not is_damage(full.value)


def test_groups_before_a_damaged_page_are_read_one_by_one(tmp_path):
    with closing(open_store(tmp_path)) as store:
        held = fill(store, logs=(1,), groups=40, size=700)[1]
    path = tmp_path / "store.sqlite"
    sound = path.read_bytes()
    good = set()
    for page in range(5, len(sound) // 4096):
        path.write_bytes(sound[: page * 4096] + b"\xff" * 4096 + sound[(page + 1) * 4096 :])
        try:
            store = open_store(tmp_path)
        except StoreDamagedError:
            continue  # a page that leads to others
        read = deque()
        with closing(store), pytest.raises(GroupDamagedError) as found:
            read.extend(store.groups(1))
        assert list(read) == held[: len(read)]
        assert found.value.first in {0, 1 + 2 * len(read)}
        good.add(len(read))
    assert len(good) > 10
    assert any(count % store_module.LOAD_ROWS for count in good)


def test_the_file_is_its_owners_only(store):
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
