"""What the replica's two SQLite files have in common: how they are opened, claimed, judged damaged and moved aside.

SQLite has no checksums over what it keeps, so it notices damage only where its own structure breaks. What the
replica cannot check by signatures or digests of its own, it must not keep in such a file.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from replica.cluster.writing import sync_directory

# SQLite pages that the write-ahead log may hold before they are moved to the main file: 16 MiB of 4 KiB pages.
WAL_PAGES_MAX = 4096
# What is left of a write-ahead log that had grown beyond this, once all of it is in the main file.
WAL_KEPT_BYTES = 64 * 1024 * 1024
# A writer waits so long for another process that reads the file (a backup, `inspect`) and holds a lock.
BUSY_S = 1.0
# Files kept aside, for whoever wants to look at them: damaged ones, and states of an earlier list of members.
ASIDE_KEPT = 1
DAMAGED, EARLIER = "damaged", "earlier"

# Our statements are fixed, so one that SQLite cannot carry out (ERROR) has met a table that lost its definition; and
# what is too big for a limit (TOOBIG) was not written by us.
_DAMAGE = frozenset(
    [
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_TOOBIG,
    ]
)
# What SQLite says of a file's structure, which no other reading of it mends.
_BROKEN = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# A sector that the disk cannot read is lost like one that has rotted. Failed writes are another matter.
_UNREADABLE = frozenset({sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ})
_PRIMARY_CODE = 0xFF
# More than a row that is read takes: if there is room for this, it was not for want of memory that SQLite stopped.
PROBE_BYTES = 64 * 1024 * 1024
_META = "create table if not exists meta (key text primary key, value blob not null) without rowid;"


class StoreError(Exception):
    """The store cannot be used; the text names the file, what is wrong and what to do."""


def open_file(path: Path, schema: str, *, durable: bool) -> sqlite3.Connection:
    """Open or create a database that only its owner can read, with its tables; sqlite3.Error if that fails."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
    try:
        path.chmod(0o600)
        db.execute("pragma auto_vacuum = incremental")  # before anything else: it holds for a new file only
        db.execute("pragma journal_mode = wal")
        db.execute(f"pragma synchronous = {'full' if durable else 'off'}")
        db.execute(f"pragma wal_autocheckpoint = {WAL_PAGES_MAX}")
        db.execute(f"pragma journal_size_limit = {WAL_KEPT_BYTES}")
        # Some systems build SQLite to overwrite what is deleted, which costs as much as writing it did.
        db.execute("pragma secure_delete = off")
        # What damage turned into text is to be refused for its type, not decoded.
        db.text_factory = bytearray
        db.executescript(_META + schema)
    except BaseException:
        db.close()
        raise
    return db


def claim(db: sqlite3.Connection, path: Path, cluster_id: bytes, number: int, schema: str) -> None:
    """Write into a new file whose it is; StoreError if it is another replica's or cluster's, or of another version."""
    claims = {"cluster_id": cluster_id, "number": str(number).encode(), "schema": schema.encode()}
    for key, value in claims.items():
        row = db.execute("select value from meta where key = ?", (key,)).fetchone()
        if row is None:
            db.execute("insert into meta values (?, ?)", (key, value))
        elif row[0] != value:
            whose = "" if key == "schema" else "belongs to another replica or cluster: "
            what, remedy = claim_trouble(key, row[0], value)
            raise StoreError(f"{path}: {whose}{what}; {remedy}")


@dataclass(frozen=True, slots=True)
class Foreign:
    """Files that say of themselves that they are another cluster's or replica's: what they say, and what to do."""

    paths: tuple[Path, ...]
    what: str
    remedy: str

    def __str__(self) -> str:
        """Return files and what they say."""
        verb = "belongs" if len(self.paths) == 1 else "belong"
        return f"{' and '.join(map(str, self.paths))} {verb} to another replica or cluster: {self.what}"


def find_foreign(paths: Iterable[Path], cluster_id: bytes, number: int) -> Foreign | None:
    """Return which files say that they are another cluster's, or else another replica's; None if none says so.

    They are only read. One that cannot be read may be damaged, and does not say whose it is.
    """
    own = {"cluster_id": cluster_id, "number": b"%d" % number}
    found = {path: read_claims(path) for path in paths if path.exists()}
    for key, value in own.items():
        others = {path: claims[key] for path, claims in found.items() if claims.get(key, value) != value}
        for held in others.values():
            alike = tuple(path for path, other in others.items() if other == held)
            return Foreign(alike, *claim_trouble(key, held, value))
    return None


def read_claims(path: Path) -> dict[str, object]:
    """Return what a file says of itself (cluster_id, number, schema), as far as it can be read."""
    with (
        suppress(sqlite3.Error),
        reading(),
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db,
    ):
        db.text_factory = lambda raw: raw.decode(errors="replace")
        return dict(db.execute("select key, value from meta").fetchall())
    return {}


def claim_trouble(key: str, held: object, own: bytes) -> tuple[str, str]:
    """Return what is wrong with what a file says of itself, which is not what it must say, and what to do."""
    raw = held if isinstance(held, bytes) else repr(held).encode()
    if key == "cluster_id":
        remedy = (
            "put the right cluster.toml in its place; or, if the databases were copied here from elsewhere, the right "
            "databases"
        )
        return f"made for cluster {raw[:32].hex()}, and cluster.toml is of cluster {own.hex()}", remedy
    if key == "number":
        remedy = "put the right database in its place, or the right number into replica.toml"
    elif raw.partition(b"-")[0] == own.partition(b"-")[0]:
        how = "sealed" if b"-" in raw else "in the clear"
        remedy = (
            "set trusted_log.encrypt_store in replica.toml as it was, or remove the file to have this replica fetch "
            "everything from its peers"
        )
        return f"was made to be {how}, which cannot be changed", remedy
    else:
        remedy = "run the version of trustlog that made it, or put the right database in its place"
    return f"its {key} is {raw[:16].decode(errors='replace')}, here it is {own.decode()}", remedy


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Do all of it, durably when this ends, or nothing."""
    db.execute("begin immediate")
    try:
        yield
        db.execute("commit")
    except BaseException:
        if db.in_transaction:
            db.execute("rollback")
        raise


def is_damage(error: sqlite3.Error) -> bool:
    """Say whether SQLite found the file damaged or unreadable, and not, for instance, the disk full."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and (code & _PRIMARY_CODE in _DAMAGE or code in _UNREADABLE)


def is_broken(error: sqlite3.Error) -> bool:
    """Say whether SQLite found the structure of the file itself damaged."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & _PRIMARY_CODE in _BROKEN


@contextmanager
def reading() -> Iterator[None]:
    """Around what SQLite reads of a file that may be damaged: on some broken pages it says that it has no memory.

    That becomes the sqlite3.DatabaseError of a damaged file, unless there is no memory indeed: a MemoryError says
    nothing of the file.
    """
    try:
        yield
    except MemoryError:
        bytearray(PROBE_BYTES)
        broken = sqlite3.DatabaseError("SQLite cannot make sense of a page")
        broken.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise broken from None


def set_aside(path: Path, why: str = DAMAGED) -> Path:
    """Move a database out of the way, durably; return its new name. No connection to it may be open.

    It becomes NAME.damaged-N, or whatever word says `why`, with N above all there were; older ones of that word beyond
    ASIDE_KEPT are deleted.
    """
    before = _files_aside(path, why)
    target = path.with_name(f"{path.name}.{why}-{before[-1][0] + 1 if before else 1}")
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    # The write-ahead log goes first: beside a new file, SQLite would replay an old one into it.
    wal = path.with_name(path.name + "-wal")
    if wal_bytes(path):
        wal.replace(target.with_name(target.name + "-wal"))
    wal.unlink(missing_ok=True)
    sync_directory(path.parent)
    path.replace(target)
    sync_directory(path.parent)
    for _, old in before[: len(before) + 1 - ASIDE_KEPT]:
        for suffix in ("", "-wal", "-shm"):
            old.with_name(old.name + suffix).unlink(missing_ok=True)
    return target


def finish_replacement(path: Path) -> None:
    """If a crash came between making a whole new file, NAME.new, and putting it in place of the damaged: do that now.

    Whoever makes one writes it under another name and renames it to NAME.new when it is complete and durable.
    """
    new = path.with_name(path.name + ".new")
    if not new.exists():
        return
    if path.exists():
        set_aside(path)
    new.replace(path)
    sync_directory(path.parent)


def damaged_files(path: Path) -> list[tuple[int, Path]]:
    """Return the numbers and names of damaged files that were set aside, oldest first."""
    return _files_aside(path, DAMAGED)


def _files_aside(path: Path, why: str) -> list[tuple[int, Path]]:
    name = re.compile(re.escape(path.name) + rf"\.{why}-([0-9]{{1,9}})")
    found = ((name.fullmatch(other.name), other) for other in path.parent.iterdir())
    return sorted((int(match[1]), other) for match, other in found if match)


def wal_bytes(path: Path) -> int:
    """Return the size of a database's write-ahead log."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except FileNotFoundError:
        return 0
