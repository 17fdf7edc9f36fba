"""One entry of a log, shown to someone who does not read that log (design section 3: a group is self-contained).

    170 append statement      64 signature; a TPM's proof: 209
    u16 count, from 1         count x 32 digests of the group's entries
    u16 place of the entry in the group, from 0
    u32 length and payload of the entry

The signature covers the digests through the attested heads; the payload is the entry's because its digest is the one at
its place. A payload here is at most `PAYLOAD_BYTES_MAX`: what is shown like this are CHECKPOINTs and other small
entries, never proposals.
"""

import struct
from dataclasses import dataclass

from replica.core.group import VerifiedGroup
from replica.core.layout import DIGEST_SIZE, LayoutError, Reader
from trustlog import ATTESTATION_SIZE_MAX, GROUP_ENTRIES_MAX, Attestation, entry_digest

PAYLOAD_BYTES_MAX = 4096
PROOF_BYTES_MAX = ATTESTATION_SIZE_MAX + 8 + GROUP_ENTRIES_MAX * DIGEST_SIZE + PAYLOAD_BYTES_MAX


@dataclass(frozen=True, slots=True)
class EntryProof:
    """What shows that a log holds `payload`; nothing is verified here. digests: 32 bytes per entry of the group."""

    attestation: Attestation
    digests: tuple[bytes, ...]
    place: int
    payload: bytes

    def encode(self) -> bytes:
        """Return the documented layout."""
        parts = [self.attestation.raw]
        parts += [struct.pack(">H", len(self.digests)), *self.digests]
        parts += [struct.pack(">HI", self.place, len(self.payload)), self.payload]
        return b"".join(parts)


def prove(group: VerifiedGroup, index: int) -> EntryProof:
    """Return the proof of the entry at `index`, which `group` holds."""
    place = index - group.first
    digests = tuple(entry_digest(payload) for payload in group.payloads)
    return EntryProof(Attestation.of_group(group.raw), digests, place, group.payloads[place])


def decode_proof(raw: bytes) -> EntryProof:
    """Decode the documented layout; LayoutError if it is not that, or the payload is not the entry at its place."""
    reader = Reader(raw)
    attestation = Attestation.of_group(raw)
    reader.take(len(attestation.raw))
    count = reader.u16()
    if not 1 <= count <= GROUP_ENTRIES_MAX:
        raise LayoutError(f"a group of {count} entries, from 1 to {GROUP_ENTRIES_MAX} are possible")
    digests = tuple(reader.take(DIGEST_SIZE) for _ in range(count))
    place = reader.u16()
    payload = reader.block(PAYLOAD_BYTES_MAX)
    reader.finish()
    if place >= count or entry_digest(payload) != digests[place]:
        raise LayoutError("the payload is not the one whose digest stands at its place")
    return EntryProof(attestation, digests, place, payload)
