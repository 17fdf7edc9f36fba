"""The store: every log's groups, as received, and the own log's payloads, in one SQLite file.

A group of the own log is stored before it is attested (design section 6), so its attestation has a table of its own
and comes with the next transaction; what is missing after a crash the trusted log issues again. Payloads are not
rewritten, but for repair. Every group is verified again when it is loaded: damage is found by digests, not by luck.

Groups below the agreed cut are deleted, the oldest first, when all of them together have more bytes than the settings
allow; SQLite uses their pages again, and what it has too many of is given back to the disk. `held` has the running
totals per log, kept by triggers.
"""

import heapq
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from replica.core.group import encode_payloads
from replica.core.layout import U16
from replica.shell.atrest import CLEAR, GROUP, Clear, UnsealError
from replica.shell.shrinking import give_back, make_shrinkable
from replica.shell.sqlitefile import (
    StoreError,
    claim,
    finish_replacement,
    is_damage,
    open_file,
    reading,
    transaction,
    wal_bytes,
)
from trustlog import APPEND_SIZE

__all__ = [
    "RESTORE",
    "GroupDamagedError",
    "Store",
    "StoreDamagedError",
    "StoreError",
    "StoredGroup",
    "is_group_row",
    "own_group",
    "read_only_group",
    "unsealed_row",
]

SCHEMA_VERSION = 1
# Rows read at a time; a row can have group_bytes_max.
LOAD_ROWS = 8
# An attestation: statement and signature. A group is counted as this and its payloads.
ATTESTATION_BYTES = APPEND_SIZE + 64
# What one `truncate` deletes at the most, but at least one group: SQLite walks through every page it gives back.
TRUNCATE_BYTES_MAX = 16 * 1024 * 1024
# Problems that `problems` reports at the most.
PROBLEMS_MAX = 20
RESTORE = "restore the file from a good copy, or replace this replica"

_SCHEMA = """
create table if not exists groups (
    seq integer primary key, log integer not null, first integer not null, last integer not null,
    attestation blob, payloads blob not null);
create unique index if not exists groups_by_log on groups (log, first);
create table if not exists own_attestations (first integer primary key, attestation blob not null);
create table if not exists held (log integer primary key, groups integer not null, bytes integer not null);
create trigger if not exists group_added after insert on groups begin
    insert or ignore into held values (new.log, 0, 0);
    update held set groups = groups + 1, bytes = bytes + length(new.payloads) where log = new.log;
end;
create trigger if not exists group_deleted after delete on groups begin
    update held set groups = groups - 1, bytes = bytes - length(old.payloads) where log = old.log;
end;
create trigger if not exists group_replaced after update of payloads on groups begin
    update held set bytes = bytes + length(new.payloads) - length(old.payloads) where log = new.log;
end;
"""
# Groups of log ?1 from the one on that holds index ?2.
_FROM = """
from groups g left join own_attestations a on g.attestation is null and a.first = g.first
where g.log = ?1 and (g.last >= ?2 or g.first >= ?2)
    and g.first >= ifnull((select max(first) from groups where log = ?1 and first <= ?2), 0)
"""
_SELECT = f"""
select g.first, g.last, coalesce(g.attestation, a.attestation), g.payloads {_FROM} order by g.first limit ?3
"""
_DELETE = f"delete from groups where seq in (select g.seq {_FROM} order by g.first limit 1)"  # noqa: S608 - no input
# The oldest groups of a log below a cut, but never its last one: that says where the log ends.
_SELECT_OLDEST = """
select seq, log, first, length(payloads) from groups
where log = ?1 and last <= ?2 and first < (select max(first) from groups where log = ?1) order by first limit ?3
"""


class StoreDamagedError(StoreError):
    """SQLite finds the file damaged. `salvage` makes a new one of what can be read."""


class GroupDamagedError(StoreError):
    """A group cannot be read, or what is read is none. The log is in order below index `first`."""

    def __init__(self, text: str, log: int, first: int) -> None:
        super().__init__(text)
        self.log = log
        self.first = first


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

    def __init__(
        self, path: Path, cluster_id: bytes, number: int, *, durable: bool = True, seal: Clear = CLEAR
    ) -> None:
        self.path = path
        self._seal = seal
        self._number = number
        finish_replacement(path)
        with self._guarded():
            self._db = open_file(path, _SCHEMA, durable=durable)
            claim(self._db, path, cluster_id, number, f"{SCHEMA_VERSION}{seal.mark}")
            self._check_totals()

    def write(
        self,
        received: Sequence[StoredGroup],
        attested: tuple[int, bytes] | None,
        own: StoredGroup | None,
    ) -> None:
        """Make everything durable in one transaction: others' groups, an attestation (first, bytes), own payloads."""
        db = self._db
        with transaction(db):
            insert = "insert or ignore into groups (log, first, last, attestation, payloads) values (?, ?, ?, ?, ?)"
            rows = [(g.log, g.first, g.last, g.attestation, self._sealed(g)) for g in received]
            db.executemany(insert, rows)
            if attested is not None:
                db.execute("insert or replace into own_attestations values (?, ?)", attested)
            if own is not None:
                db.execute(insert.replace("or ignore ", ""), (own.log, own.first, own.last, None, self._sealed(own)))

    def _sealed(self, group: StoredGroup) -> bytes:
        return self._seal.seal(GROUP, group.log, group.first, group.payloads)

    def read(self, log: int, first: int, rows_max: int = LOAD_ROWS) -> list[StoredGroup]:
        """Return groups of `log` that end at or above `first`, in order, up to a damaged one.

        GroupDamagedError if the very first of them is damaged.
        """
        try:
            with reading():
                found = self._db.execute(_SELECT, (log, first, rows_max)).fetchall()
        except sqlite3.Error as error:
            text = f"{self.path}: cannot read log {log} from {first} on: {error}; {RESTORE}"
            if not is_damage(error):
                raise StoreError(text) from error
            if rows_max > 1:
                return self.read(log, first, 1)  # those before the damage are good
            raise GroupDamagedError(text, log, first) from error
        groups: list[StoredGroup] = []
        for sealed in found:
            row = unsealed_row(self._seal, log, sealed)
            if not is_group_row(row):
                if groups:
                    break
                text = f"{self.path}: the group {row[0]} to {row[1]} of log {log} is damaged; {RESTORE}"
                raise GroupDamagedError(text, log, first)
            groups.append(StoredGroup(log, *row))  # type: ignore[arg-type]
        return groups

    def groups(self, log: int, first: int = 0) -> Iterator[StoredGroup]:
        """Yield the groups of `log` that end at or above index `first`, in order; GroupDamagedError where one is."""
        while rows := self.read(log, first):
            yield from rows
            first = rows[-1].last + 1

    def last_group(self, log: int) -> StoredGroup | None:
        """Return the last group of `log`, or None."""
        with self._guarded():
            newest = self._db.execute("select max(first) from groups where log = ?", (log,)).fetchone()[0]
        rows = [] if newest is None else self.read(log, newest, 1)
        return rows[0] if rows else None

    def first_index(self, log: int) -> int | None:
        """Return the first index of `log` that is held, or None if nothing of it is."""
        with self._guarded():
            first: int | None = self._db.execute("select min(first) from groups where log = ?", (log,)).fetchone()[0]
        return first

    def held_bytes(self) -> int:
        """Return how many bytes all groups have together, from the running totals."""
        count, size = self._db.execute("select ifnull(sum(groups), 0), ifnull(sum(bytes), 0) from held").fetchone()
        return int(count * ATTESTATION_BYTES + size)

    def truncate(self, cuts: Sequence[int], keep_bytes: int, rows_max: int) -> list[int | None]:
        """Delete groups that end at or below their log's cut while all groups have more than `keep_bytes`.

        The oldest first, of each log from its beginning on, and never a log's last group. At most `rows_max` groups
        and TRUNCATE_BYTES_MAX a call, in one transaction: call again while it is not enough. Returns for each log the
        first index still held, or None.
        """
        with self._guarded():
            excess = min(self.held_bytes() - keep_bytes, TRUNCATE_BYTES_MAX)
            if excess > 0:
                self._delete_oldest(cuts, excess, rows_max)
        return [self.first_index(log) for log in range(len(cuts))]

    def _delete_oldest(self, cuts: Sequence[int], excess: int, rows_max: int) -> None:
        by_log = [self._db.execute(_SELECT_OLDEST, (log, cut, rows_max)) for log, cut in enumerate(cuts)]
        doomed: list[int] = []
        below = 0  # of the own log
        for seq, log, first, size in heapq.merge(*by_log, key=itemgetter(0)):
            if excess <= 0 or len(doomed) == rows_max:
                break
            doomed.append(seq)
            excess -= size + ATTESTATION_BYTES
            below = first + 1 if log == self._number else below
        for rows in by_log:
            rows.close()
        if not doomed:
            return
        with transaction(self._db):
            self._db.executemany("delete from groups where seq = ?", ((seq,) for seq in doomed))
            self._db.execute("delete from own_attestations where first < ?", (below,))

    def give_back(self, pages_max: int) -> bool:
        """Give pages that hold nothing back to the disk, at most so many; say whether there are more to give."""
        with self._guarded():
            return give_back(self._db, self.path, pages_max)

    def make_shrinkable(self) -> str:
        """Write a file of an earlier version anew, so that it can give pages back; return why not, or ""."""
        with self._guarded():
            return make_shrinkable(self._db, self.path)

    def drop(self, log: int, index: int) -> None:
        """Remove the group of another's log that holds `index`, or else the next one, durably: to fetch it again."""
        self._need_another(log)
        with self._guarded(), transaction(self._db):
            self._db.execute(_DELETE, (log, index))

    def drop_from(self, log: int, first: int) -> None:
        """Remove the groups of another's log that hold `first` or come after it, durably: to fetch them again."""
        self._need_another(log)
        with self._guarded(), transaction(self._db):
            self._db.execute("delete from groups where log = ?1 and (last >= ?2 or first >= ?2)", (log, first))

    def _need_another(self, log: int) -> None:
        if log == self._number:
            raise ValueError("groups of the own log are never dropped: replace them")

    def replace(self, group: StoredGroup) -> None:
        """Put a good copy of an own group in the place of a damaged or lost one, durably.

        StoreError if that would overlap other groups: it belongs to another history of the log.
        """
        if group.log != self._number:
            raise ValueError("groups of another's log are dropped and fetched again, not replaced")
        place = (group.log, group.first)
        with self._guarded(), transaction(self._db):
            overlap = "select first from groups where log = ? and first <> ? and first <= ? and last >= ?"
            if self._db.execute(overlap, (*place, group.last, group.first)).fetchone() is not None:
                raise StoreError(
                    f"{self.path}: the group {group.first} to {group.last} would overlap another; {RESTORE}"
                )
            update = "update groups set last = ?, attestation = null, payloads = ? where log = ? and first = ?"
            if self._db.execute(update, (group.last, self._sealed(group), *place)).rowcount == 0:
                insert = "insert into groups (log, first, last, payloads) values (?, ?, ?, ?)"
                self._db.execute(insert, (*place, group.last, self._sealed(group)))
            if group.attestation is not None:
                attested = (group.first, group.attestation)
                self._db.execute("insert or replace into own_attestations values (?, ?)", attested)

    def drop_unattested(self, log: int, first: int) -> None:
        """Remove own payloads that were never attested."""
        self._db.execute("delete from groups where log = ? and first = ? and attestation is null", (log, first))

    def problems(self) -> list[str]:
        """Return what SQLite's own check finds wrong with the file's structure: it reads all of it.

        Content that rotted within the structure is found only where groups are verified.
        """
        try:
            with reading():
                found = self._db.execute(f"pragma quick_check({PROBLEMS_MAX})").fetchall()
        except sqlite3.Error as error:
            return [str(error)]
        texts = [bytes(row[0]).decode(errors="replace") for row in found]
        return [] if texts == ["ok"] else texts

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log."""
        return wal_bytes(self.path)

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn SQLite's errors into StoreDamagedError or StoreError."""
        try:
            yield
        except sqlite3.Error as error:
            if is_damage(error):
                raise StoreDamagedError(f"{self.path}: the file is damaged: {error}; {RESTORE}") from error
            raise StoreError(f"{self.path}: {error}; see whether the disk is full or its folder writable") from error

    def _check_totals(self) -> None:
        """Count anew if the totals cannot be right: the file is older than they are, or damaged."""
        db = self._db
        counted = dict(db.execute("select log, count(*) from groups group by log").fetchall())
        totals = db.execute("select log, groups, bytes from held where groups <> 0 or bytes <> 0").fetchall()
        pages = db.execute("pragma page_count").fetchone()[0] * db.execute("pragma page_size").fetchone()[0]
        sound = all(type(value) is int for row in totals for value in row)
        sound = sound and all(size >= 0 for _, _, size in totals)
        sound = sound and sum(count * ATTESTATION_BYTES + size for _, count, size in totals) <= pages
        if sound and {log: count for log, count, _ in totals} == counted:
            return
        with transaction(db):
            db.execute("delete from held")
            db.execute("insert into held select log, count(*), sum(length(payloads)) from groups group by log")


def unsealed_row(seal: Clear, log: int, row: tuple[object, ...]) -> tuple[object, ...]:
    """Return first, last, attestation and payloads with the payloads opened; None in their place if they do not."""
    first, last, attestation, payloads = row
    if type(payloads) is not bytes or type(first) is not int or first < 0:
        return row
    try:
        return first, last, attestation, seal.unseal(GROUP, log, first, payloads)
    except UnsealError:
        return first, last, attestation, None


def is_group_row(row: tuple[object, ...]) -> bool:
    """Say whether first, last, attestation and payloads are of the right types and fit together.

    SQLite keeps whatever a damaged or edited file says, of whatever type.
    """
    first, last, attestation, payloads = row
    if type(first) is not int or type(last) is not int or type(payloads) is not bytes:
        return False
    if attestation is not None and type(attestation) is not bytes:
        return False
    return len(payloads) >= 2 and 1 <= first <= last and U16.unpack_from(payloads)[0] == last - first + 1


def read_only_group(db: sqlite3.Connection, log: int, index: int | None, seal: Clear = CLEAR) -> StoredGroup | None:
    """Return the attested group of `log` that holds `index`, or the last one, from an opened store, or None."""
    if index is None:
        newest = "select max(last) from groups left join own_attestations using (first) where log = ?"
        # Only what is attested: the own log's last group may still be on its way.
        index = db.execute(
            f"{newest} and coalesce(groups.attestation, own_attestations.attestation) is not null", (log,)
        ).fetchone()[0]
    rows = [] if index is None else db.execute(_SELECT, (log, index, 1)).fetchall()
    row = unsealed_row(seal, log, rows[0]) if rows else None
    found = None if row is None or row[3] is None else StoredGroup(log, *row)  # type: ignore[arg-type]
    return None if found is None or found.first > (index or 0) or found.attestation is None else found


def own_group(log: int, first: int, payloads: tuple[bytes, ...]) -> StoredGroup:
    """Return the row for own payloads that are about to be attested."""
    return StoredGroup(log, first, first + len(payloads) - 1, None, encode_payloads(payloads))
