"""Letting others read logs: one endless stream of the own log per reader, and single fetches of any log.

A replica speaks to its peers by letting them read its log. A reader subscribes from an index and gets every group from
there on, as long as it reads; one that reads slowly is served from the store at its own pace and holds up nobody.
"""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from replica.core.group import VerifiedGroup
from replica.shell.outbox import ReleasedGroup
from replica.shell.store import Store, StoreError
from replica.wire.frames import MessageProtocol
from replica.wire.messages import GroupMessage, Held, encode_frame

# Recent groups kept in memory per log.
RECENT_BYTES_MAX = 8 * 1024 * 1024
# What one fetch, or one step of a lagging stream, returns at the most (but at least one group).
SERVED_BYTES_MAX = 2 * 1024 * 1024


class Recent:
    """The newest groups of one log, in order and without gaps."""

    def __init__(self) -> None:
        self._groups: deque[tuple[int, int, bytes]] = deque()
        self._bytes = 0

    def add(self, group: VerifiedGroup) -> None:
        """Add the group that follows; a gap forgets what came before it."""
        if self._groups and self._groups[-1][1] + 1 != group.first:
            self._groups.clear()
            self._bytes = 0
        self._groups.append((group.first, group.last, group.raw))
        self._bytes += len(group.raw)
        while self._bytes > RECENT_BYTES_MAX and len(self._groups) > 1:
            self._bytes -= len(self._groups.popleft()[2])

    def since(self, first: int) -> list[tuple[int, bytes]] | None:
        """Return (last index, raw) of groups that end at or above `first`; None if older ones are needed."""
        if not self._groups or self._groups[0][0] > first:
            return None
        found: list[tuple[int, bytes]] = []
        size = 0
        # From the end backwards: readers are nearly always near the end.
        start = len(self._groups)
        while start and self._groups[start - 1][1] >= first:
            start -= 1
        for at in range(start, len(self._groups)):
            _, last, raw = self._groups[at]
            size += len(raw)
            if found and size > SERVED_BYTES_MAX:
                break
            found.append((last, raw))
        return found


class Reader:
    """One reader's place in the own log."""

    def __init__(self, connection: MessageProtocol) -> None:
        self.connection = connection
        self.next: int | None = None  # the first index not sent yet; None before it subscribed
        self.busy = False


class Streams:
    """Serves the own log to its readers, and any log to whoever fetches."""

    def __init__(
        self,
        number: int,
        n: int,
        store: Store,
        received: Callable[[int], int],
        seen: Callable[[int], int],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._number = number
        self._store = store
        self._received = received
        self._seen = seen
        self._on_failed = on_failed
        self._published = 0
        self._recent = [Recent() for _ in range(n)]
        self._readers: set[Reader] = set()
        self._thread = ThreadPoolExecutor(1, "streams")
        self._tasks: set[asyncio.Task[None]] = set()

    def publish(self, released: ReleasedGroup) -> None:
        """Give a released group to every reader that is up to date; the others come to it."""
        group = released.group
        self._published = group.last
        self._recent[self._number].add(group)
        frame = encode_frame(GroupMessage(self._number, group.raw))
        for reader in self._readers:
            if reader.next == group.first and not reader.busy and reader.connection.writable:
                reader.connection.send_frame(frame)
                reader.next = group.last + 1
            else:
                self._serve_later(reader)

    def heard(self, group: VerifiedGroup) -> None:
        """Keep a group that was taken for those who fetch it; one of the own log, given back, for its readers too."""
        self._recent[group.author].add(group)
        if group.author == self._number:
            for reader in self._readers:
                self._serve_later(reader)

    def subscribe(self, reader: Reader, first: int) -> None:
        """Send `reader` the own log from index `first` on, now and as it grows."""
        reader.next = max(first, 1)
        self._readers.add(reader)
        self._serve_later(reader)

    def unsubscribe(self, reader: Reader) -> None:
        """Forget a reader."""
        self._readers.discard(reader)

    def resume(self, reader: Reader) -> None:
        """Go on with a reader whose connection takes more again."""
        if reader in self._readers:
            self._serve_later(reader)

    def fetch(self, reader: Reader, log: int, first: int) -> None:
        """Send `reader` once what there is of `log` from `first` on, and what there is. One fetch at a time."""
        if not reader.busy and 0 <= log < len(self._recent):
            self._start(self._fetch(reader, log, max(first, 1)))

    def read_back(self, log: int, first: int, take: Callable[[int, bytes], None]) -> None:
        """Hand `take` some groups of `log` from `first` on, as the store holds them."""
        self._start(self._read_back(log, first, take))

    async def close(self) -> None:
        """Stop serving."""
        self._readers.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=True)

    def _end(self) -> int:
        """Return the last index there is to send. A group is published before the core has read it."""
        return max(self._published, self._received(self._number))

    def _serve_later(self, reader: Reader) -> None:
        if not reader.busy and reader.connection.writable:
            self._start(self._serve(reader))

    def _start(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, sqlite3.Error | StoreError):
            self._on_failed(error)
        elif error is not None:
            # Not the disk's doing: that one reader is not served, nobody else suffers.
            context = {"message": "serving a log failed", "exception": error, "task": task}
            asyncio.get_running_loop().call_exception_handler(context)

    async def _serve(self, reader: Reader) -> None:
        """Send `reader` what it lacks of the own log until it is up to date or takes no more."""
        if reader.busy:
            return
        reader.busy = True
        try:
            while reader.connection.is_open and reader.connection.writable:
                if reader.next is None or reader.next > self._end():
                    return
                groups = await self._groups(self._number, reader.next)
                if not groups:
                    return
                for last, raw in groups:
                    reader.connection.send(GroupMessage(self._number, raw))
                    reader.next = last + 1
                await asyncio.sleep(0)  # let the connection flush, and say whether it takes more
        finally:
            reader.busy = False

    async def _fetch(self, reader: Reader, log: int, first: int) -> None:
        reader.busy = True
        try:
            groups = await self._groups(log, first)
            for _, raw in groups:
                reader.connection.send(GroupMessage(log, raw))
            oldest = await asyncio.get_running_loop().run_in_executor(self._thread, self._store.first_index, log)
            last = self._end() if log == self._number else self._received(log)
            first = last + 1 if oldest is None else min(oldest, last + 1)
            # Groups that arrived and still wait for those before them show that the log reaches farther.
            reader.connection.send(Held(log, first, max(last, self._seen(log))))
        finally:
            reader.busy = False
        if reader.next is not None and reader.next <= self._end():
            self._serve_later(reader)

    async def _read_back(self, log: int, first: int, take: Callable[[int, bytes], None]) -> None:
        for _, raw in await asyncio.get_running_loop().run_in_executor(self._thread, self._stored, log, first):
            take(log, raw)

    async def _groups(self, log: int, first: int) -> list[tuple[int, bytes]]:
        recent = self._recent[log].since(first)
        if recent is not None:
            return recent
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._stored, log, first)

    def _stored(self, log: int, first: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        size = 0
        for group in self._store.groups(log, first):
            if group.attestation is None:
                break
            size += len(group.payloads)
            if found and size > SERVED_BYTES_MAX:
                break
            found.append((group.last, group.raw))
        return found
