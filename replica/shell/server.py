"""Accepting connections: other replicas that read logs, and clients that send requests.

A connection is counted before its first byte is read. Until it has said who it is, it is cheap (frames of 4 KiB), has
a deadline, and when too many such strangers are there the oldest makes room, so that a flood of them cannot keep a
replica out. Clients have a limit of their own; replicas' places are theirs.
"""

import asyncio
import os
import socket
import ssl
from collections import Counter
from typing import TYPE_CHECKING, cast

from replica.cluster.clusterfile import ClusterFile
from replica.core.envelope import decode_envelope
from replica.core.events import RequestReceived
from replica.core.layout import LayoutError
from replica.core.snapshot import PartWanted
from replica.shell.appraisal import EVIDENCE_BYTES_MAX, Examination
from replica.shell.sqlitefile import StoreError
from replica.shell.streams import Reader
from replica.shell.verify import verify_by_client
from replica.wire.frames import MessageProtocol
from replica.wire.handshake import connect_statement
from replica.wire.messages import (
    FRAME_OVERHEAD_MAX,
    WIRE_VERSION,
    AskCheckpoint,
    AskEvidence,
    AskPart,
    AskReceipt,
    Challenge,
    CheckpointOffer,
    ClientHello,
    EvidenceShown,
    Fetch,
    Heads,
    Message,
    Notice,
    Part,
    Ping,
    Pong,
    Refused,
    ReplicaHello,
    Request,
    StaleRead,
    StaleResult,
    StatusQuery,
    StatusReport,
    Subscribe,
    Unwatch,
    Watch,
    WatchAck,
    Welcome,
)
from replica.wire.tls import WrongCertificate, member_of

if TYPE_CHECKING:
    from replica.shell.node import Node

STRANGERS_MAX = 256
HANDSHAKE_S = 5.0
CLIENTS_MAX = 2048
CONNECTIONS_PER_CLIENT_MAX = 512
CONNECTIONS_PER_REPLICA_MAX = 4
IDLE_S = 60.0
LISTEN_BACKLOG = 512
NONCE_SIZE = 32
# Questions about the state that one connection may have open.
PARTS_AT_ONCE_MAX = 8
# What is kept of a peer's questions until it is appraised.
HELD_MAX = 8


class Server:
    """Listens, and keeps the list of who is connected."""

    def __init__(self, node: "Node", cluster: ClusterFile, tls: ssl.SSLContext) -> None:
        self.node = node
        self.cluster = cluster
        self.refusals: Counter[str] = node.refusals
        self.clients: dict[bytes, list[ServerConnection]] = {}
        self.client_count = 0
        self._tls = tls
        self._strangers: dict[socket.socket, float] = {}
        self._connections: set[ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    def start(self, host: str, port: int) -> None:
        """Bind and listen. OSError if the address cannot be had."""
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(LISTEN_BACKLOG)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self.start_task(self._accept(listener))

    async def close(self) -> None:
        """Stop listening and close every connection, sending what waits to be sent."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for accepted in self._strangers:
            accepted.close()  # its greeting was cancelled before it began
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close()

    def start_task(self, work: "asyncio._CoroutineLike[None]") -> None:
        """Run something until it ends or the server closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                # Not the loop's own way of accepting: cancelled at the wrong moment, that loses what it accepted.
                accepted, _ = listener.accept()
                accepted.setblocking(False)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BlockingIOError:
                await self._wait_readable(listener)
                continue
            except OSError as error:
                # Out of file descriptors, most likely: what is connected goes on, newcomers wait.
                self.refusals["accept-failed"] += 1
                self.node.log.warning("cannot accept a connection", error=str(error))
                await asyncio.sleep(0.1)
                continue
            if len(self._strangers) >= STRANGERS_MAX:
                self._drop_oldest_stranger()
            self._strangers[accepted] = loop.time()
            self.start_task(self._greet(accepted))

    async def _wait_readable(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()

        def note() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(listener, note)
        try:
            await readable
        finally:
            loop.remove_reader(listener)

    async def _greet(self, accepted: socket.socket) -> None:
        """Run TLS and the handshake on a new connection, within the deadline."""
        loop = asyncio.get_running_loop()
        connection = ServerConnection(self)
        connected = False
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                # What this returns as the protocol is uvloop's own under TLS, so the connection is made beforehand.
                await loop.connect_accepted_socket(
                    lambda: connection, accepted, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_S
                )
                connected = True
                await connection.known
        except TimeoutError:
            self.refusals["handshake-timeout"] += 1
        except (OSError, ssl.SSLError):
            self.refusals["tls-failed"] += 1
        finally:
            self._strangers.pop(accepted, None)
            if connection.role is None:
                connection.abort()
            if not connected:
                accepted.close()

    def _drop_oldest_stranger(self) -> None:
        oldest = next(iter(self._strangers))
        del self._strangers[oldest]
        self.refusals["too-many-strangers"] += 1
        try:
            oldest.shutdown(socket.SHUT_RDWR)
        except OSError:
            oldest.close()

    # Called by connections.

    def joined(self, connection: "ServerConnection") -> None:
        """Note a connection."""
        self._connections.add(connection)

    def left(self, connection: "ServerConnection") -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        if connection.client is not None:
            same = self.clients[connection.client]
            same.remove(connection)
            self.client_count -= 1
            if not same:
                del self.clients[connection.client]

    def admit_client(self, connection: "ServerConnection", key: bytes) -> bool:
        """Note whose connection it is; False if there is no place."""
        same = self.clients.get(key, [])
        if self.client_count >= CLIENTS_MAX or len(same) >= CONNECTIONS_PER_CLIENT_MAX:
            return False
        self.clients.setdefault(key, []).append(connection)
        self.client_count += 1
        return True

    def admit_replica(self, number: int) -> None:
        """Make room for another connection of this replica: its oldest may be what a restart left behind."""
        same = [connection for connection in self._connections if connection.replica == number and connection.is_open]
        for connection in sorted(same, key=lambda one: one.welcomed_at)[: 1 - CONNECTIONS_PER_REPLICA_MAX or None]:
            connection.refuse("too-many-connections-of-a-replica")

    def heard_from(self, number: int) -> float:
        """Return when replica `number` was last heard on a connection of its own, on the loop's clock; 0 if never."""
        return max((one.last_heard for one in self._connections if one.replica == number), default=0.0)

    def drop_idle(self, now: float) -> None:
        """Close connections that were not heard of for a minute: the other end may be gone without a word."""
        for connection in list(self._connections):
            if connection.role is not None and now - connection.last_heard > IDLE_S:
                self.refusals["idle"] += 1
                connection.abort()


class ServerConnection(MessageProtocol):
    """A connection that was accepted: a stranger's, then a client's or a replica's."""

    holds_back = True

    def __init__(self, server: Server) -> None:
        super().__init__(server.refusals)
        self.role: str | None = None
        self.client: bytes | None = None
        self.replica: int | None = None
        self.welcomed_at = 0.0
        self.known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server = server
        self._node = server.node
        self._reader = Reader(self)
        self._handing_out = 0
        genesis = server.cluster.genesis
        self._challenge = Challenge(
            WIRE_VERSION,
            server.cluster.cluster_id,
            server.cluster.digest,
            server.node.number,
            os.urandom(NONCE_SIZE),
        )
        self._limits = genesis.limits
        self._examination = Examination(server.node.appraisals, self, os.urandom(NONCE_SIZE), self._on_appraised)
        self._is_appraised = False
        self._early: list[Subscribe | Fetch] = []

    def opened(self) -> None:
        """Send the challenge."""
        self._server.joined(self)
        self.send(self._challenge)

    def closed(self, reason: str) -> None:  # noqa: ARG002 - part of the interface
        """Give the place back."""
        self._examination.close()
        self._node.streams.unsubscribe(self._reader)
        self._node.watches.left(self)
        self._server.left(self)
        if not self.known.done():
            self.known.set_result(None)

    def drained(self) -> None:
        """Go on streaming."""
        self._node.streams.resume(self._reader)
        self._node.watches.drained(self)

    def message_received(self, message: Message) -> None:
        """Handle a message according to who sent it."""
        if self.role is None:
            self._on_hello(message)
        elif isinstance(message, Ping):
            self.send(Pong(message.number))
        elif isinstance(message, StatusQuery):
            self.send(StatusReport(message.query, self._node.status_json()))
        elif self.role == "replica" and self._on_appraisal(message):
            pass
        elif isinstance(message, Request):
            self._on_request(message)
        elif self.role == "client" and isinstance(message, StaleRead | AskReceipt):
            self._on_question(message)
        elif self.role == "client" and isinstance(message, Watch | WatchAck | Unwatch):
            self._node.watches.on_message(self, message)
        elif self.role == "replica" and isinstance(message, Subscribe):
            self._node.on_subscribe(cast("int", self.replica), message.first)
            self._node.streams.subscribe(self._reader, message.first)
        elif self.role == "replica" and isinstance(message, Fetch):
            self._node.streams.fetch(self._reader, message.log, message.first)
        elif self.role == "replica" and isinstance(message, AskCheckpoint | AskPart):
            self._hand_out(message)
        elif self.role == "replica" and isinstance(message, Heads):
            self._node.on_heads(cast("int", self.replica), message)
        else:
            raise LayoutError(f"a {self.role} does not send {type(message).__name__}")

    def _on_hello(self, message: Message) -> None:
        if not isinstance(message, ClientHello | ReplicaHello):
            raise LayoutError("the first message must say who it is")
        if message.version != WIRE_VERSION:
            self._refuse_hello("version", f"this replica speaks version {WIRE_VERSION}, not {message.version}")
        elif message.cluster_id != self._challenge.cluster_id:
            mine, theirs = self._challenge.cluster_id.hex(), message.cluster_id.hex()
            self._refuse_hello(
                "other-cluster", f"this replica is of cluster {mine}, you are of {theirs}: compare cluster.toml"
            )
        elif isinstance(message, ClientHello):
            self._on_client(message)
        else:
            self._on_replica(message)

    def _on_client(self, hello: ClientHello) -> None:
        own = self._server.cluster.replicas[self._node.number].certificate_der
        if not verify_by_client(hello.public_key, hello.signature, connect_statement(self._challenge, own)):
            self._refuse_hello("bad-signature", "the challenge is not signed by that key")
        elif not self._server.admit_client(self, hello.public_key):
            self._refuse_hello("too-many-clients", "this replica has no place for another client; try again later")
        else:
            self.client = hello.public_key
            self._welcome("client")

    def _on_replica(self, hello: ReplicaHello) -> None:
        transport = cast("asyncio.Transport", self.transport)
        try:
            presented = member_of(transport.get_extra_info("ssl_object"), self._server.cluster)
        except WrongCertificate:
            presented = None
        if presented is None or presented != hello.number or presented == self._node.number:
            self._refuse_hello("not-that-replica", f"your certificate is not replica {hello.number}'s")
            return
        self._server.admit_replica(hello.number)
        self.replica = hello.number
        self._is_appraised = not self._node.appraisals.is_demanded
        self._welcome("replica")
        self.frame_bytes_max = max(self.frame_bytes_max, EVIDENCE_BYTES_MAX + FRAME_OVERHEAD_MAX)
        self._examination.begin(hello.number)

    def _on_appraisal(self, message: Message) -> bool:
        """Deal with what belongs to the appraisal, and with what came before its end; say whether it was that.

        A peer's first questions are kept until then, because it asks them once; the rest is dropped.
        """
        if isinstance(message, AskEvidence):
            self._examination.on_asked(message)
        elif isinstance(message, EvidenceShown):
            self._examination.on_shown(message)
        elif self._is_appraised:
            return False
        elif isinstance(message, Subscribe | Fetch) and len(self._early) < HELD_MAX:
            self._early.append(message)
        else:
            self.refusals["before-appraisal"] += 1
        return True

    def _on_appraised(self, refused: str | None) -> None:
        if refused is not None:
            self.send(Refused("appraisal", f"this replica does not accept your evidence: {refused}"))
            self.close()
            return
        self._is_appraised = True
        early, self._early = self._early, []
        for message in early:
            self.message_received(message)

    def _welcome(self, role: str) -> None:
        self.role = role
        self.welcomed_at = self._loop.time()
        # Neither a client nor a reading replica sends anything larger than an envelope.
        self.frame_bytes_max = self._limits.envelope_bytes_max + FRAME_OVERHEAD_MAX
        self.send(Welcome(self._node.core.executed, self._node.core.view))
        if not self.known.done():
            self.known.set_result(None)

    def _refuse_hello(self, code: str, text: str) -> None:
        self.refusals[f"hello-{code}"] += 1
        self._node.log.warning("connection refused", reason=code, text=text)
        self.send(Refused(code, text))
        self.close()

    def _on_request(self, message: Request) -> None:
        try:
            envelope = decode_envelope(message.envelope, self._challenge.cluster_id, self._limits)
        except LayoutError as error:
            self._refuse_request("malformed-envelope", str(error))
            return
        if self.client is not None and envelope.client != self.client:
            self._refuse_request("foreign-envelope", "the envelope is another key's than this connection's")
        elif not self._node.verify_envelope(envelope):
            self._refuse_request("bad-envelope-signature", "the envelope's signature is not its client's")
        else:
            if self.role == "client":
                self._node.measures.requested(envelope)
            self._node.post(RequestReceived(envelope, relayed=self.role == "replica", source=self))

    def _hand_out(self, message: AskCheckpoint | AskPart) -> None:
        if self._handing_out >= PARTS_AT_ONCE_MAX:
            self._node.refusals["parts-at-once"] += 1
            return
        wanted = PartWanted.decode(*message[1:]) if isinstance(message, AskPart) else None
        self._handing_out += 1
        self._server.start_task(self._answer(message, wanted))

    async def _answer(self, message: AskCheckpoint | AskPart, wanted: PartWanted | None) -> None:
        keeper = self._node.keeper
        try:
            if isinstance(message, AskCheckpoint):
                offer = await keeper.offer()
                if offer is not None and self.is_open:
                    self.send(CheckpointOffer(*offer))
            elif wanted is not None:
                data = await keeper.part(message.slot, wanted)
                if self.is_open:
                    self.send(Part(*message, int(data is not None), data or b""))
        except LayoutError:
            self.refuse("malformed-message")
        except StoreError as error:
            # The file is damaged: the next start finds out and fetches the state anew; others are asked by the peer.
            self._node.refusals["state-unreadable"] += 1
            self._node.log.error("cannot hand out the state", error=str(error))  # noqa: TRY400 - no traceback
        finally:
            self._handing_out -= 1

    def _refuse_request(self, code: str, text: str) -> None:
        self.refusals[code] += 1
        if self.client is not None:
            self.send(Notice(code, text))

    def _on_question(self, message: StaleRead | AskReceipt) -> None:
        if isinstance(message, StaleRead):
            self._on_stale_read(message)
        else:
            self._node.receipts.on_ask(self, message)
        # Nobody ordered it, so nothing else paces it: one at a time, and everybody else in between.
        self.hold(pause=True)
        self._loop.call_soon(self._after_question)

    def _after_question(self) -> None:
        self.hold(pause=False)

    def _on_stale_read(self, message: StaleRead) -> None:
        if len(message.operation) > self._limits.operation_bytes_max:
            raise LayoutError("an operation above the limit")
        result = self._node.core.executor.peek(message.operation)
        self.send(StaleResult(message.query, result.status, self._node.core.executed, result.value))
