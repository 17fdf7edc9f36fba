"""The store: every log's groups, as received, and the own log's payloads, in one SQLite file.

A group of the own log is stored before it is attested (design section 6), so its attestation has a table of its own
and comes with the next transaction; what is missing after a crash the trusted log issues again. Payloads are never
rewritten. Every group is verified again when it is loaded: damage is found by digests, not by luck.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from replica.core.group import encode_payloads

SCHEMA_VERSION = 1
# SQLite pages that the write-ahead log may hold before they are moved to the main file: 16 MiB of 4 KiB pages.
WAL_PAGES_MAX = 4096
# Rows read at a time; a row can have group_bytes_max.
LOAD_ROWS = 8
RESTORE = "restore the file from a good copy, or replace this replica"

_SCHEMA = """
create table if not exists meta (key text primary key, value blob not null) without rowid;
create table if not exists groups (
    seq integer primary key, log integer not null, first integer not null, last integer not null,
    attestation blob, payloads blob not null);
create unique index if not exists groups_by_log on groups (log, first);
create table if not exists own_attestations (first integer primary key, attestation blob not null);
"""
_SELECT = """
select g.first, g.last, coalesce(g.attestation, a.attestation), g.payloads
from groups g left join own_attestations a on g.attestation is null and a.first = g.first
where g.log = ? and g.last >= ? order by g.first limit ?
"""


class StoreError(Exception):
    """The store cannot be used; the text names the file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A row. `attestation` is statement and signature, or None for the own log's last group before it is stored."""

    log: int
    first: int
    last: int
    attestation: bytes | None
    payloads: bytes

    @property
    def raw(self) -> bytes:
        """Return the group as it is sent."""
        if self.attestation is None:
            raise StoreError(f"group {self.first} to {self.last} of log {self.log} has no attestation yet")
        return self.attestation + self.payloads


class Store:
    """One replica's file. Every method may block, and is called from one thread at a time."""

    def __init__(self, path: Path, cluster_id: bytes, number: int, *, durable: bool = True) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1)
            path.chmod(0o600)
            self._prepare(durable)
            self._claim("cluster_id", cluster_id)
            self._claim("number", str(number).encode())
            self._claim("schema", str(SCHEMA_VERSION).encode())
        except sqlite3.Error as error:
            raise StoreError(f"{path}: {error}; see whether the disk is full or the file damaged") from error

    def _prepare(self, durable: bool) -> None:
        self._db.execute("pragma journal_mode = wal")
        self._db.execute(f"pragma synchronous = {'full' if durable else 'off'}")
        self._db.execute(f"pragma wal_autocheckpoint = {WAL_PAGES_MAX}")
        self._db.executescript(_SCHEMA)

    def _claim(self, key: str, value: bytes) -> None:
        row = self._db.execute("select value from meta where key = ?", (key,)).fetchone()
        if row is None:
            self._db.execute("insert into meta values (?, ?)", (key, value))
        elif row[0] != value:
            raise StoreError(
                f"{self.path}: its {key} is {bytes(row[0]).hex()[:16]}, this replica's is {value.hex()[:16]}; "
                "the file belongs to another replica or cluster: put the right one in its place"
            )

    def write(
        self,
        received: Sequence[StoredGroup],
        attested: tuple[int, bytes] | None,
        own: StoredGroup | None,
    ) -> None:
        """Make everything durable in one transaction: others' groups, an attestation (first, bytes), own payloads."""
        db = self._db
        db.execute("begin immediate")
        try:
            insert = "insert or ignore into groups (log, first, last, attestation, payloads) values (?, ?, ?, ?, ?)"
            rows = [(g.log, g.first, g.last, g.attestation, g.payloads) for g in received]
            db.executemany(insert, rows)
            if attested is not None:
                db.execute("insert or replace into own_attestations values (?, ?)", attested)
            if own is not None:
                db.execute(insert.replace("or ignore ", ""), (own.log, own.first, own.last, None, own.payloads))
            db.execute("commit")
        except BaseException:
            if db.in_transaction:
                db.execute("rollback")
            raise

    def read(self, log: int, first: int, rows_max: int = LOAD_ROWS) -> list[StoredGroup]:
        """Return groups of `log` that end at or above `first`, in order."""
        try:
            found = self._db.execute(_SELECT, (log, first, rows_max)).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot read log {log} from {first} on: {error}; {RESTORE}") from error
        for row in found:
            # SQLite keeps whatever a damaged or edited file says, of whatever type.
            if [type(value) for value in row] not in ([int, int, bytes, bytes], [int, int, type(None), bytes]):
                raise StoreError(f"{self.path}: the group {row[0]} to {row[1]} of log {log} is damaged; {RESTORE}")
        return [StoredGroup(log, *row) for row in found]

    def groups(self, log: int, first: int = 0) -> Iterator[StoredGroup]:
        """Yield the groups of `log` that end at or above index `first`, in order."""
        while rows := self.read(log, first):
            yield from rows
            first = rows[-1].last + 1

    def last_group(self, log: int) -> StoredGroup | None:
        """Return the last group of `log`, or None."""
        newest = self._db.execute("select max(first) from groups where log = ?", (log,)).fetchone()[0]
        return None if newest is None else self.read(log, newest, 1)[0]

    def drop_unattested(self, log: int, first: int) -> None:
        """Remove own payloads that were never attested."""
        self._db.execute("delete from groups where log = ? and first = ? and attestation is null", (log, first))

    def close(self) -> None:
        """Give the file back."""
        self._db.close()


def read_only_group(db: sqlite3.Connection, log: int, index: int | None) -> StoredGroup | None:
    """Return the attested group of `log` that holds `index`, or the last one, from an opened store, or None."""
    if index is None:
        newest = "select max(last) from groups left join own_attestations using (first) where log = ?"
        # Only what is attested: the own log's last group may still be on its way.
        index = db.execute(
            f"{newest} and coalesce(groups.attestation, own_attestations.attestation) is not null", (log,)
        ).fetchone()[0]
    rows = [] if index is None else db.execute(_SELECT, (log, index, 1)).fetchall()
    found = StoredGroup(log, *rows[0]) if rows else None
    return None if found is None or found.first > (index or 0) or found.attestation is None else found


def own_group(log: int, first: int, payloads: tuple[bytes, ...]) -> StoredGroup:
    """Return the row for own payloads that are about to be attested."""
    return StoredGroup(log, first, first + len(payloads) - 1, None, encode_payloads(payloads))
