"""Accepting connections: counted, introduced, and then a client's or a replica's.

A connection is counted before its first byte is read. Until it has said who it is, it is cheap (frames of 4 KiB), has
a deadline, and when too many such strangers are there the oldest makes room, so that a flood of them cannot keep a
replica out. Clients have a limit of their own; replicas' places are theirs.

When clients have all their places, the newest connection of the key that has most of them gives way to a key that has
fewer, and first of all one of a key that may ask for nothing: revoked, or not listed where only listed keys may. Such
keys have few places altogether, and operators some in reserve.
"""

import asyncio
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, cast

from replica.cluster.clusterfile import ClusterFile
from replica.core.envelope import Envelope, decode_envelope
from replica.core.layout import LayoutError
from replica.shell.turns import Turns
from replica.shell.verify import verify_by_client
from replica.wire.frames import MessageProtocol
from replica.wire.handshake import connect_statement
from replica.wire.messages import (
    FRAME_OVERHEAD_MAX,
    WIRE_VERSION,
    Challenge,
    ClientHello,
    Message,
    Notice,
    Ping,
    Pong,
    Refused,
    ReplicaHello,
    Request,
    Welcome,
)
from replica.wire.tls import WrongCertificate, member_of

STRANGERS_MAX = 256
HANDSHAKE_S = 5.0
CLIENTS_MAX = 2048
CONNECTIONS_PER_CLIENT_MAX = 512
# Of all keys together that may ask for nothing.
UNWELCOME_MAX = 64
# For operators, beyond CLIENTS_MAX.
OPERATOR_CONNECTIONS_MAX = 16
CONNECTIONS_PER_REPLICA_MAX = 4
IDLE_S = 60.0
LISTEN_BACKLOG = 512
NONCE_SIZE = 32


class Host(Protocol):
    """The replica that listens, as far as a connection needs to know it."""

    @property
    def number(self) -> int:
        """Its number."""
        ...

    @property
    def refusals(self) -> Counter[str]:
        """What it refused."""
        ...

    def is_allowed(self, key: bytes) -> bool:
        """Say whether this key may be a client's."""
        ...

    @property
    def log(self) -> Any:  # noqa: ANN401 - structlog's own type
        """Where it says what happens."""
        ...

    @property
    def progress(self) -> tuple[int, int]:
        """The highest slot executed, and the view."""
        ...


class Server:
    """Listens, and keeps the list of who is connected. accept: makes its side of a connection."""

    def __init__(
        self,
        node: Host,
        cluster: ClusterFile,
        tls: ssl.SSLContext,
        accept: "Callable[[Server], AcceptedConnection]",
    ) -> None:
        self.node = node
        self.cluster = cluster
        self.refusals: Counter[str] = node.refusals
        self.clients: dict[bytes, list[AcceptedConnection]] = {}
        self.client_count = 0
        self.turns = Turns()
        self._tls = tls
        self._new_connection = accept
        self._strangers: dict[socket.socket, float] = {}
        self._connections: set[AcceptedConnection] = set()
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
        connection = self._new_connection(self)
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

    def joined(self, connection: "AcceptedConnection") -> None:
        """Note a connection."""
        self._connections.add(connection)

    def left(self, connection: "AcceptedConnection") -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        same = self.clients.get(connection.client or b"", [])
        if connection in same:  # else it gave way before
            same.remove(connection)
            self.client_count -= 1
            if not same:
                del self.clients[connection.client or b""]

    def admit_client(self, connection: "AcceptedConnection", key: bytes) -> bool:
        """Note whose connection it is; False if there is no place."""
        if len(self.clients.get(key, ())) >= CONNECTIONS_PER_CLIENT_MAX:
            return False
        if not self._is_welcome(key):
            taken = sum(len(some) for other, some in self.clients.items() if not self._is_welcome(other))
            if taken >= UNWELCOME_MAX:
                return False
        reserve = OPERATOR_CONNECTIONS_MAX if self._is_operator(key) else 0
        if self.client_count >= CLIENTS_MAX + reserve and not self._make_room(key):
            return False
        self.clients.setdefault(key, []).append(connection)
        self.client_count += 1
        return True

    def _is_operator(self, key: bytes) -> bool:
        return key in self.cluster.genesis.operators

    def _is_welcome(self, key: bytes) -> bool:
        return self._is_operator(key) or self.node.is_allowed(key)

    def _make_room(self, key: bytes) -> bool:
        """Have the newest connection of whoever has most give way to one of this key; False if nobody has more."""
        ranks = {
            other: (not self._is_welcome(other), len(some))
            for other, some in self.clients.items()
            if not self._is_operator(other)
        }
        most = max(ranks, key=ranks.__getitem__, default=key)
        if ranks.get(most, (False, 0)) <= (not self._is_welcome(key), len(self.clients.get(key, ())) + 1):
            return False
        newest = self.clients[most][-1]
        self.left(newest)
        newest.give_way()
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


class AcceptedConnection(MessageProtocol):
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
        self._host = server.node
        self._challenge = Challenge(
            WIRE_VERSION,
            server.cluster.cluster_id,
            server.cluster.digest,
            server.node.number,
            os.urandom(NONCE_SIZE),
        )
        self._limits = server.cluster.genesis.limits

    # To be implemented by subclasses.

    def introduced(self, message: Message) -> None:
        """Handle a message of a client or a replica: who it is stands in `role`."""
        raise NotImplementedError

    def replica_welcomed(self, number: int) -> None:
        """Act on a replica having been welcomed."""

    # asyncio's side.

    def opened(self) -> None:
        """Send the challenge."""
        self._server.joined(self)
        self.send(self._challenge)

    def closed(self, reason: str) -> None:  # noqa: ARG002 - part of the interface
        """Give the place back."""
        self._server.left(self)
        if not self.known.done():
            self.known.set_result(None)

    def has_turn(self) -> bool:
        """See MessageProtocol: clients take turns by their keys."""
        return self.client is None or self._server.turns.has_turn(self.client, self)

    def message_received(self, message: Message) -> None:
        """Handle a message according to who sent it."""
        if self.role is None:
            self._on_hello(message)
        elif self.client is not None:
            with self._server.turns.charged(self.client):
                self._introduced(message)
        else:
            self._introduced(message)

    def _introduced(self, message: Message) -> None:
        if isinstance(message, Ping):
            self.send(Pong(message.number))
        else:
            self.introduced(message)

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
        own = self._server.cluster.replicas[self._host.number].certificate_der
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
        if presented is None or presented != hello.number or presented == self._host.number:
            self._refuse_hello("not-that-replica", f"your certificate is not replica {hello.number}'s")
            return
        self._server.admit_replica(hello.number)
        self.replica = hello.number
        self._welcome("replica")
        self.replica_welcomed(hello.number)

    def _welcome(self, role: str) -> None:
        self.role = role
        self.welcomed_at = self._loop.time()
        # Neither a client nor a reading replica sends anything larger than an envelope.
        self.frame_bytes_max = self._limits.envelope_bytes_max + FRAME_OVERHEAD_MAX
        self.send(Welcome(*self._host.progress))
        if not self.known.done():
            self.known.set_result(None)

    def give_way(self) -> None:
        """Close the connection of a client that has more of them than others, who need a place."""
        self.refusals["client-gave-way"] += 1
        self.send(Refused("too-many-clients", "this replica needs the place for a client with fewer connections"))
        self.close()

    def _refuse_hello(self, code: str, text: str) -> None:
        self.refusals[f"hello-{code}"] += 1
        self._host.log.warning("connection refused", reason=code, text=text)
        self.send(Refused(code, text))
        self.close()

    def needs_no_order(self, envelope: Envelope) -> bool:  # noqa: ARG002 - part of the interface
        """Deal with a request of this connection's client without its signature, if that can be; say whether it was."""
        return False

    def _decode_request(self, message: Request, verify: Callable[[Envelope], bool]) -> Envelope | None:
        """Return the envelope of a request, or None if it is dealt with; verify: whether its client signed one."""
        try:
            envelope = decode_envelope(message.envelope, self._challenge.cluster_id, self._limits)
        except LayoutError as error:
            self._refuse_request("malformed-envelope", str(error))
            return None
        if self.client is not None and envelope.client != self.client:
            self._refuse_request("foreign-envelope", "the envelope is another key's than this connection's")
        elif self.client is not None and self.needs_no_order(envelope):
            pass
        elif not verify(envelope):
            self._refuse_request("bad-envelope-signature", "the envelope's signature is not its client's")
        else:
            return envelope
        return None

    def _refuse_request(self, code: str, text: str) -> None:
        self.refusals[code] += 1
        if self.client is not None:
            self.send(Notice(code, text))
