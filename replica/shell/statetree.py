"""Reading one tree of a persisted milestone: its digests, and its entries verified against them."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby, starmap
from operator import itemgetter
from pathlib import Path

from replica.core.frozen import FrozenMap
from replica.core.tree import (
    BUCKETS,
    EMPTY,
    KEY_BYTES_MAX,
    NODE_FANOUT,
    bucket_digest,
    encode_bucket,
    encode_item,
    node_digest,
    root_digest,
)
from replica.shell.atrest import CLEAR, Clear, UnsealError
from replica.shell.sqlitefile import StoreError, is_broken, is_damage

# The platform's own records, in tree 1, are the longest: a session with all its results.
VALUE_BYTES_MAX = 8 * 1024 * 1024

Entry = tuple[bytes, bytes]


class StateDamagedError(StoreError):
    """The state file is damaged. Nothing is lost: the caller discards it and fetches the state from peers."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path}: damaged: {what}. It is of no more use: the replica moves it aside and fetches the state from "
            "its peers; check the disk if this comes again"
        )


class StateBrokenError(StateDamagedError):
    """SQLite finds the structure of the file damaged: whoever opens it again meets that again."""


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours: StateDamagedError if the file is damaged, or else StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        if is_broken(error):
            raise StateBrokenError(path, str(error)) from error
        if is_damage(error):
            raise StateDamagedError(path, str(error)) from error
        raise StoreError(f"{path}: {error}; see whether the disk is full or its folder not writable") from error


def opened_entries(seal: Clear, path: Path, tree: int, rows: list[Entry]) -> list[Entry]:
    """Return a bucket's entries as they were sealed, in key order; StateDamagedError if one does not open."""
    if seal is CLEAR:
        return rows
    opened = []
    for name, found in rows:
        if type(name) is not bytes or type(found) is not bytes:
            raise StateDamagedError(path, f"tree {tree}: an entry")
        try:
            opened.append(seal.unseal_entry(tree, name, found))
        except UnsealError as error:
            raise StateDamagedError(path, f"tree {tree}: an entry {error}") from error
    return sorted(opened)


class StateTree:
    """One tree of the milestone that a read transaction on `db` is frozen at; one thread at a time.

    Every method raises StateDamagedError if what it reads is damaged.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, number: int, seal: Clear = CLEAR) -> None:
        self._db = db
        self._seal = seal
        self._path = path
        self._number = number

    def count(self) -> int:
        """Return the number of keys."""
        return self._buckets[1]

    def nodes(self) -> tuple[bytes, ...]:
        """Return the 256 node digests; 32 zero bytes for an empty node."""
        return self._nodes

    def root(self) -> bytes:
        """Return the digest of the whole tree, from its buckets' digests."""
        return root_digest(self._nodes, self.count())

    def bucket_digests(self, node: int) -> tuple[bytes, ...]:
        """Return the 256 digests of the buckets of `node`; 32 zero bytes for an empty one."""
        first = node * NODE_FANOUT
        return tuple(self._digest(bucket) for bucket in range(first, first + NODE_FANOUT))

    def bucket(self, number: int) -> bytes:
        """Return a bucket's content, as hashed: u32 length, key, u32 length, value for each key, in key order."""
        with guarded(self._path):
            rows = self._db.execute(
                "select key, value from entries where tree = ? and bucket = ? order by key", (self._number, number)
            ).fetchall()
        return self._verified(number, self._opened(rows))

    def entries(self) -> Iterator[Entry]:
        """Yield every key and value, by bucket, each bucket after it was verified against its digest."""
        count = 0
        with guarded(self._path):
            rows = self._db.execute(
                "select bucket, key, value from entries where tree = ? order by bucket, key", (self._number,)
            )
            for bucket, found in groupby(rows, itemgetter(0)):
                entries = self._opened([(key, value) for _, key, value in found])
                self._verified(bucket, entries)
                count += len(entries)
                yield from entries
        if count != self.count():
            raise self._damaged(f"{count} entries in place of {self.count()}")

    def _opened(self, rows: list[Entry]) -> list[Entry]:
        return opened_entries(self._seal, self._path, self._number, rows)

    def frozen(self) -> FrozenMap:
        """Return the whole tree, each bucket verified against its digest; about three seconds per million keys."""
        buckets: dict[int, tuple[bytes, ...]] = {}
        with guarded(self._path):
            rows = self._db.execute(
                "select bucket, key, value from entries where tree = ? order by bucket, key", (self._number,)
            )
            for bucket, found in groupby(rows, itemgetter(0)):
                buckets[bucket] = self._items(bucket, found)
        if sum(map(len, buckets.values())) != self.count():
            raise self._damaged(f"{sum(map(len, buckets.values()))} entries in place of {self.count()}")
        size = NODE_FANOUT * 32
        digests = {
            node: bytes(self._buckets[0][node * size : node * size + size])
            for node, digest in enumerate(self._nodes)
            if digest != EMPTY
        }
        return FrozenMap(buckets, digests, self._nodes, self.count())

    def _items(self, bucket: int, found: Iterable[tuple[int, bytes, bytes]]) -> tuple[bytes, ...]:
        """Return a bucket's items. That they have its digest says that all of them are right, if they are bytes."""
        if type(bucket) is not int or not 0 <= bucket < BUCKETS:
            raise self._damaged("an entry without a bucket")
        entries = self._opened([(key, value) for _, key, value in found])
        keys, values = zip(*entries, strict=True)
        if {*map(type, keys), *map(type, values)} != {bytes} or max(map(len, keys)) > KEY_BYTES_MAX:
            raise self._damaged(f"an entry of bucket {bucket}")
        items = tuple(starmap(encode_item, entries))
        if self._digest(bucket) != bucket_digest(b"".join(items)):
            raise self._damaged(f"the content of bucket {bucket} does not have its digest")
        return items

    def _verified(self, bucket: int, entries: list[Entry]) -> bytes:
        if type(bucket) is not int or not 0 <= bucket < BUCKETS:
            raise self._damaged("an entry without a bucket")
        for key, value in entries:
            if type(key) is not bytes or type(value) is not bytes:
                raise self._damaged(f"an entry of bucket {bucket}")
            if not 1 <= len(key) <= KEY_BYTES_MAX or len(value) > VALUE_BYTES_MAX:
                raise self._damaged(f"the size of an entry of bucket {bucket}")
        content = encode_bucket(entries)
        if self._digest(bucket) != bucket_digest(content):
            raise self._damaged(f"the content of bucket {bucket} does not have its digest")
        return content

    def _digest(self, bucket: int) -> bytes:
        return bytes(self._buckets[0][bucket * 32 : bucket * 32 + 32])

    @cached_property
    def _buckets(self) -> tuple[bytearray, int]:
        """All bucket digests in a row (2 MiB), and the number of keys."""
        digests, count = bytearray(BUCKETS * 32), 0
        with guarded(self._path):
            rows = self._db.execute("select bucket, keys, digest from buckets where tree = ?", (self._number,))
            for bucket, keys, digest in rows:
                if [type(bucket), type(keys), type(digest)] != [int, int, bytes]:
                    raise self._damaged("a bucket's digest")
                if not 0 <= bucket < BUCKETS or keys < 1 or len(digest) != 32:
                    raise self._damaged(f"the digest of bucket {bucket}")
                digests[bucket * 32 : bucket * 32 + 32] = digest
                count += keys
        return digests, count

    @cached_property
    def _nodes(self) -> tuple[bytes, ...]:
        digests, size = bytes(self._buckets[0]), NODE_FANOUT * 32
        parts = [digests[at : at + size] for at in range(0, len(digests), size)]
        return tuple(map(node_digest, parts))

    def _damaged(self, what: str) -> StateDamagedError:
        return StateDamagedError(self._path, f"tree {self._number}: {what}")
