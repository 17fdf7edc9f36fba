"""Replies on their way to clients: what waits to be read is bounded, for a connection, for a key and for all of them.

What was executed is answered where it was asked. A replica that had it from another one does not know on which of its
client's connections a program listens, and answers on the newest; what is asked for once more is answered there and
nowhere else. Not on all of them: a reply is encrypted for each. A client that does not read, or listens elsewhere, gets
no more: it asks again, and the result is kept.
"""

from typing import TYPE_CHECKING, Final

from replica.core.events import Send
from replica.core.genesis import MIB
from replica.wire.messages import Reply, encode_frame

if TYPE_CHECKING:
    from replica.shell.node import Node

# On so many of a key's connections is answered what came from another replica.
ANSWERED_MAX: Final = 16
# What may wait on all connections of one key before they get no more replies.
CLIENT_BYTES_MAX: Final = 16 * MIB
# What may wait on all clients' connections before the one on which most waits is closed.
ALL_BYTES_MAX: Final = 256 * MIB


class Replies:
    """One replica's."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._all_at_most = 0  # what waits on all connections, and what was sent meanwhile

    def send(self, effect: Send) -> None:
        """Send a reply to whom it is for, as far as there is room."""
        node = self._node
        node.tracing.replied(effect.client, effect.reply)
        same = node.server.clients.get(effect.client, [])
        asked = [one for one in same if one is effect.source]
        if not asked and not effect.again:
            asked = same[-ANSWERED_MAX:]
        if not asked:
            return
        node.measures.replied(effect.client, effect.reply)
        try:
            frame = encode_frame(Reply(effect.reply))
        except ValueError:
            node.refusals["reply-too-large"] += 1
            return
        waiting = sum(connection.waiting_bytes for connection in same)
        for connection in asked:
            if connection.writable and (not waiting or waiting + len(frame) <= CLIENT_BYTES_MAX):
                connection.send_frame(frame)
                waiting += len(frame)
                self._all_at_most += len(frame)
            else:
                node.refusals["reply-not-read"] += 1
        if self._all_at_most > ALL_BYTES_MAX:
            self._make_room()

    def _make_room(self) -> None:
        waiting = {one: one.waiting_bytes for same in self._node.server.clients.values() for one in same}
        self._all_at_most = sum(waiting.values())
        while self._all_at_most > ALL_BYTES_MAX:
            most = max(waiting, key=lambda one: waiting[one])
            self._all_at_most -= waiting.pop(most)
            most.refuse("does-not-read")
