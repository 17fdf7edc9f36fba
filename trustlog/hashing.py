"""The hash chain of a log (A2M, SOSP 2007, section 3: sequence number and cumulative digest).

    digest_i = SHA-256(0x00 || payload_i)
    head_i   = SHA-256(0x01 || head_{i-1} || u64(i) || digest_i)
    head_0   = SHA-256(0x02 || log id || u64(epoch))
    log id   = SHA-256(uncompressed public key, 65 bytes)

All integers are big-endian. The first byte separates the three uses, so that no payload can be mistaken for
a link of the chain. An index is part of its link, hence equal heads mean equal histories *at equal
positions*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

HASH_SIZE = 32


def entry_digest(payload: bytes) -> bytes:
    """Digest of an entry's payload (any length): 32 bytes."""
    return hashlib.sha256(b"\x00" + payload).digest()


def chain(head: bytes, index: int, digest: bytes) -> bytes:
    """Head after the entry ``digest`` at ``index`` (u64) on top of ``head``; 32 bytes each."""
    return hashlib.sha256(b"\x01" + head + index.to_bytes(8, "big") + digest).digest()


def genesis_head(log_id: bytes, epoch: int) -> bytes:
    """Head of the empty log ``log_id`` (32 bytes) in ``epoch`` (u64)."""
    return hashlib.sha256(b"\x02" + log_id + epoch.to_bytes(8, "big")).digest()


def log_id(public_key: bytes) -> bytes:
    """Identity of a log: the digest (32 bytes) of its uncompressed P-256 public key (65 bytes)."""
    return hashlib.sha256(public_key).digest()


def fold(head: bytes, first: int, digests: Iterable[bytes]) -> bytes:
    """Head after a whole group: ``digests`` (32 bytes each) at ``first``, first + 1, … on top of ``head``."""
    for index, digest in enumerate(digests, first):
        head = chain(head, index, digest)
    return head
