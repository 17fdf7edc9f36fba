"""Links to peers: one connection per peer, dialled by who reads its log, resumed after any disconnection."""

import asyncio
import hashlib
import os
import random
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from replica.cluster.clusterfile import ReplicaPlace
from replica.cluster.home import ReplicaHome
from replica.shell.appraisal import Examination
from replica.wire.dial import dial, resolve
from replica.wire.frames import WRITE_BUFFER_HIGH, MessageProtocol
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    WIRE_VERSION,
    AskEvidence,
    Challenge,
    CheckpointOffer,
    EvidenceShown,
    Fetch,
    GroupMessage,
    Held,
    MembersShown,
    Message,
    Notice,
    Part,
    Ping,
    Pong,
    Refused,
    ReplicaHello,
    Subscribe,
    Welcome,
)
from replica.wire.tls import WrongCertificate, pinned, presented_certificate

if TYPE_CHECKING:
    from replica.shell.node import Node

DIAL_S = 5.0
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
SILENT_S = 8.0
NONCE_SIZE = 32


class Dialler(Protocol):
    """The replica that dials, as far as a connection needs to know it."""

    @property
    def number(self) -> int:
        """Its number."""
        ...

    @property
    def home(self) -> ReplicaHome:
        """Its folder."""
        ...

    @property
    def refusals(self) -> Counter[str]:
        """What it refused."""
        ...

    @property
    def log(self) -> Any:  # noqa: ANN401 - structlog's own type
        """Where it says what happens."""
        ...


class Link:
    """The connection to one peer: dials, and dials again when it is lost. connect: makes the dialler's side of it.

    tls: one for each certificate that this replica may show; another one's turn comes whenever the peer did not welcome
    it.
    """

    def __init__(
        self,
        node: Dialler,
        place: ReplicaPlace,
        tls: Sequence[ssl.SSLContext],
        connect: "Callable[[Link, Callable[[str], None]], PeerConnection]",
    ) -> None:
        self.node = node
        self.place = place
        self.connection: PeerConnection | None = None
        self.trouble: str | None = "not connected yet"
        self.cluster_file: bytes | None = None  # SHA-256 of the peer's, by its own word, once it was connected
        self.last_heard = 0.0  # on the loop's clock, until the connection before this one ended
        self._tls = tls
        self._turn = 0
        self._connect = connect
        self._task: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Say whether the peer welcomed this replica, and its log, if it has one, is being read."""
        return self.connection is not None and self.connection.subscribed

    @property
    def heard(self) -> float:
        """When the peer was last heard on this link, on the loop's clock; 0 if never."""
        return self.connection.last_heard if self.is_up and self.connection is not None else self.last_heard

    def start(self) -> None:
        """Begin to dial."""
        self._task = asyncio.get_running_loop().create_task(self._keep_up())

    async def close(self) -> None:
        """Stop dialling and hang up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.connection is not None:
            self.connection.abort()

    def send(self, message: Message) -> bool:
        """Send if the link is up and takes more; say whether it was sent."""
        connection = self.connection
        if not self.is_up or connection is None or not connection.writable:
            return False
        if connection.waiting_bytes > WRITE_BUFFER_HIGH:
            return False
        connection.send(message)
        return True

    def hold_back(self, *, pause: bool) -> None:
        """Read no further from this peer for now, or go on."""
        if self.connection is not None:
            self.connection.hold(pause=pause)

    def ping(self) -> None:
        """Ask for a sign of life; hang up on a peer that gave none for a while."""
        connection = self.connection
        if connection is None:
            return
        if asyncio.get_running_loop().time() - connection.last_heard > SILENT_S:
            self.trouble = f"silent for {SILENT_S:.0f} s"
            connection.abort()
        elif connection.subscribed:
            connection.send(Ping(0))

    async def _keep_up(self) -> None:
        retry = RETRY_FIRST_S
        while True:
            trouble = await self._dial(self._tls[self._turn])
            if trouble is not None:
                self._turn = (self._turn + 1) % len(self._tls)
            else:
                retry = RETRY_FIRST_S
                trouble = "disconnected"
            if self.trouble != trouble:
                self.node.log.info("no link to peer", peer=self.place.number, address=self.place.address, why=trouble)
            self.trouble = trouble
            # A little chance in the pause keeps a cluster that restarts from dialling in step.
            await asyncio.sleep(retry * random.uniform(0.7, 1.3))  # noqa: S311 - not for secrecy
            retry = min(2 * retry, RETRY_MAX_S)

    async def _dial(self, tls: ssl.SSLContext) -> str | None:
        """Hold one connection until it ends; return why it never came up, or None if it did."""
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[str] = loop.create_future()
        connection: PeerConnection | None = None
        try:
            addresses = await resolve(self.place.host, self.place.port, DIAL_S)
            async with asyncio.timeout(DIAL_S):
                transport, connection = await dial(
                    lambda: self._connect(self, lost.set_result), addresses, self.place.port, tls
                )
                pinned(transport.get_extra_info("ssl_object"), self.place.certificate_der)
        except TimeoutError:
            return f"no answer within {DIAL_S:.0f} s"
        except ssl.SSLCertVerificationError as error:
            return await self._wrong_certificate(error.verify_message)
        except (OSError, ssl.SSLError, WrongCertificate) as error:
            if connection is not None:
                connection.abort()
            return str(error) or type(error).__name__
        self.connection = connection
        try:
            ended = await asyncio.shield(lost)
        finally:
            self.last_heard = self.heard
            self.connection = None
            connection.abort()
        return connection.refused or (None if connection.subscribed else ended)

    async def _wrong_certificate(self, why: str) -> str:
        """Say which certificate the peer has and which is expected: the first mistake that everybody makes."""
        place = self.place
        shown = await presented_certificate(place.host, place.port, DIAL_S)
        found = "none that can be read" if shown is None else hashlib.sha256(shown).hexdigest()
        if shown == place.certificate_der:
            return f"{place.address}: its certificate is the one in cluster.toml, but is not accepted: {why}"
        trouble = (
            f"{place.address} presents a certificate with SHA-256 {found}, cluster.toml lists "
            f"{place.fingerprint.hex()} for replica {place.number}: it runs with other keys, or the machines have "
            "different cluster.toml files; compare them (trustlog-replica doctor)"
        )
        if self.trouble != trouble:
            self.node.log.error("wrong peer", peer=place.number, why=trouble)
        return trouble


class PeerConnection(MessageProtocol):
    """The dialler's side of a connection between replicas: says who it is. `subscribed` once it was welcomed."""

    def __init__(self, link: Link, lost: Callable[[str], None]) -> None:
        super().__init__(link.node.refusals)
        self.subscribed = False
        self.refused: str | None = None
        self._link = link
        self._lost = lost
        # Replies to the handshake are small, but what a replica says at first follows its Welcome at once.
        self.frame_bytes_max = FRAME_BYTES_MAX

    def closed(self, reason: str) -> None:
        """Let the link dial again."""
        self._lost(reason)

    def message_received(self, message: Message) -> None:
        """Handle what every peer sends."""
        if isinstance(message, Challenge):
            self._on_challenge(message)
        elif isinstance(message, Refused):
            self.refused = f"refused: {message.text}"
            self._link.node.log.error("peer refuses this replica", peer=self._link.place.number, why=message.text)
            self.close()
        elif isinstance(message, Notice):
            # About one client's request: no reason to stop reading a log.
            self.refusals["notice-from-peer"] += 1
        elif not isinstance(message, Pong):
            self.refuse("unexpected-message")

    def _on_challenge(self, challenge: Challenge) -> None:
        node, place = self._link.node, self._link.place
        mine = node.home.cluster
        if challenge.cluster_id != mine.cluster_id or challenge.number != place.number:
            self.refused = (
                f"{place.address} is replica {challenge.number} of cluster {challenge.cluster_id.hex()}, wanted was "
                f"replica {place.number} of {mine.cluster_id.hex()}: the machines have different cluster.toml files"
            )
            node.log.error("wrong peer", peer=place.number, why=self.refused)
            self.close()
            return
        self._link.cluster_file = challenge.cluster_file_digest
        if challenge.cluster_file_digest != mine.digest:
            node.log.warning(
                "a peer's cluster.toml differs outside its agreed part",
                peer=place.number,
                theirs=challenge.cluster_file_digest.hex(),
                mine=mine.digest.hex(),
            )
        self.send(ReplicaHello(WIRE_VERSION, mine.cluster_id, mine.digest, node.number))


class LogLink(Link):
    """Reads a peer's log."""

    def __init__(self, node: "Node", place: ReplicaPlace, tls: Sequence[ssl.SSLContext]) -> None:
        super().__init__(node, place, tls, lambda link, lost: LinkConnection(node, link, lost))
        self._reader = node

    def subscribe(self) -> None:
        """Ask for the peer's log from where it was received."""
        self.send(Subscribe(self._reader.core.received(self.place.number) + 1))


class LinkConnection(PeerConnection):
    """The dialler's side: subscribes, hands groups on."""

    takes_turns = True  # each group is a signature to verify

    def __init__(self, node: "Node", link: Link, lost: Callable[[str], None]) -> None:
        super().__init__(link, lost)
        self._node = node
        self._examination = Examination(node.appraisals, self, os.urandom(NONCE_SIZE), self._on_appraised)

    def closed(self, reason: str) -> None:
        """Let the link dial again."""
        self._examination.close()
        super().closed(reason)

    def message_received(self, message: Message) -> None:
        """Handle what the peer sends."""
        node, peer = self._node, self._link.place.number
        if isinstance(message, GroupMessage) and self.subscribed:
            node.on_group(message, peer)
        elif isinstance(message, Held | CheckpointOffer | Part) and self.subscribed:
            node.on_answer(message, peer)
        elif isinstance(message, MembersShown) and self.subscribed:
            node.lists.on_shown(message, peer)
        elif isinstance(message, Welcome):
            self._examination.begin(peer)
            if not node.appraisals.is_demanded:
                self._read()
        elif isinstance(message, AskEvidence):
            self._examination.on_asked(message)
        elif isinstance(message, EvidenceShown):
            self._examination.on_shown(message)
        else:
            super().message_received(message)

    def _on_appraised(self, refused: str | None) -> None:
        if refused is not None:
            self.refused = f"not read: {refused}"
            self.close()
        elif not self.subscribed:
            self._read()

    def _read(self) -> None:
        node, link = self._node, self._link
        self.subscribed = True
        link.trouble = None
        node.log.info("reading peer's log", peer=link.place.number)
        if not node.core.is_live:
            # What it holds of the own log is what a restarted replica waits for before it may speak.
            first = node.core.received(node.number) + 1
            link.send(Fetch(node.number, first, node.home.cluster.genesis.list_number))
        node.links[link.place.number].subscribe()
