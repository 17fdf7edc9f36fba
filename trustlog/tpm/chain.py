r"""A log whose chain is a PCR: what is extended, what is signed, and what a verifier may conclude.

    event        SHA-256("trustlog/group\0\0" ‖ log id ‖ u64 first ‖ u16 count ‖ context ‖ digests)
    PCR after    SHA-256(PCR before ‖ event)
    statement    an APPEND of kind 3 (``trustlog.statements``) whose heads are the PCR's values
    proof        209 bytes in the signature's place: 145 TPMS_ATTEST of a quote of that one PCR, 64 r‖s
    extra data   SHA-256(statement)
    head         SHA-256("trustlog/pcr\0\0\0\0" ‖ u64 epoch ‖ u8 closed ‖ PCR): what readers chain groups by
    epoch        u32 reset count ‖ u32 restart count
    log.pub      the public key, 130 hex digits; of a TPM's log a second line, the pins, 150

A group by itself proves that its author's TPM moved the PCR by it. The TPM knows nothing of indexes: a host may extend
what it likes, between the groups or in their place. That an index has one value follows from replaying the groups in
order from the base, which was pinned at enrolment: in one epoch a PCR has one history, so at most one group continues
each head. Whoever replays therefore *passes over* a group that does not continue what it has (a host can make as many
as it likes); two groups that continue the *same* head differently exist only if the TPM is broken, or is a copied
software TPM.

A reboot empties the PCR. The groups of a new epoch count only after CLOSE and OPEN, each alone in its group: nothing
continues a closed head but OPEN, which names it, begins on the base, and counts only in the epoch with the next reset
count and restart count 0; there the base is continued once. In any other epoch another OPEN could have been said.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from trustlog.errors import SealedStateError, VerificationError
from trustlog.hashing import HASH_SIZE, entry_digest
from trustlog.keys import VerifyingKey
from trustlog.statements import (
    CLOSE_PAYLOAD,
    TPM_PINS_SIZE,
    TPM_PROOF_SIZE,
    U64_MAX,
    AppendStatement,
    EndStatement,
    open_payload,
)
from trustlog.tpm.quote import Quote, parse_quote, verify_quote
from trustlog.tpm.structures import NAME_SIZE

ATTEST_SIZE = 145  # with a SHA-256 name, 32 bytes of extra data, one bank of three octets
PROOF_SIZE = TPM_PROOF_SIZE
PCR_MAX = 15  # 16 and 23 can be reset, 17 … 22 cannot be extended at locality 0
PCR_DEFAULT = 14
PUBLIC_FILE_SIZE_MAX = 4096

_TAG_GROUP = b"trustlog/group\0\0"
_TAG_HEAD = b"trustlog/pcr\0\0\0\0"
CLOSE_DIGEST = entry_digest(CLOSE_PAYLOAD)


@dataclass(frozen=True, slots=True)
class TpmPins:
    """What enrolment fixes for ever; fixed layout, 75 bytes, big-endian: u8 PCR, 32 base, 34 signer, u64 epoch.

    pcr: 0 … 15. base: its value at boot, before the log's first group. signer: the qualified name of the attestation
    key, which shows that it is a child of that endorsement key. epoch: the one in which the log begins.
    """

    pcr: int
    base: bytes
    signer: bytes
    epoch: int

    def __post_init__(self) -> None:
        sizes = len(self.base) == HASH_SIZE and len(self.signer) == NAME_SIZE
        if not (sizes and 0 <= self.pcr <= PCR_MAX and 0 <= self.epoch <= U64_MAX):
            raise VerificationError("malformed", "these are no pins of a TPM log: PCR 0 … 15, base, signer, epoch")

    def encode(self) -> bytes:
        """Return the 75 bytes of the layout above."""
        return _PINS.pack(self.pcr, self.base, self.signer, self.epoch)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read exactly the layout above; VerificationError("malformed") otherwise."""
        if len(data) != _PINS.size:
            raise VerificationError("malformed", f"a TPM log's pins have {len(data)} bytes instead of {TPM_PINS_SIZE}")
        return cls(*_PINS.unpack(data))

    def accepts(self, epoch: int) -> bool:
        """Tell whether groups of ``epoch`` may count: the first, or one that OPEN can have begun."""
        return epoch == self.epoch or (epoch >> 32 > self.epoch >> 32 and not epoch & 0xFFFFFFFF)

    def before(self, epoch: int) -> int:
        """Return the only epoch that OPEN in ``epoch`` may continue."""
        resets = (epoch >> 32) - 1
        return self.epoch if resets == self.epoch >> 32 else resets << 32


_PINS = struct.Struct(">B32s34sQ")


def read_public_file(path: Path) -> tuple[VerifyingKey, TpmPins | None]:
    """Read log.pub: the key, and a second line with the pins if it is a TPM log's; SealedStateError otherwise."""
    with path.open("rb") as stream:
        lines = stream.read(PUBLIC_FILE_SIZE_MAX).split(b"\n")
    try:
        key, *pins = (bytes.fromhex(line.decode("ascii")) for line in lines if line)
        return VerifyingKey.from_bytes(key), TpmPins.decode(pins[0]) if pins else None
    except (ValueError, VerificationError) as error:
        raise SealedStateError(f"{path}: is no public key of a log: {error}") from error


def dump_public_file(key: bytes, pins: TpmPins) -> bytes:
    """Return the content of log.pub."""
    return f"{key.hex()}\n{pins.encode().hex()}\n".encode()


class Link(NamedTuple):
    """The heads (32 bytes each) that a group leads from and to."""

    before: bytes
    after: bytes


def event_digest(log_id: bytes, first: int, context: bytes, digests: Sequence[bytes]) -> bytes:
    """Return what a group extends the PCR with: log id, context and digests have 32 bytes each."""
    numbers = struct.pack(">QH", first, len(digests))
    return hashlib.sha256(_TAG_GROUP + log_id + numbers + context + b"".join(digests)).digest()


def extended(pcr: bytes, event: bytes) -> bytes:
    """Return a PCR's value (32 bytes) after TPM2_PCR_Extend ("TPM 2.0 Library, Part 1", section 17.2)."""
    return hashlib.sha256(pcr + event).digest()


def head(epoch: int, pcr: bytes, *, closed: bool = False) -> bytes:
    """Return the chain's head (32 bytes) while the PCR has this value in this epoch."""
    return hashlib.sha256(_TAG_HEAD + struct.pack(">Q?", epoch, closed) + pcr).digest()


def initial_head(pins: TpmPins) -> bytes:
    """Return the head before the log's first group."""
    return head(pins.epoch, pins.base)


def is_open(statement: AppendStatement, digests: Sequence[bytes], pins: TpmPins) -> bool:
    """Tell whether this group is the OPEN of its epoch: then it extends the base."""
    if len(digests) != 1 or statement.epoch == pins.epoch:
        return False
    closed = head(pins.before(statement.epoch), statement.head_before, closed=True)
    return digests[0] == entry_digest(open_payload(statement.first - 1, closed))


def link_of(statement: AppendStatement, digests: Sequence[bytes], pins: TpmPins) -> Link:
    """Return the heads of a group that ``verify_group`` found valid."""
    closes = list(digests) == [CLOSE_DIGEST]
    opens = is_open(statement, digests, pins)
    epoch = pins.before(statement.epoch) if opens else statement.epoch
    before = head(epoch, statement.head_before, closed=opens)
    return Link(before, head(statement.epoch, statement.head_after, closed=closes))


def asked(signed: bytes) -> bytes:
    """Return the extra data of a quote that is asked for as proof of this statement."""
    return hashlib.sha256(signed).digest()


def verify_group(
    key: VerifyingKey, pins: TpmPins, statement: AppendStatement, signed: bytes, proof: bytes, digests: Sequence[bytes]
) -> None:
    """Verify that the TPM's PCR was moved by exactly this group; VerificationError otherwise.

    statement: decoded from ``signed``, and of this key's log. proof: 209 bytes. digests: 32 bytes each.
    """
    before = pins.base if is_open(statement, digests, pins) else statement.head_before
    event = event_digest(statement.log_id, statement.first, statement.context, digests)
    if extended(before, event) != statement.head_after:
        raise VerificationError("wrong-head", "the digests do not lead to the attested value of the PCR")
    _verify_proof(key, pins, statement.epoch, statement.head_after, signed, proof)


def verify_fresh(key: VerifyingKey, pins: TpmPins, statement: EndStatement, signed: bytes, proof: bytes) -> None:
    """Verify that the PCR was ``statement.head`` after the nonce in it was chosen; low and last are claims."""
    _verify_proof(key, pins, statement.epoch, statement.head, signed, proof)


def pins_of_any(proof: bytes) -> TpmPins:
    """Return stand-ins for pins that are not known, as far as two contradicting groups need them.

    Both halves of a contradiction must be about one PCR that cannot be reset, in one epoch, under one key; then it does
    not matter which PCR was pinned.
    """
    quote = parse_quote(proof[:ATTEST_SIZE])
    pcr = next((pcrs[0] for pcrs in quote.selection.values() if pcrs), PCR_MAX + 1)
    return TpmPins(pcr, bytes(HASH_SIZE), quote.qualified_signer, quote.clock.epoch)


def _verify_proof(key: VerifyingKey, pins: TpmPins, epoch: int, pcr: bytes, signed: bytes, proof: bytes) -> Quote:
    if len(proof) != PROOF_SIZE:
        raise VerificationError("malformed", f"a TPM's proof has {len(proof)} bytes instead of {PROOF_SIZE}")
    attest, signature = proof[:ATTEST_SIZE], proof[ATTEST_SIZE:]
    quote = parse_quote(attest)
    if quote.clock.epoch != epoch:
        said = f"{quote.clock.reset_count}.{quote.clock.restart_count}"
        raise VerificationError("wrong-epoch", f"the quote was made in another epoch, {said}, than the statement says")
    return verify_quote(key, attest, signature, {pins.pcr: pcr}, nonce=asked(signed), signer=pins.signer)
