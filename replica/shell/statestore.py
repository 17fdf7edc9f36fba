"""The state store: the newest persisted milestone, a whole agreed state, in a SQLite file of its own (state.db).

    milestone (one row)   slot, header (its SHA-256 is the checkpoint digest), certificate, and a digest of this table
    parts                 (kind, number) -> bytes: reduced log states (kind 0), batches in flight (kind 1)
    entries               (tree, bucket, key) -> value, clustered, so that a bucket is one range in key order
    buckets               (tree, bucket) -> number of keys, digest; no row for an empty bucket

Trees, buckets and digests are those of replica.core.state: tree 0 is the application's state, tree 1 the client table;
a key's bucket is the first two bytes of its SHA-256. A milestone is written in one transaction that touches only what
changed since the one before: the cost follows the changes, not the state.

Nothing here is believed when it is read again: each bucket must have its digest, the header is checked by whoever
loads it, and the digests together by `root()`. A file with damage is set aside and the state fetched from peers.
"""

import hashlib
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from replica.core.frozen import FrozenMap
from replica.core.layout import U64
from replica.core.tree import BUCKETS, KEY_BYTES_MAX, bucket_of
from replica.shell.atrest import CLEAR, PART, Clear, UnsealError
from replica.shell.shrinking import give_back, make_shrinkable
from replica.shell.sqlitefile import DAMAGED, claim, open_file, set_aside, transaction, wal_bytes
from replica.shell.statetree import (
    VALUE_BYTES_MAX,
    StateDamagedError,
    StateTree,
    guarded,
)

SCHEMA_VERSION = 1
TREES = 2
# Header, certificate, a reduced log state or a batch.
PART_BYTES_MAX = 16 * 1024 * 1024
PARTS_MAX = 65536
# What SQLite may read at once: no damaged length makes it allocate more.
ROW_BYTES_MAX = PART_BYTES_MAX + 1024 * 1024
# Changes that are sorted and written at a time.
CHANGES_AT_A_TIME = 50_000
# Changed buckets that a write reads back, about: some 10 ms.
READ_BACK = 256
# Page cache of the writer, and of each reader.
WRITER_CACHE_KIB = 64 * 1024
READER_CACHE_KIB = 4 * 1024
LOG_STATE, BATCH = 0, 1

_SCHEMA = """
create table if not exists milestone (
    id integer primary key check (id = 1), slot integer not null, header blob not null, certificate blob not null,
    check_digest blob not null);
create table if not exists parts (
    kind integer not null, number integer not null, content blob not null, primary key (kind, number));
create table if not exists entries (
    tree integer not null, bucket integer not null, key blob not null, value blob not null,
    primary key (tree, bucket, key)) without rowid;
create table if not exists buckets (
    tree integer not null, bucket integer not null, keys integer not null, digest blob not null,
    primary key (tree, bucket)) without rowid;
"""

Change = tuple[bytes, bytes | None]


@dataclass(frozen=True, slots=True)
class Milestone:
    """A stable checkpoint to persist. The store takes all of these bytes as they are.

    header: its SHA-256 is the checkpoint digest. logs: the reduced log states, by replica. changes: per tree (0
    application, 1 client table) what differs from the milestone persisted before: (key, value), value None if the key
    is gone. A key's last change counts. They are read once and one by one. maps: per tree all that is there with these
    changes: changed buckets get their digests from it, so that an entry that rotted on the disk never gets a new one,
    and some of them are read back. roots: what the trees must hash to afterwards.
    """

    slot: int
    header: bytes
    certificate: bytes
    logs: tuple[bytes, ...]
    batches: tuple[bytes, ...]
    changes: tuple[Iterable[Change], Iterable[Change]]
    maps: tuple[FrozenMap, FrozenMap]
    roots: tuple[bytes, bytes] | None = None


class PinnedState:
    """The persisted milestone as it was when this was opened, whatever is written since. Close it.

    It has a connection of its own. It may be used from any thread, by one at a time. While it is open, the write-ahead
    log cannot be emptied beyond it and grows with every milestone: look at `StateStore.wal_bytes()`, and close it when
    that is too much. Every method raises StateDamagedError if what it reads is damaged.
    """

    def __init__(self, path: Path, seal: Clear = CLEAR) -> None:
        self.path = path
        self._seal = seal
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("pragma query_only = on")
            self._db.execute(f"pragma cache_size = -{READER_CACHE_KIB}")
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, ROW_BYTES_MAX)
            # What damage turned into text is to be refused, not decoded.
            self._db.text_factory = bytearray
            self._db.execute("begin")
            self._read_milestone()
        except BaseException:
            self._db.close()
            raise

    def _read_milestone(self) -> None:
        row = self._db.execute("select slot, header, certificate, check_digest from milestone").fetchone()
        self.exists = row is not None
        values: tuple[int, bytes, bytes, bytes] = row or (0, b"", b"", b"")
        self.slot, self.header, self.certificate, check = values
        self.logs = self._parts(LOG_STATE)
        self.batches = self._parts(BATCH)
        types = [type(value) for value in values]
        if types != [int, bytes, bytes, bytes] or self.slot < 0 or (self.exists and self._check_digest() != check):
            raise StateDamagedError(self.path, "the milestone's header, certificate, log states or batches")
        self.trees = tuple(StateTree(self._db, self.path, tree, self._seal) for tree in range(TREES))

    def _parts(self, kind: int) -> tuple[bytes, ...]:
        rows = self._db.execute(
            "select number, content from parts where kind = ? order by number limit ?", (kind, PARTS_MAX + 1)
        ).fetchall()
        if any(type(content) is not bytes or number != at for at, (number, content) in enumerate(rows)):
            raise StateDamagedError(self.path, "a log state or batch of the milestone")
        try:
            return tuple(self._seal.unseal(PART, kind, number, content) for number, content in rows)
        except UnsealError as error:
            raise StateDamagedError(self.path, f"a log state or batch of the milestone {error}") from error

    def _check_digest(self) -> bytes:
        return _digest_of(self.slot, self.header, self.certificate, self.logs, self.batches)

    def close(self) -> None:
        """Let the view go; harmless when repeated."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class StateStore:
    """One replica's state file. Every method may block; `write` and `close` are called by one thread at a time.

    The constructor raises StoreError if the file belongs to another replica, StateDamagedError if it is damaged:
    `discard_state(path)` then moves it aside, and the state is fetched from peers.
    """

    def __init__(
        self, path: Path, cluster_id: bytes, number: int, *, durable: bool = True, seal: Clear = CLEAR
    ) -> None:
        self.path = path
        self._seal = seal
        self._claim = (cluster_id, number)
        self._durable = durable
        self._writes = 0
        with guarded(path):
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = open_file(self.path, _SCHEMA, durable=self._durable)
        try:
            db.execute(f"pragma cache_size = -{WRITER_CACHE_KIB}")
            claim(db, self.path, *self._claim, f"{SCHEMA_VERSION}{self._seal.mark}")
        except BaseException:
            db.close()
            raise
        return db

    def write(self, milestone: Milestone, *, replace_all: bool = False) -> None:
        """Make `milestone` the persisted one, in one transaction: durable, or nothing changed.

        replace_all: forget all entries first, after a state transfer. ValueError if a size exceeds what `load` takes,
        StateDamagedError if the file is damaged or its trees do not come to `milestone.roots`, StoreError if it cannot
        be written. After damage, `discard()` and a write of the whole state make it good again.
        """
        _check_sizes(milestone)
        self._writes += 1
        with guarded(self.path), transaction(self._db):
            if replace_all:
                self._db.execute("delete from entries")
                self._db.execute("delete from buckets")
            for tree, changes in enumerate(milestone.changes):
                buckets = self._apply(tree, changes)
                self._put_digests(tree, buckets, milestone.maps[tree])
                written = StateTree(self._db, self.path, tree, self._seal)
                self._read_back(written, buckets)
                if milestone.roots is not None and written.root() != milestone.roots[tree]:
                    raise StateDamagedError(self.path, f"tree {tree}: the digests are not those of what was written")
            self._put_milestone(milestone)

    def give_back(self, pages_max: int) -> bool:
        """Give pages that hold nothing back to the disk, at most so many; say whether there are more to give.

        Called as `write` is, and raises as it does.
        """
        with guarded(self.path):
            return give_back(self._db, self.path, pages_max)

    def make_shrinkable(self) -> str:
        """Write a file of an earlier version anew, so that it can give pages back; return why not, or ""."""
        with guarded(self.path):
            return make_shrinkable(self._db, self.path)

    def _apply(self, tree: int, changes: Iterable[Change]) -> list[int]:
        """Write changed entries; return the buckets that were touched."""
        touched = bytearray(BUCKETS)
        waiting = iter(changes)
        while chunk := dict(islice(waiting, CHANGES_AT_A_TIME)):
            # In the order of the file: neighbours share pages.
            filed = sorted((bucket_of(key), key) for key in chunk)
            put = (
                (tree, bucket, *self._seal.seal_entry(tree, key, _sized(key, chunk[key])))
                for bucket, key in filed
                if chunk[key] is not None
            )
            self._db.executemany("insert or replace into entries values (?, ?, ?, ?)", put)
            gone = ((tree, bucket, self._seal.entry_name(tree, key)) for bucket, key in filed if chunk[key] is None)
            self._db.executemany("delete from entries where tree = ? and bucket = ? and key = ?", gone)
            for bucket, _ in filed:
                touched[bucket] = 1
        return [bucket for bucket, one in enumerate(touched) if one]

    def _put_digests(self, tree: int, buckets: list[int], known: FrozenMap) -> None:
        """Write the digests of touched buckets, as they are known."""
        rows = (
            (tree, bucket, known.keys_in(bucket), known.bucket_digest(bucket))
            for bucket in buckets
            if bucket in known.buckets
        )
        self._db.executemany("insert or replace into buckets values (?, ?, ?, ?)", rows)
        empty = ((tree, bucket) for bucket in buckets if bucket not in known.buckets)
        self._db.executemany("delete from buckets where tree = ? and bucket = ?", empty)

    def _read_back(self, written: StateTree, buckets: list[int]) -> None:
        """Verify touched buckets against their digests: all if they are few, else others each time.

        To read all of them would be most of the work with a million keys. What is not what it should be in one replica
        is found at the next start; what an error of ours does in all of them must be found while they have the state.
        """
        step = max(1, len(buckets) // READ_BACK)
        for bucket in buckets[self._writes % step :: step]:
            written.bucket(bucket)

    def _put_milestone(self, milestone: Milestone) -> None:
        m, db = milestone, self._db
        check = _digest_of(m.slot, m.header, m.certificate, m.logs, m.batches)
        db.execute("insert or replace into milestone values (1, ?, ?, ?, ?)", (m.slot, m.header, m.certificate, check))
        db.execute("delete from parts")
        for kind, parts in ((LOG_STATE, m.logs), (BATCH, m.batches)):
            rows = ((kind, at, self._seal.seal(PART, kind, at, part)) for at, part in enumerate(parts))
            db.executemany("insert into parts values (?, ?, ?)", rows)

    def pinned(self) -> PinnedState | None:
        """Return a view frozen at the persisted milestone, or None if there is none. Any thread; close it."""
        with guarded(self.path):
            view = PinnedState(self.path, self._seal)
        if view.exists:
            return view
        view.close()
        return None

    def load(self) -> PinnedState | None:
        """Return the persisted milestone for reading all of it, or None if there is none; close it.

        Its `trees[t].entries()` yield every entry and verify each bucket against its digest. What the caller verifies:
        that the header is the certified one, and that it names the trees' `root()`.
        """
        return self.pinned()

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log, which a pinned view keeps from being emptied."""
        return wal_bytes(self.path)

    def discard(self, why: str = DAMAGED) -> Path:
        """Move the file aside and begin an empty one; return its new name. Close pinned views before."""
        self._db.close()
        aside = discard_state(self.path, why)
        with guarded(self.path):
            self._db = self._open()
        return aside

    def close(self) -> None:
        """Give the file back; harmless when repeated."""
        self._db.close()


def discard_state(path: Path, why: str = DAMAGED) -> Path:
    """Move a state file aside that is not open, as NAME.damaged-N; return its new name. The newest one is kept."""
    return set_aside(path, why)


def _digest_of(
    slot: int, header: bytes, certificate: bytes, logs: tuple[bytes, ...], batches: tuple[bytes, ...]
) -> bytes:
    """Return a digest of what no bucket covers, so that damage to it is named as such."""
    digest = hashlib.sha256(U64.pack(slot))
    for part in (header, certificate, U64.pack(len(logs)), *logs, U64.pack(len(batches)), *batches):
        digest.update(U64.pack(len(part)))
        digest.update(part)
    return digest.digest()


def _sized(key: bytes, value: bytes | None) -> bytes:
    if type(key) is not bytes or not 1 <= len(key) <= KEY_BYTES_MAX:
        raise ValueError(f"a key of the state is 1 to {KEY_BYTES_MAX} bytes")
    if type(value) is not bytes or len(value) > VALUE_BYTES_MAX:
        raise ValueError(f"a value of the state is at most {VALUE_BYTES_MAX} bytes")
    return value


def _check_sizes(milestone: Milestone) -> None:
    m = milestone
    for part in (m.header, m.certificate, *m.logs, *m.batches):
        if len(part) > PART_BYTES_MAX:
            raise ValueError(f"a part of a milestone has {len(part)} bytes, the limit is {PART_BYTES_MAX}")
    if max(len(m.logs), len(m.batches)) > PARTS_MAX:
        raise ValueError(f"a milestone has at most {PARTS_MAX} batches")
    if len(m.changes) != TREES or m.slot < 0:
        raise ValueError(f"a milestone has a slot from 0 on and changes for {TREES} trees")
