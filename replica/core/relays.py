"""What a backup hands to the primary: each request when it comes, and again with growing pauses until it is executed.

The way to the primary holds only so much. What it did not take was not handed over: neither does the primary have to
execute it by then, nor does the next try wait for longer. As long as such requests wait, those that come later wait
with them, and every tick hands over what is due in an order that is fair to clients: by how much each has had in this
tick, so that one client's flood leaves room for another's first request.
"""

from collections import Counter
from typing import Final

from replica.core.envelope import Envelope
from replica.core.events import Relay
from replica.core.genesis import MIB
from replica.core.requests import RELAY_PAUSE_MS, RequestQueue, Waiting

# A request is handed to the primary again when it is not executed for a while, each time for twice as long.
RELAY_PAUSE_MS_MAX: Final = 10_000
# What one tick hands over: what a connection takes, and not much more work than it can be.
RELAYS_PER_TICK_MAX: Final = 512
RELAY_BYTES_PER_TICK_MAX: Final = MIB


class Relays:
    """One backup's."""

    def __init__(self, requests: RequestQueue) -> None:
        self._requests = requests
        self._is_full = False  # what comes waits for the next tick

    def arrived(self, waiting: Waiting, to: int, now_ms: int) -> list[Relay]:
        """Return a request that a client sent here, for the primary, unless others wait to be handed over."""
        return [] if self._is_full else [self._hand_over(waiting, to, now_ms)]

    def due(self, to: int, now_ms: int) -> list[Relay]:
        """Return what is to be handed over in this tick."""
        had: Counter[bytes] = Counter()
        line: list[tuple[int, Waiting]] = []
        for waiting in self._requests.claims:
            if now_ms >= waiting.relay_at_ms:
                client = waiting.envelope.client
                had[client] += len(waiting.envelope.raw)
                line.append((had[client], waiting))
        line.sort(key=lambda one: one[0])
        handed: list[Relay] = []
        size = 0
        for _, waiting in line[:RELAYS_PER_TICK_MAX]:
            size += len(waiting.envelope.raw)
            if handed and size > RELAY_BYTES_PER_TICK_MAX:
                break
            handed.append(self._hand_over(waiting, to, now_ms))
        self._is_full = len(handed) < len(line)
        return handed

    def not_sent(self, envelope: Envelope) -> None:
        """Note that what was returned last for this request was not sent: the next tick tries again."""
        self._is_full = True
        waiting = self._requests.find(envelope)
        if waiting is None:
            return
        if waiting.relay_pause_ms == 2 * RELAY_PAUSE_MS:  # it was the first time in this view
            waiting.relayed_ms = None
        waiting.relay_pause_ms = max(RELAY_PAUSE_MS, waiting.relay_pause_ms // 2)
        waiting.relay_at_ms = 0

    def _hand_over(self, waiting: Waiting, to: int, now_ms: int) -> Relay:
        """Hand a request over, and plan when to do so again."""
        waiting.relay_at_ms = now_ms + waiting.relay_pause_ms
        waiting.relayed_ms = now_ms if waiting.relayed_ms is None else waiting.relayed_ms
        waiting.relay_pause_ms = min(2 * waiting.relay_pause_ms, RELAY_PAUSE_MS_MAX)
        return Relay(to, waiting.envelope)
