"""When a replica looks at the clock: evenly, and once early while something that may wait is held back."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from replica.core.events import Tick

TICK_S: Final = 0.05
# While the core holds something back it is told the time so often: what may wait waits for that, or twice that.
HELD_S: Final = 0.005
HOUSEKEEPING_TICKS: Final = 40
TURNS_KEPT: Final = 5


def now() -> Tick:
    """Return the time, for the core."""
    return Tick(int(asyncio.get_running_loop().time() * 1000), int(time.time() * 1000))


class Ticking:
    """Calls of `on_tick` every TICK_S, and of `on_housekeeping` with every HOUSEKEEPING_TICKS-th; `early`: one between.

    It also measures how late they come.
    """

    def __init__(
        self, on_tick: Callable[[], None], on_housekeeping: Callable[[], None], early: Callable[[], None]
    ) -> None:
        self._on_tick, self._on_housekeeping, self._early = on_tick, on_housekeeping, early
        self._ticks = 0
        self._due_at = 0.0
        self._turns_ms = deque([0.0], maxlen=TURNS_KEPT)  # the longest turn of each housekeeping period
        self._timer: asyncio.TimerHandle | None = None
        self._early_timer: asyncio.TimerHandle | None = None

    @property
    def longest_turn_ms(self) -> float:
        """By how much a tick of the last ten seconds came late: as long as the event loop was busy with one thing."""
        return max(self._turns_ms)

    def start(self) -> None:
        """Begin, with the first tick now."""
        self._tick()

    def close(self) -> None:
        """End."""
        for timer in (self._timer, self._early_timer):
            if timer is not None:
                timer.cancel()

    def hurry(self, *, wanted: bool) -> None:
        """Plan a call of `early` in HELD_S, unless one is planned; or, if it is not wanted any more, none."""
        if not wanted:
            if self._early_timer is not None:
                self._early_timer.cancel()
                self._early_timer = None
        elif self._early_timer is None:
            self._early_timer = asyncio.get_running_loop().call_later(HELD_S, self._call_early)

    def _call_early(self) -> None:
        self._early_timer = None
        self._early()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        if self._due_at:
            self._turns_ms[-1] = max(self._turns_ms[-1], (loop.time() - self._due_at) * 1000)
        self._due_at = loop.time() + TICK_S
        self._timer = loop.call_later(TICK_S, self._tick)
        self._ticks += 1
        self._on_tick()
        if self._ticks % HOUSEKEEPING_TICKS == 0:
            self._turns_ms.append(0.0)
            self._on_housekeeping()
