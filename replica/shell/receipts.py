"""Receipts: clients' questions to the core, and its answers back to them (`replica.core.results`)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from replica.core.events import ResultAsked, ResultRefused, ResultShown
from replica.wire.messages import RECEIPT_VERSION, AskReceipt, ReceiptShown

if TYPE_CHECKING:
    from replica.shell.node import Node
    from replica.shell.server import ServerConnection

SHOWN = ""


class Receipts:
    """One replica's way from a client's question to its answer."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self.effects: dict[type, Callable[[Any], None]] = {ResultShown: self._show, ResultRefused: self._refuse}

    def on_ask(self, connection: "ServerConnection", message: AskReceipt) -> None:
        """Hand a client's question to the core, or refuse one of another version."""
        source = (connection, message.query)
        if message.version != RECEIPT_VERSION:
            self._refuse(ResultRefused(source, "version"))
        elif connection.client is not None and not self._node.core.executor.clients.is_allowed(connection.client):
            self._refuse(ResultRefused(source, "not-allowed"))
        elif connection.client is not None:
            self._node.post(ResultAsked(connection.client, message.slot, message.leaf, source))

    def _show(self, effect: ResultShown) -> None:
        proof, path = effect.proof.encode(), b"".join(effect.path)
        self._answer(effect.source, SHOWN, proof, effect.place, effect.size, path)

    def _refuse(self, effect: ResultRefused) -> None:
        self._node.refusals[f"receipt-{effect.code}"] += 1
        self._answer(effect.source, effect.code, b"", 0, 0, b"")

    def _answer(self, source: Any, code: str, proof: bytes, place: int, size: int, path: bytes) -> None:  # noqa: ANN401
        connection, query = source
        # One that does not read gets no answer: its client asks again when it does.
        if connection.is_open and connection.writable:
            connection.send(ReceiptShown(RECEIPT_VERSION, query, code, proof, place, size, path))
