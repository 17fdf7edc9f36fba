"""What a trusted log signs: five fixed byte layouts. No field has a variable length; integers are big-endian.

Every statement begins with the same header (90 bytes):

    offset size field
         0   16 domain tag, ASCII, zero padded: one per statement, so that none passes as another
        16    1 version, 1
        17    1 kind of backend: 1 software, 2 process, 3 tpm
        18   32 context, opaque to the log: where the statement counts (for replicas: cluster and member list)
        50   32 log id, SHA-256 of the public key
        82    8 epoch

and goes on with

    APPEND    tag "trustlog/append"     170 bytes   a group of entries was added
        90    8 first       index of the group's first entry, ≥ 1
        98    8 last        index of its last entry, ≥ first
       106   32 head before the head at first - 1
       138   32 head after  the head at last

    LOOKUP    tag "trustlog/lookup"     179 bytes   what stands at one index
        90   32 nonce       the asker's
       122    8 index       the index asked for, ≥ 1
       130    1 outcome     1 assigned (low ≤ index ≤ last), 2 unassigned (> last), 3 forgotten (< low)
       131   32 digest      the entry's digest if assigned, else zeros
       163    8 low         the first index not forgotten, 1 ≤ low ≤ last + 1
       171    8 last        the last index assigned, 0 in an empty log

    END       tag "trustlog/end"        170 bytes   where the log ends now
        90   32 nonce       the asker's
       122    8 low
       130    8 last
       138   32 head        the head at last

    TRUNCATE  tag "trustlog/trunc"      138 bytes   everything below low is forgotten
        90    8 low
        98    8 last
       106   32 head        the head at last

    QUOTE     tag "trustlog/quote"      219 bytes   which program holds this key (remote attestation, RFC 9334)
        90   32 nonce       the verifier's
       122   32 measurement of the trusted part, see trustlog.measurement
       154   65 public key  uncompressed P-256 point; its SHA-256 is the log id

A TPM signs no statement of ours, only a quote: 209 bytes stand in the signature's place (``trustlog.tpm.chain``), and
every entry whose payload is one of these two is the log's own:

    CLOSE     17 bytes   0x08 "trustlog/close" 0x00 0x00                             the last entry of an epoch
    OPEN      57 bytes   0x09 "trustlog/open" 0x00 0x00 0x00, u64 index of that CLOSE, 32 head after it

What is signed are these bytes as they stand. A verifier decodes them but never encodes them again. The
verbs are A2M's (SOSP 2007, section 3.1); one APPEND covers a group, so the cost of a signature is paid per
group.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self

from trustlog.errors import VerificationError
from trustlog.hashing import log_id

VERSION = 1
NONCE_SIZE = 32
CONTEXT_SIZE = 32
U64_MAX = 2**64 - 1
ZERO_DIGEST = bytes(32)

TAG_APPEND = b"trustlog/append\0"
TAG_LOOKUP = b"trustlog/lookup\0"
TAG_END = b"trustlog/end\0\0\0\0"
TAG_TRUNCATE = b"trustlog/trunc\0\0"
TAG_QUOTE = b"trustlog/quote\0\0"

TPM_PROOF_SIZE = 209
TPM_PINS_SIZE = 75  # what a TPM log's enrolment pins: trustlog.tpm.chain.TpmPins

# The first byte is the type among a replica's entries, whose rules pass these over.
CLOSE_PAYLOAD = b"\x08trustlog/close\0\0"
_OPEN_TAG = b"\x09trustlog/open\0\0\0"

_HEADER = "16sBB32s32sQ"


class BackendKind(IntEnum):
    """What keeps the key and the head, and so what a statement withstands (the design's fault model)."""

    SOFTWARE = 1
    PROCESS = 2
    TPM = 3


class Outcome(IntEnum):
    """The three answers of LOOKUP."""

    ASSIGNED = 1
    UNASSIGNED = 2
    FORGOTTEN = 3


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise VerificationError("malformed", f"statement is malformed: {what}")


@dataclass(frozen=True, slots=True)
class _Statement:
    """The common header. Every instance is valid: construction raises VerificationError otherwise.

    ``context`` and ``log_id`` are 32 bytes each, ``epoch`` a u64.
    """

    TAG: ClassVar[bytes]
    LAYOUT: ClassVar[struct.Struct]

    kind: BackendKind
    context: bytes
    log_id: bytes
    epoch: int

    def __post_init__(self) -> None:
        _require(len(self.context) == CONTEXT_SIZE, "context is not 32 bytes")
        _require(len(self.log_id) == 32, "log id is not 32 bytes")
        _require(0 <= self.epoch <= U64_MAX, "epoch is not a u64")
        self._check()

    def _check(self) -> None:
        raise NotImplementedError

    def _body(self) -> tuple[int | bytes, ...]:
        raise NotImplementedError

    def encode(self) -> bytes:
        """Return the bytes to sign, laid out as at the top of this module."""
        header = (self.TAG, VERSION, self.kind, self.context, self.log_id, self.epoch)
        return self.LAYOUT.pack(*header, *self._body())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a statement of exactly this type; VerificationError "wrong-statement" or "malformed"."""
        if data[:16] != cls.TAG:
            raise VerificationError("wrong-statement", f"not a statement {cls.TAG.rstrip(bytes(1)).decode()!r}")
        _require(len(data) == cls.LAYOUT.size, f"{len(data)} bytes instead of {cls.LAYOUT.size}")
        _, version, kind, context, log_id, epoch, *body = cls.LAYOUT.unpack(data)
        _require(version == VERSION, f"version {version} is unknown")
        _require(kind in _KINDS, f"kind of backend {kind} is unknown")
        return cls(BackendKind(kind), context, log_id, epoch, *body)


_KINDS = frozenset(BackendKind)
_OUTCOMES = frozenset(Outcome)


def _check_bounds(low: int, last: int) -> None:
    _require(0 <= last <= U64_MAX, "last is not a u64")
    _require(1 <= low <= min(last + 1, U64_MAX), "low is not within 1 … last + 1")


@dataclass(frozen=True, slots=True)
class AppendStatement(_Statement):
    """Entries ``first`` … ``last`` were added and moved the head from ``head_before`` to ``head_after``."""

    TAG = TAG_APPEND
    LAYOUT = struct.Struct(f">{_HEADER}QQ32s32s")

    first: int
    last: int
    head_before: bytes
    head_after: bytes

    def _check(self) -> None:
        _require(1 <= self.first <= self.last <= U64_MAX, "not 1 ≤ first ≤ last < 2^64")
        _require(len(self.head_before) == 32 == len(self.head_after), "a head is not 32 bytes")

    def _body(self) -> tuple[int | bytes, ...]:
        return (self.first, self.last, self.head_before, self.head_after)


@dataclass(frozen=True, slots=True)
class LookupStatement(_Statement):
    """What stands at ``index``; ``digest`` is zeros unless the outcome is ASSIGNED."""

    TAG = TAG_LOOKUP
    LAYOUT = struct.Struct(f">{_HEADER}32sQB32sQQ")

    nonce: bytes
    index: int
    outcome: Outcome
    digest: bytes
    low: int
    last: int

    def _check(self) -> None:
        _require(len(self.nonce) == NONCE_SIZE, "nonce is not 32 bytes")
        _require(1 <= self.index <= U64_MAX, "index is not within 1 … 2^64 - 1")
        _check_bounds(self.low, self.last)
        _require(self.outcome in _OUTCOMES, f"outcome {self.outcome} is unknown")
        # decode() hands in a plain number; the one place where a frozen field is replaced, by its equal.
        object.__setattr__(self, "outcome", Outcome(self.outcome))
        _require(
            self.outcome is lookup_outcome(self.index, self.low, self.last),
            "outcome contradicts low and last",
        )
        _require(len(self.digest) == 32, "digest is not 32 bytes")
        if self.outcome is not Outcome.ASSIGNED:
            _require(self.digest == ZERO_DIGEST, "a digest, but nothing is assigned")

    def _body(self) -> tuple[int | bytes, ...]:
        return (self.nonce, self.index, self.outcome, self.digest, self.low, self.last)


@dataclass(frozen=True, slots=True)
class EndStatement(_Statement):
    """The log reaches from ``low`` to ``last`` and ends in ``head``; fresh, because it repeats the nonce."""

    TAG = TAG_END
    LAYOUT = struct.Struct(f">{_HEADER}32sQQ32s")

    nonce: bytes
    low: int
    last: int
    head: bytes

    def _check(self) -> None:
        _require(len(self.nonce) == NONCE_SIZE, "nonce is not 32 bytes")
        _check_bounds(self.low, self.last)
        _require(len(self.head) == 32, "head is not 32 bytes")

    def _body(self) -> tuple[int | bytes, ...]:
        return (self.nonce, self.low, self.last, self.head)


@dataclass(frozen=True, slots=True)
class TruncateStatement(_Statement):
    """Everything below ``low`` is forgotten."""

    TAG = TAG_TRUNCATE
    LAYOUT = struct.Struct(f">{_HEADER}QQ32s")

    low: int
    last: int
    head: bytes

    def _check(self) -> None:
        _check_bounds(self.low, self.last)
        _require(len(self.head) == 32, "head is not 32 bytes")

    def _body(self) -> tuple[int | bytes, ...]:
        return (self.low, self.last, self.head)


@dataclass(frozen=True, slots=True)
class QuoteStatement(_Statement):
    """The program with this ``measurement`` (32 bytes) holds the key ``public_key`` (65 bytes)."""

    TAG = TAG_QUOTE
    LAYOUT = struct.Struct(f">{_HEADER}32s32s65s")

    nonce: bytes
    measurement: bytes
    public_key: bytes

    def _check(self) -> None:
        _require(len(self.nonce) == NONCE_SIZE, "nonce is not 32 bytes")
        _require(len(self.measurement) == 32, "measurement is not 32 bytes")
        _require(len(self.public_key) == 65, "public key is not 65 bytes")
        _require(log_id(self.public_key) == self.log_id, "log id is not the digest of the public key")

    def _body(self) -> tuple[int | bytes, ...]:
        return (self.nonce, self.measurement, self.public_key)


def open_payload(last: int, closed_head: bytes) -> bytes:
    """Return the payload of OPEN after the CLOSE at index ``last``, which led to ``closed_head``."""
    return _OPEN_TAG + struct.pack(">Q", last) + closed_head


def is_epoch_mark(payload: bytes) -> bool:
    """Tell whether a payload has the form of CLOSE or OPEN."""
    return payload == CLOSE_PAYLOAD or (payload.startswith(_OPEN_TAG) and len(payload) == len(_OPEN_TAG) + 40)


def lookup_outcome(index: int, low: int, last: int) -> Outcome:
    """Return the only honest answer for ``index`` in a log that reaches from ``low`` to ``last``."""
    if index > last:
        return Outcome.UNASSIGNED
    if index < low:
        return Outcome.FORGOTTEN
    return Outcome.ASSIGNED


APPEND_SIZE = AppendStatement.LAYOUT.size
LOOKUP_SIZE = LookupStatement.LAYOUT.size
END_SIZE = EndStatement.LAYOUT.size
TRUNCATE_SIZE = TruncateStatement.LAYOUT.size
QUOTE_SIZE = QuoteStatement.LAYOUT.size
