"""Batches: what one slot orders.

u64 time: the proposer's clock in milliseconds since 1970, advisory
u16 positions, then per position u64: the CUT, at every K-th slot one for each log, else none
u16 envelopes, then per envelope u32 length and its bytes, as they were received from the client

d = SHA-256("trustlog/batch" || 0x00 0x00 || these bytes)
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from replica.core.envelope import Envelope, decode_envelope
from replica.core.genesis import Limits
from replica.core.layout import LayoutError, Reader

BATCH_TAG = b"trustlog/batch\0\0"
CUT_POSITIONS_MAX = 64
# What a batch takes besides its envelopes: time, two counts, and a cut.
BATCH_OVERHEAD_MAX = 8 + 2 + 8 * CUT_POSITIONS_MAX + 2


@dataclass(frozen=True, slots=True)
class Batch:
    """A decoded batch; `raw` is what was proposed and what `digest` covers."""

    raw: bytes
    digest: bytes
    time_ms: int
    cut: tuple[int, ...]
    envelopes: tuple[Envelope, ...]


def batch_digest(raw: bytes) -> bytes:
    """Return d, the 32-byte digest that votes name."""
    return hashlib.sha256(BATCH_TAG + raw).digest()


def encode_batch(time_ms: int, cut: Sequence[int], envelopes: Sequence[bytes]) -> bytes:
    """Return the documented layout."""
    parts = [struct.pack(f">QH{len(cut)}QH", time_ms, len(cut), *cut, len(envelopes))]
    for envelope in envelopes:
        parts += (struct.pack(">I", len(envelope)), envelope)
    return b"".join(parts)


def make_batch(time_ms: int, cut: Sequence[int], envelopes: Sequence[Envelope]) -> Batch:
    """Return the batch that proposes these envelopes."""
    raw = encode_batch(time_ms, cut, [envelope.raw for envelope in envelopes])
    return Batch(raw, batch_digest(raw), time_ms, tuple(cut), tuple(envelopes))


NULL_BATCH = make_batch(0, (), ())


def decode_batch(raw: bytes, cluster_id: bytes, limits: Limits) -> Batch:
    """Decode a batch and its envelopes strictly; signatures are not looked at. LayoutError says what is wrong."""
    if len(raw) > limits.batch_bytes_max:
        raise LayoutError(f"a batch of {len(raw)} bytes, the limit is {limits.batch_bytes_max}")
    reader = Reader(raw)
    time_ms, positions = reader.u64(), reader.u16()
    if positions > CUT_POSITIONS_MAX:
        raise LayoutError(f"a cut of {positions} positions")
    cut = tuple(reader.u64() for _ in range(positions))
    count = reader.u16()
    if count > limits.batch_envelopes_max:
        raise LayoutError(f"a batch of {count} envelopes, the limit is {limits.batch_envelopes_max}")
    envelopes = tuple(
        decode_envelope(reader.block(limits.envelope_bytes_max), cluster_id, limits) for _ in range(count)
    )
    reader.finish()
    return Batch(raw, batch_digest(raw), time_ms, cut, envelopes)
