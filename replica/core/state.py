"""An application's whole state: an ordered map of byte strings, digested by buckets.

Keys fall into 65,536 buckets by the first two bytes of their SHA-256; 256 buckets make a node, 256 nodes the root:

    bucket = SHA-256(0x20 || for each key in byte order: u32 length, key, u32 length, value)    empty: 32 zero bytes
    node   = SHA-256(0x21 || its 256 bucket digests)                                            empty: 32 zero bytes
    root   = SHA-256(0x22 || the 256 node digests || u64 number of keys)

Between two calls of `root()` only the buckets that were touched are hashed again, so the cost of a checkpoint follows
what changed. The fan-out keeps a bucket at about sixteen keys with a million of them.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator

from sortedcontainers import SortedDict

from replica.core.layout import U32, U64

BUCKETS = 65536
NODE_FANOUT = 256
EMPTY = bytes(32)
KEY_BYTES_MAX = 4096
VALUE_BYTES_MAX = 1024 * 1024


class BucketedMap:
    """An ordered map of byte strings with undo of the running operation and an incremental digest.

    Reads and writes between `begin()` and `commit()` or `rollback()` belong to one operation.

    Invariants, checked by `check()`:
      1. the buckets hold exactly the map's keys, less those touched since the last `root()`;
      2. no bucket is empty, and every bucket is sorted.
    """

    def __init__(self) -> None:
        self._map: SortedDict = SortedDict()
        self._undo: dict[bytes, bytes | None] = {}
        self._touched: dict[bytes, None] = {}
        self._buckets: dict[int, list[bytes]] = {}
        self._bucket_digests: dict[int, bytes] = {}
        self._node_digests: list[bytes] = [EMPTY] * (BUCKETS // NODE_FANOUT)

    def __len__(self) -> int:
        return len(self._map)

    def __contains__(self, key: bytes) -> bool:
        return key in self._map

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, or None."""
        value: bytes | None = self._map.get(key)
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Set `key`; ValueError if key or value exceed the limits, TypeError if they are not bytes."""
        if type(key) is not bytes or type(value) is not bytes:
            raise TypeError("keys and values of the state are bytes")
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise ValueError(f"a key must have 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(f"a value must have at most {VALUE_BYTES_MAX} bytes, not {len(value)}")
        self.put_unbounded(key, value)

    def put_unbounded(self, key: bytes, value: bytes) -> None:
        """Set `key` without looking at sizes: for the platform's own records, which are bounded elsewhere."""
        if key not in self._undo:
            self._undo[key] = self._map.get(key)
        self._map[key] = value

    def delete(self, key: bytes) -> bool:
        """Remove `key`; say whether it was there."""
        old = self._map.pop(key, None)
        if old is None:
            return False
        self._undo.setdefault(key, old)
        return True

    def scan(self, prefix: bytes = b"", after: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys that begin with `prefix` and their values in byte order, those above `after` only."""
        place, inclusive = (prefix, True) if after is None or after < prefix else (after, False)
        while True:
            # Looked up anew for each key, so that what is put or deleted meanwhile is seen alike everywhere.
            key = next(self._map.irange(minimum=place, inclusive=(inclusive, True)), None)
            if key is None or not key.startswith(prefix):
                return
            yield key, self._map[key]
            place, inclusive = key, False

    def begin(self) -> None:
        """Start an operation: forget how to undo the one before."""
        self._undo.clear()

    def commit(self) -> None:
        """Keep what the operation changed."""
        for key in self._undo:
            self._touched[key] = None
        self._undo.clear()

    def rollback(self) -> None:
        """Take back what the operation changed."""
        for key, value in self._undo.items():
            if value is None:
                self._map.pop(key, None)
            else:
                self._map[key] = value
        self._undo.clear()

    def root(self) -> bytes:
        """Return the 32-byte digest of the whole map, hashing only buckets touched since the last call."""
        touched: set[int] = set()
        for key in self._touched:
            touched.add(self._file(key))
        self._touched.clear()
        for number in sorted(touched):
            self._hash_bucket(number)
        for node in sorted({number // NODE_FANOUT for number in touched}):
            first = node * NODE_FANOUT
            digests = [self._bucket_digests.get(b, EMPTY) for b in range(first, first + NODE_FANOUT)]
            empty = all(digest is EMPTY for digest in digests)
            self._node_digests[node] = EMPTY if empty else hashlib.sha256(b"\x21" + b"".join(digests)).digest()
        count = U64.pack(len(self._map))
        return hashlib.sha256(b"\x22" + b"".join(self._node_digests) + count).digest()

    def check(self) -> None:
        """Raise RuntimeError if an invariant is broken."""
        filed = {key for keys in self._buckets.values() for key in keys}
        if filed - self._touched.keys() != set(self._map) - self._touched.keys():
            raise RuntimeError("invariant 1: the buckets and the map hold different keys")
        if any(not keys or keys != sorted(keys) for keys in self._buckets.values()):
            raise RuntimeError("invariant 2: a bucket is empty or not sorted")

    def _file(self, key: bytes) -> int:
        """Put `key` into its bucket, or take it out if it is gone; return the bucket's number."""
        number = int.from_bytes(hashlib.sha256(key).digest()[:2], "big")
        keys = self._buckets.setdefault(number, [])
        place = bisect_left(keys, key)
        filed = place < len(keys) and keys[place] == key
        if key in self._map:
            if not filed:
                keys.insert(place, key)
        elif filed:
            del keys[place]
        if not keys:
            del self._buckets[number]
        return number

    def _hash_bucket(self, number: int) -> None:
        keys = self._buckets.get(number)
        if keys is None:
            self._bucket_digests.pop(number, None)
            return
        parts = [b"\x20"]
        for key in keys:
            value = self._map[key]
            parts += (U32.pack(len(key)), key, U32.pack(len(value)), value)
        self._bucket_digests[number] = hashlib.sha256(b"".join(parts)).digest()
