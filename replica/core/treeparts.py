"""Parts of a digested map as they travel: what may be asked for, and the bytes that answer it.

A want, 38 bytes (integers big-endian; what a kind does not use is zero):

    u8  kind     1 NODES: the node digests; 2 DIGESTS: the bucket digests of a node; 3 BUCKETS: buckets of a node
    u8  node
    32  mask     BUCKETS: bit b, counted from the lowest of the last byte, asks for bucket b of the node; not empty
    u32 offset   BUCKETS: where to go on in a bucket that is larger than a part; then exactly one bucket is asked for

A part, at most PART_BYTES_MAX:

    NODES        256 x 32 node digests, u64 number of keys
    DIGESTS      256 x 32 bucket digests
    BUCKETS      pieces: u16 bucket, u32 total size, u32 offset, u32 length, content

Pieces are whole buckets, in the order asked for, as many as fit; or one slice of the first bucket, if that one alone
does not fit. A whole bucket, like digests, proves itself at once; slices prove nothing before they are all there, so
the slices of one bucket are asked of one source. A want does not say of which map: the message around it does.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from replica.core.layout import DIGEST_SIZE, U64, LayoutError, Reader
from replica.core.tree import NODE_FANOUT, NODES, split_digests

PART_BYTES_MAX = 1024 * 1024
# A fetcher collects slices up to this size before it can tell whether they are right.
BUCKET_BYTES_MAX = 64 * 1024 * 1024
WANT_SIZE = 38

_MASK_SIZE = NODE_FANOUT // 8
_WANT = struct.Struct(f">BB{_MASK_SIZE}sI")
_PIECE = struct.Struct(">HIII")
SLICE_BYTES_MAX = PART_BYTES_MAX - _PIECE.size


class Kind(IntEnum):
    """What a want asks for."""

    NODES = 1
    DIGESTS = 2
    BUCKETS = 3


@dataclass(frozen=True, slots=True)
class Want:
    """One request. `buckets` are numbers within the node, 0 to 255, ascending.

    One with an offset goes to the source of the slices before it.
    """

    kind: Kind
    node: int = 0
    buckets: tuple[int, ...] = ()
    offset: int = 0

    def encode(self) -> bytes:
        """Return the documented layout."""
        mask = sum(1 << bucket for bucket in self.buckets)
        return _WANT.pack(self.kind, self.node, mask.to_bytes(_MASK_SIZE, "big"), self.offset)

    @classmethod
    def decode(cls, raw: bytes) -> "Want":
        """Decode a request from outside strictly; LayoutError says what is wrong."""
        if len(raw) != WANT_SIZE:
            raise LayoutError(f"a want of {len(raw)} bytes, it has {WANT_SIZE}")
        kind, node, mask, offset = _WANT.unpack(raw)
        bits = int.from_bytes(mask, "big")
        buckets = tuple(bucket for bucket in range(NODE_FANOUT) if bits >> bucket & 1)
        if kind not in _KINDS:
            raise LayoutError(f"unknown kind of want {kind}")
        if kind == Kind.NODES and node:
            raise LayoutError("a want of the node digests that names a node")
        if (kind == Kind.BUCKETS) != bool(buckets) or (offset and len(buckets) != 1):
            raise LayoutError(f"a want of kind {kind} for {len(buckets)} buckets from offset {offset}")
        return cls(Kind(kind), node, buckets, offset)


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Piece:
    """A bucket, or a slice of one. `bucket` counts within the node."""

    bucket: int
    total: int
    offset: int
    data: bytes

    @property
    def is_whole(self) -> bool:
        """Say whether this is the bucket and not a slice."""
        return len(self.data) == self.total


class TreeSource(Protocol):
    """A digested map, read by its digests and buckets; a `BucketedMap` shows itself as of its last root."""

    def nodes(self) -> tuple[bytes, ...]:
        """Return the 256 node digests."""
        ...

    def count(self) -> int:
        """Return the number of keys."""
        ...

    def bucket_digests(self, node: int) -> tuple[bytes, ...]:
        """Return the 256 digests of the buckets of `node`."""
        ...

    def bucket(self, number: int) -> bytes:
        """Return the content of a bucket, `number` counting from 0 to 65,535."""
        ...


def part_of(source: TreeSource, want: Want) -> bytes:
    """Return the answer to a want; LayoutError if it asks for more of a bucket than there is, or a bucket is too large.

    It reads at most one bucket beyond what it returns.
    """
    if want.kind is Kind.NODES:
        return b"".join(source.nodes()) + U64.pack(source.count())
    if want.kind is Kind.DIGESTS:
        return b"".join(source.bucket_digests(want.node))
    parts: list[bytes] = []
    room = PART_BYTES_MAX
    for bucket in want.buckets:
        number = want.node * NODE_FANOUT + bucket
        content = source.bucket(number)
        if not parts and (want.offset or len(content) > SLICE_BYTES_MAX):
            return _slice(number, content, want.offset)
        room -= _PIECE.size + len(content)
        if room < 0:
            break
        parts += (_PIECE.pack(number, len(content), 0, len(content)), content)
    return b"".join(parts)


def _slice(number: int, content: bytes, offset: int) -> bytes:
    total = len(content)
    if not SLICE_BYTES_MAX < total <= BUCKET_BYTES_MAX or offset >= total:
        raise LayoutError(f"bucket {number} has {total} bytes: no slice of it begins at {offset}")
    data = content[offset : offset + SLICE_BYTES_MAX]
    return _PIECE.pack(number, total, offset, len(data)) + data


def decode_nodes(data: bytes) -> tuple[tuple[bytes, ...], int]:
    """Return the node digests and the number of keys of a NODES part; LayoutError for another size."""
    reader = Reader(data)
    nodes, count = split_digests(reader.take(NODES * DIGEST_SIZE)), reader.u64()
    reader.finish()
    return nodes, count


def decode_pieces(want: Want, data: bytes) -> list[Piece]:
    """Return the pieces of a BUCKETS part: at least one; LayoutError unless they are what `want` asks for.

    That is the first wanted buckets whole, in order, or the slice of the first one that begins at the want's offset.
    """
    if len(data) > PART_BYTES_MAX:
        raise LayoutError(f"a part of {len(data)} bytes, the limit is {PART_BYTES_MAX}")
    reader = Reader(data)
    pieces: list[Piece] = []
    for bucket in want.buckets:
        number, total, offset, length = _PIECE.unpack(reader.take(_PIECE.size))
        if number != want.node * NODE_FANOUT + bucket:
            raise LayoutError(f"bucket {number} was not asked for, or not at this place")
        piece = Piece(bucket, total, offset, reader.take(length))
        pieces.append(piece)
        if want.offset or not piece.is_whole:
            _check_slice(piece, want, len(pieces))
            break
        if offset:
            raise LayoutError(f"a whole bucket at offset {offset}")
        if not reader.left():
            break
    reader.finish()
    return pieces


def _check_slice(piece: Piece, want: Want, place: int) -> None:
    if not SLICE_BYTES_MAX < piece.total <= BUCKET_BYTES_MAX:
        raise LayoutError(f"slices of a bucket of {piece.total} bytes")
    left = piece.total - want.offset
    if place > 1 or piece.offset != want.offset or left <= 0 or len(piece.data) != min(left, SLICE_BYTES_MAX):
        raise LayoutError(f"a slice of {len(piece.data)} bytes at offset {piece.offset} is not the next one")
