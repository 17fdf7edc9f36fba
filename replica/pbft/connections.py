"""Connections of a PBFT replica: it dials its peers to tell them what it says, and accepts them and clients."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from replica.cluster.pbft import NO_LOGS
from replica.core.layout import LayoutError
from replica.shell.accepting import AcceptedConnection, Server
from replica.shell.links import Link, PeerConnection
from replica.wire.messages import (
    FRAME_BYTES_MAX,
    AskReceipt,
    Message,
    Notice,
    PbftParcel,
    Request,
    StaleRead,
    StaleResult,
    StatusQuery,
    StatusReport,
    Unwatch,
    Watch,
    WatchAck,
    Welcome,
)

if TYPE_CHECKING:
    from replica.pbft.node import PbftNode


class PeerLink(PeerConnection):
    """The dialler's side: tells the peer what it missed, and then what is said; the peer answers nothing."""

    def __init__(self, node: "PbftNode", link: Link, lost: Callable[[str], None]) -> None:
        super().__init__(link, lost)
        self._node = node

    def message_received(self, message: Message) -> None:
        """See MessageProtocol."""
        if isinstance(message, Welcome) and not self.subscribed:
            self.subscribed = True
            self._link.trouble = None
            self._node.peer_welcomed(self, self._link.place.number, message.executed)
        else:
            super().message_received(message)


class PbftConnection(AcceptedConnection):
    """An accepted connection: what a peer says, or a client asks for."""

    def __init__(self, node: "PbftNode", server: Server) -> None:
        super().__init__(server)
        self._node = node

    def replica_welcomed(self, number: int) -> None:  # noqa: ARG002 - part of the interface
        """Take parcels: a NEW-VIEW is as large as a frame can be."""
        self.frame_bytes_max = FRAME_BYTES_MAX

    def introduced(self, message: Message) -> None:
        """Handle a message of a client or a replica."""
        if isinstance(message, StatusQuery):
            self.send(StatusReport(message.query, self._node.status_json()))
        elif isinstance(message, Request):
            envelope = self._decode_request(message, self._node.verify_envelope)
            if envelope is not None:
                self._node.on_request(envelope, None if self.role == "replica" else self)
        elif self.role == "replica" and isinstance(message, PbftParcel):
            self._node.on_parcel(cast("int", self.replica), message.parcel)
        elif self.role == "client" and isinstance(message, StaleRead):
            self._on_stale_read(message)
        elif self.role == "client" and isinstance(message, AskReceipt | Watch | WatchAck | Unwatch):
            self.refusals["not-in-pbft"] += 1
            self.send(Notice("no-trusted-logs", NO_LOGS))
        else:
            raise LayoutError(f"a {self.role} does not send {type(message).__name__}")

    def _on_stale_read(self, message: StaleRead) -> None:
        if len(message.operation) > self._limits.operation_bytes_max:
            raise LayoutError("an operation above the limit")
        executor = self._node.executor
        result = executor.peek(message.operation, cast("bytes", self.client))
        self.send(StaleResult(message.query, result.status, executor.slot, result.value))
        # Nobody ordered it, so nothing else paces it: one at a time, and everybody else in between.
        self.hold(pause=True)
        self._loop.call_soon(lambda: self.hold(pause=False))
