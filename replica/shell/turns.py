"""Whose message is handled next: clients share the event loop by key, however many connections a key has.

All that clients send is looked at on the loop: requests are decoded and their signatures verified, questions about the
state are answered. One turn of the loop spends TURN_S on that, and then everything else has its turn. As long as that
is enough, messages are handled as they come. Whoever comes later waits in line: not the message, which stays where it
was received, but the connection, which reads no further meanwhile.

The line is by time used: of the keys that wait, the one that used least is next (fair queueing after Demers, Keshav and
Shenker, SIGCOMM 1989, with the time that handling took as the size). A key that begins to wait has used as much as the
one that was served last, so that nobody saves anything up; its connections take turns among themselves.
"""

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

# What clients' messages may take in one turn of the loop. The last one begun may exceed it.
TURN_S: Final = 0.004
# Keys of which is remembered what they used, while others wait.
KEYS_MAX: Final = 4096


class Served(Protocol):
    """A client's connection."""

    @property
    def is_open(self) -> bool:
        """Say whether it stands."""
        ...

    def take_turn(self) -> None:
        """Handle one message, and ask before the next."""
        ...


class Turns:
    """One replica's. clock: in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._line: dict[bytes, deque[Served]] = {}  # of each key that waits
        self._next: list[tuple[float, int, bytes]] = []  # heap: used, place, key
        self._used: dict[bytes, float] = {}
        self._served_last = 0.0
        self._places = 0
        self._spent_s = 0.0
        self._turn: Served | None = None
        self._ends = False

    def has_turn(self, key: bytes, connection: Served) -> bool:
        """Say whether a connection of this key may handle a message now; if not, `take_turn` is called when it may."""
        if connection is self._turn:
            self._turn = None
            return True
        if not self._line and self._spent_s < TURN_S:
            return True
        if key in self._line:
            self._line[key].append(connection)
        else:
            self._line[key] = deque([connection])
            self._push(key)
        self._end_soon()
        return False

    @contextmanager
    def charged(self, key: bytes) -> Iterator[None]:
        """Charge a key for the time that this takes."""
        begun = self._clock()
        try:
            yield
        finally:
            took = self._clock() - begun
            self._spent_s += took
            self._used[key] = max(self._used.get(key, 0.0), self._served_last) + took
            self._end_soon()

    def _push(self, key: bytes) -> None:
        self._places += 1
        used = self._used[key] = max(self._used.get(key, 0.0), self._served_last)
        heapq.heappush(self._next, (used, self._places, key))

    def _end_soon(self) -> None:
        if not self._ends:
            self._ends = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a turn of the loop with those who wait."""
        self._ends = False
        self._spent_s = 0.0
        while self._next and self._spent_s < TURN_S:
            self._served_last, _, key = heapq.heappop(self._next)
            waiting = self._line[key]
            connection = waiting.popleft()
            if not waiting:
                del self._line[key]
            if connection.is_open:
                self._turn = connection
                connection.take_turn()
                self._turn = None
            if waiting:
                self._push(key)
        if self._line:
            self._end_soon()
            if len(self._used) > KEYS_MAX:
                self._used = {key: used for key, used in self._used.items() if used > self._served_last}
        else:
            self._used.clear()
            self._served_last = 0.0
