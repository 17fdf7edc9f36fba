"""Giving room back to the disk: pages of a SQLite file that hold nothing any more, a few at a time.

A file gives pages back by moving its last ones to where nothing is (SQLite's incremental vacuum). That is written to
the write-ahead log first, and the file is shorter once the log was moved into it. So it is done in small steps, not
while somebody reads a view of before, which would make the log grow and the file no shorter, and not on a disk that is
nearly full. Nothing depends on it: if it fails, and not by damage, it is left for the next time.
"""

import shutil
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from replica.shell.sqlitefile import WAL_KEPT_BYTES, is_damage, reading, transaction

# Free pages that a file keeps for what comes next: 64 MiB, or a quarter of what is used. With every milestone the store
# forgets as much as 32 MiB of batches took, and needs it again: with less it would give back and take for ever.
FREE_PAGES_MIN = 16384
FREE_SHARE = 4
# A step is over after this time. Where the list of free pages is long, SQLite looks through it for each page it moves.
STEP_S = 0.02
# Room that the disk must have for a step, of which the write-ahead log takes some.
ROOM_BYTES = 16 * 1024 * 1024
_INCREMENTAL = 2  # what SQLite calls a file that can give pages back


def give_back(db: sqlite3.Connection, path: Path, pages_max: int) -> bool:
    """Give pages that hold nothing back, at most so many; say whether there are more to give now.

    FREE_PAGES_MIN or a share of the file is kept. sqlite3.Error if the file is damaged.
    """
    try:
        return _give_back(db, path, pages_max)
    except sqlite3.Error as error:
        if is_damage(error):
            raise
        return False  # the disk is full after all, or somebody else writes


def _give_back(db: sqlite3.Connection, path: Path, pages_max: int) -> bool:
    if _number(db, "auto_vacuum") != _INCREMENTAL:
        return False
    total, free = _number(db, "page_count"), _number(db, "freelist_count")
    surplus = free - max(FREE_PAGES_MIN, (total - free) // FREE_SHARE)
    if surplus <= 0:
        if path.stat().st_size > total * _number(db, "page_size"):
            _move_log(db)  # whoever read a view of before may have gone
        return False
    if not _move_log(db) or shutil.disk_usage(path.parent).free < ROOM_BYTES:
        return False
    ends, given = time.monotonic() + STEP_S, 0
    with transaction(db):
        while given < min(surplus, pages_max) and (given == 0 or time.monotonic() < ends):
            db.execute("pragma incremental_vacuum(1)").fetchall()
            given += 1
    if given < surplus:
        return True
    _move_log(db)
    return False


def _move_log(db: sqlite3.Connection) -> bool:
    """Move the write-ahead log into the file, as far as nobody reads what it replaces; say whether that was all."""
    _, pages, moved = db.execute("pragma wal_checkpoint(passive)").fetchone()
    return bool(pages == moved)


def make_shrinkable(db: sqlite3.Connection, path: Path) -> str:
    """Write a file anew that an earlier version made, so that it can give pages back; return why not, or "".

    It takes as much room again as the file uses, twice, and some seconds per gigabyte. To be called where nobody waits,
    and after the file was found sound: damage would be copied as far as SQLite can read.
    """
    if _number(db, "auto_vacuum") == _INCREMENTAL:
        return ""
    used = (_number(db, "page_count") - _number(db, "freelist_count")) * _number(db, "page_size")
    needed, free = 2 * used + WAL_KEPT_BYTES, shutil.disk_usage(path.parent).free
    if free < needed:
        return f"{needed} bytes of room are needed to write it anew, {free} are free"
    why = ""
    try:
        with reading():
            db.execute("pragma auto_vacuum = incremental")
            db.execute("vacuum")
    except sqlite3.Error as error:
        why = f"it could not be written anew: {error}"
    with suppress(sqlite3.Error):
        db.execute("pragma wal_checkpoint(truncate)").fetchone()
    return why


def _number(db: sqlite3.Connection, pragma: str) -> int:
    return int(db.execute(f"pragma {pragma}").fetchone()[0])
