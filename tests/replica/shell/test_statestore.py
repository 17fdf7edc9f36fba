"""The state store: what was written is read back, frozen views stay frozen, and every damage is noticed."""

import hashlib
import random
import sqlite3
import stat
from contextlib import closing, nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica.core.state import BucketedMap
from replica.core.tree import bucket_of
from replica.shell import statestore
from replica.shell.sqlitefile import StoreError
from replica.shell.statestore import Milestone, StateStore, discard_state
from replica.shell.statetree import VALUE_BYTES_MAX, StateDamagedError
from tests.replica.shell.states import NONE, MappedStore

CLUSTER_ID = bytes(range(32))


def open_store(folder, **options):
    return MappedStore(folder / "state.db", CLUSTER_ID, 1, **options)


def milestone(slot=128, tree0=(), tree1=(), **fields):
    values = {
        "header": b"header %d" % slot,
        "certificate": b"certificate",
        "logs": (b"log 0", b"", b"log 2"),
        "batches": (b"batch",),
        "maps": NONE,
    } | fields
    return Milestone(slot=slot, changes=(tree0, tree1), **values)


def mapped(entries: dict) -> BucketedMap:
    state = BucketedMap()
    state.begin()
    for key, value in entries.items():
        state.put_unbounded(key, value)
    state.commit()
    return state


def contents(view) -> list[dict]:
    found = [list(tree.entries()) for tree in view.trees]
    assert [len(dict(entries)) for entries in found] == [len(entries) for entries in found]
    return [dict(entries) for entries in found]


def read(store) -> list[dict]:
    with store.load() as view:
        return contents(view)


def entries(count, size=20, seed=0):
    chance = random.Random(seed)
    return {b"key %d" % number: chance.randbytes(size) for number in range(count)}


@pytest.fixture
def store(tmp_path):
    with closing(open_store(tmp_path)) as opened:
        yield opened


def test_an_empty_store_has_no_milestone(store):
    assert store.load() is None
    assert store.pinned() is None


def test_what_was_written_is_read_back_after_reopening(tmp_path):
    state, table = entries(3000), {b"\x04" + bytes(64): b"session"}
    with closing(open_store(tmp_path)) as store:
        store.write(milestone(128, state.items(), table.items()))
        assert stat.S_IMODE((tmp_path / "state.db").stat().st_mode) == 0o600
    with closing(open_store(tmp_path)) as store, store.load() as view:
        assert (view.slot, view.header, view.certificate) == (128, b"header 128", b"certificate")
        assert (view.logs, view.batches) == ((b"log 0", b"", b"log 2"), (b"batch",))
        assert contents(view) == [state, table]
        assert [tree.count() for tree in view.trees] == [3000, 1]
        assert [tree.root() for tree in view.trees] == [mapped(state).root(), mapped(table).root()]


KEYS = st.sampled_from([b"a", b"b", b"ab", b"\x00", b"\xff" * 40, b"k" * 4096])
CHANGES = st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=5)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), CHANGES, CHANGES), min_size=1, max_size=6), at_a_time=st.integers(1, 9))
def test_any_sequence_of_changes(tmp_path_factory, steps, at_a_time):
    """Against a dictionary and the core's own digests."""
    expected = ({}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statestore, "CHANGES_AT_A_TIME", at_a_time)
        with closing(open_store(tmp_path_factory.mktemp("s"), durable=False)) as store:
            for slot, (replace_all, *changes) in enumerate(steps):
                for held, changed in zip(expected, changes, strict=True):
                    if replace_all:
                        held.clear()
                    for key, value in changed:
                        held.pop(key, None)
                        if value is not None:
                            held[key] = value
                store.write(milestone(slot, *changes), replace_all=replace_all)
                with store.load() as view:
                    assert view.slot == slot
                    assert contents(view) == list(expected)
                    assert [tree.root() for tree in view.trees] == [mapped(held).root() for held in expected]


def test_digests_and_contents_are_those_of_the_core(store):
    state = entries(2000, size=50)
    store.write(milestone(1, state.items()))
    core = mapped(state)
    core.root()
    with store.pinned() as view:
        tree, empty = view.trees
        assert tree.nodes() == core.nodes()
        digests = [digest for node in range(256) for digest in tree.bucket_digests(node)]
        assert digests == [digest for node in range(256) for digest in core.bucket_digests(node)]
        for number in {bucket_of(key) for key in list(state)[:200]} | {7}:
            content = tree.bucket(number)
            expected = hashlib.sha256(b"\x20" + content).digest() if content else bytes(32)
            assert digests[number] == expected
            assert content == core.bucket(number)
        assert empty.nodes() == (bytes(32),) * 256
        assert (empty.count(), empty.bucket(0), empty.bucket_digests(255)) == (0, b"", (bytes(32),) * 256)
        assert empty.root() == BucketedMap().root()


def test_a_pinned_view_stays_while_milestones_are_written(store):
    first = entries(500)
    store.write(milestone(1, first.items()))
    with store.pinned() as view:
        for slot in range(2, 6):
            store.write(milestone(slot, ((key, b"%d" % slot) for key in first), logs=(), batches=()))
        store.write(milestone(9), replace_all=True)
        grown = store.wal_bytes()
        assert contents(view) == [first, {}]
        assert (view.slot, view.logs, view.trees[0].root()) == (1, (b"log 0", b"", b"log 2"), mapped(first).root())
    assert read(store) == [{}, {}]
    assert store.wal_bytes() == grown > 0


def test_the_log_of_writes_is_reused_once_no_view_is_pinned(store, monkeypatch):
    store._db.execute("pragma wal_autocheckpoint = 10")
    changes = list(entries(200, size=200).items())
    store.write(milestone(1, changes))
    view = store.pinned()
    for slot in range(2, 12):
        store.write(milestone(slot, changes))
    held_back = store.wal_bytes()
    view.close()
    for slot in range(12, 40):
        store.write(milestone(slot, changes))
    assert held_back > 500_000
    assert store.wal_bytes() < held_back * 1.3


def test_a_write_that_fails_changes_nothing(store):
    state = entries(100)
    store.write(milestone(1, state.items()))

    def breaking():
        yield b"new", b"value"
        raise KeyError("the source of the changes failed")

    with pytest.raises(KeyError):
        store.write(milestone(2, breaking()), replace_all=True)
    assert read(store) == [state, {}]
    with store.load() as view:
        assert view.slot == 1
    store.write(milestone(2, [(b"new", b"value")]))
    assert read(store)[0] == state | {b"new": b"value"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tree0": [(b"", b"x")]},
        {"tree0": [(b"k" * 4097, b"x")]},
        {"tree0": [("text", b"x")]},
        {"tree1": [(b"k", bytes(VALUE_BYTES_MAX + 1))]},
        {"tree1": [(b"k", "text")]},
        {"header": bytes(statestore.PART_BYTES_MAX + 1)},
        {"batches": (b"",) * (statestore.PARTS_MAX + 1)},
        {"slot": -1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_could_not_be_loaded_is_not_written(store, wrong):
    with pytest.raises((ValueError, AttributeError, TypeError)):
        store.write(milestone(**wrong))
    assert store.load() is None


def test_the_longest_entries_and_parts_are_taken(store):
    longest = {b"k" * 4096: bytes(VALUE_BYTES_MAX)}
    store.write(milestone(1, (), longest.items(), header=bytes(statestore.PART_BYTES_MAX)))
    assert read(store) == [{}, longest]


def test_a_file_of_another_replica_is_refused(tmp_path):
    open_store(tmp_path).close()
    for cluster_id, number in ((bytes(32), 1), (CLUSTER_ID, 2)):
        with pytest.raises(StoreError, match=r"state\.db: belongs to another .* put the right ") as refused:
            StateStore(tmp_path / "state.db", cluster_id, number)
        assert not isinstance(refused.value, StateDamagedError)


def test_a_full_disk_is_not_called_damage(store):
    store._db.execute("pragma max_page_count = 30")
    with pytest.raises(StoreError, match="disk is full") as failed:
        store.write(milestone(1, entries(3000, size=200).items()))
    assert not isinstance(failed.value, StateDamagedError)
    assert store.load() is None


TAMPERINGS = [
    "update entries set value = x'00' where key = x'6b6579203139'",
    "update entries set value = 'text' where key = x'6b6579203139'",
    "update entries set value = cast(x'ff00ff' as text) where key = x'6b6579203139'",
    "update entries set value = 5 where key = x'6b6579203139'",
    "update entries set key = x'00' where key = x'6b6579203139'",
    "update entries set bucket = 65536 where key = x'6b6579203139'",
    "update entries set bucket = 'x' where key = x'6b6579203139'",
    "update entries set tree = 1 where key = x'6b6579203139'",
    "update entries set value = zeroblob(17000000) where key = x'6b6579203139'",
    "update entries set value = zeroblob(20000000) where key = x'6b6579203139'",
    "delete from entries where key = x'6b6579203139'",
    "insert into entries values (0, 3, x'01', x'02')",
    "update buckets set digest = zeroblob(32) where bucket = (select min(bucket) from buckets)",
    "update buckets set digest = x'00' where bucket = (select min(bucket) from buckets)",
    "update buckets set digest = 'x' where bucket = (select min(bucket) from buckets)",
    "update buckets set keys = 'x' where bucket = (select min(bucket) from buckets)",
    "update buckets set bucket = 'x' where bucket = (select min(bucket) from buckets)",
    "update buckets set keys = 0 where bucket = (select min(bucket) from buckets)",
    "update buckets set keys = 77 where bucket = (select min(bucket) from buckets)",
    "update buckets set bucket = -1 where bucket = (select min(bucket) from buckets)",
    "delete from buckets where bucket = (select min(bucket) from buckets)",
    "update milestone set slot = slot + 1",
    "update milestone set slot = -1",
    "update milestone set slot = 'x'",
    "update milestone set header = x'00'",
    "update milestone set certificate = 'text'",
    "update milestone set check_digest = 7",
    "update parts set content = x'00' where kind = 1",
    "update parts set content = 'log 2' where kind = 0 and number = 2",
    "update parts set number = 5 where kind = 0 and number = 2",
    "delete from parts where kind = 0 and number = 2",
    "drop table parts",
]


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_every_altered_row_is_noticed(store, tampering):
    state = entries(60)
    store.write(milestone(1, state.items()))
    assert read(store)[0] == state
    with closing(sqlite3.connect(store.path)) as db, db:
        before = db.total_changes
        db.execute(tampering)
        assert db.total_changes == before + 1 or tampering.startswith("drop")
    with pytest.raises(StateDamagedError, match=r"state\.db: damaged: .* fetches the state"):
        read(store)


@pytest.mark.parametrize("tampering", [t for t in TAMPERINGS if "update buckets" in t and "keys = 77" not in t])
def test_digests_that_are_none_are_never_served(store, tampering):
    if "zeroblob(32)" in tampering:
        return  # of the right type and size: refused by whoever compares it with the root
    store.write(milestone(1, entries(60).items()))
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute(tampering)
    with store.pinned() as view:
        for read in (view.trees[0].nodes, view.trees[0].root, lambda: view.trees[0].bucket_digests(0)):
            with pytest.raises(StateDamagedError):
                read()


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"", b"x"), (b"k" * 4097, b"x"), (b"k", bytes(VALUE_BYTES_MAX + 1))],
    ids=["none", "long", "big"],
)
def test_sizes_are_checked_even_if_the_digest_is_right(store, key, value):
    store.write(milestone(1))
    content = b"".join((len(key).to_bytes(4, "big"), key, len(value).to_bytes(4, "big"), value))
    digest = hashlib.sha256(b"\x20" + content).digest()
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("insert into entries values (0, 9, ?, ?)", (key, value))
        db.execute("insert into buckets values (0, 9, 1, ?)", (digest,))
    with pytest.raises(StateDamagedError, match="size of an entry of bucket 9"):
        read(store)


def test_a_damaged_length_is_refused_before_it_is_read(store):
    store.write(milestone(1, [(b"k", b"v")]))
    with closing(sqlite3.connect(store.path)) as db, db:
        db.execute("update entries set value = zeroblob(?)", (statestore.ROW_BYTES_MAX + 1,))
    with pytest.raises(StateDamagedError, match="too big"):
        read(store)


def test_a_rotted_neighbour_never_becomes_part_of_a_new_milestone(store, monkeypatch):
    state = entries(3)
    store.write(milestone(1, state.items(), roots=(mapped(state).root(), BucketedMap().root())))
    store._db.execute("update entries set value = x'00' where key = ?", (b"key 1",))
    # A key of the same bucket is written: its digest is the agreed one, which what is there does not have.
    beside = next(b"%d" % n for n in range(10**7) if bucket_of(b"%d" % n) == bucket_of(b"key 1"))
    changed = state | {beside: b"x"}
    good = milestone(2, [(beside, b"x")], roots=(mapped(changed).root(), BucketedMap().root()))
    with pytest.raises(StateDamagedError, match="does not have its digest"):
        store.write(good)
    monkeypatch.setattr(store, "_read_back", lambda *_: None)  # one of those that are not
    store.write(good)
    with pytest.raises(StateDamagedError, match="does not have its digest"):
        read(store)
    store.discard()
    store.write(milestone(2, changed.items(), roots=good.roots))
    assert read(store)[0] == changed


def test_a_milestone_is_not_written_beside_a_rotted_digest(store):
    state = entries(3)
    store.write(milestone(1, state.items(), roots=(mapped(state).root(), BucketedMap().root())))
    sound = store._db.execute("select bucket, keys, digest from buckets where tree = 0").fetchall()
    store._db.execute("update buckets set digest = zeroblob(32) where bucket = ?", (bucket_of(b"key 1"),))
    changed = state | {b"key 0": b"x"}
    roots = (mapped(changed).root(), BucketedMap().root())
    with pytest.raises(StateDamagedError, match="tree 0: the digests are not those of what was written"):
        store.write(milestone(2, [(b"key 0", b"x")], roots=roots))
    store._db.executemany("insert or replace into buckets values (0, ?, ?, ?)", sound)
    assert read(store)[0] == state, "nothing was written"
    store.write(milestone(2, [(b"key 0", b"x")], roots=roots))
    assert read(store)[0] == changed


def test_of_many_buckets_others_are_read_back_each_time(store, monkeypatch):
    monkeypatch.setattr(statestore, "READ_BACK", 4)
    state = entries(40)
    store.write(milestone(1, state.items()))
    buckets = {bucket_of(key) for key in state}
    store._db.execute("update entries set value = x'00' where key = ?", (b"key 1",))
    changed = {key: b"x" for key in state if key != b"key 1"}
    store.write(milestone(2, changed.items()))  # not touched: nobody looks
    beside = next(b"%d" % n for n in range(10**7) if bucket_of(b"%d" % n) == bucket_of(b"key 1"))
    assert len(buckets) == 40
    refused = 0
    for slot in range(3, 13):
        try:
            store.write(milestone(slot, [*changed.items(), (beside, b"%d" % slot)]))
        except StateDamagedError:
            refused += 1
    assert refused == 1, "one in ten, and each in its turn"


def test_the_digests_that_are_written_are_those_of_the_maps(store):
    state = entries(300)
    gone = dict.fromkeys(list(state)[::3])
    store.write(milestone(1, state.items()))
    store.write(milestone(2, gone.items()))
    kept = mapped({key: value for key, value in state.items() if key not in gone}).frozen()
    with store.load() as view:
        tree = view.trees[0]
        assert (tree.count(), tree.nodes(), tree.root()) == (len(state) - len(gone), kept.nodes(), kept.root())
        assert tree.frozen() == kept


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    """Of a closed file: never another state than the one that was written."""
    state = entries(400, size=60)
    roots = [mapped(state).root(), BucketedMap().root()]
    with closing(open_store(tmp_path)) as store:
        store.write(milestone(1, state.items()))
    path = tmp_path / "state.db"
    sound = path.read_bytes()
    chance, noticed = random.Random(5), 0
    for _ in range(300):
        place = chance.randrange(len(sound))
        path.write_bytes(sound[:place] + bytes([sound[place] ^ (1 << chance.randrange(8))]) + sound[place + 1 :])
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        try:
            with closing(open_store(tmp_path)) as store, store.load() or nullcontext() as view:
                assert view is None or contents(view) == [state, {}]
                assert view is None or [tree.root() for tree in view.trees] == roots
                noticed += view is None
        except StoreError:
            noticed += 1
    assert noticed > 100


def test_a_damaged_file_is_set_aside_and_one_is_kept(tmp_path):
    path = tmp_path / "state.db"
    for number in (1, 2, 3):
        path.write_bytes(b"not a database, number %d" % number * 100)
        with pytest.raises(StateDamagedError, match="not a database"):
            open_store(tmp_path)
        aside = discard_state(path)
        assert aside.name == f"state.db.damaged-{number}"
        assert b"number %d" % number in aside.read_bytes()
        assert list(tmp_path.iterdir()) == [aside]
    with closing(open_store(tmp_path)) as store:
        assert store.load() is None
        store.write(milestone(1, [(b"k", b"v")]))
        # With its write-ahead log, which must not be replayed into the new file.
        assert store.discard().name == "state.db.damaged-4"
        assert store.load() is None
        store.write(milestone(2, [(b"k", b"w")]))
        assert read(store)[0] == {b"k": b"w"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.db", "state.db.damaged-4"]
