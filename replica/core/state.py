"""An application's whole state: an ordered map of byte strings, digested by buckets.

Keys fall into 65,536 buckets by the first two bytes of their SHA-256; 256 buckets make a node, 256 nodes the root:

    bucket = SHA-256(0x20 || for each key in byte order: u32 length, key, u32 length, value)    empty: 32 zero bytes
    node   = SHA-256(0x21 || its 256 bucket digests)                                            empty: 32 zero bytes
    root   = SHA-256(0x22 || the 256 node digests || u64 number of keys)

A bucket's content is bounded: keys that fall into one bucket are easily found, and a bucket that could not be hashed or
transferred in reasonable time would keep a replica that was away from ever coming back. A put that would fill a bucket
beyond its limit fails, everywhere alike: the sizes follow from the map's content alone.

Between two calls of `root()` only the buckets that were touched are hashed again, so the cost of a checkpoint follows
what changed; `settle()` does part of that before, so that no single call takes long. The fan-out keeps a bucket at
about sixteen keys with a million of them.

A bucket is a tuple of *items*, one per key, that is replaced and never changed: so a view of the whole map, frozen as
it is, costs a copy of the table of buckets (a few milliseconds), however many keys there are. An item is the key with
its value as they are hashed, in one byte string, and all that is kept of a value. A bucket has no more elements than
keys, because Python's garbage collector walks through those of every new tuple.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from sortedcontainers import SortedList

from replica.core.frozen import FrozenMap
from replica.core.layout import DIGEST_SIZE
from replica.core.tree import (
    EMPTY,
    ITEM_OVERHEAD,
    KEY_BYTES_MAX,
    NODE_FANOUT,
    NODES,
    VALUE_BYTES_MAX,
    bucket_digest,
    bucket_of,
    encode_item,
    key_of,
    node_digest,
    root_digest,
    split_digests,
    value_of,
)

# The content of one bucket of an application's state.
CONTENT_BYTES_MAX = 16 * 1024 * 1024
# Keys that `settle` digests at a time: some 10 ms with a million keys stored.
SETTLED_AT_ONCE = 1024
# Keys sorted in one call when a large map is made, about; other threads run between two calls. And how many of them
# there are to each of the sample from which it is seen where to divide them.
SORTED_AT_ONCE = 32_768
SAMPLED_EVERY = 1024


class BucketedMap:
    """An ordered map of byte strings with undo of the running operation and an incremental digest.

    Reads and writes between `begin()` and `commit()` or `rollback()` belong to one operation. `nodes()`, `count()`,
    `bucket_digests()` and `bucket()` show the map as the last `root()` or `settle()` digested it.

    Invariants, checked by `check()`:
      1. the buckets hold exactly the map's items, those touched and not yet digested as they were before;
      2. no bucket is empty, and every bucket is sorted;
      3. exactly the nodes with a bucket have bucket digests, less those not digested yet;
      4. `_sizes` holds the size of every bucket's content, the running operation included;
      5. `_keys` holds the map's keys in byte order.
    """

    def __init__(self, items: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Make a map of keys and values that were digested before; they do not count as changes.

        A million keys take a few seconds, and less if they come in order.
        """
        self._map: dict[bytes, bytes] = {key: encode_item(key, value) for key, value in items}
        self._keys: SortedList = SortedList(self._map)
        # What the running operation found: key -> its item before it, and the number of its bucket.
        self._undo: dict[bytes, tuple[bytes | None, int]] = {}
        # What was committed and is not yet digested: key -> its item as it was digested, and the number of its bucket.
        self._touched: dict[bytes, tuple[bytes | None, int]] = {}
        # What was committed since the last take_changes(): key -> item, None if it is gone.
        self._changed: dict[bytes, bytes | None] = {}
        # Per bucket its items as they were digested, shared with the map, in byte order of their keys. So a bucket is
        # hashed without looking up its other keys.
        self._buckets: dict[int, tuple[bytes, ...]] = {}
        # Node -> its 256 bucket digests, joined, so that a node is hashed without collecting them.
        self._bucket_digests: dict[int, bytearray] = {}
        self._node_digests: list[bytes] = [EMPTY] * NODES
        self._stale_nodes: set[int] = set()
        self._count = 0
        self._sizes: dict[int, int] = {}
        filed: dict[int, list[bytes]] = {}
        for key in self._keys:
            item, number = self._map[key], bucket_of(key)
            self._sizes[number] = self._sizes.get(number, 0) + len(item)
            filed.setdefault(number, []).append(item)
        self._buckets = {number: tuple(found) for number, found in filed.items()}
        for number in self._buckets:
            self._hash_bucket(number)
        self._hash_nodes()
        self._count = len(self._map)

    @classmethod
    def thawed(cls, frozen: FrozenMap) -> "BucketedMap":
        """Return a map that goes on from a frozen one, without changes: some two seconds per million keys.

        In a thread of its own it holds up the others for less than a tenth of a second at a time.
        """
        made = cls()
        made._buckets = dict(frozen.buckets)
        made._bucket_digests = {node: bytearray(digests) for node, digests in frozen.digests.items()}
        made._node_digests = list(frozen.nodes())
        made._count = frozen.count()
        made._sizes = {number: sum(map(len, items)) for number, items in made._buckets.items()}
        made._map = {key_of(item): item for item in chain.from_iterable(made._buckets.values())}
        made._keys = SortedList(_sorted(list(made._map)))
        return made

    def __len__(self) -> int:
        return len(self._map)

    def __contains__(self, key: bytes) -> bool:
        return key in self._map

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, or None."""
        item = self._map.get(key)
        return None if item is None else value_of(item, key)

    def put(self, key: bytes, value: bytes) -> None:
        """Set `key`; ValueError if key, value or its bucket exceed the limits, TypeError if they are not bytes."""
        if type(key) is not bytes or type(value) is not bytes:
            raise TypeError("keys and values of the state are bytes")
        if not 1 <= len(key) <= KEY_BYTES_MAX:
            raise ValueError(f"a key must have 1 to {KEY_BYTES_MAX} bytes, not {len(key)}")
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(f"a value must have at most {VALUE_BYTES_MAX} bytes, not {len(value)}")
        number, old = bucket_of(key), self._map.get(key)
        size = self._sizes.get(number, 0) + ITEM_OVERHEAD + len(key) + len(value) - _size(old)
        if size > CONTENT_BYTES_MAX:
            raise ValueError(f"the keys that share a bucket with this one have {CONTENT_BYTES_MAX} bytes already")
        self._set(key, number, old, encode_item(key, value), size)

    def put_unbounded(self, key: bytes, value: bytes) -> None:
        """Set `key` without looking at sizes: for the platform's own records, whose keys are short."""
        number, old, item = bucket_of(key), self._map.get(key), encode_item(key, value)
        self._set(key, number, old, item, self._sizes.get(number, 0) + len(item) - _size(old))

    def delete(self, key: bytes) -> bool:
        """Remove `key`; say whether it was there."""
        old = self._map.pop(key, None)
        if old is None:
            return False
        number = bucket_of(key)
        self._keys.remove(key)
        self._undo.setdefault(key, (old, number))
        self._sizes[number] -= len(old)
        return True

    def scan(
        self, prefix: bytes = b"", after: bytes | None = None, without: bytes | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys that begin with `prefix` and their values in byte order, those above `after` only.

        without: keys that begin so are stepped over in one jump, however many there are.
        """
        if without is not None and prefix.startswith(without):
            return
        place, inclusive = (prefix, True) if after is None or after < prefix else (after, False)
        while True:
            # Looked up anew for each key, so that what is put or deleted meanwhile is seen alike everywhere.
            key = next(self._keys.irange(minimum=place, inclusive=(inclusive, True)), None)
            if key is None or not key.startswith(prefix):
                return
            if without is not None and key.startswith(without):
                if not (above := _above(without)):
                    return
                place, inclusive = above, True
                continue
            yield key, value_of(self._map[key], key)
            place, inclusive = key, False

    def begin(self) -> None:
        """Start an operation: forget how to undo the one before."""
        self._undo.clear()

    def commit(self) -> None:
        """Keep what the operation changed."""
        for key, found in self._undo.items():
            self._touched.setdefault(key, found)
            self._changed[key] = self._map.get(key)
        self._undo.clear()

    def rollback(self) -> None:
        """Take back what the operation changed."""
        for key, (item, number) in self._undo.items():
            now = self._map.get(key)
            self._sizes[number] += _size(item) - _size(now)
            if item is not None:
                self._map[key] = item
                if now is None:
                    self._keys.add(key)
            elif now is not None:
                del self._map[key]
                self._keys.remove(key)
        self._undo.clear()

    def undoable(self) -> list[tuple[bytes, bytes | None]]:
        """Return the keys that the running operation wrote, each with its value before it, None if it had none."""
        return [(key, None if item is None else value_of(item, key)) for key, (item, _) in self._undo.items()]

    def root(self) -> bytes:
        """Return the 32-byte digest of the whole map, hashing only buckets touched since the last call.

        RuntimeError while an operation is neither committed nor taken back.
        """
        self._need_no_operation()
        self._digest(len(self._touched))
        self._hash_nodes()
        self._count = len(self._map)
        return root_digest(self._node_digests, self._count)

    def settle(self) -> None:
        """Digest some of what was committed, if it is much: less is left for `root()`. Between operations only."""
        self._need_no_operation()
        if len(self._touched) >= SETTLED_AT_ONCE:
            self._digest(SETTLED_AT_ONCE)

    def nodes(self) -> tuple[bytes, ...]:
        """Return the 256 node digests as of the last `root()`."""
        return tuple(self._node_digests)

    def count(self) -> int:
        """Return the number of keys as of the last `root()`."""
        return self._count

    def bucket_digests(self, node: int) -> tuple[bytes, ...]:
        """Return the 256 digests of the buckets of `node` as of the last `root()`."""
        digests = self._bucket_digests.get(node)
        return (EMPTY,) * NODE_FANOUT if digests is None else split_digests(digests)

    def bucket(self, number: int) -> bytes:
        """Return the content of bucket `number` as the last `root()` hashed it, without the tag byte."""
        return b"".join(self._buckets.get(number, ()))

    def take_changes(self) -> list[tuple[bytes, bytes | None]]:
        """Return the keys committed since the last call, each with its item now or None if deleted.

        Their order means nothing, and differs between replicas. Every committed key is remembered until then: call it
        at every milestone. RuntimeError while an operation is neither committed nor taken back.
        """
        self._need_no_operation()
        changes, self._changed = self._changed, {}
        return list(changes.items())

    def frozen(self) -> FrozenMap:
        """Return the map as it is now, digested; it stays so. A few milliseconds, beside what `root()` has to do.

        RuntimeError while an operation is neither committed nor taken back.
        """
        self.root()
        digests = {node: bytes(joined) for node, joined in self._bucket_digests.items()}
        return FrozenMap(dict(self._buckets), digests, tuple(self._node_digests), self._count)

    def check(self) -> None:
        """Raise RuntimeError if an invariant is broken."""
        filed = {number: [key_of(item) for item in items] for number, items in self._buckets.items()}
        before = {key: item for key, (item, _) in [*self._undo.items(), *self._touched.items()]}
        digested = {key: item for key, item in {**self._map, **before}.items() if item is not None}
        if {key_of(item): item for items in self._buckets.values() for item in items} != digested:
            raise RuntimeError("invariant 1: the buckets and the map hold different items")
        if any(not keys or keys != sorted(keys) for keys in filed.values()):
            raise RuntimeError("invariant 2: a bucket is empty or not sorted")
        nodes = {number // NODE_FANOUT for number in self._buckets}
        if self._bucket_digests.keys() - self._stale_nodes != nodes - self._stale_nodes:
            raise RuntimeError("invariant 3: bucket digests of other nodes than those with a bucket")

        sizes = dict.fromkeys(self._sizes, 0)
        for key, item in self._map.items():
            sizes[bucket_of(key)] = sizes.get(bucket_of(key), 0) + len(item)
        if sizes != self._sizes:
            raise RuntimeError("invariant 4: a bucket of another size")
        if list(self._keys) != sorted(self._map):
            raise RuntimeError("invariant 5: other keys than those of the map, or in another order")

    def _set(self, key: bytes, number: int, old: bytes | None, new: bytes, size: int) -> None:
        """Set a key whose item was `old`, in the bucket `number`, whose content has `size` bytes then."""
        if key not in self._undo:
            self._undo[key] = (old, number)
        if old is None:
            self._keys.add(key)
        self._map[key] = new
        self._sizes[number] = size

    def _need_no_operation(self) -> None:
        if self._undo:
            raise RuntimeError("an operation is running: commit() or rollback() first")

    def _file(self, key: bytes, old: bytes | None, number: int) -> None:
        """Put the item of `key` into its bucket as it is now, in place of `old`, or take it out if the key is gone."""
        items, new = self._buckets.get(number, ()), self._map.get(key)
        place = bisect_left(items, key, key=key_of) if old is None else items.index(old)
        items = (*items[:place], *(() if new is None else (new,)), *items[place + (old is not None) :])
        if items:
            self._buckets[number] = items
        else:
            self._buckets.pop(number, None)

    def _digest(self, keys_max: int) -> None:
        """Digest the buckets of up to so many touched keys, those touched first."""
        if keys_max >= len(self._touched):
            touched, self._touched = self._touched, {}
        else:
            touched = dict(islice(self._touched.items(), keys_max))
            for key in touched:
                del self._touched[key]
        last = {number: key for key, (_, number) in touched.items()}
        for key, (old, number) in touched.items():
            self._file(key, old, number)
            if last[number] is key:
                self._hash_bucket(number)

    def _hash_nodes(self) -> None:
        for node in self._stale_nodes:
            digest = node_digest(self._bucket_digests[node])
            self._node_digests[node] = digest
            if digest is EMPTY:
                del self._bucket_digests[node]
        self._stale_nodes.clear()

    def _hash_bucket(self, number: int) -> None:
        node, place = divmod(number, NODE_FANOUT)
        digests = self._bucket_digests.get(node)
        if digests is None:
            digests = self._bucket_digests[node] = bytearray(NODE_FANOUT * DIGEST_SIZE)
        digests[place * DIGEST_SIZE : (place + 1) * DIGEST_SIZE] = bucket_digest(self.bucket(number))
        self._stale_nodes.add(node)


def _size(item: bytes | None) -> int:
    """Return what an item adds to its bucket's content; nothing if there is none."""
    return 0 if item is None else len(item)


def _above(prefix: bytes) -> bytes:
    """Return the lowest bytes above all that begin with `prefix`; empty if there are none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b""


def _sorted(keys: list[bytes]) -> list[bytes]:
    """Sort, in calls that each take a short time only: a call of C code lets no other thread run."""
    # Dealt out between every so manieth key of a sample, and sorted there.
    sample = sorted(keys[::SAMPLED_EVERY])
    bounds = sample[:: SORTED_AT_ONCE // SAMPLED_EVERY]
    shares: list[list[bytes]] = [[] for _ in range(len(bounds) + 1)]
    for key in keys:
        shares[bisect_right(bounds, key)].append(key)
    return [key for share in shares for key in sorted(share)]
