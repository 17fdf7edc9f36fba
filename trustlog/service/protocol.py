"""What travels between a log's service and its client; integers are big-endian, no field has a variable place.

A frame is u32 length ‖ that many bytes, of which the first is the code. One request, one reply, in turn; the
first request is HELLO. Offsets count from the code.

    HELLO     1   1 version (1)      2 nonce 32    34 context 32                                     66 bytes
    APPEND    2   1 first u64        9 context 32  41 digests 32 each, 1 … 1024                  73 … 32,809
    REISSUE   3                                                                                       1 byte
    LOOKUP    4   1 index u64        9 nonce 32    41 context 32
                  73 statement 170 243 signature 64 307 digests 32 each, 0 … 1024; or nothing    73 … 33,075
    END       5   1 nonce 32        33 context 32                                                    65 bytes
    TRUNCATE  6   1 index u64        9 context 32                                                    41 bytes
    STOREKEY  7                                                                                       1 byte
    QUOTE     8   1 nonce 32        33 context 32                                                    65 bytes

    ATTESTED  0   1 statement 138 … 219, then signature 64
    WELCOME   1   1 version (1)      2 kind 1       3 durability 1 (0 memory, 1 disk)
                  4 protections 1    5 pid u32      9 uid u32      13 client's uid u32
                 17 first u64 of the last group    25 public key 65
                 90 END statement 170, with HELLO's nonce and context         260 signature 64     324 bytes
    REFUSED   2   1 why 1            2 reason 24, ASCII, zero padded          26 text, UTF-8, at most 2,048
    KEY       3   1 key 32                                                                           33 bytes

APPEND names the index that its first digest is to get, so a request that is sent twice is appended once: the
second is refused. WELCOME's END statement proves, freshly, that this service holds the key and where its log ends.
STOREKEY releases a key for the host's payloads at rest, which is neither the log's key nor that of its seal.

After REFUSED with why "malformed", "busy", "peer", "unavailable" or "storage" the service closes the connection; a
request that is refused has changed nothing, except that after "storage" the last one's outcome is unknown.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Self

from trustlog.errors import TrustLogError
from trustlog.hashing import HASH_SIZE
from trustlog.statements import APPEND_SIZE, CONTEXT_SIZE, END_SIZE, NONCE_SIZE
from trustlog.verification import GROUP_ENTRIES_MAX, PUBLIC_KEY_SIZE, SIGNATURE_SIZE, Attestation

VERSION = 1
LENGTH_SIZE = 4
KEY_SIZE = 32
REASON_SIZE = 24
TEXT_SIZE_MAX = 2048
LOOKUP_SIZE = 1 + 8 + NONCE_SIZE + CONTEXT_SIZE
APPEND_HEADER_SIZE = 1 + 8 + CONTEXT_SIZE
REQUEST_SIZE_MAX = LOOKUP_SIZE + APPEND_SIZE + SIGNATURE_SIZE + GROUP_ENTRIES_MAX * HASH_SIZE
REPLY_SIZE_MAX = 2 + REASON_SIZE + TEXT_SIZE_MAX


class Request(IntEnum):
    """What a client may ask."""

    HELLO = 1
    APPEND = 2
    REISSUE = 3
    LOOKUP = 4
    END = 5
    TRUNCATE = 6
    STOREKEY = 7
    QUOTE = 8


class Reply(IntEnum):
    """What a service answers."""

    ATTESTED = 0
    WELCOME = 1
    REFUSED = 2
    KEY = 3


class Why(IntEnum):
    """Why a request was refused."""

    MISUSE = 1  # the caller's mistake
    VERIFICATION = 2  # the group handed in proves nothing; ``reason`` is VerificationError's
    MALFORMED = 3  # not a request of this protocol
    STORAGE = 4  # the state could not be saved: the service ends
    BUSY = 5  # another client is connected
    PEER = 6  # this user may not connect
    UNAVAILABLE = 7  # the log cannot be opened


class Protection(IntFlag):
    """What the service gave up before it took its first request."""

    NO_NEW_PRIVILEGES = 1
    NO_DUMP = 2
    SYSTEM_CALLS = 4


class ProtocolError(TrustLogError):
    """Bytes that are no message of this protocol."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """A service's answer to HELLO."""

    kind: int
    is_durable: bool
    protections: Protection
    pid: int
    uid: int
    client_uid: int
    first: int
    public_key: bytes
    end: Attestation

    def encode(self) -> bytes:
        """Return the bytes, from the code on."""
        numbers = (Reply.WELCOME, VERSION, self.kind, self.is_durable, self.protections)
        process = (self.pid, self.uid, self.client_uid, self.first)
        return _WELCOME.pack(*numbers, *process, self.public_key, self.end.statement, self.end.signature)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read WELCOME; ProtocolError if it is none. What it says is not yet verified."""
        if len(data) != _WELCOME.size or data[1] != VERSION:
            raise ProtocolError(f"not a welcome of version {VERSION}: {len(data)} bytes")
        fields = _WELCOME.unpack(data)
        kind, durable, protections, pid, uid, client_uid, first, public_key, statement, signature = fields[2:]
        end = Attestation(statement, signature)
        known = Protection(protections & 7)
        return cls(kind, bool(durable), known, pid, uid, client_uid, first, public_key, end)


_WELCOME = struct.Struct(f">5B3IQ{PUBLIC_KEY_SIZE}s{END_SIZE}s{SIGNATURE_SIZE}s")


def frame(message: bytes) -> bytes:
    """Return ``message`` with its length before it."""
    return len(message).to_bytes(LENGTH_SIZE, "big") + message


def encode_hello(nonce: bytes, context: bytes) -> bytes:
    """HELLO; ``nonce`` and ``context`` are 32 bytes each, here and below."""
    return bytes((Request.HELLO, VERSION)) + nonce + context


def encode_append(first: int, digests: Sequence[bytes], context: bytes) -> bytes:
    """APPEND of ``digests`` (32 bytes each) at ``first``."""
    return struct.pack(">BQ", Request.APPEND, first) + context + b"".join(digests)


def encode_lookup(index: int, nonce: bytes, context: bytes, group: tuple[Attestation, Sequence[bytes]] | None) -> bytes:
    """LOOKUP of ``index``, with the attested group that may hold it."""
    head = struct.pack(">BQ", Request.LOOKUP, index) + nonce + context
    if group is None:
        return head
    attestation, digests = group
    return head + attestation.statement + attestation.signature + b"".join(digests)


def encode_end(nonce: bytes, context: bytes) -> bytes:
    """END."""
    return bytes((Request.END,)) + nonce + context


def encode_quote(nonce: bytes, context: bytes) -> bytes:
    """QUOTE."""
    return bytes((Request.QUOTE,)) + nonce + context


def encode_truncate(index: int, context: bytes) -> bytes:
    """TRUNCATE to ``index``."""
    return struct.pack(">BQ", Request.TRUNCATE, index) + context


def encode_refusal(why: Why, text: str, reason: str = "") -> bytes:
    """REFUSED; a text that is too long is cut."""
    cut = text.encode("utf-8", "backslashreplace")[:TEXT_SIZE_MAX]
    return bytes((Reply.REFUSED, why)) + reason.encode("ascii")[:REASON_SIZE].ljust(REASON_SIZE, b"\0") + cut


def decode_refusal(data: bytes) -> tuple[Why, str, str]:
    """Return why, reason and text of a REFUSED message; ProtocolError if it is none."""
    if len(data) < 2 + REASON_SIZE or data[1] not in _WHYS:
        raise ProtocolError("not a refusal of this protocol")
    reason = data[2 : 2 + REASON_SIZE].rstrip(b"\0").decode("ascii", "replace")
    return Why(data[1]), reason, data[2 + REASON_SIZE :].decode("utf-8", "replace")


_WHYS = frozenset(Why)


def split(data: bytes) -> tuple[bytes, ...]:
    """Cut ``data`` into digests; ProtocolError if its length is no multiple of 32, or gives more than 1024."""
    count, rest = divmod(len(data), HASH_SIZE)
    if rest or count > GROUP_ENTRIES_MAX:
        raise ProtocolError(f"{len(data)} bytes are not 0 … {GROUP_ENTRIES_MAX} digests")
    return tuple(data[at : at + HASH_SIZE] for at in range(0, len(data), HASH_SIZE))


def require_size(data: bytes, size: int) -> None:
    """ProtocolError unless ``data`` has ``size`` bytes."""
    if len(data) != size:
        raise ProtocolError(f"a request {data[0]} of {len(data)} bytes instead of {size}")
