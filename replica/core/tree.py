"""The digest tree over a map of byte strings: its arithmetic, and the content of a bucket. No state.

`replica.core.state` says how buckets, nodes and the root are digested. What a bucket's digest covers, behind the tag
byte, is the bucket's *content*: for each key in byte order its *item*, which is u32 length, key, u32 length, value. It
travels as it is hashed, and is never encoded in a second way.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import starmap

from replica.core.layout import DIGEST_SIZE, U32, U64, LayoutError, Reader

BUCKETS = 65536
NODE_FANOUT = 256
NODES = BUCKETS // NODE_FANOUT
EMPTY = bytes(DIGEST_SIZE)
KEY_BYTES_MAX = 4096
VALUE_BYTES_MAX = 1024 * 1024
# The two lengths of an item.
ITEM_OVERHEAD = 8

_EMPTY_NODE = EMPTY * NODE_FANOUT
# From 2,048 bytes on hashlib lets other threads run while it digests, and where one is busy it takes milliseconds to go
# on. So what takes microseconds is given to it in pieces, and only what takes longer as a whole.
_PIECE_BYTES = 2047
_PIECES_BYTES_MAX = 64 * 1024
_LENGTHS = tuple(U32.pack(size) for size in range(KEY_BYTES_MAX + 1))


def bucket_of(key: bytes) -> int:
    """Return the number of the bucket that `key` belongs to."""
    return int.from_bytes(hashlib.sha256(key).digest()[:2], "big")


def bucket_digest(content: bytes) -> bytes:
    """Return the digest of a bucket with this content; EMPTY for an empty one."""
    return _tagged(b"\x20", content) if content else EMPTY


def node_digest(digests: bytes | bytearray) -> bytes:
    """Return the digest of a node from its 256 bucket digests, joined; EMPTY if all of them are."""
    return EMPTY if digests == _EMPTY_NODE else _tagged(b"\x21", digests)


def root_digest(nodes: Sequence[bytes], count: int) -> bytes:
    """Return the digest of a whole map from its 256 node digests and its number of keys."""
    return hashlib.sha256(b"\x22" + b"".join(nodes) + U64.pack(count)).digest()


def _tagged(tag: bytes, content: bytes | bytearray) -> bytes:
    size = len(content)
    if size < _PIECE_BYTES or size > _PIECES_BYTES_MAX:
        return hashlib.sha256(tag + content).digest()
    digest = hashlib.sha256(tag)
    for at in range(0, size, _PIECE_BYTES):
        digest.update(content[at : at + _PIECE_BYTES])
    return digest.digest()


def split_digests(joined: bytes | bytearray) -> tuple[bytes, ...]:
    """Return the 256 digests that `joined` consists of; LayoutError for another number."""
    if len(joined) != NODE_FANOUT * DIGEST_SIZE:
        raise LayoutError(f"{len(joined)} bytes are not {NODE_FANOUT} digests")
    return tuple(bytes(joined[at : at + DIGEST_SIZE]) for at in range(0, len(joined), DIGEST_SIZE))


def encode_item(key: bytes, value: bytes) -> bytes:
    """Return the item of a key: what stands for it in the content of its bucket."""
    size = len(value)
    return b"".join((_LENGTHS[len(key)], key, _LENGTHS[size] if size <= KEY_BYTES_MAX else U32.pack(size), value))


def key_of(item: bytes) -> bytes:
    """Return the key that an item stands for."""
    return item[4 : 4 + int.from_bytes(item[:4], "big")]


def value_of(item: bytes, key: bytes) -> bytes:
    """Return the value in the item of `key`."""
    return item[ITEM_OVERHEAD + len(key) :]


def with_values(changes: Iterable[tuple[bytes, bytes | None]]) -> Iterator[tuple[bytes, bytes | None]]:
    """Yield every key with its value in place of its item; with None if it is gone."""
    return ((key, None if item is None else value_of(item, key)) for key, item in changes)


def encode_bucket(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the content of a bucket with these keys and values, which must be in byte order of the keys."""
    return b"".join(starmap(encode_item, items))


def decode_bucket(number: int, content: bytes, value_bytes_max: int) -> list[tuple[bytes, bytes]]:
    """Return the keys and values of bucket `number` in byte order.

    LayoutError unless every key has 1 to KEY_BYTES_MAX bytes, belongs to this bucket and is above the one before,
    every value has at most `value_bytes_max` bytes, and nothing is left over.
    """
    reader = Reader(content)
    items = []
    before = b""
    while reader.left():
        key = reader.block(KEY_BYTES_MAX)
        # The empty key is not above the empty string, so this refuses it too.
        if key <= before:
            raise LayoutError(f"bucket {number}: keys are empty, repeated or out of order")
        if bucket_of(key) != number:
            raise LayoutError(f"bucket {number} holds a key of bucket {bucket_of(key)}")
        items.append((key, reader.block(value_bytes_max)))
        before = key
    return items
