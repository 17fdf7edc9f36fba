"""A connection that a replica with a log accepted: another replica that reads logs, or a client that sends requests."""

import os
from typing import TYPE_CHECKING, cast

from replica.core.envelope import Envelope
from replica.core.events import RequestReceived, Send
from replica.core.layout import LayoutError
from replica.core.snapshot import PartWanted
from replica.shell.accepting import NONCE_SIZE, AcceptedConnection, Server
from replica.shell.appraisal import EVIDENCE_BYTES_MAX, Examination
from replica.shell.sqlitefile import StoreError
from replica.shell.streams import Reader
from replica.wire.messages import (
    FRAME_OVERHEAD_MAX,
    AskCheckpoint,
    AskEvidence,
    AskMembers,
    AskPart,
    AskReceipt,
    CheckpointOffer,
    EvidenceShown,
    Fetch,
    Heads,
    Held,
    Message,
    Notice,
    Part,
    Refused,
    Request,
    StaleRead,
    StaleResult,
    StatusQuery,
    StatusReport,
    Subscribe,
    Unwatch,
    Watch,
    WatchAck,
)

if TYPE_CHECKING:
    from replica.shell.node import Node

# Questions about the state that one connection may have open.
PARTS_AT_ONCE_MAX = 8
# Where a log begins of which nothing is kept.
FORGOTTEN = 1 << 62
# What is kept of a peer's questions until it is appraised.
HELD_MAX = 8

QUEUE_FULL = "this client has too many requests waiting; wait for replies before sending more"


class ServerConnection(AcceptedConnection):
    """A connection to a replica that keeps a log: peers read it and appraise each other."""

    def __init__(self, node: "Node", server: Server) -> None:
        super().__init__(server)
        self._node = node
        self._reader = Reader(self)
        self._handing_out = 0
        self._examination = Examination(node.appraisals, self, os.urandom(NONCE_SIZE), self._on_appraised)
        self._is_appraised = False
        self._early: list[Subscribe | Fetch] = []

    def closed(self, reason: str) -> None:
        """Give the place back."""
        self._examination.close()
        self._node.streams.unsubscribe(self._reader)
        self._node.watches.left(self)
        super().closed(reason)

    def drained(self) -> None:
        """Go on streaming."""
        self._node.streams.resume(self._reader)
        self._node.watches.drained(self)

    def replica_welcomed(self, number: int) -> None:
        """Begin the appraisal."""
        self._is_appraised = not self._node.appraisals.is_demanded
        self.frame_bytes_max = max(self.frame_bytes_max, EVIDENCE_BYTES_MAX + FRAME_OVERHEAD_MAX)
        self._examination.begin(number)

    def introduced(self, message: Message) -> None:
        """Handle a message of a client or a replica."""
        if isinstance(message, StatusQuery):
            self.send(StatusReport(message.query, self._node.status_json()))
        elif isinstance(message, AskMembers):
            self.send(self._node.lists.shown(message.number))
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
            self._on_fetch(message)
        elif self.role == "replica" and isinstance(message, AskCheckpoint | AskPart):
            self._hand_out(message)
        elif self.role == "replica" and isinstance(message, Heads):
            self._node.on_heads(cast("int", self.replica), message)
        else:
            raise LayoutError(f"a {self.role} does not send {type(message).__name__}")

    def _on_fetch(self, message: Fetch) -> None:
        if self._node.lists.is_another_log(message.log, message.number):
            # What is wanted was forgotten here when its log left: as far as that log goes, there is only a state.
            self.send(Held(message.log, FORGOTTEN, FORGOTTEN - 1))
        else:
            self._node.streams.fetch(self._reader, message.log, message.first)

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

    def _on_request(self, message: Request) -> None:
        envelope = self._decode_request(message, self._node.verify_envelope)
        if envelope is not None:
            if self.role == "client":
                self._node.measures.requested(envelope)
            self._node.tracing.received(envelope)
            relayed = self.role == "replica"
            self._node.post(RequestReceived(envelope, relayed, source=self, peer=self.replica))

    def needs_no_order(self, envelope: Envelope) -> bool:
        """Deal with what is answered, waits already or finds no room: who asks is known, so no signature is needed."""
        core = self._node.core
        if core.has_request(envelope):
            return True
        known = core.executor.known_reply(envelope)
        if known is not None:
            self._node.reply(Send(envelope.client, known, self, again=True))
        elif not core.has_room_for(envelope.client):
            self.refusals["request-queue-full"] += 1
            self.send(Notice("busy", QUEUE_FULL))
        else:
            return False
        return True

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
        result = self._node.core.executor.peek(message.operation, cast("bytes", self.client))
        self.send(StaleResult(message.query, result.status, self._node.core.executed, result.value))
