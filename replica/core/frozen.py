"""A digested map as it was at one moment: read by any thread, shown to others, and turned into a map again.

Nothing in it ever changes. Buckets are shared with the map that it was taken of, and with those made of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from replica.core.tree import EMPTY, ITEM_PARTS, NODE_FANOUT, root_digest, split_digests


@dataclass(frozen=True, slots=True)
class FrozenMap:
    """One map; a `TreeSource`.

    buckets: by number, 0 to 65,535, the parts of each bucket that is not empty: four per key, as `item_parts` makes
    them. digests: by node, the 256 digests of its buckets, joined, if one is not empty. node_digests: 256 of them.
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

    def bucket(self, number: int) -> bytes:
        """Return the content of a bucket."""
        return b"".join(self.buckets.get(number, ()))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield every key with its value, by bucket; within one in byte order."""
        for _, parts in sorted(self.buckets.items()):
            yield from zip(parts[1::ITEM_PARTS], parts[3::ITEM_PARTS], strict=True)


def keys_of(parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return the keys that a bucket's parts stand for, in byte order."""
    return parts[1::ITEM_PARTS]
