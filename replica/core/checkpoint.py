r"""What a checkpoint covers, and how it is shown to a replica that was away (design section 4.3).

The header names everything that replicas agree on after slot s, by digests; D, which CHECKPOINT entries attest, is the
header's SHA-256 (integers u64 big-endian unless noted):

    16 tag "trustlog/state\0\x02"    slot    time, milliseconds since 1970
    32 digest of the application's state        32 digest of the client table
    u16 logs, then per log: position at the agreed cut, 32 head there, 32 SHA-256 of its reduced state there
    u64 list of members under which it is said, 32 SHA-256 of the list in force after it (`replica.core.members`):
    both left out as long as that is the genesis

A certificate is what makes a header believed: q entries CHECKPOINT(s, D) of different logs, each with its attestation:

    u16 count, count x (u16 log, u32 length, proof; layout in `replica.core.proof`), logs ascending

A cluster that was founded with another one's state (`replica.core.founding`) begins with a header that its genesis
names to the last byte. It needs nobody's word: its certificate is empty. For heads it has 32 zero bytes each: they
follow from the logs' keys.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from replica.core.batch import NULL_BATCH
from replica.core.entries import Checkpoint, decode_entry
from replica.core.genesis import Genesis
from replica.core.layout import DIGEST_SIZE, U64, LayoutError, Reader
from replica.core.logstate import LogState, initial_states
from replica.core.proof import PROOF_BYTES_MAX, EntryProof, decode_proof
from replica.core.quorum import primary

HEADER_TAG = b"trustlog/state\0\2"
_FIXED = struct.Struct(">16sQQ32s32sH")
_LOG = struct.Struct(">Q32s32s")

# (log, proof) -> whether that log attested the entry in this cluster.
VerifyProof = Callable[[int, EntryProof], bool]


@dataclass(frozen=True, slots=True)
class Header:
    """The agreed state after `slot`, by digests of 32 bytes. cut, heads and logs have one item per log.

    list_number: of the list of members whose logs say it. members: digest of the list in force after it, which is the
    next one if this is the last checkpoint of its list; b"" as long as that is the genesis.
    """

    slot: int
    time_ms: int
    application: bytes
    table: bytes
    cut: tuple[int, ...]
    heads: tuple[bytes, ...]
    logs: tuple[bytes, ...]
    list_number: int = 0
    members: bytes = b""

    def encode(self) -> bytes:
        """Return the documented layout."""
        fixed = (HEADER_TAG, self.slot, self.time_ms, self.application, self.table, len(self.cut))
        logs = zip(self.cut, self.heads, self.logs, strict=True)
        return _FIXED.pack(*fixed) + b"".join(_LOG.pack(*log) for log in logs) + self._list()

    def _list(self) -> bytes:
        return U64.pack(self.list_number) + self.members if self.members else b""

    @property
    def digest(self) -> bytes:
        """D, 32 bytes."""
        return hashlib.sha256(self.encode()).digest()


def decode_header(raw: bytes, n: int) -> Header:
    """Decode the header of a cluster of n replicas; LayoutError if these bytes are none."""
    reader = Reader(raw)
    tag, slot, time_ms, application, table, count = _FIXED.unpack(reader.take(_FIXED.size))
    if tag != HEADER_TAG or count != n:
        raise LayoutError("not the header of a checkpoint of this cluster")
    logs = [_LOG.unpack(reader.take(_LOG.size)) for _ in range(n)]
    later = reader.left() == U64.size + DIGEST_SIZE
    listed = (reader.u64(), reader.take(DIGEST_SIZE)) if later else (0, b"")
    reader.finish()
    cut, heads, states = zip(*logs, strict=True)
    return Header(slot, time_ms, application, table, cut, heads, states, *listed)


def encode_certificate(proofs: Mapping[int, EntryProof]) -> bytes:
    """Return the documented layout."""
    parts = [struct.pack(">H", len(proofs))]
    for log in sorted(proofs):
        raw = proofs[log].encode()
        parts.append(struct.pack(">HI", log, len(raw)) + raw)
    return b"".join(parts)


def founding_header(genesis: Genesis) -> Header | None:
    """Return the header with which a founded cluster begins; None of any other one, and of a later list of members."""
    founding = genesis.founding
    if founding is None or genesis.list_number:
        return None
    logs = tuple(state_digest(state.encode()) for state in initial_states(genesis.n, genesis.base))
    agreed = (genesis.base, founding.time_ms, founding.application, founding.table)
    return Header(*agreed, (0,) * genesis.n, (bytes(DIGEST_SIZE),) * genesis.n, logs)


def is_founding(header: Header, genesis: Genesis) -> bool:
    """Say whether this is the header with which a founded cluster begins."""
    return header.slot == genesis.base and header == founding_header(genesis)


def check_certificate(raw: bytes, header: Header, genesis: Genesis, verify: VerifyProof) -> None:
    """Raise LayoutError unless `raw` shows that q logs attested CHECKPOINT of exactly this header.

    With an empty `raw`, unless it is the one with which the cluster was founded.
    """
    if not raw and is_founding(header, genesis):
        return
    if header.list_number != genesis.list_number:
        raise LayoutError(f"a header of list {header.list_number} of members, not of list {genesis.list_number}")
    said = check_certified(raw, genesis, verify)
    if said != Checkpoint(header.slot, header.digest):
        raise LayoutError(f"a certificate of something else than CHECKPOINT({header.slot}) of this state")


def check_certified(raw: bytes, genesis: Genesis, verify: VerifyProof) -> Checkpoint:
    """Return the CHECKPOINT that q logs attested, as `raw` shows; LayoutError unless it does."""
    reader = Reader(raw)
    count = reader.u16()
    if not genesis.quorum <= count <= genesis.n:
        raise LayoutError(f"a certificate of {count} entries, {genesis.quorum} to {genesis.n} belong there")
    said: Checkpoint | None = None
    before = -1
    for _ in range(count):
        log = reader.u16()
        proof = decode_proof(reader.block(PROOF_BYTES_MAX))
        if not before < log < genesis.n:
            raise LayoutError("a certificate names its logs in ascending order, each once")
        before = log
        entry = decode_entry(proof.payload, genesis, genesis.cluster_id())
        if not isinstance(entry, Checkpoint) or entry != (said or entry):
            raise LayoutError(f"log {log} is shown with something else than the others' CHECKPOINT")
        if not verify(log, proof):
            raise LayoutError(f"log {log} did not attest its CHECKPOINT({entry.slot})")
        said = entry
    reader.finish()
    if said is None:
        raise LayoutError("a certificate of no entries")
    return said


def state_digest(encoded: bytes) -> bytes:
    """Return the 32-byte digest of a log's encoded reduced state."""
    return hashlib.sha256(encoded).digest()


def batches_in_flight(states: Sequence[LogState]) -> list[tuple[int, int, bytes]]:
    """Return (slot, view, digest) of what primaries proposed in these prefixes and is no null batch, ascending.

    Whoever starts from these states needs the batches.
    """
    n = len(states)
    found = []
    for state in states:
        for slot, by_view in state.votes.items():
            for view, digest in by_view.items():
                if primary(view, n) == state.author and digest != NULL_BATCH.digest:
                    found.append((slot, view, digest))
    return sorted(found)


def distinct_digests(in_flight: Sequence[tuple[int, int, bytes]]) -> list[bytes]:
    """Return each batch's digest once, in the order of `batches_in_flight`; a carried batch stands there repeatedly."""
    return list(dict.fromkeys(digest for _, _, digest in in_flight))
