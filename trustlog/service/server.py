"""The service: one trusted log, one client at a time, one request after the other.

Rules. 1. Only the one user that was named may connect (SO_PEERCRED, which the kernel fills in). 2. While one client
is connected, another is refused, not queued: two programs that both believe to be this replica are a mistake that
must show. 3. A request is validated completely before the log is touched; whatever is no request closes the
connection and changes nothing. 4. Nothing is kept for a client beyond one unfinished request, and that for a few
seconds only. 5. When the state cannot be saved, the service says so and ends: what the disk holds is unknown until
the log is opened again.

There are no threads and there is no history; what must be remembered is in the ``AttestedLog``.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from trustlog.errors import MisuseError, TrustLogError, VerificationError
from trustlog.hashing import HASH_SIZE
from trustlog.log import AttestedLog
from trustlog.service.protocol import (
    APPEND_HEADER_SIZE,
    LENGTH_SIZE,
    LOOKUP_SIZE,
    REQUEST_SIZE_MAX,
    VERSION,
    Protection,
    ProtocolError,
    Reply,
    Request,
    Welcome,
    Why,
    encode_refusal,
    frame,
    require_size,
    split,
)
from trustlog.statements import APPEND_SIZE
from trustlog.verification import SIGNATURE_SIZE, Attestation

# A request that was begun must be complete, and a reply taken, within this time. An idle client may be silent.
PATIENCE_S = 5.0
READ_SIZE = 64 * 1024
BACKLOG = 16

_PEER = struct.Struct("iII")  # pid, uid, gid


class StorageError(Exception):
    """The state could not be saved: the service must end."""


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return process id and user id of whoever connected, as the kernel saw them then."""
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


def store_key(seal_key: bytes) -> bytes:
    """Derive the key for the host's payloads at rest from the sealing key; 32 bytes each."""
    return hmac.digest(seal_key, b"trustlog/store", "sha256")


class Answering:
    """Requests to replies, without a socket: ``answer`` never raises for anything a client sent."""

    def __init__(
        self, log: AttestedLog, protections: Protection, key: bytes | None = None, *, is_durable: bool = True
    ) -> None:
        """Take the opened log, what was given up, the key that STOREKEY releases, and whether saving is synced."""
        self._log = log
        self._protections = protections
        self._key = key
        self._is_durable = is_durable and log.durability == "disk"
        self.refused: Counter[str] = Counter()

    def welcome(self, request: bytes, client_uid: int) -> bytes:
        """Answer HELLO, the first request; ProtocolError for anything else."""
        if request[:1] != bytes((Request.HELLO,)):
            raise ProtocolError("the first request must be HELLO")
        require_size(request, 66)
        if request[1] != VERSION:
            raise ProtocolError(f"version {request[1]} of the protocol; this service speaks {VERSION}")
        log = self._log
        end = log.end(nonce=request[2:34], context=request[34:])
        first = log.last_group[0] if log.last_group else 0
        process = (os.getpid(), os.getuid(), client_uid)
        return Welcome(log.kind, self._is_durable, self._protections, *process, first, log.public_key, end).encode()

    def answer(self, request: bytes) -> bytes:
        """Answer any other request. ProtocolError: it is none. StorageError: the service must end."""
        code = request[0] if request else 0
        verb = self._VERBS.get(code)
        if verb is None:
            raise ProtocolError(f"there is no request {code}")
        try:
            attested = verb(self, request)
        except MisuseError as error:
            self.refused["misuse"] += 1
            return encode_refusal(Why.MISUSE, str(error))
        except VerificationError as error:
            self.refused[error.reason] += 1
            return encode_refusal(Why.VERIFICATION, str(error), error.reason)
        except ProtocolError:
            raise
        except Exception as error:
            raise StorageError(f"{type(error).__name__}: {error}") from error
        if isinstance(attested, bytes):
            return bytes((Reply.KEY,)) + attested
        return bytes((Reply.ATTESTED,)) + attested.statement + attested.signature

    def _append(self, request: bytes) -> Attestation:
        if len(request) < APPEND_HEADER_SIZE + HASH_SIZE:
            raise ProtocolError("an append without a digest")
        digests = split(request[APPEND_HEADER_SIZE:])
        first = int.from_bytes(request[1:9], "big")
        if first != self._log.last + 1:
            raise MisuseError(f"the next index is {self._log.last + 1}, not {first}: another append came before")
        return self._log.append(digests, context=request[9:41])

    def _reissue(self, request: bytes) -> Attestation:
        require_size(request, 1)
        return self._log.reissue()

    def _lookup(self, request: bytes) -> Attestation:
        group = None
        if len(request) > LOOKUP_SIZE:
            statement, rest = request[LOOKUP_SIZE : LOOKUP_SIZE + APPEND_SIZE], request[LOOKUP_SIZE + APPEND_SIZE :]
            if len(rest) < SIGNATURE_SIZE:
                raise ProtocolError("a lookup whose group is cut short")
            group = (Attestation(statement, rest[:SIGNATURE_SIZE]), split(rest[SIGNATURE_SIZE:]))
        else:
            require_size(request, LOOKUP_SIZE)
        index = int.from_bytes(request[1:9], "big")
        return self._log.lookup(index, nonce=request[9:41], context=request[41:73], group=group)

    def _end(self, request: bytes) -> Attestation:
        require_size(request, 65)
        return self._log.end(nonce=request[1:33], context=request[33:])

    def _quote(self, request: bytes) -> Attestation:
        require_size(request, 65)
        return self._log.quote(nonce=request[1:33], context=request[33:])

    def _truncate(self, request: bytes) -> Attestation:
        require_size(request, 41)
        return self._log.truncate(int.from_bytes(request[1:9], "big"), context=request[9:])

    def _store_key(self, request: bytes) -> bytes:
        require_size(request, 1)
        if self._key is None:
            raise MisuseError("this service keeps no key for payloads")
        return self._key

    _VERBS: ClassVar[dict[int, Callable[[Answering, bytes], Attestation | bytes]]] = {
        Request.APPEND: _append,
        Request.REISSUE: _reissue,
        Request.LOOKUP: _lookup,
        Request.END: _end,
        Request.TRUNCATE: _truncate,
        Request.STOREKEY: _store_key,
        Request.QUOTE: _quote,
    }


@dataclass(slots=True)
class _Client:
    socket: socket.socket
    pid: int
    uid: int
    since: float  # when its unfinished request, or its silence before HELLO, began
    is_welcome: bool = False
    unread: bytearray = field(default_factory=bytearray)

    @property
    def owes(self) -> bool:
        return not self.is_welcome or bool(self.unread)


class Server:
    """Serves clients one at a time until the process ends; ``report`` is told what an operator should know."""

    def __init__(self, answering: Answering, client_uid: int, report: Callable[[str], None]) -> None:
        """Only processes of ``client_uid`` may connect."""
        self._answering = answering
        self._client_uid = client_uid
        self._report = report
        self._client: _Client | None = None
        self.counts: Counter[str] = Counter()

    def serve(self, listener: socket.socket) -> None:
        """Accept and answer for ever; StorageError when the log's state could not be saved."""
        listener.setblocking(False)
        while True:
            self.turn(listener)

    def serve_one(self, connection: socket.socket) -> None:
        """Answer the one client at the other end of ``connection`` until it hangs up; StorageError as above."""
        self._admit(connection)
        while self._client is not None:
            self.turn(None)

    def turn(self, listener: socket.socket | None) -> None:
        """Wait for something and deal with it."""
        poller, client = select.poll(), self._client
        if listener is not None:
            poller.register(listener, select.POLLIN)
        if client is not None:
            poller.register(client.socket, select.POLLIN)
        ready = poller.poll(self._patience_ms())
        for descriptor, _ in ready:
            if client is not None and descriptor == client.socket.fileno():
                self._read(client)
            elif listener is not None:
                self._accept(listener)
        late = self._client
        if late is not None and late.owes and time.monotonic() - late.since > PATIENCE_S:
            self._hang_up("slow", "a request was not completed in time")

    def _patience_ms(self) -> int | None:
        client = self._client
        if client is None or not client.owes:
            return None
        return max(0, int((client.since + PATIENCE_S - time.monotonic()) * 1000) + 1)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # whoever it was has gone
        self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        pid, uid = peer_of(connection)
        if uid != self._client_uid:
            self._count("peer", f"refused process {pid} of user {uid}: only user {self._client_uid} may connect")
            text = f"only user {self._client_uid} may speak to this log, and you are user {uid}: see --client-user"
            _refuse(connection, Why.PEER, text)
        elif self._client is not None:
            owner = self._client.pid
            self._count("busy", f"refused process {pid}: process {owner} is connected")
            text = f"process {owner} is connected to this log already: one log has one owner; stop that process first"
            _refuse(connection, Why.BUSY, text)
        else:
            self._client = _Client(connection, pid, uid, time.monotonic())

    def _read(self, client: _Client) -> None:
        try:
            data = client.socket.recv(READ_SIZE)
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return
        if client.is_welcome and not client.unread:
            client.since = time.monotonic()
        client.unread += data
        while self._client is client and (request := self._next_request(client)) is not None:
            self._reply(client, request)

    def _next_request(self, client: _Client) -> bytes | None:
        """Take a complete request off what was read. Beyond a limit, nothing is waited for."""
        unread = client.unread
        if len(unread) < LENGTH_SIZE:
            return None
        size = int.from_bytes(unread[:LENGTH_SIZE], "big")
        if not 1 <= size <= REQUEST_SIZE_MAX:
            self._malformed(client, f"a request of {size} bytes; the limit is {REQUEST_SIZE_MAX}")
            return None
        if len(unread) < LENGTH_SIZE + size:
            return None
        request = bytes(unread[LENGTH_SIZE : LENGTH_SIZE + size])
        del unread[: LENGTH_SIZE + size]
        client.since = time.monotonic()
        return request

    def _reply(self, client: _Client, request: bytes) -> None:
        try:
            if client.is_welcome:
                reply = self._answering.answer(request)
            else:
                reply = self._answering.welcome(request, client.uid)
                client.is_welcome = True
        except ProtocolError as error:
            self._malformed(client, str(error))
            return
        except (StorageError, TrustLogError) as error:
            text = f"the log's state could not be saved: {error}; the service ends"
            _refuse(client.socket, Why.STORAGE, text)
            raise StorageError(text) from error
        try:
            client.socket.sendall(frame(reply))
        except OSError:
            self._hang_up("slow", "a reply was not taken")

    def _malformed(self, client: _Client, text: str) -> None:
        self._count("malformed", f"process {client.pid} sent what is no request: {text}")
        _refuse(client.socket, Why.MALFORMED, f"not a request of this protocol: {text}")
        self._client = None

    def _hang_up(self, reason: str = "", text: str = "") -> None:
        client, self._client = self._client, None
        if client is not None:
            client.socket.close()
            if reason:
                self._count(reason, f"hung up on process {client.pid}: {text}")

    def _count(self, reason: str, text: str) -> None:
        """Report the first, second, fourth, eighth … of a kind: whoever tries must not fill the disk."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if count & (count - 1) == 0:
            self._report(f"{text} ({reason}, time {count})")


def _refuse(connection: socket.socket, why: Why, text: str) -> None:
    """Say no, if the other end takes it at once, and hang up."""
    try:
        connection.settimeout(0)
        connection.sendall(frame(encode_refusal(why, text)))
    except OSError:
        pass
    finally:
        connection.close()
