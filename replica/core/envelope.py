"""Envelopes: what clients sign and replicas order (design section 5).

A client that has several operations at hand puts them into one envelope and pays one signature for all of them.
Layout (integers big-endian):

    16  tag "trustlog/request"
    u8  version 1
    u8  kind: 1 operations, 2 open a session
    32  cluster id
    65  client's public key (uncompressed P-256 point)

  kind 1, operations:
    u64, u32  session: slot and place at which it was opened
    u64 first request number, from 1; the operations have consecutive numbers
    u64 acknowledged: the client has done with every number below this one; at most `first`
    u16 count, from 1
    count x (u32 length, operation)

  kind 2, open a session:
    16  nonce, chosen at random by the client
    u64 void after: the opening does nothing when executed above this slot

  kind 3, administer:
    u64 void after: it does nothing when executed above this slot
    u32 length, command: a list of members (`replica.core.members`), about clients (`replica.core.clients`), or about
        the application's version (`replica.core.versions`); judged when it is executed, not before

    64  signature by the client's key over all bytes before it (ECDSA P-256, SHA-256, raw r and s)

The signature is over the received bytes; nothing is ever re-encoded to check it. Replies are laid out as

    u8 1, u64 u32 session, u64 first, u16 count, count x (u8 status, u64 slot, u32 length, result)
    u8 2, 16 nonce, u8 status, u64 u32 session
    u8 3, 32 SHA-256 of the command, u8 status, u64 slot, u16 length, text: OK: in force after that slot

and compared by the client as opaque bytes between replicas.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, cast

from replica.core.genesis import PUBLIC_KEY_SIZE, Limits
from replica.core.layout import DIGEST_SIZE, U64, U64_MAX, LayoutError, Reader

ENVELOPE_TAG = b"trustlog/request"
ENVELOPE_VERSION = 1
SIGNATURE_SIZE = 64
OPEN_NONCE_SIZE = 16

_HEADER = struct.Struct(f">16sBB32s{PUBLIC_KEY_SIZE}s")
_OPERATIONS = struct.Struct(">QIQQH")
_OPEN = struct.Struct(">16sQ")
_LENGTH = struct.Struct(">I")
_RESULT = struct.Struct(">BQI")
_REPLY = struct.Struct(">BQIQH")
_OPENED = struct.Struct(">B16sBQI")
_ADMINISTERED = struct.Struct(">B32sBQH")


class EnvelopeKind(IntEnum):
    """What an envelope asks for."""

    OPERATIONS = 1
    OPEN = 2
    ADMINISTER = 3


class Status(IntEnum):
    """How an operation ended, the same at every correct replica."""

    OK = 0  # executed; the result is the application's
    ERROR = 1  # executed; the application refused it and changed nothing; the result is its message
    EXPIRED = 2  # the session is unknown or evicted: not executed now; whether it was before is unknown
    OUT_OF_WINDOW = 3  # too far above what the session acknowledged: not executed now, but the envelope may be later
    FORGOTTEN = 4  # acknowledged, or its result is no longer kept: not executed again
    VOID = 5  # an opening or a command whose `void after` has passed or lies too far ahead: no session
    BUSY = 6  # an opening for which there is no room: no session
    TOO_LARGE = 7  # no room in the reply beside the envelope's other results: not executed; ask again with fewer
    NOT_ALLOWED = 8  # this key may not be a client's: not executed now; whether it was before is unknown
    NOT_PERMITTED = 9  # this key may not do that: not executed; the result says what it may not


@dataclass(frozen=True, slots=True, order=True)
class SessionId:
    """The slot and the place in its batch at which a session was opened."""

    slot: int
    place: int


@dataclass(frozen=True, slots=True)
class Operations:
    """The content of an envelope of kind 1."""

    session: SessionId
    first: int
    acknowledged: int
    operations: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Open:
    """The content of an envelope of kind 2."""

    nonce: bytes
    void_after: int


@dataclass(frozen=True, slots=True)
class Administer:
    """The content of an envelope of kind 3, by an operator."""

    void_after: int
    command: bytes


class RefusedError(ValueError):
    """A command that must not be executed; the text says why."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A decoded envelope; `raw` is what was received, and what is signed, hashed, ordered and passed on."""

    raw: bytes
    client: bytes
    content: Operations | Open | Administer
    _digest: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def signed(self) -> bytes:
        """Return the bytes under the signature."""
        return self.raw[:-SIGNATURE_SIZE]

    @property
    def signature(self) -> bytes:
        """Return the raw 64-byte signature."""
        return self.raw[-SIGNATURE_SIZE:]

    def digest(self) -> bytes:
        """Return the SHA-256 of the envelope as received; it is computed once, and asked for at every step."""
        if self._digest is None:
            object.__setattr__(self, "_digest", hashlib.sha256(self.raw).digest())
        return cast("bytes", self._digest)


def encode_operations(cluster_id: bytes, client: bytes, content: Operations) -> bytes:
    """Return the bytes to sign for an envelope of operations; append the signature to get the envelope."""
    session = content.session
    parts = [
        _HEADER.pack(ENVELOPE_TAG, ENVELOPE_VERSION, EnvelopeKind.OPERATIONS, cluster_id, client),
        _OPERATIONS.pack(session.slot, session.place, content.first, content.acknowledged, len(content.operations)),
    ]
    for operation in content.operations:
        parts.append(_LENGTH.pack(len(operation)))
        parts.append(operation)
    return b"".join(parts)


def encode_open(cluster_id: bytes, client: bytes, content: Open) -> bytes:
    """Return the bytes to sign for an envelope that opens a session."""
    header = _HEADER.pack(ENVELOPE_TAG, ENVELOPE_VERSION, EnvelopeKind.OPEN, cluster_id, client)
    return header + _OPEN.pack(content.nonce, content.void_after)


def encode_administer(cluster_id: bytes, client: bytes, content: Administer) -> bytes:
    """Return the bytes to sign for an envelope that changes how the cluster is run."""
    header = _HEADER.pack(ENVELOPE_TAG, ENVELOPE_VERSION, EnvelopeKind.ADMINISTER, cluster_id, client)
    return header + U64.pack(content.void_after) + _LENGTH.pack(len(content.command)) + content.command


def decode_envelope(raw: bytes, cluster_id: bytes, limits: Limits) -> Envelope:
    """Decode an envelope strictly; its signature is not looked at. LayoutError says what is wrong."""
    if len(raw) > limits.envelope_bytes_max:
        raise LayoutError(f"an envelope of {len(raw)} bytes, the limit is {limits.envelope_bytes_max}")
    if len(raw) < _HEADER.size + SIGNATURE_SIZE:
        raise LayoutError(f"an envelope of {len(raw)} bytes is too short")
    tag, version, kind, for_cluster, client = _HEADER.unpack_from(raw)
    if tag != ENVELOPE_TAG or version != ENVELOPE_VERSION:
        raise LayoutError("not an envelope of a version that this program knows")
    if for_cluster != cluster_id:
        raise LayoutError(f"for cluster {for_cluster.hex()[:16]}, this is cluster {cluster_id.hex()[:16]}")
    content: Operations | Open | Administer
    if kind == EnvelopeKind.OPERATIONS:
        content = _decode_operations(raw, limits)
    elif kind == EnvelopeKind.OPEN:
        reader = Reader(raw, _HEADER.size, len(raw) - SIGNATURE_SIZE)
        content = Open(nonce=reader.take(OPEN_NONCE_SIZE), void_after=reader.u64())
        reader.finish()
    elif kind == EnvelopeKind.ADMINISTER:
        reader = Reader(raw, _HEADER.size, len(raw) - SIGNATURE_SIZE)
        content = Administer(void_after=reader.u64(), command=reader.block(limits.operation_bytes_max))
        reader.finish()
    else:
        raise LayoutError(f"unknown kind of envelope {kind}")
    return Envelope(raw=raw, client=client, content=content)


def _decode_operations(raw: bytes, limits: Limits) -> Operations:
    end = len(raw) - SIGNATURE_SIZE
    position = _HEADER.size + _OPERATIONS.size
    if position > end:
        raise LayoutError("an envelope of operations is too short")
    slot, place, first, acknowledged, count = _OPERATIONS.unpack_from(raw, _HEADER.size)
    if not 1 <= count <= limits.envelope_operations_max:
        raise LayoutError(f"{count} operations, from 1 to {limits.envelope_operations_max} are allowed")
    if not 1 <= first <= U64_MAX - count or not acknowledged <= first:
        raise LayoutError(f"request numbers from {first}, acknowledged {acknowledged}")
    operations = []
    # A plain loop over the buffer: this runs once per operation at every replica.
    for _ in range(count):
        if position + 4 > end:
            raise LayoutError("an operation's length is cut off")
        (size,) = _LENGTH.unpack_from(raw, position)
        position += 4
        if size > limits.operation_bytes_max:
            raise LayoutError(f"an operation of {size} bytes, the limit is {limits.operation_bytes_max}")
        if position + size > end:
            raise LayoutError("an operation is cut off")
        operations.append(raw[position : position + size])
        position += size
    if position != end:
        raise LayoutError(f"{end - position} bytes too many after the last operation")
    return Operations(SessionId(slot, place), first, acknowledged, tuple(operations))


class Result(NamedTuple):
    """How one operation ended: status, the slot at which it was executed, and the result's bytes.

    A tuple, as there is one per operation: making one costs a third of what a frozen dataclass costs.
    """

    status: Status
    slot: int
    value: bytes


@dataclass(frozen=True, slots=True)
class OperationsReply:
    """A decoded reply to an envelope of operations."""

    session: SessionId
    first: int
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class OpenReply:
    """A decoded reply to an opening; `session` means something only with status OK."""

    nonce: bytes
    status: Status
    session: SessionId


@dataclass(frozen=True, slots=True)
class AdministerReply:
    """A decoded reply to a command; `command` is its digest, `slot`, with status OK, the last one before its effect."""

    command: bytes
    status: Status
    slot: int
    text: str

    @classmethod
    def to(cls, content: Administer, status: Status, slot: int, text: str) -> "AdministerReply":
        """Return the reply to the command in `content`."""
        return cls(hashlib.sha256(content.command).digest(), status, slot, text)


def encode_operations_reply(session: SessionId, first: int, results: Sequence[Result]) -> bytes:
    """Return a reply's bytes for operations `first`, `first + 1` and so on."""
    parts = [_REPLY.pack(EnvelopeKind.OPERATIONS, session.slot, session.place, first, len(results))]
    for result in results:
        parts.append(_RESULT.pack(result.status, result.slot, len(result.value)))
        parts.append(result.value)
    return b"".join(parts)


def encode_open_reply(reply: OpenReply) -> bytes:
    """Return the bytes of a reply to an opening."""
    session = reply.session
    return _OPENED.pack(EnvelopeKind.OPEN, reply.nonce, reply.status, session.slot, session.place)


def encode_administer_reply(reply: AdministerReply) -> bytes:
    """Return the bytes of a reply to a command."""
    text = reply.text.encode()
    return _ADMINISTERED.pack(EnvelopeKind.ADMINISTER, reply.command, reply.status, reply.slot, len(text)) + text


def decode_reply(raw: bytes, limits: Limits) -> OperationsReply | OpenReply | AdministerReply:
    """Decode a reply strictly; LayoutError if a replica sent something else."""
    reader = Reader(raw)
    kind = reader.u8()
    if kind == EnvelopeKind.OPEN:
        nonce, status = reader.take(OPEN_NONCE_SIZE), _status(reader.u8())
        opened = OpenReply(nonce, status, SessionId(reader.u64(), reader.u32()))
        reader.finish()
        return opened
    if kind == EnvelopeKind.ADMINISTER:
        return _decode_administer_reply(reader)
    if kind != EnvelopeKind.OPERATIONS:
        raise LayoutError(f"unknown kind of reply {kind}")
    session = SessionId(reader.u64(), reader.u32())
    first, count = reader.u64(), reader.u16()
    if not 1 <= count <= limits.envelope_operations_max:
        raise LayoutError(f"a reply with {count} results")
    results = []
    for _ in range(count):
        status, slot = _status(reader.u8()), reader.u64()
        results.append(Result(status, slot, reader.block(limits.result_bytes_max)))
    reader.finish()
    return OperationsReply(session, first, tuple(results))


def _decode_administer_reply(reader: Reader) -> AdministerReply:
    command, status, slot = reader.take(DIGEST_SIZE), _status(reader.u8()), reader.u64()
    raw = reader.take(reader.u16())
    reader.finish()
    try:
        return AdministerReply(command, status, slot, raw.decode())
    except UnicodeDecodeError:
        raise LayoutError("the text of a reply is not UTF-8") from None


def _status(number: int) -> Status:
    try:
        return Status(number)
    except ValueError:
        raise LayoutError(f"unknown status {number}") from None
