"""``RemoteLog``: the verbs of an ``AttestedLog``, answered by a service over a socket.

Not part of what must be trusted: what it returns is an attestation, which proves itself. When a connection is made,
the service signs a new nonce, so that whoever answers at that path holds the expected key; after that the kernel
vouches that the other end of the socket is still the same process.

Calls block. One connection has one life: when it fails, every further call raises ``ServiceLostError``, and the
outcome of the one that failed is unknown until a new connection says where the log ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from trustlog.errors import LogInUseError, MisuseError, SealedStateError, TrustLogError, VerificationError
from trustlog.hashing import HASH_SIZE, fold
from trustlog.log import Group, LogState
from trustlog.service.protocol import (
    KEY_SIZE,
    LENGTH_SIZE,
    REPLY_SIZE_MAX,
    Protection,
    ProtocolError,
    Reply,
    Request,
    Welcome,
    Why,
    decode_refusal,
    encode_append,
    encode_end,
    encode_hello,
    encode_lookup,
    encode_quote,
    encode_truncate,
    frame,
)
from trustlog.statements import (
    CONTEXT_SIZE,
    NONCE_SIZE,
    U64_MAX,
    AppendStatement,
    BackendKind,
    EndStatement,
    TruncateStatement,
)
from trustlog.verification import GROUP_ENTRIES_MAX, SIGNATURE_SIZE, Attestation, LogIdentity, VerifyingKey, verify_end

# A disk may take long over one sync; a service that takes longer is given up.
REPLY_S = 30.0
# What the statement that opens a connection is about: no verifier counts statements with this context.
_GREETING = b"trustlog/service".ljust(CONTEXT_SIZE, b"\0")
_KINDS = frozenset(BackendKind)


class ServiceLostError(TrustLogError):
    """The service cannot be reached, or did not answer: whether the last request was done is unknown."""


class ServiceRefusedError(TrustLogError):
    """The service does not serve this program, or keeps another log than the expected one."""


class ServiceBusyError(ServiceRefusedError):
    """Another client is connected: its log is in use."""


class ServicePeerError(ServiceRefusedError):
    """This user may not connect; the text says which one may."""


@dataclass(frozen=True, slots=True)
class ServiceProcess:
    """What a service says of itself: its own word. ``client_uid`` is whom the kernel shows it at the other end."""

    pid: int
    uid: int
    client_uid: int
    protections: Protection

    @property
    def is_apart(self) -> bool:
        """Tell whether it runs under another user than its client, and the client is not root."""
        return self.uid != self.client_uid != 0


class RemoteLog:
    """An opened connection to a log's service; thread-safe. Contexts and nonces are 32 bytes."""

    def __init__(self, connection: socket.socket, *, public_key: bytes | None = None, reply_s: float = REPLY_S) -> None:
        """Greet the service; with ``public_key``, only a service that holds this key will do.

        ServiceLostError, ServiceRefusedError; what kept the service from opening its log is raised as the log would.
        """
        self._socket = connection
        self._lock = threading.Lock()
        self._ended: str | None = None
        connection.settimeout(reply_s)
        try:
            welcome = self._greet(public_key)
        except BaseException:
            connection.close()
            raise
        self.process = ServiceProcess(welcome.pid, welcome.uid, welcome.client_uid, welcome.protections)
        self._durability: Literal["disk", "memory"] = "disk" if welcome.is_durable else "memory"

    @classmethod
    def connect(cls, path: Path, *, public_key: bytes | None = None, reply_s: float = REPLY_S) -> Self:
        """Connect to the service that listens at ``path``; raises as above."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(reply_s)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            raise ServiceLostError(f"no log service can be reached at {path}: {error.strerror or error}") from error
        return cls(connection, public_key=public_key, reply_s=reply_s)

    def _greet(self, public_key: bytes | None) -> Welcome:
        nonce = os.urandom(NONCE_SIZE)
        reply = self._exchange(encode_hello(nonce, _GREETING))
        if reply[0] != Reply.WELCOME:
            raise ProtocolError(f"the service answered HELLO with a message {reply[0]}")
        welcome = Welcome.decode(reply)
        if public_key is not None and welcome.public_key != public_key:
            raise ServiceRefusedError(
                f"the service keeps the log with key {welcome.public_key.hex()[:18]}…, not the expected "
                f"{public_key.hex()[:18]}…: it is another log's"
            )
        if welcome.kind not in _KINDS:
            raise ProtocolError(f"kind of backend {welcome.kind} is unknown")
        kind = BackendKind(welcome.kind)
        key = VerifyingKey.from_bytes(welcome.public_key)
        statement = EndStatement.decode(welcome.end.statement)
        self._identity = LogIdentity(key, kind, statement.epoch)
        verify_end(self._identity, welcome.end, context=_GREETING, nonce=nonce)
        self._kind, self._epoch = kind, statement.epoch
        self._low, self._last, self._head, self._first = statement.low, statement.last, statement.head, welcome.first
        if self._last == 0 and self._head != LogState.empty(key.log_id, self._epoch).head:
            raise ProtocolError("the service has an empty log with a head that is none")
        return welcome

    @property
    def public_key(self) -> bytes:
        """The uncompressed P-256 public key, 65 bytes."""
        return self._identity.key.raw

    @property
    def log_id(self) -> bytes:
        """SHA-256 of the public key, 32 bytes."""
        return self._identity.key.log_id

    @property
    def kind(self) -> BackendKind:
        """What keeps the key; stands in every statement."""
        return self._kind

    @property
    def durability(self) -> Literal["disk", "memory"]:
        """Whether the state survives the service."""
        return self._durability

    @property
    def epoch(self) -> int:
        """The log's epoch."""
        return self._epoch

    @property
    def low(self) -> int:
        """First index not forgotten, as of the last answer; so are the three below."""
        return self._low

    @property
    def last(self) -> int:
        """Last index assigned; 0 in an empty log."""
        return self._last

    @property
    def head(self) -> bytes:
        """Head of the chain at ``last``, 32 bytes."""
        return self._head

    @property
    def last_group(self) -> tuple[int, int] | None:
        """Bounds (first, last) of the last group, None in an empty log."""
        return (self._first, self._last) if self._last else None

    def append(self, digests: Sequence[bytes], *, context: bytes) -> Attestation:
        """Add one group of 1 … 1024 digests (32 bytes each), in one round trip."""
        digests = tuple(digests)
        if not 1 <= len(digests) <= GROUP_ENTRIES_MAX:
            raise MisuseError(f"a group has 1 … {GROUP_ENTRIES_MAX} entries, not {len(digests)}; split it")
        if any(len(digest) != HASH_SIZE for digest in digests):
            raise MisuseError("every digest must be 32 bytes: pass entry_digest(payload), not the payload")
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            first, before = self._last + 1, self._head
            if first >= U64_MAX:
                raise MisuseError("the log is full: 2^64 - 1 entries")
            attestation = self._attested(encode_append(first, digests, context))
            statement = AppendStatement.decode(attestation.statement)
            said = (statement.first, statement.last, statement.head_before, statement.head_after)
            head = fold(before, first, digests)
            if said != (first, first + len(digests) - 1, before, head) or statement.context != context:
                raise self._end_with("the service attested another group than it was given")
            self._first, self._last, self._head = first, statement.last, head
            return attestation

    def reissue(self) -> Attestation:
        """Have the last group's one statement signed again."""
        with self._lock:
            return self._attested(bytes((Request.REISSUE,)))

    def lookup(self, index: int, *, nonce: bytes, context: bytes, group: Group | None) -> Attestation:
        """Have LOOKUP of ``index`` (≥ 1) attested; see ``AttestedLog.lookup``."""
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        if not 1 <= index <= U64_MAX:
            raise MisuseError(f"indexes run from 1 to 2^64 - 1; {index} is none")
        if group is not None:
            attestation, digests = group
            # What has no place in the layout would be read as something else.
            AppendStatement.decode(attestation.statement)
            if len(attestation.signature) != SIGNATURE_SIZE:
                raise VerificationError("bad-signature", "the group's signature is not 64 bytes")
            if len(digests) > GROUP_ENTRIES_MAX or any(len(digest) != HASH_SIZE for digest in digests):
                raise VerificationError("wrong-count", "the group's digests are not 0 … 1024 of 32 bytes")
        with self._lock:
            return self._attested(encode_lookup(index, nonce, context, group))

    def end(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Have END attested: low, last and head now, with the asker's nonce."""
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            return self._attested(encode_end(nonce, context))

    def quote(self, *, nonce: bytes, context: bytes) -> Attestation:
        """Have QUOTE attested: which program holds the key, with the asker's nonce."""
        _check_size("nonce", nonce, NONCE_SIZE)
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            return self._attested(encode_quote(nonce, context))

    def truncate(self, index: int, *, context: bytes) -> Attestation:
        """Forget what is below ``index`` (low ≤ index ≤ last + 1) for ever."""
        _check_size("context", context, CONTEXT_SIZE)
        with self._lock:
            if not self._low <= index <= self._last + 1:
                raise MisuseError(
                    f"cannot truncate to {index}: low never falls and at most the whole log is forgotten; "
                    f"choose {self._low} … {self._last + 1}"
                )
            attestation = self._attested(encode_truncate(index, context))
            self._low = TruncateStatement.decode(attestation.statement).low
            return attestation

    def store_key(self) -> bytes:
        """Ask for the key of the host's payloads at rest, 32 bytes."""
        with self._lock:
            reply = self._exchange(bytes((Request.STOREKEY,)))
            if reply[0] != Reply.KEY or len(reply) != 1 + KEY_SIZE:
                raise self._end_with("the service sent no key")
            return reply[1:]

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for a hang-up on; -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up, also on a call that waits; harmless when repeated."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._socket.close()
            self._ended = self._ended or "the log is closed; open it again"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attested(self, request: bytes) -> Attestation:
        reply = self._exchange(request)
        if reply[0] != Reply.ATTESTED or len(reply) <= 1 + SIGNATURE_SIZE:
            raise self._end_with(f"the service answered with a message {reply[0]} of {len(reply)} bytes")
        return Attestation(reply[1:-SIGNATURE_SIZE], reply[-SIGNATURE_SIZE:])

    def _exchange(self, request: bytes) -> bytes:
        """Send one request and return its reply, from the code on; a refusal is raised."""
        if self._ended is not None:
            raise MisuseError(self._ended) if self._socket.fileno() < 0 else ServiceLostError(self._ended)
        try:
            self._socket.sendall(frame(request))
            size = int.from_bytes(self._receive(LENGTH_SIZE), "big")
            if not 1 <= size <= REPLY_SIZE_MAX:
                raise self._end_with(f"the service sent a reply of {size} bytes")
            reply = self._receive(size)
        except TimeoutError as error:
            raise self._end_with(f"the service did not answer within {self._socket.gettimeout():g} s") from error
        except OSError as error:
            # What it said before it hung up tells why.
            said = self._last_words()
            raise self._end_with(f"the connection to the service broke: {error}") if said is None else said from error
        if reply[0] == Reply.REFUSED:
            raise self._refusal(reply)
        return reply

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise self._end_with("the service ended" if not data else "the service ended in the middle of a reply")
            data += part
        return data

    def _last_words(self) -> TrustLogError | None:
        try:
            self._socket.settimeout(0)
            data = self._socket.recv(LENGTH_SIZE + REPLY_SIZE_MAX)
        except OSError:
            return None
        return self._refusal(data[LENGTH_SIZE:]) if data[LENGTH_SIZE : LENGTH_SIZE + 1] == b"\2" else None

    def _refusal(self, reply: bytes) -> TrustLogError:
        why, reason, text = decode_refusal(reply)
        match why:
            case Why.MISUSE:
                return MisuseError(text)
            case Why.VERIFICATION:
                return VerificationError(reason, text)
            case Why.UNAVAILABLE:
                self._end_with(text)
                return _UNAVAILABLE.get(reason, MisuseError)(text)
            case Why.BUSY | Why.PEER:
                self._end_with(text)
                return ServiceBusyError(text) if why is Why.BUSY else ServicePeerError(text)
            case _:
                return self._end_with(text)

    def _end_with(self, text: str) -> ServiceLostError:
        """Make this connection's end known to every later call."""
        self._ended = text
        return ServiceLostError(text)


_UNAVAILABLE: dict[str, type[TrustLogError]] = {
    "SealedStateError": SealedStateError,
    "LogInUseError": LogInUseError,
}


def _check_size(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise MisuseError(f"{name} must be {size} bytes, not {len(value)}")
