"""A digested map as it was at one moment: read by any thread, shown to others, and turned into a map again.

Nothing in it ever changes. Buckets are shared with the map that it was taken of, and with those made of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from replica.core.layout import DIGEST_SIZE
from replica.core.tree import EMPTY, NODE_FANOUT, key_of, root_digest, split_digests


@dataclass(frozen=True, slots=True)
class FrozenMap:
    """One map; a `TreeSource`.

    buckets: by number, 0 to 65,535, the items of each bucket that is not empty, in byte order of their keys. digests:
    by node, the 256 digests of its buckets, joined, if one is not empty. node_digests: 256 of them.
    """

    buckets: dict[int, tuple[bytes, ...]]
    digests: dict[int, bytes]
    node_digests: tuple[bytes, ...]
    keys: int

    def nodes(self) -> tuple[bytes, ...]:
        """Return the 256 node digests."""
        return self.node_digests

    def count(self) -> int:
        """Return the number of keys."""
        return self.keys

    def root(self) -> bytes:
        """Return the digest of the whole map."""
        return root_digest(self.node_digests, self.keys)

    def bucket_digests(self, node: int) -> tuple[bytes, ...]:
        """Return the 256 digests of the buckets of `node`."""
        joined = self.digests.get(node)
        return (EMPTY,) * NODE_FANOUT if joined is None else split_digests(joined)

    def bucket_digest(self, number: int) -> bytes:
        """Return the digest of a bucket."""
        node, place = divmod(number, NODE_FANOUT)
        return self.digests[node][place * DIGEST_SIZE : (place + 1) * DIGEST_SIZE] if node in self.digests else EMPTY

    def keys_in(self, number: int) -> int:
        """Return how many keys a bucket has."""
        return len(self.buckets.get(number, ()))

    def bucket(self, number: int) -> bytes:
        """Return the content of a bucket."""
        return b"".join(self.buckets.get(number, ()))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield every key with its item, by bucket; within one in byte order."""
        for _, items in sorted(self.buckets.items()):
            for item in items:
                yield key_of(item), item
