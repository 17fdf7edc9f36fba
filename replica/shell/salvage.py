"""Salvage: a new log store of every row of a damaged one that can still be read.

Damage within a group's bytes is found by its signature; such a group is dropped or replaced by itself. When pages of
the file are damaged, SQLite stops at the first of them: here every row is asked for by its number, so what a damaged
page takes with it are its own rows only. What is missing then comes from peers: groups of other logs are fetched
again, those of the own log replaced by peers' copies. The damaged file is kept aside.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from replica.cluster.writing import sync_directory
from replica.shell.atrest import CLEAR, Clear
from replica.shell.sqlitefile import StoreError, damaged_files, find_foreign, finish_replacement, reading
from replica.shell.store import Store, StoredGroup, is_group_row, unsealed_row

# Rows asked for at once, as long as nothing is damaged, and written at once.
ROWS_AT_ONCE = 64
# Row numbers looked at, at the most: a damaged number may be anything.
ROWS_MAX = 50_000_000

_GROUPS = "select log, first, last, attestation, payloads from groups where seq between ? and ? order by seq"
_GROUPS_ENDS = (
    "select seq from groups order by seq limit 1",
    "select seq from groups order by seq desc limit 1",
)
# The index lies on other pages than the groups, and is read from both ends.
_INDEX = (
    "select log, first, seq from groups indexed by groups_by_log order by log, first",
    "select log, first, seq from groups indexed by groups_by_log order by log desc, first desc",
)
_ATTESTATIONS = "select first, attestation from own_attestations where first between ? and ? order by first"
_ATTESTATIONS_ENDS = (
    "select first from own_attestations order by first limit 1",
    "select first from own_attestations order by first desc limit 1",
)

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """Indexes `first` to `last` of `log` that could not be read; last None: and whatever came after it."""

    log: int
    first: int
    last: int | None


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What was done: how many groups were read, what is known to be missing, and where the damaged file is.

    missing names gaps between groups, and an end that the file's index still knew. Where a log must end, only the
    trusted log or its author can say. unattested: own groups, by (first, last), whose attestations were lost.
    """

    groups: int
    missing: tuple[Missing, ...]
    unattested: tuple[tuple[int, int], ...]
    aside: Path


def salvage(path: Path, cluster_id: bytes, number: int, seal: Clear = CLEAR) -> Salvaged:
    """Make a new store of what can be read of the one at `path`, which is not open; put it in its place, durably.

    A crash on the way leaves either file whole; opening the store finishes what was begun. StoreError if the file is
    another replica's, or the new one cannot be written. Row by row: seconds for some hundred thousand groups.
    """
    draft = path.with_name(path.name + ".salvaging")
    for suffix in ("", "-wal", "-shm"):
        draft.with_name(draft.name + suffix).unlink(missing_ok=True)
    _check_owner(path, cluster_id, number)
    read_only = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(read_only, uri=True, isolation_level=None)) as db,
            closing(Store(draft, cluster_id, number, seal=seal)) as new,
        ):
            db.text_factory = bytearray
            old = _Damaged(db, number, seal)
            groups = iter(old.groups())
            while chunk := list(islice(groups, ROWS_AT_ONCE)):
                new.write(chunk, None, None)
    except sqlite3.Error as error:
        raise StoreError(f"{draft}: {error}; see whether the disk is full: nothing was changed") from error
    # Closing it moved its write-ahead log into the file.
    draft.replace(path.with_name(path.name + ".new"))
    sync_directory(path.parent)
    finish_replacement(path)
    held = sum(map(len, old.held.values()))
    return Salvaged(held, tuple(old.missing()), tuple(old.unattested), damaged_files(path)[-1][1])


def _check_owner(path: Path, cluster_id: bytes, number: int) -> None:
    """Refuse another replica's file. One that cannot say whose it is may be salvaged: its groups are verified."""
    foreign = find_foreign([path], cluster_id, number)
    if foreign is not None:
        raise StoreError(f"{path}: belongs to another replica or cluster: {foreign.what}; {foreign.remedy}")


@dataclass(slots=True)
class _Damaged:
    """A damaged store, and what was read of it."""

    db: sqlite3.Connection
    number: int
    seal: Clear
    held: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # by log: bounds of groups
    known: dict[int, set[int]] = field(default_factory=dict)  # by log: first indexes that the file's index knows
    unattested: list[tuple[int, int]] = field(default_factory=list)

    def groups(self) -> Iterator[StoredGroup]:
        """Yield every group that can be read, own ones with their attestations, and note them."""
        seqs = {seq for (seq,) in self._readable(_GROUPS_ENDS)}
        for log, first, seq in self._readable(_INDEX):
            if type(log) is int and type(first) is int:
                self.known.setdefault(log, set()).add(first)
                seqs.add(seq)
        ends = {first for (first,) in self._readable(_ATTESTATIONS_ENDS)}
        attestations = {
            first: attestation for first, attestation in self._rows(_ATTESTATIONS, ends) if type(attestation) is bytes
        }
        for log, *sealed in self._rows(_GROUPS, seqs):
            if type(log) is not int or log < 0:
                continue
            rest: tuple[Any, ...] = unsealed_row(self.seal, log, tuple(sealed))
            if not is_group_row(rest):
                continue
            first, last, attestation, payloads = rest
            if attestation is None and log == self.number:
                attestation = attestations.get(first)
            if attestation is None:
                self.unattested.append((first, last))
            self.held.setdefault(log, []).append((first, last))
            yield StoredGroup(log, first, last, attestation, payloads)

    def missing(self) -> Iterator[Missing]:
        """Compare what was read with itself, and with what the file's index knew."""
        for log in sorted(self.known.keys() | self.held.keys()):
            held, known = sorted(self.held.get(log, [])), self.known.get(log, set())
            before = min((first for first in known if not held or first < held[0][0]), default=None)
            if before is not None:
                yield Missing(log, before, held[0][0] - 1 if held else None)
            for (_, last), (first, _) in pairwise(held):
                if last + 1 < first:
                    yield Missing(log, last + 1, first - 1)
            if held and max(known, default=0) > held[-1][1]:
                yield Missing(log, held[-1][1] + 1, None)

    def _readable(self, selects: tuple[str, ...]) -> Iterator[Row]:
        """Yield what each of these yields, up to where it meets damage."""
        for select in selects:
            with suppress(sqlite3.Error), reading():
                yield from self.db.execute(select)

    def _rows(self, select: str, known: set[int]) -> Iterator[Row]:
        """Yield every row that can be read, in the order of the numbers by which they are asked for."""
        lowest, highest = min(known, default=1), max(known, default=0)
        for start in range(lowest, min(highest, lowest + ROWS_MAX) + 1, ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE - 1, highest)
            try:
                with reading():
                    rows = self.db.execute(select, (start, end)).fetchall()
                yield from rows
            except sqlite3.Error:
                for one in range(start, end + 1):
                    with suppress(sqlite3.Error), reading():
                        yield from self.db.execute(select, (one, one)).fetchall()
