"""What all replicas of a cluster must agree on before the first entry, and the cluster id that binds it.

Whatever can make one replica judge an entry differently from another stands here: members and their log keys,
ordering, checkpoint interval and window, every size limit, the application. The cluster id is the digest of these
values in the layout below; it stands in every envelope and, through the context, in every attested statement. Replicas
with different values have different ids and never talk to each other.

Layout (integers big-endian; text is UTF-8 preceded by its u16 length):

    16  tag "trustlog/genesis"        u8  version 1
    text name                         32  nonce
    u16 f                             u8  ordering (2 or 3 phases)
    text application
    13 x u64, in the order of `Limits`' fields
    u16 members, then per member      u16 number, u8 kind of log backend, 65 public key of the log, and for a TPM what
                                      was pinned at its enrolment (75 bytes, trustlog.tpm.chain)
    u16 operators, 65 each            public keys of those who may change the members (`replica.core.members`); left out
                                      if there are none and nothing follows
    for a cluster that begins with another one's state (`replica.core.founding`), else left out:
        32 id of that cluster         u64 slot after which it was its state     32 digest of the state there
        u64 agreed time               32 root of the application's state        32 root of the client table begun with

The genesis is list 0 of members. A later list makes a `Genesis` of its own (`successor`), with the same cluster id: all
that is ordered under it is judged by its members, from the slot after `base` on.
"""

import hashlib
import struct
from dataclasses import dataclass, fields, replace
from enum import IntEnum

from replica.core import quorum
from trustlog import TPM_PINS_SIZE, BackendKind

GENESIS_TAG = b"trustlog/genesis"
CONTEXT_TAG = b"trustlog/context"
GENESIS_VERSION = 1
NONCE_SIZE = 32
PUBLIC_KEY_SIZE = 65
OPERATORS_MAX = 16
TEXT_SIZE_MAX = 200

KIB = 1024
MIB = 1024 * KIB


class Ordering(IntEnum):
    """How many phases an operation passes; the value is the number of phases."""

    TWO_PHASE = 2  # MinBFT: q votes decide
    THREE_PHASE = 3  # A2M-PBFT-EA: q commits decide

    @property
    def label(self) -> str:
        """Return the name used in configuration: "two-phase" or "three-phase"."""
        return "two-phase" if self is Ordering.TWO_PHASE else "three-phase"


@dataclass(frozen=True, slots=True)
class Limits:
    """Agreed limits; sizes in bytes, the rest in pieces or slots. They judge entries, hence they are agreed."""

    checkpoint_interval: int = 128  # K, slots
    window: int = 256  # L = 2K, slots a log may be ahead of its own last checkpoint
    operation_bytes_max: int = MIB
    envelope_operations_max: int = 1024
    envelope_bytes_max: int = 2 * MIB
    batch_envelopes_max: int = 1000
    batch_bytes_max: int = 4 * MIB
    group_entries_max: int = 256
    group_bytes_max: int = 6 * MIB
    result_bytes_max: int = MIB
    sessions_max: int = 4096
    sessions_per_client_max: int = 64
    session_window: int = 4096  # request numbers a session may run ahead of what it acknowledged

    def problems(self) -> list[str]:
        """Return what makes these limits unusable, in words; an empty list if nothing does."""
        found = [f"{f.name} must be at least 1" for f in fields(self) if getattr(self, f.name) < 1]
        if self.window < 2 * self.checkpoint_interval:
            found.append("window must be at least twice checkpoint_interval, or checkpoints stall the proposer")
        # An envelope that is accepted always fits a batch, and a batch always fits a group.
        if self.operation_bytes_max + 1024 > self.envelope_bytes_max:
            found.append("envelope_bytes_max must exceed operation_bytes_max by at least 1024")
        if self.envelope_bytes_max + 4096 > self.batch_bytes_max:
            found.append("batch_bytes_max must exceed envelope_bytes_max by at least 4096")
        if self.batch_bytes_max + 65536 > self.group_bytes_max:
            found.append("group_bytes_max must exceed batch_bytes_max by at least 65536")
        if self.group_bytes_max > 7 * MIB:
            found.append("group_bytes_max must be at most 7 MiB, so that a group fits a frame of 8 MiB")
        if self.envelope_operations_max > self.session_window:
            found.append("session_window must be at least envelope_operations_max")
        upper = {"envelope_operations_max": 65535, "batch_envelopes_max": 65535, "group_entries_max": 1024}
        found += [f"{name} must be at most {top}" for name, top in upper.items() if getattr(self, name) > top]
        return found


@dataclass(frozen=True, slots=True)
class Member:
    """A replica's identity as far as ordering is concerned: its number, its log's key, and what is pinned with it.

    since: the list of members with which its log came in; what the log says carries the context of that list.
    """

    number: int
    log_kind: int
    log_public_key: bytes
    log_pins: bytes = b""
    since: int = 0


@dataclass(frozen=True, slots=True)
class Founding:
    """The state with which a cluster begins, if it goes on from another one's (`replica.core.founding`).

    cluster_id, slot, digest: the other cluster, the slot after which it had that state, and `Executor.digest` there.
    time_ms, application, table: the agreed time and the maps' roots, with which this cluster begins.
    """

    cluster_id: bytes
    slot: int
    digest: bytes
    time_ms: int
    application: bytes
    table: bytes

    def base(self, interval: int) -> int:
        """Return the slot after which the new cluster begins: the other one's, rounded up to a checkpoint's."""
        return -(-self.slot // interval) * interval

    def problems(self) -> list[str]:
        """Return what makes this unusable, in words; an empty list if nothing does."""
        digests = (self.cluster_id, self.digest, self.application, self.table)
        found = ["a founding's id, digest and roots have 32 bytes each"] if set(map(len, digests)) != {32} else []
        if not 1 <= self.slot < 1 << 62 or not 0 <= self.time_ms < 1 << 63:
            found.append("a founding's slot is from 1 on, and its time not negative")
        return found

    def encode(self) -> bytes:
        """Return the documented layout."""
        origin = self.cluster_id + struct.pack(">Q", self.slot) + self.digest
        return origin + struct.pack(">Q", self.time_ms) + self.application + self.table


@dataclass(frozen=True, slots=True)
class Genesis:
    """The agreed part of the cluster file. Raises ValueError for values that no cluster can run with.

    operators: keys of those who may change the members, 65 bytes each. list_number, base, origin: of a later list of
    members, the slot after which it is in force, and the id of the cluster, whose members were others once. founding:
    of a cluster that begins with another one's state; its first list is in force after `founding.base(…)`.
    """

    name: str
    nonce: bytes
    f: int
    ordering: Ordering
    application: str
    limits: Limits
    members: tuple[Member, ...]
    operators: tuple[bytes, ...] = ()
    list_number: int = 0
    base: int = 0
    origin: bytes = b""
    founding: Founding | None = None

    def __post_init__(self) -> None:
        problems = self.limits.problems()
        if len(self.nonce) != NONCE_SIZE:
            problems.append(f"the nonce must have {NONCE_SIZE} bytes, not {len(self.nonce)}")
        if [m.number for m in self.members] != list(range(quorum.replica_count(self.f))):
            problems.append(f"f = {self.f} needs members 0 to {2 * self.f} in this order")
        if len({m.log_public_key for m in self.members}) != len(self.members):
            problems.append("two members have the same log key")
        if any(len(m.log_public_key) != PUBLIC_KEY_SIZE for m in self.members):
            problems.append(f"a log's public key must have {PUBLIC_KEY_SIZE} bytes (uncompressed P-256 point)")
        if any(len(m.log_pins) != (TPM_PINS_SIZE if m.log_kind == BackendKind.TPM else 0) for m in self.members):
            problems.append(f"a TPM's log, and no other, has pins of {TPM_PINS_SIZE} bytes")
        if len(set(self.operators)) != len(self.operators) or len(self.operators) > OPERATORS_MAX:
            problems.append(f"there may be at most {OPERATORS_MAX} operators, each once")
        if any(len(key) != PUBLIC_KEY_SIZE for key in self.operators):
            problems.append(f"an operator's public key must have {PUBLIC_KEY_SIZE} bytes (uncompressed P-256 point)")
        problems += self._founding_problems()
        for label, text in (("name", self.name), ("application", self.application)):
            if not 1 <= len(text.encode()) <= TEXT_SIZE_MAX:
                problems.append(f"{label} must have 1 to {TEXT_SIZE_MAX} bytes")
        if problems:
            raise ValueError("; ".join(problems))

    def _founding_problems(self) -> list[str]:
        founding, interval = self.founding, max(1, self.limits.checkpoint_interval)
        problems = [] if founding is None else founding.problems()
        begins = 0 if founding is None or problems else founding.base(interval)
        if not self.list_number and not problems and self.base != begins:
            problems.append(f"the first list of members is in force after slot {begins}, not {self.base}")
        return problems

    @property
    def needs_state(self) -> bool:
        """Say whether nothing can be read under this list of members without the state with which it begins."""
        return self.list_number > 0 or self.founding is not None

    @property
    def n(self) -> int:
        """Return the number of replicas."""
        return len(self.members)

    @property
    def quorum(self) -> int:
        """Return q = f + 1."""
        return quorum.quorum(self.f)

    def encode(self) -> bytes:
        """Return the documented layout, of which the cluster id is the digest; ValueError for a later list."""
        if self.list_number:
            raise ValueError("the cluster id is the digest of the first list of members alone")
        parts = [GENESIS_TAG, bytes([GENESIS_VERSION]), _text(self.name), self.nonce]
        parts += [struct.pack(">HB", self.f, self.ordering), _text(self.application)]
        parts += [struct.pack(">Q", getattr(self.limits, f.name)) for f in fields(Limits)]
        parts.append(struct.pack(">H", self.n))
        parts += [struct.pack(">HB", m.number, m.log_kind) + m.log_public_key + m.log_pins for m in self.members]
        if self.operators or self.founding is not None:
            parts += [struct.pack(">H", len(self.operators)), *self.operators]
        if self.founding is not None:
            parts.append(self.founding.encode())
        return b"".join(parts)

    def cluster_id(self) -> bytes:
        """Return the 32-byte SHA-256 of the first list's `encode()`."""
        return self.origin or hashlib.sha256(self.encode()).digest()

    def successor(self, number: int, base: int, members: tuple[Member, ...]) -> "Genesis":
        """Return what is agreed under list `number` of members, in force after slot `base`; ValueError as above."""
        f = quorum.faults(len(members))
        return replace(self, f=f, members=members, list_number=number, base=base, origin=self.cluster_id())

    def contexts(self) -> tuple[bytes, ...]:
        """Return the context of every member's log."""
        return tuple(self.context(member.since) for member in self.members)

    def context(self, list_number: int = 0) -> bytes:
        """Return the 32 bytes that every statement of a log carries which came in with that list of members."""
        return hashlib.sha256(CONTEXT_TAG + self.cluster_id() + struct.pack(">Q", list_number)).digest()


def new_genesis(
    name: str,
    nonce: bytes,
    f: int,
    ordering: Ordering,
    application: str,
    limits: Limits,
    members: tuple[Member, ...],
    operators: tuple[bytes, ...] = (),
    founding: Founding | None = None,
) -> Genesis:
    """Return a new cluster's genesis, in force after the slot that follows from `founding`; ValueError as above."""
    interval = max(1, limits.checkpoint_interval)  # what is no limit is refused below
    base = 0 if founding is None else founding.base(interval)
    agreed = (name, nonce, f, ordering, application, limits, members, operators)
    return Genesis(*agreed, base=base, founding=founding)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">H", len(raw)) + raw
