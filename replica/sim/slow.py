"""Primaries that are not dead, only slow: nothing that they say is wrong, and nobody's patience ends.

They keep the requests that reach them, and let the puppet, which does the rest, have them as late as patience allows.
A faulty replica knows when the others' patience began: they hand it the request in that moment.
"""

from typing import TYPE_CHECKING

from replica.sim.host import TICK_MS
from replica.sim.messages import Request
from replica.sim.strategies import Strategy

if TYPE_CHECKING:
    from replica.sim.faulty import FaultyReplica

# What is kept is handed on this much before patience ends: two looks at the clock, appends and messages.
MARGIN_MS = 4 * TICK_MS
KEPT_MAX = 500


class Slow(Strategy):
    """Keeps requests while it is the primary. The argument: the percentage of patience that it takes, 99 if none.

    longest: the longest time in one view, in patiences, in which it was slow and primary; from `forgive` on, which says
    that the network is healed now, and the others can know whose fault it is.
    """

    def __init__(self, argument: str = "") -> None:
        super().__init__(argument)
        self._share = int(argument or 99)
        self.longest = 0

    def join(self, host: "FaultyReplica") -> None:
        """See `Strategy`."""
        super().join(host)
        self._kept: dict[bytes, int | None] = {}  # request -> when a backup handed it over
        self._reign: tuple[int, int] | None = None  # view, when it began to be slow in it
        self._last_ms = 0
        self._hands_on = False

    def takes(self, source: int, message: object) -> bool:
        """See `Strategy`."""
        core = self.host.core
        if self._hands_on or not isinstance(message, Request) or core.primary != core.number:
            return True
        if message.raw in self._kept or len(self._kept) < KEPT_MAX:
            relayed = source in self.host.peers
            since = self._kept.setdefault(message.raw, self.world.now if relayed else None)
            if relayed and since is None:
                self._kept[message.raw] = self.world.now
        return False

    def on_tick(self) -> None:
        """See `Strategy`."""
        core = self.host.core
        due = list(self._kept) if core.primary != core.number else self.due()
        if not due:
            return
        if core.primary == core.number:
            self.did()
            self._last_ms = self.world.now
            if self._reign is None or self._reign[0] != core.view:
                self._reign = (core.view, self.world.now)
            self.longest = max(self.longest, (self.world.now - self._reign[1]) // core.patience.present_ms)
        self._hands_on = True
        for raw in due:
            del self._kept[raw]
            self.host.receive(self.host.number, Request(raw))
        self._hands_on = False

    def forgive(self) -> None:
        """Count anew."""
        self.longest, self._reign = 0, None

    def due(self) -> list[bytes]:
        """Return the requests to be handed on now."""
        raise NotImplementedError

    def budget_ms(self) -> int:
        """Return how long after others began to wait something is handed on; it knows their patience."""
        return self.host.core.patience.present_ms * self._share // 100 - MARGIN_MS

    def begun(self) -> list[int]:
        """Return when others began to wait for what is kept, oldest first."""
        return [since for since in self._kept.values() if since is not None]


class SlowPrimary(Slow):
    """Orders everything that waits at once, when the patience with the oldest request is about to end."""

    name = "slow-primary"

    def due(self) -> list[bytes]:
        """See `Slow`."""
        begun = self.begun()
        return list(self._kept) if begun and self.world.now - begun[0] >= self.budget_ms() else []


class DrippingPrimary(Slow):
    """Orders one request at a time, at intervals so long that everything that waits has its turn just in time."""

    name = "dripping-primary"

    def due(self) -> list[bytes]:
        """See `Slow`."""
        begun = self.begun()
        if not begun or self.world.now - self._last_ms < self.budget_ms() // len(begun):
            return []
        return [next(raw for raw, since in self._kept.items() if since is not None)]
