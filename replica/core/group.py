"""A group of entries as it is stored and sent: the attestation and the payloads that it covers.

    170 append statement        64 signature (ECDSA P-256, raw r and s); a TPM's proof: 209
    u16 count, from 1           count x u32 payload length        the payloads

The digests are not sent: whoever holds the payloads computes them. A group proves by itself that its author said
these payloads at these indexes (design section 3).
"""

import struct
from dataclasses import dataclass

from replica.core.genesis import Limits
from replica.core.layout import LayoutError
from trustlog import ATTESTATION_SIZE_MAX, Attestation

GROUP_HEADER_SIZE_MAX = ATTESTATION_SIZE_MAX + 2


@dataclass(frozen=True, slots=True)
class Group:
    """Payloads with the attestation over them, not yet verified. `raw` is what was received or will be sent."""

    raw: bytes
    attestation: Attestation
    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class VerifiedGroup:
    """A group of replica `author`'s log whose attestation was verified (signature, log, epoch, context, digests).

    first and last are indexes from 1; the heads are 32 bytes; `raw` is the group in the layout above. counted: the log
    counts its indexes itself, so that another group at one of them proves it broken. A TPM does not: its host can have
    anything attested, but only one group that continues a head (trustlog.tpm.chain).
    """

    author: int
    first: int
    last: int
    head_before: bytes
    head_after: bytes
    payloads: tuple[bytes, ...]
    raw: bytes
    counted: bool = True


def payload_bytes(group_raw: bytes) -> bytes:
    """Return the part of a group after its attestation: count, lengths, payloads."""
    return group_raw[len(Attestation.of_group(group_raw).raw) :]


def encode_payloads(payloads: tuple[bytes, ...]) -> bytes:
    """Return count, lengths and payloads: a group less its attestation."""
    count = len(payloads)
    return struct.pack(f">H{count}I", count, *map(len, payloads)) + b"".join(payloads)


def encode_group(attestation: Attestation, payloads: bytes) -> bytes:
    """Return a group's bytes from its attestation and `encode_payloads`' result."""
    return attestation.raw + payloads


def decode_payloads(raw: bytes, start: int, limits: Limits) -> tuple[bytes, ...]:
    """Read count, lengths and payloads from `start` to the end; LayoutError if they are not exactly there."""
    if len(raw) > limits.group_bytes_max + GROUP_HEADER_SIZE_MAX + 4 * limits.group_entries_max:
        raise LayoutError(f"a group of {len(raw)} bytes, the limit is {limits.group_bytes_max}")
    if len(raw) < start + 2:
        raise LayoutError(f"a group of {len(raw)} bytes is too short")
    (count,) = struct.unpack_from(">H", raw, start)
    if not 1 <= count <= limits.group_entries_max:
        raise LayoutError(f"a group of {count} entries, from 1 to {limits.group_entries_max} are allowed")
    position = start + 2 + 4 * count
    if len(raw) < position:
        raise LayoutError("a group's lengths are cut off")
    sizes = struct.unpack_from(f">{count}I", raw, start + 2)
    if position + sum(sizes) != len(raw):
        raise LayoutError(f"payloads of {sum(sizes)} bytes in {len(raw) - position} bytes")
    payloads = []
    for size in sizes:
        payloads.append(raw[position : position + size])
        position += size
    return tuple(payloads)


def decode_group(raw: bytes, limits: Limits) -> Group:
    """Take a group apart; nothing is verified here. LayoutError if the bytes are not laid out as documented."""
    attestation = Attestation.of_group(raw)
    return Group(raw, attestation, decode_payloads(raw, len(attestation.raw), limits))
