"""What changed lately, for whoever watches: recorded as it is executed, kept within bounds, told at the reader's pace.

Changes come from the state itself, so they are what an application did, whatever it is, and the same at all correct
replicas. The core knows nothing of this: a `Recorder` stands in for the application and notes which keys an operation
wrote; whether the operation was kept or taken back is seen in the state when the next one begins.

A replica keeps changes in memory, HISTORY_BYTES_MAX of them and HISTORY_SLOTS_MAX slots at the most; what was executed
before it started, or was skipped by a state transfer, it does not have. Whoever watches from before is told "gone",
whoever watches from a slot that does not come within AHEAD_PATIENCE_S is told "ahead", and whose key may not read all
keys with the prefix, or may not be a client's any more, is told "not-allowed".
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from replica.application import Application, Context, accesses_of, known_version
from replica.core.state import BucketedMap
from replica.wire.changes import (
    END,
    WINDOW_BYTES,
    WINDOW_LINKS,
    Link,
    Position,
    SlotChanges,
    make_slot,
    next_link,
)
from replica.wire.frames import MessageProtocol
from replica.wire.messages import Changes, Watch, WatchAck, WatchEnded

HISTORY_BYTES_MAX: Final = 32 * 1024 * 1024
HISTORY_SLOTS_MAX: Final = 100_000
WATCHES_MAX: Final = 1024
WATCHES_PER_CONNECTION_MAX: Final = 256
# Slots that are looked through, for one watch or for all of them, before others have their turn of the loop.
TURN_SLOTS_MAX: Final = 2048
# What watchers are told, in bytes, before others have their turn of the loop; one link goes beyond it.
TURN_BYTES_MAX: Final = 1024 * 1024
LINK_OVERHEAD: Final = 100
# How long a watch may wait for a replica to come to the slot that it begins at.
AHEAD_PATIENCE_S: Final = 3.0


class Recorder:
    """An application that notes what another one changes."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.internal_prefix: bytes | None = getattr(application, "internal_prefix", None)
        self.version = known_version(application)
        # None if the application does not say which keys an operation uses.
        self.accesses = accesses_of(application)
        self._state: BucketedMap | None = None
        # What the last operation wrote, in which slot: keys with their values before.
        self._written: list[tuple[bytes, bytes | None]] = []
        self._slot = 0
        self._kept: dict[int, list[tuple[bytes, bytes | None]]] = {}

    def apply(self, operation: bytes, context: Context) -> bytes:
        """Carry an operation out as the application does."""
        if self._written:
            self._settle()
        result = self.application.apply(operation, context)
        self._written = context.state.undoable()
        if self._written:
            self._state, self._slot = context.state, context.slot
        return result

    def reset(self) -> None:
        """Forget what was noted: the state is another one from now on."""
        self._written.clear()
        self._kept.clear()
        self._state = None

    def take(self) -> dict[int, list[tuple[bytes, bytes | None]]]:
        """Return, by slot, keys with new values that were changed since the last call; nothing may be running."""
        self._settle()
        kept, self._kept = self._kept, {}
        return kept

    def _settle(self) -> None:
        """Take in whether the last operation was kept: if not, the state holds what it held before."""
        state, hidden = self._state, self.internal_prefix
        if state is None:
            return
        for key, old in self._written:
            new = state.get(key)
            if new != old and (hidden is None or not key.startswith(hidden)):
                self._kept.setdefault(self._slot, []).append((key, new))
        self._written.clear()


class History:
    """The changes of the slots above `floor` up to `executed`; slots without changes take no room."""

    def __init__(self, bytes_max: int = HISTORY_BYTES_MAX) -> None:
        self.floor = self.executed = 0
        self._bytes_max = bytes_max
        self._slots: dict[int, SlotChanges] = {}  # in order
        self._bytes = 0
        self._ahead: dict[int, list[tuple[bytes, bytes | None]]] = {}

    def begin(self, slot: int) -> None:
        """Begin anew after a slot."""
        self.floor = self.executed = slot
        self._slots.clear()
        self._ahead.clear()
        self._bytes = 0

    def add(self, slot: int, changed: dict[int, list[tuple[bytes, bytes | None]]]) -> None:
        """Take in that `slot` was executed; `changed` may hold changes of slots that are said to be executed later."""
        self._ahead.update(changed)
        own = self._ahead.pop(slot, None)
        self.executed = slot
        if own:
            made = make_slot(slot, own)
            if made is None:
                self._forget_to(slot)
            else:
                self._slots[slot] = made
                self._bytes += made.size
        while self._bytes > self._bytes_max:
            self._forget_to(next(iter(self._slots)))
        self._forget_to(slot - HISTORY_SLOTS_MAX)

    def has(self, position: Position) -> bool:
        """Say whether everything after a position is here."""
        return looked_to(position) >= self.floor

    def links(self, start: Position, prefix: bytes, looked: int) -> Iterator[tuple[int, Link | None]]:
        """Yield the links of a chain from `start` on, each with its slot; None for a slot that makes none.

        looked: no slot up to this one makes a link any more.
        """
        slot = looked + 1
        while slot <= self.executed:
            link = next_link(start, prefix, slot, self._slots.get(slot))
            yield slot, link
            if link is not None:
                start = link.end
            if link is None or link.end.place == END:
                slot += 1

    def _forget_to(self, slot: int) -> None:
        if slot <= self.floor:
            return
        self.floor = slot
        while self._slots and (oldest := next(iter(self._slots))) <= slot:
            self._bytes -= self._slots.pop(oldest).size


def looked_to(position: Position) -> int:
    """Return the last slot of which nothing comes after a position."""
    return position.slot if position.place == END else position.slot - 1


class _Watching:
    """One watch of one connection."""

    def __init__(self, connection: MessageProtocol, message: Watch) -> None:
        self.connection, self.query, self.prefix = connection, message.query, message.prefix
        self.position = Position(message.slot, message.place)
        # The last slot that was looked through; there is no link between `position` and here.
        self.looked = looked_to(self.position)
        self.unacknowledged: list[tuple[Position, int]] = []
        # Whether the watcher was told that the watch is on: it is when what it begins at was executed.
        self.is_on = False

    def has_room(self) -> bool:
        """Say whether the watcher may be told more now."""
        size = sum([size for _, size in self.unacknowledged])
        return self.connection.writable and len(self.unacknowledged) < WINDOW_LINKS and size < WINDOW_BYTES


class _Turn:
    """What may still be done for watches in one turn of the loop."""

    def __init__(self) -> None:
        self._slots, self._bytes = TURN_SLOTS_MAX, TURN_BYTES_MAX

    def spend(self, link: Link | None) -> None:
        """Take in that a slot was looked through for one watch, and what that watch is told of it."""
        self._slots -= 1
        if link is not None:
            self._bytes -= len(link.changes) + LINK_OVERHEAD

    @property
    def is_over(self) -> bool:
        """Say whether it is the others' turn."""
        return self._slots <= 0 or self._bytes <= 0


class Watches:
    """Everybody who watches this replica. `history` is what they are told from.

    may_read: says whether who watches over a connection may read all keys that begin with a prefix; asked again before
    anything is told.
    """

    def __init__(self, recorder: Recorder, may_read: Callable[[Any, bytes], bool]) -> None:
        self.history = History()
        self._recorder = recorder
        self._may_read = may_read
        self._watching: dict[tuple[MessageProtocol, int], _Watching] = {}
        self._scheduled = False
        # Watches that there may be something to tell to, in the order in which they have their turns.
        self._due: OrderedDict[tuple[MessageProtocol, int], None] = OrderedDict()
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._watching)

    # What happens to the state

    def begin(self, slot: int) -> None:
        """Begin anew with the state after a slot; whoever watches from before is told."""
        self._recorder.reset()
        self.history.begin(slot)
        self._news.set()
        self._pump_soon(self._watching)

    def executed(self, slot: int) -> None:
        """Take in that a slot was executed."""
        self.history.add(slot, self._recorder.take())
        self._news.set()
        self._pump_soon(self._watching)

    async def news(self, executed: int) -> None:
        """Wait until something was executed after a slot, or the state was exchanged."""
        while self.history.executed == executed:
            self._news.clear()
            await self._news.wait()

    # What watchers say

    def on_message(self, connection: MessageProtocol, message: Any) -> None:  # noqa: ANN401 - of three kinds
        """Take a watcher's message."""
        key = (connection, message.query)
        if isinstance(message, Watch):
            others = sum(1 for one, _ in self._watching if one is connection)
            if key in self._watching or others >= WATCHES_PER_CONNECTION_MAX or len(self._watching) >= WATCHES_MAX:
                connection.send(WatchEnded(message.query, "busy", self.history.floor))
                return
            watching = self._watching[key] = _Watching(connection, message)
            if not self._end_if_not_allowed(key, watching) and not self._end_if_gone(key, watching):
                if not self._is_on(watching):
                    loop = asyncio.get_running_loop()
                    loop.call_later(AHEAD_PATIENCE_S, self._end_if_ahead, key, watching)
                self._pump_soon([key])
        elif isinstance(message, WatchAck):
            known = self._watching.get(key)
            if known is not None:
                seen = Position(message.slot, message.place)
                known.unacknowledged = [one for one in known.unacknowledged if one[0] > seen]
                self._pump_soon([key])
        else:
            self._watching.pop(key, None)

    def left(self, connection: MessageProtocol) -> None:
        """Forget a connection."""
        for key in [key for key in self._watching if key[0] is connection]:
            del self._watching[key]

    def drained(self, connection: MessageProtocol) -> None:
        """Take in that a connection has room again."""
        self._pump_soon([key for key in self._watching if key[0] is connection])

    # Telling

    def _pump_soon(self, keys: Iterable[tuple[MessageProtocol, int]] = ()) -> None:
        for key in keys:
            self._due.setdefault(key)
        if self._due and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Serve watches in turn, for one turn of the loop's worth; who is not done goes to the end of the line."""
        self._scheduled = False
        turn = _Turn()
        while self._due and not turn.is_over:
            key, _ = self._due.popitem(last=False)
            watching = self._watching.get(key)
            if watching is None or not watching.connection.is_open or self._end_if_not_allowed(key, watching):
                continue
            if self._end_if_gone(key, watching):
                continue
            if not self._tell(watching, turn):
                self._due[key] = None
        self._pump_soon()

    def _end_if_gone(self, key: tuple[MessageProtocol, int], watching: _Watching) -> bool:
        if watching.looked >= self.history.floor:
            return False
        del self._watching[key]
        watching.connection.send(WatchEnded(watching.query, "gone", self.history.floor))
        return True

    def _end_if_not_allowed(self, key: tuple[MessageProtocol, int], watching: _Watching) -> bool:
        if self._may_read(watching.connection, watching.prefix):
            return False
        del self._watching[key]
        watching.connection.send(WatchEnded(watching.query, "not-allowed", self.history.executed))
        return True

    def _end_if_ahead(self, key: tuple[MessageProtocol, int], watching: _Watching) -> None:
        """End a watch that has waited long enough for a slot that this replica has not come to."""
        if self._watching.get(key) is not watching or self._is_on(watching):
            return
        del self._watching[key]
        watching.connection.send(WatchEnded(watching.query, "ahead", self.history.executed))

    def _is_on(self, watching: _Watching) -> bool:
        if not watching.is_on and watching.position.slot <= self.history.executed:
            # It says that the watch is on; where nothing changes, nothing else would.
            watching.connection.send(Changes(watching.query, *watching.position, *watching.position, b""))
            watching.is_on = True
        return watching.is_on

    def _tell(self, watching: _Watching, turn: _Turn) -> bool:
        """Tell one watch what there is; say whether nothing is left that it could be told in another turn."""
        if not self._is_on(watching) or not watching.has_room():
            return True
        for slot, link in self.history.links(watching.position, watching.prefix, watching.looked):
            turn.spend(link)
            watching.looked = slot
            if link is not None:
                watching.connection.send(Changes(watching.query, *watching.position, *link.end, link.changes))
                watching.unacknowledged.append((link.end, len(link.changes) + LINK_OVERHEAD))
                watching.position = link.end
                watching.looked = looked_to(link.end)
            if not watching.has_room():
                return True
            if turn.is_over:
                return False
        return True
