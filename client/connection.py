"""Connections to replicas: TLS with the pinned certificate, the handshake, reconnecting, finding dead ones.

A link keeps one connection to one replica and dials again, with growing random pauses, for as long as it
runs. What a connection says is the word of the replica whose certificate the cluster file names, and of no
other.
"""

import asyncio
import ssl
from dataclasses import dataclass
from random import SystemRandom
from typing import Protocol

from replica.cluster.clusterfile import ClusterFile, ReplicaPlace
from replica.cluster.keys import ClientKey
from replica.core.layout import LayoutError
from replica.wire.dial import dial, resolve
from replica.wire.frames import MessageProtocol
from replica.wire.handshake import connect_statement
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    WIRE_VERSION,
    Challenge,
    ClientHello,
    Message,
    Ping,
    Pong,
    Refused,
    Reply,
    Welcome,
)
from replica.wire.tls import WrongCertificate, client_context, pinned

# More than this in a connection's buffer means that the replica does not read; what would come on top is
# dropped, and sent again when patience ends.
SEND_BUFFER_MAX = 16 * 1024 * 1024
PROBLEM_TEXT_MAX = 300
_random = SystemRandom()


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a link is, in seconds."""

    connect_s: float = 5.0  # for dialling, TLS and the handshake together; as much again to resolve a name before
    backoff_first_s: float = 0.05
    backoff_s_max: float = 2.0
    ping_after_s: float = 2.0  # silence after which a sign of life is asked for
    dead_after_s: float = 6.0  # silence after which the connection is given up


class LinkOwner(Protocol):
    """Who is told what a link finds."""

    def link_up(self, number: int, executed: int, view: int) -> None:
        """Take in that the replica welcomed this client."""

    def link_down(self, number: int, problem: str) -> None:
        """Take in that a connection ended or an attempt failed, and why."""

    def link_message(self, number: int, message: Message) -> None:
        """Handle a message of a replica that welcomed this client."""


class _Nobody:
    """The owner of a link to a replica that is no member any more."""

    def link_up(self, number: int, executed: int, view: int) -> None:
        """See LinkOwner."""

    def link_down(self, number: int, problem: str) -> None:
        """See LinkOwner."""

    def link_message(self, number: int, message: Message) -> None:
        """See LinkOwner."""


_NOBODY = _Nobody()


def printable(text: str) -> str:
    """Return a foreign text for a terminal or a log: bounded, without control characters."""
    shown = "".join([character if character.isprintable() else "?" for character in text[:PROBLEM_TEXT_MAX]])
    return shown if len(text) <= PROBLEM_TEXT_MAX else shown + "…"


class ReplicaConnection(MessageProtocol):
    """One connection: certificate, handshake, then messages for the link's owner."""

    def __init__(self, link: "ReplicaLink") -> None:
        super().__init__()
        self._link = link
        self._challenged = False
        self.welcomed: asyncio.Future[bool] = self._loop.create_future()  # False: it ended before
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.problem = ""

    def opened(self) -> None:
        """See MessageProtocol."""
        tls = self.transport.get_extra_info("ssl_object") if self.transport else None
        if tls is None:
            self._give_up("the connection is not encrypted")
            return
        try:
            pinned(tls, self._link.place.certificate_der)
        except WrongCertificate as error:
            self._give_up(str(error))

    def closed(self, reason: str) -> None:
        """See MessageProtocol."""
        if self.refusals and not self.problem:
            self.problem = f"it sent what is no message ({', '.join(self.refusals)})"
        self.problem = self.problem or reason
        if not self.welcomed.done():
            self.welcomed.set_result(False)
        if not self.ended.done():
            self.ended.set_result(None)

    def message_received(self, message: Message) -> None:
        """See MessageProtocol."""
        if self.welcomed.done():
            self._in_conversation(message)
        elif isinstance(message, Refused):
            self._give_up(f"refused: {printable(message.text)} ({printable(message.code)})")
        elif not self._challenged and isinstance(message, Challenge):
            self._answer(message)
        elif self._challenged and isinstance(message, Welcome):
            self.frame_bytes_max = FRAME_BYTES_MAX
            self.welcomed.set_result(True)
            self._link.on_welcome(self, message)
        else:
            raise LayoutError(f"a {type(message).__name__} in the handshake")

    def _in_conversation(self, message: Message) -> None:
        # Most messages are replies; nothing comes before them.
        if type(message) is not Reply:
            if isinstance(message, Ping):
                self.send(Pong(message.number))
                return
            if isinstance(message, Pong):
                return
        self._link.owner.link_message(self._link.place.number, message)

    def _answer(self, challenge: Challenge) -> None:
        self._challenged = True
        cluster, place, key = self._link.cluster, self._link.place, self._link.key
        if challenge.version != WIRE_VERSION:
            self._give_up(f"it speaks version {challenge.version} of the protocol, this client {WIRE_VERSION}")
            return
        if challenge.cluster_id != cluster.cluster_id:
            self._give_up(
                f"it belongs to cluster {challenge.cluster_id.hex()[:16]} (cluster file "
                f"{challenge.cluster_file_digest.hex()[:16]}), this client to "
                f"{cluster.cluster_id.hex()[:16]} (cluster file {cluster.digest.hex()[:16]}); use the same "
                "cluster.toml on both sides"
            )
            return
        if challenge.number != place.number:
            self._give_up(f"it says that it is replica {challenge.number}; check the addresses in cluster.toml")
            return
        signature = key.sign(connect_statement(challenge, place.certificate_der))
        self.send(ClientHello(WIRE_VERSION, cluster.cluster_id, key.public_key, signature))

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        self.abort()


class ReplicaLink:
    """Keeps a connection to one replica; `run` is the task that does it."""

    def __init__(
        self, cluster: ClusterFile, place: ReplicaPlace, key: ClientKey, owner: LinkOwner, timing: Timing
    ) -> None:
        self.cluster, self.place, self.key, self.owner = cluster, place, key, owner
        self.problem = "not connected yet"
        self.settled = asyncio.Event()  # set once the first attempt succeeded or failed
        self.backoff_s = timing.backoff_first_s
        self._timing = timing
        self._context = client_context(place.certificate_der)
        self._connection: ReplicaConnection | None = None

    def retire(self) -> None:
        """Hang up, and tell the owner nothing any more: the replica is no member. `run` must be cancelled too."""
        self.owner = _NOBODY
        self.problem = "no member of the cluster any more"
        self.settled.set()
        if self._connection is not None:
            self._connection.abort()

    @property
    def is_up(self) -> bool:
        """Say whether the replica has welcomed this client and the connection stands."""
        return self._connection is not None and self._connection.is_open

    def on_welcome(self, connection: ReplicaConnection, welcome: Welcome) -> None:
        """Take a connection into use; called by it."""
        self._connection = connection
        self.settled.set()
        self.owner.link_up(self.place.number, welcome.executed, welcome.view)

    def close(self) -> None:
        """Close the connection, if there is one, after what waits was sent. `run` must be cancelled too."""
        if self._connection is not None:
            self._connection.close()

    async def wait_closed(self, patience_s: float) -> None:
        """Wait until the connection is closed, for a limited time."""
        if self._connection is not None:
            await asyncio.wait({self._connection.ended}, timeout=patience_s)

    def send_frame(self, frame: bytes) -> bool:
        """Send a frame if the connection stands and its buffer has room; say whether it was taken."""
        connection = self._connection
        if connection is None or connection.transport is None or not connection.is_open:
            return False
        if not connection.writable and connection.transport.get_write_buffer_size() > SEND_BUFFER_MAX:
            return False
        connection.send_frame(frame)
        return True

    async def run(self) -> None:
        """Connect, and connect again whenever the connection ends; until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self._converse()
            self.settled.set()
            self.owner.link_down(self.place.number, self.problem)
            # A replica that welcomes and at once disconnects does not get this client to dial in a tight loop.
            if loop.time() - began >= self._timing.backoff_s_max:
                self.backoff_s = self._timing.backoff_first_s
            # Random, so that many clients of a restarted replica do not all come back at once.
            await asyncio.sleep(self.backoff_s * _random.uniform(0.5, 1.0))
            self.backoff_s = min(2 * self.backoff_s, self._timing.backoff_s_max)

    async def _converse(self) -> None:
        """Dial, shake hands and return when the connection has ended; `problem` says why."""
        connection: ReplicaConnection | None = None

        def remember() -> ReplicaConnection:
            nonlocal connection
            connection = ReplicaConnection(self)
            return connection

        try:
            addresses = await resolve(self.place.host, self.place.port, self._timing.connect_s)
            # With a timeout around it, asyncio's own (60 s for the TLS handshake) never comes to bear.
            async with asyncio.timeout(self._timing.connect_s):
                await dial(remember, addresses, self.place.port, self._context)
                welcomed = connection is not None and await connection.welcomed
            if connection is None or not welcomed:
                self.problem = connection.problem if connection else "no connection"
                return
            await self._watch(connection)
            self.problem = connection.problem
        except TimeoutError:
            self.problem = f"no answer within {self._timing.connect_s:g} s"
        except (OSError, ssl.SSLError) as error:
            self.problem = _in_words(error)
        finally:
            self._connection = None
            if connection is not None:
                connection.abort()

    async def _watch(self, connection: ReplicaConnection) -> None:
        """Return when the connection has ended; end it if the replica is silent for too long."""
        loop = asyncio.get_running_loop()
        number = 0
        while not connection.ended.done():
            await asyncio.wait({connection.ended}, timeout=self._timing.ping_after_s / 2)
            silence = loop.time() - connection.last_heard
            if silence >= self._timing.dead_after_s:
                connection.problem = f"silent for {silence:.0f} s"
                connection.abort()
                return
            if silence >= self._timing.ping_after_s and connection.is_open:
                number += 1
                connection.send(Ping(number))


def _in_words(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "its TLS certificate is not the one in the cluster file; compare both sides' cluster.toml, and "
            "cluster.members.toml"
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return error.strerror or printable(str(error)) or type(error).__name__
