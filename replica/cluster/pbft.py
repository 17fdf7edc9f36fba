"""What the replicas of a PBFT cluster agree on: `ordering = "pbft"`, the baseline without trusted logs.

n = 3f+1; each member has a key that signs its messages (P-256, 65 bytes) where other clusters list a log's. Clients use
it like any genesis: f+1 equal replies decide. The id is the SHA-256 of (integers big-endian, text preceded by its u16
length):

    16  tag "trustlog/pbftgen"        u8  version 1
    text name                         32  nonce
    u16 f                             text application
    13 x u64, in the order of `Limits`' fields
    u16 members, then per member      u16 number, 65 public key
"""

import hashlib
import struct
from dataclasses import dataclass, fields
from typing import Final, cast

from replica.core.genesis import (
    KIB,
    MIB,
    NONCE_SIZE,
    PUBLIC_KEY_SIZE,
    TEXT_SIZE_MAX,
    Genesis,
    Limits,
    Member,
    Ordering,
)

TAG: Final = b"trustlog/pbftgen"
VERSION: Final = 1
FAULTS_MAX: Final = 3
# No kind of trusted log: nothing that wants one takes such a member for its keeper.
NO_LOG: Final = 0
# A NEW-VIEW holds every batch of a window once, and has to fit a frame of 8 MiB together with its certificates.
WINDOW_BYTES_MAX: Final = 6 * MIB
BASELINE: Final = (
    "PBFT here is a baseline for measuring and teaching: no trusted logs, receipts, evidence, audits or watches, "
    "nothing on disk, and a replica that stopped cannot be started again"
)
NO_LOGS: Final = (
    'this cluster has no trusted logs (ordering = "pbft"): it is a baseline for measuring and teaching, which orders '
    "operations and answers them, and does nothing else; for this, make a cluster with --ordering three-phase"
)

LIMITS: Final = Limits(
    checkpoint_interval=32,
    window=64,
    operation_bytes_max=32 * KIB,
    envelope_bytes_max=48 * KIB,
    batch_bytes_max=64 * KIB,
)


class _PbftOrdering:
    """Stands where other clusters have an Ordering; it is none, so that the core's machine cannot run it."""

    label = "pbft"


PBFT: Final = cast("Ordering", _PbftOrdering())


def pbft_replica_count(f: int) -> int:
    """Return n = 3f + 1; ValueError unless f is from 1 to 3."""
    if not 1 <= f <= FAULTS_MAX:
        raise ValueError(f"f must be from 1 to {FAULTS_MAX} with ordering pbft, not {f}")
    return 3 * f + 1


def pbft_member(number: int, public_key: bytes) -> Member:
    """Return a member with this signing key."""
    return Member(number, NO_LOG, public_key)


@dataclass(frozen=True, slots=True)
class PbftGenesis(Genesis):
    """The agreed part of a PBFT cluster's file. ValueError for values that no such cluster can run with."""

    def __post_init__(self) -> None:
        problems = self.limits.problems()
        if len(self.nonce) != NONCE_SIZE:
            problems.append(f"the nonce must have {NONCE_SIZE} bytes, not {len(self.nonce)}")
        if [member.number for member in self.members] != list(range(pbft_replica_count(self.f))):
            problems.append(f"f = {self.f} needs members 0 to {3 * self.f} in this order with ordering pbft")
        if len({member.log_public_key for member in self.members}) != len(self.members):
            problems.append("two members have the same signing key")
        if any(len(member.log_public_key) != PUBLIC_KEY_SIZE for member in self.members):
            problems.append(f"a signing key must have {PUBLIC_KEY_SIZE} bytes (uncompressed P-256 point)")
        if any(member.log_kind != NO_LOG or member.log_pins for member in self.members):
            problems.append("members of a PBFT cluster have no logs")
        if self.limits.window * self.limits.batch_bytes_max > WINDOW_BYTES_MAX:
            problems.append(f"window times batch_bytes_max must be at most {WINDOW_BYTES_MAX} with ordering pbft")
        for label, text in (("name", self.name), ("application", self.application)):
            if not 1 <= len(text.encode()) <= TEXT_SIZE_MAX:
                problems.append(f"{label} must have 1 to {TEXT_SIZE_MAX} bytes")
        if problems:
            raise ValueError("; ".join(problems))

    def encode(self) -> bytes:
        """Return the documented layout, of which the cluster id is the digest."""
        parts = [TAG, bytes([VERSION]), _text(self.name), self.nonce, struct.pack(">H", self.f)]
        parts += [_text(self.application), *(struct.pack(">Q", getattr(self.limits, f.name)) for f in fields(Limits))]
        parts.append(struct.pack(">H", self.n))
        parts += [struct.pack(">H", member.number) + member.log_public_key for member in self.members]
        return b"".join(parts)

    def cluster_id(self) -> bytes:
        """Return the 32-byte SHA-256 of `encode()`."""
        return hashlib.sha256(self.encode()).digest()

    def context(self, list_number: int = 0) -> bytes:
        """Raise ValueError: nothing is attested here."""
        raise ValueError(f"no context of list {list_number}: {NO_LOGS}")


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">H", len(raw)) + raw
