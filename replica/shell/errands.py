"""What the core wants sent: replies to clients, requests to the primary, questions to peers."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from replica.core.events import AskCheckpoint, AskPart, Fetch, GroupReceived, NotSent, Refuse, Relay, Send
from replica.core.layout import LayoutError
from replica.shell.replies import Replies
from replica.shell.server import ServerConnection
from replica.wire.messages import AskCheckpoint as AskCheckpointMessage
from replica.wire.messages import AskPart as AskPartMessage
from replica.wire.messages import Fetch as FetchMessage
from replica.wire.messages import Notice, Request
from trustlog import VerificationError

if TYPE_CHECKING:
    from replica.shell.node import Node


class Errands:
    """A node's errands. effects: what to call for which of the core's effects."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.effects: dict[type, Callable[[Any], None]] = {
            Send: Replies(node).send,
            Relay: self._relay,
            Fetch: self._fetch,
            AskCheckpoint: self._ask_checkpoint,
            AskPart: self._ask_part,
            Refuse: self._refuse,
        }

    def _relay(self, effect: Relay) -> None:
        if not self._node.links[effect.to].send(Request(effect.envelope.raw)):
            self._node.refusals["relay-not-sent"] += 1
            self._node.post(NotSent(effect.to, effect.envelope))

    def _fetch(self, effect: Fetch) -> None:
        node = self._node
        if node.has_beyond_gap(effect.log, effect.first):
            # What lay behind a gap in the store, and did not fit into memory until the gap was closed.
            node.streams.read_back(effect.log, effect.first, self._on_read_back)
        number = node.home.cluster.genesis.list_number
        node.links[effect.ask].send(FetchMessage(effect.log, effect.first, number))

    def _on_read_back(self, log: int, raw: bytes) -> None:
        with suppress(LayoutError, VerificationError):
            self._node.post(GroupReceived(self._node.verifier.verify(log, raw)))

    def _ask_checkpoint(self, effect: AskCheckpoint) -> None:
        self._node.lists.ask(effect.ask)
        self._node.links[effect.ask].send(AskCheckpointMessage())

    def _ask_part(self, effect: AskPart) -> None:
        wanted = effect.want
        want = b"" if wanted.want is None else wanted.want.encode()
        self._node.links[effect.ask].send(AskPartMessage(effect.slot, wanted.source, wanted.number, want))

    def _refuse(self, effect: Refuse) -> None:
        if isinstance(effect.source, ServerConnection) and effect.source.is_open:
            effect.source.send(Notice(effect.code, effect.text))
